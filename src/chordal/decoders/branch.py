"""Several texts with one beginning in one row of the cache, each decoded by a coroutine of its own.

What they share is cached once and seen by all. Behind it their slots are interleaved, so that branches
grow without knowing how long they will be. With a shared part of 4 and three branches a, b, c:

    slot     0 1 2 3 4 5 6 7 8 9
    holds    . . . . a b c a b c

A branch is unaware of this: it asks as if the row were its own, with slot i for position i of its text,
and `Branches` rewrites what it asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from chordal.decoders.decoder import Part
from chordal.errors import InputError
from chordal.forward import Bools, Forward, Ints, Reading, Visible


@dataclass(frozen=True, slots=True)
class Placed:
    """What a branch asked, rewritten.

    Attributes:
        items: What is left to be run; part of the tuple that its decoder yields.
        is_run: Whether each request is among them; the others would only cache what is cached.
        is_single: Whether it asked with a request rather than a tuple.
    """

    items: tuple[Any, ...]
    is_run: tuple[bool, ...]
    is_single: bool

    def answer(self, readings: Iterator[Any]) -> Any:
        """Take as many readings as there are items, and give what the branch is to be sent."""
        given = tuple(next(readings) if is_run else Reading() for is_run in self.is_run)
        return given[0] if self.is_single else given


class Branches:
    """Rewrites the requests of several texts for one row of the cache.

    Args:
        num: Texts.
        num_shared: Tokens they begin with in common; the next one is each branch's own root, even where
            it is the same.
    """

    def __init__(self, num: int, num_shared: int) -> None:
        self.num, self.num_shared = num, num_shared
        self._is_cached: dict[str, Bools] = {}

    def place(self, branch: int, asked: Any) -> Placed:
        """Rewrite what a branch asks.

        The first to feed a shared token feeds it for all. So a request that was placed must be run, in
        the same tick as those that are placed behind it or before.

        Args:
            branch: Number of the branch.
            asked: What its coroutine yielded.

        Raises:
            InputError: A request writes nothing; there is no telling what it sees.
        """
        asks = (asked,) if isinstance(asked, Forward) else tuple(asked)
        items = [
            self._forward(branch, ask) if isinstance(ask, Forward) else self._part(branch, ask)
            for ask in asks
        ]
        is_run = tuple(item is not None for item in items)
        return Placed(tuple(item for item in items if item is not None), is_run, isinstance(asked, Forward))

    def slots(self, branch: int, slots: Ints) -> Ints:
        """Say where what a branch has in some slots of its own view is in the row."""
        behind = self.num_shared + (slots - self.num_shared) * self.num + branch
        return np.where(slots < self.num_shared, slots, behind)

    def _forward(self, branch: int, ask: Forward) -> Forward | None:
        """Rewrite a request; None if there is nothing left of it."""
        if ask.slots is None:
            raise InputError("a decoder that reads without writing cannot run in branches; use another one.")
        rows = self._rows_to_feed(ask)
        if not len(rows):
            return None
        read = ask.read
        if read is not None:
            number = np.zeros(len(ask.tokens), np.int64)
            number[rows] = np.arange(len(rows))
            read = dataclasses.replace(read, rows=number[read.rows])
        moves = ask.moves and (self.slots(branch, ask.moves[0]), self.slots(branch, ask.moves[1]))
        return dataclasses.replace(
            ask,
            tokens=ask.tokens[rows],
            positions=ask.positions[rows],
            slots=self.slots(branch, ask.slots[rows]),
            sees=self._sees(branch, ask, rows),
            read=read,
            moves=moves,
        )

    def _rows_to_feed(self, ask: Forward) -> Ints:
        """List the rows that are the branch's own, not cached yet, or read."""
        assert ask.slots is not None
        is_cached = self._is_cached.setdefault(ask.model, np.zeros(self.num_shared, bool))
        is_shared = ask.slots < self.num_shared
        is_fed = ~is_shared
        is_fed[is_shared] = ~is_cached[ask.slots[is_shared]]
        if ask.read is not None:
            is_fed[ask.read.rows] = True
        is_cached[ask.slots[is_shared]] = True
        return np.flatnonzero(is_fed)

    def _sees(self, branch: int, ask: Forward, rows: Ints) -> Visible:
        """Name every slot that the rows see, wherever it is."""
        assert ask.slots is not None
        visible = ask.sees if isinstance(ask.sees, Visible) else ask.sees.visible(ask.slots)
        ends = [int(visible.end.max()), int(ask.slots.max()) + 1]
        if visible.seen is not None:
            ends.append(visible.seen.shape[1])
        at = np.arange(max(ends))
        seen = (at >= visible.start[:, None]) & (at < visible.end[:, None])
        if visible.hidden is not None:
            seen[:, visible.hidden] = False
        if visible.seen is not None:
            seen[:, : visible.seen.shape[1]] |= visible.seen
        if visible.own is not None:
            seen[:, ask.slots] |= visible.own
        slots = self.slots(branch, at)
        seen_in_row = np.zeros((len(rows), slots[-1] + 1), bool)
        seen_in_row[:, slots] = seen[rows]
        none = np.zeros(len(rows), np.int64)
        return Visible(none, none, seen=seen_in_row)

    def _part(self, branch: int, part: Part) -> Part:
        """Rewrite what a coroutine asks that a branch runs beside its requests."""
        given: Any = None
        while True:
            try:
                ask = self._forward(branch, part.send(given))
            except StopIteration as end:
                return end.value
            given = Reading() if ask is None else (yield ask)
