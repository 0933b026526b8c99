"""Errors that callers may want to catch.

ChordalError
+-- InputError (also ValueError)     a prompt, a setting or a file the caller gave is wrong
|   +-- UnknownNameError             no such model, decoder or setting; near matches in the text
|   +-- PromptError                  a prompt that is empty, too long or holds reserved tokens
|   +-- CheckpointError              a checkpoint folder that is missing, damaged or unsupported
+-- DecodingError                    one sequence could not go on (e.g. non-finite logits)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ChordalError(Exception):
    """Base of every error Chordal raises on purpose."""


class InputError(ChordalError, ValueError):
    """Something the caller gave cannot be used; the message says what would be."""


class PromptError(InputError):
    """A prompt that is empty, too long for the window, or holds reserved tokens."""


class CheckpointError(InputError):
    """A checkpoint folder that is missing, damaged or of a kind that is not supported."""


class DecodingError(ChordalError):
    """One sequence could not go on; every other sequence of the engine does."""


class UnknownNameError(InputError):
    """No such name; the message lists the near matches first, then all of them.

    Args:
        kind: What was looked up, e.g. "decoder".
        name: What the caller gave.
        known: Every valid name.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")
