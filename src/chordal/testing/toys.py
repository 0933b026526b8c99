"""Models that are a function written down: no weights, and every answer known beforehand.

A toy keeps which token was written to which slot at which position, and gives each query exactly
what its request lets it see. So a wrong slot, mask or position gives a wrong answer, and a query
that sees an empty slot, or two tokens at one position, fails at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from chordal.forward import Floats, Forward, Hidden, Ints, Reading, Visible
from chordal.models.family import Family
from chordal.models.reading import LogitsRead, read_logits
from chordal.models.runner import Move, Request

UNSEEN = -1


class ToyModel(ABC):
    """A model in place of `LanguageModel`; a subclass says what the logits are.

    Args:
        family: What decoders need to know of it.
        vocab_size: Number of tokens, the mask token included.
        window: Most tokens of a sequence.
        max_rows: Sequences at once, at most.
        name: For messages and results.
    """

    tokenizer = None
    device = torch.device("cpu")
    dtype = torch.float32
    packs = False

    def __init__(
        self, family: Family, vocab_size: int, *, window: int = 64, max_rows: int = 64, name: str = "toy"
    ) -> None:
        self.family, self.vocab_size, self.window = family, vocab_size, window
        self.max_rows, self.name = max_rows, name
        # Read-only requests stand behind a full window; a tuple of them may be 16 times as wide.
        shape = max_rows, 17 * window
        self._tokens = np.full(shape, UNSEEN, np.int64)
        self._positions = np.full(shape, UNSEEN, np.int64)
        self._used = [0] * max_rows

    @abstractmethod
    def logits(self, position: int, view: Ints) -> Floats:
        """Give the logits `[V]` of the query at a position.

        Args:
            position: Where the query stands.
            view: Token the query sees at each position, `UNSEEN` where it sees none, int `[window]`.
        """

    def run(self, requests: Sequence[Request]) -> list[Reading]:
        """Write what is fed, then answer every request from what it sees."""
        placed = []
        behind = {row: self._used[row] for row, _ in requests}
        self.move_slots([(row, *forward.moves) for row, forward in requests if forward.moves is not None])
        for row, forward in requests:
            slots, num = forward.slots, len(forward.tokens)
            if slots is None:
                slots = np.arange(behind[row], behind[row] + num)
            else:
                self._used[row] = max(self._used[row], int(slots.max()) + 1)
            behind[row] += num
            self._tokens[row, slots], self._positions[row, slots] = forward.tokens, forward.positions
            placed.append((row, forward, slots))

        readings = [Reading()] * len(requests)
        asked: list[tuple[int, LogitsRead]] = []
        logits: list[Floats] = []
        for index, (row, forward, slots) in enumerate(placed):
            if forward.blend is not None:
                raise NotImplementedError(f"{self.name} is a function of tokens; it cannot blend several.")
            if isinstance(forward.read, Hidden):
                raise NotImplementedError(f"{self.name} is a function of tokens; it has no hidden states.")
            if forward.read is not None:
                asked.append((index, forward.read))
                logits.extend(self._answer(row, forward, slots))
        if asked:
            logits_NV = torch.from_numpy(np.stack(logits)).float()
            if self.family.mask_id is not None:
                logits_NV[:, self.family.mask_id] = float("-inf")
            answers = read_logits(logits_NV, [read for _, read in asked])
            for (index, _), reading in zip(asked, answers, strict=True):
                readings[index] = reading

        for row, forward, slots in placed:
            if forward.slots is None:
                self._positions[row, slots] = UNSEEN
        return readings

    def move_slots(self, moves: Sequence[Move]) -> None:
        """Copy what some slots hold to others; if it fails nothing has been copied."""
        held = [(self._tokens[row, source], self._positions[row, source]) for row, source, _ in moves]
        for (row, _, target), (tokens, positions) in zip(moves, held, strict=True):
            self._tokens[row, target], self._positions[row, target] = tokens, positions

    def read_slots(self, row: int, start: int, end: int) -> torch.Tensor:
        """Copy the tokens and positions of some slots, `[end - start, 2]`."""
        held = np.stack([self._tokens[row, start:end], self._positions[row, start:end]], 1)
        if (held[:, 1] == UNSEEN).any():
            raise AssertionError(f"slots {start} to {end} of row {row} are read, and some hold nothing.")
        return torch.from_numpy(held)

    def write_slots(self, row: int, held: torch.Tensor) -> None:
        """Fill the first slots of a row with what `read_slots` gave."""
        self._tokens[row, : len(held)], self._positions[row, : len(held)] = held.numpy().T
        self._used[row] = max(self._used[row], len(held))

    def move_row(self, source: int, target: int) -> None:
        """Give what one row caches another place."""
        self._tokens[target], self._positions[target] = self._tokens[source], self._positions[source]
        self._used[target] = self._used[source]

    def free_row(self, row: int, *, clear: bool = False) -> None:
        """Forget the sequence of a row."""
        self._positions[row] = UNSEEN
        self._used[row] = 0

    def release(self) -> None:
        """Forget all rows; the memory is next to nothing."""
        self._positions[:] = UNSEEN

    def _answer(self, row: int, forward: Forward, slots: Ints) -> Iterator[Floats]:
        assert forward.read is not None
        sees = forward.sees
        visible = sees if isinstance(sees, Visible) else sees.visible(slots)
        views: dict[bytes, Ints] = {}  # the queries of a canvas mostly see the same
        for query in forward.read.rows.tolist():
            seen = np.arange(visible.start[query], visible.end[query])
            if visible.hidden is not None:
                seen = np.setdiff1d(seen, visible.hidden)
            if visible.seen is not None:
                seen = np.union1d(seen, np.flatnonzero(visible.seen[query]))
            if visible.own is not None:
                seen = np.union1d(seen, slots[visible.own[query]])
            key = seen.tobytes()
            if key not in views:
                views[key] = self._view(row, seen)
            yield self.logits(int(forward.positions[query]), views[key])

    def _view(self, row: int, slots: Ints) -> Ints:
        positions = self._positions[row, slots]
        if (positions == UNSEEN).any():
            empty = slots[positions == UNSEEN].tolist()
            raise AssertionError(f"a query of row {row} sees slots {empty}, to which nothing was written.")
        view = np.full(self.window, UNSEEN, np.int64)
        view[positions] = self._tokens[row, slots]
        if (view != UNSEEN).sum() < len(slots):
            raise AssertionError(f"a query of row {row} sees two tokens at one position.")
        return view


class TableModel(ToyModel):
    """A causal model whose next token depends on the last two: small enough to enumerate.

    Args:
        vocab_size: Number of tokens, 3 to 6 for chi-square tests.
        seed: Of the table.
        spread: Standard deviation of the table's logits; larger is more peaked.
        eos_ids: Tokens that end a text.
    """

    def __init__(
        self,
        vocab_size: int = 4,
        *,
        seed: int = 0,
        spread: float = 1.0,
        eos_ids: tuple[int, ...] = (),
        window: int = 64,
        max_rows: int = 64,
    ) -> None:
        family = Family(kind="causal", eos_ids=eos_ids)
        super().__init__(family, vocab_size, window=window, max_rows=max_rows, name="table")
        rng = np.random.default_rng(seed)
        # The last entry of the first axis stands for "no token before this one".
        self.table_VVV = spread * rng.standard_normal((vocab_size + 1, vocab_size, vocab_size))

    def logits(self, position: int, view: Ints) -> Floats:  # noqa: D102
        seen = np.flatnonzero(view != UNSEEN)
        if len(seen) != position + 1 or seen[-1] != position:
            raise AssertionError(f"the query at position {position} sees the positions {seen.tolist()}.")
        before = view[position - 1] if position else self.vocab_size
        row: Floats = self.table_VVV[before, view[position]]
        return row

    def joint(self, prompt: Ints, length: int, temperature: float = 1.0) -> Floats:
        """Give the probability of every continuation of a prompt, `[V] * length`.

        Args:
            prompt: At least one token.
            length: Tokens of the continuation.
            temperature: Above 0.
        """
        z_VVV = self.table_VVV / temperature
        p_VVV = np.exp(z_VVV - z_VVV.max(-1, keepdims=True))
        p_VVV /= p_VVV.sum(-1, keepdims=True)
        before = prompt[-2] if len(prompt) > 1 else self.vocab_size
        joint: Floats = p_VVV[before, prompt[-1]]
        for drawn in range(1, length):
            last = p_VVV[prompt[-1]] if drawn == 1 else p_VVV[: self.vocab_size]
            joint = joint[..., None] * last
        return joint
