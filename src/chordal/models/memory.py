"""Memory that is freed while a model is loaded, given back instead of kept for later."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

_TRIM_BYTES = 16_000_000


class Trimmer:
    """Counts bytes that are about to be freed, and gives them back once there are enough.

    glibc keeps freed memory on top of what is allocated meanwhile: weights that are read one by one to
    be stacked or packed would be in memory twice.
    """

    def __init__(self) -> None:
        self._freed_bytes = 0

    def count(self, num_bytes: int) -> None:
        """Count what was read or replaced; trims every few megabytes."""
        self._freed_bytes += num_bytes
        if self._freed_bytes > _TRIM_BYTES:
            self._freed_bytes = 0
            with suppress(OSError, AttributeError):  # another C library
                ctypes.CDLL(None).malloc_trim(0)

    def watch(self, weight: Any) -> Any:
        """Count the bytes of a weight that is not read yet whenever it is."""
        return _Watched(weight, self)


class _Watched:
    """A weight that is read when it is indexed."""

    def __init__(self, weight: Any, trimmer: Trimmer) -> None:
        self._weight, self._trimmer = weight, trimmer

    def __getitem__(self, index: Any) -> Any:
        values = self._weight[index]
        self._trimmer.count(values.nbytes)
        return values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weight, name)
