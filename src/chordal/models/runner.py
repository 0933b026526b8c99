"""What the engine needs of a model: `LanguageModel` has it, and so have the toys of `chordal.testing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch

from chordal.forward import Forward, Ints, Reading
from chordal.models.family import Family

Request: TypeAlias = tuple[int, Forward]  # row of the sequence, what it asks for
Move: TypeAlias = tuple[int, Ints, Ints]  # row, the slots that are read, the slots that are then written


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
        packs: Whether requests of unlike widths run together at little more than what they feed.
    """

    name: str
    family: Family
    window: int
    vocab_size: int
    max_rows: int
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    packs: bool

    def run(self, requests: Sequence[Request]) -> list[Reading]:
        """Run requests together and give each its reading; those of one row stand together."""
        ...

    def move_slots(self, moves: Sequence[Move]) -> None:
        """Copy what some slots hold to others, as `Forward.moves` says; an error means that nothing was."""
        ...

    def read_slots(self, row: int, start: int, end: int) -> torch.Tensor:
        """Copy what the slots `start <= slot < end` of a row hold, one row of numbers each, `[n, W]`."""
        ...

    def write_slots(self, row: int, held: torch.Tensor) -> None:
        """Fill the first slots of a row with what `read_slots` gave for the same slots of any row."""
        ...

    def move_row(self, source: int, target: int) -> None:
        """Give what one row caches another place."""
        ...

    def free_row(self, row: int, *, clear: bool = False) -> None:
        """Forget the sequence of a row; `clear` wipes values that may not be finite."""
        ...

    def release(self) -> None:
        """Give back the memory that caches took; only while no row has a sequence."""
        ...
