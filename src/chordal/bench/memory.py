"""The most memory a process or its accelerators held while something ran."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from chordal.generation import Model

_PROCESS = Path("/proc/self")


class PeakMemory:
    """Measures the peak of what a model's device holds, weights included.

    On a GPU that is what torch allocated, over all of them; on a CPU the resident memory of the process,
    which only Linux can tell of a stretch of time.

    Args:
        model: The model.
    """

    def __init__(self, model: Model) -> None:
        self._on_gpu = any(runner.device.type == "cuda" for runner in model.engine.models.values())
        self._can_reset = True

    def reset(self) -> None:
        """Begin a stretch of time."""
        if self._on_gpu:
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            # 5 sets the peak to what is resident now.
            (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self._can_reset = False

    def read(self) -> int | None:
        """Give the peak since the reset in bytes, None where it cannot be told."""
        if self._on_gpu:
            return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
        if not self._can_reset:
            return None
        for line in (_PROCESS / "status").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return int(value.split()[0]) * 1024
        return None
