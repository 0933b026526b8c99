"""What the engine needs of a model: `LanguageModel` has it, and so have the toys of `chordal.testing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch

from chordal.forward import Forward, Reading
from chordal.models.family import Family

Request: TypeAlias = tuple[int, Forward]  # row of the sequence, what it asks for


class Runner(Protocol):
    """Runs a batch of forwards and keeps what the sequences have cached.

    Attributes:
        name: For messages and results.
        family: What decoders need to know of it.
        window: Most tokens of a sequence.
        vocab_size: Token ids are below it.
        max_rows: Sequences at once, at most.
        tokenizer: transformers tokenizer, or None where no text is asked for.
        device: Where it runs.
        dtype: Of its weights.
    """

    name: str
    family: Family
    window: int
    vocab_size: int
    max_rows: int
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype

    def run(self, requests: Sequence[Request]) -> list[Reading]:
        """Run requests together and give each its reading; those of one row stand together."""
        ...

    def move_row(self, source: int, target: int) -> None:
        """Give what one row caches another place."""
        ...

    def free_row(self, row: int, *, clear: bool = False) -> None:
        """Forget the sequence of a row; `clear` wipes values that may not be finite."""
        ...
