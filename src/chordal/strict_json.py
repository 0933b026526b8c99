"""JSON that any reader takes: `json.dumps` would write NaN and Infinity, which JSON does not have."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(document: Any, *, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """Write a value as JSON; numbers that are not finite become text ("nan", "inf")."""
    try:
        return json.dumps(document, ensure_ascii=ensure_ascii, allow_nan=False, indent=indent)
    except ValueError:  # rare, and looking first would take as long again
        return json.dumps(_finite(document), ensure_ascii=ensure_ascii, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
