"""What a model has cached of a text that grows, branches and is cut back.

Several models may follow one text, each with gaps of its own: a draft model has not seen what was
copied, a target has seen branches that were rejected. A cursor knows by comparing tokens, so whoever
decodes names the text and need not keep account.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from chordal.drafters.draft import NO_DRAFT, Draft
from chordal.forward import Causal, Forward, Ints, Logits, Read, Reading, Sees, Visible
from chordal.ops import sampling, tree
from chordal.sequence import Sequence
from chordal.stats import TARGET


@dataclass(frozen=True, slots=True)
class Feed:
    """A request that is complete but for what is read.

    Attributes:
        forward: The request.
        rows: Rows to read: the last of the text, then nodes of the draft, int `[r]`.
        following: The position each of them predicts, int `[r]`.
        text: The text that is fed.
        draft: The draft behind it.
        nodes: The nodes that are fed, the last of `rows`.
    """

    forward: Forward
    rows: Ints
    following: Ints
    text: Ints
    draft: Draft
    nodes: range

    @property
    def contexts(self) -> tuple[Ints, ...]:
        """The tokens that precede what each row predicts."""
        inside = self.following[: len(self.rows) - len(self.nodes)].tolist()
        paths = (tree.path(self.draft.parents, node) for node in self.nodes)
        behind = (np.concatenate([self.text, self.draft.tokens[path]]) for path in paths)
        return (*(self.text[:position] for position in inside), *behind)

    def sample(self, seq: Sequence, **more: Any) -> Forward:
        """Read one token under the law of the sequence at each row; `more` as in `Sample`."""
        if seq.law.reads_context:
            more["contexts"] = self.contexts
        return self.read(seq.sample(self.rows, self.following, **more))

    def logits(self) -> Forward:
        """Read the raw logits of each row."""
        return self.read(Logits(self.rows))

    def under_law(self, reading: Reading, seq: Sequence) -> Tensor:
        """Put the raw logits that were read under the law of the sequence, `[r, V]` on the device."""
        contexts = self.contexts if seq.law.reads_context else ()
        return sampling.under_law(reading.logits, seq.law, contexts, seq.num_prompt)

    def read(self, read: Read | None) -> Forward:
        """Read anything else."""
        ask = self.forward
        return Forward(
            ask.tokens, ask.positions, ask.sees, read, slots=ask.slots, model=ask.model, moves=ask.moves
        )


@dataclass
class Cursor:
    """What one model has cached of a text.

    Slot i holds the token of position i; a draft tree stands behind the text, in the order of its
    nodes, until the next feed tells which of them became text.

    Attributes:
        model: Which of the engine's models.
        text: The cached tokens.
        draft: The tree that was fed behind them.
    """

    model: str = TARGET
    text: Ints = field(default_factory=lambda: NO_DRAFT.tokens)
    draft: Draft = NO_DRAFT

    def feed(self, text: Ints, draft: Draft = NO_DRAFT, *, num_read: int = 1) -> Feed:
        """Feed what the model has not seen of a text, and a draft behind it.

        Args:
            text: The whole text from position 0 on, at least one token.
            draft: What is fed behind it, each node seeing the text and its ancestors.
            num_read: Last tokens of the text whose rows are read, at least 1; they are fed again if
                they were cached.
        """
        num_cached, moves = self._catch_up(text)
        start, end = min(num_cached, len(text) - num_read), len(text)
        num_rows = end - start
        slots = np.arange(start, end + len(draft))
        positions: Ints = slots
        sees: Sees = Causal()
        if not draft.is_chain:
            positions = np.concatenate([slots[:num_rows], end - 1 + tree.depths(draft.parents)])
            sees = _see_tree(slots[:num_rows], end, draft)
        self.text, self.draft = text.copy(), draft

        rows = np.arange(num_rows - num_read, num_rows + len(draft))
        tokens = np.concatenate([text[start:], draft.tokens])
        forward = Forward(tokens, positions, sees, slots=slots, model=self.model, moves=moves)
        return Feed(forward, rows, positions[rows] + 1, text, draft, range(len(draft)))

    def grow(self, draft: Draft) -> Feed:
        """Feed the nodes that were added to the draft since it was fed, and read their rows.

        Args:
            draft: The draft, beginning with the nodes it had.
        """
        end, num_held, num = len(self.text), len(self.draft), len(draft)
        rows = np.arange(num - num_held)
        slots = end + num_held + rows
        positions = end - 1 + tree.depths(draft.parents)[num_held:]
        is_above = tree.ancestors(draft.parents)[num_held:]
        seen = np.ones((len(rows), end + num_held), bool)
        seen[:, end:] = is_above[:, :num_held]
        nowhere = np.zeros(len(rows), np.int64)
        sees = Visible(nowhere, nowhere, is_above[:, num_held:], seen=seen)
        self.draft = draft
        forward = Forward(draft.tokens[num_held:], positions, sees, slots=slots, model=self.model)
        return Feed(forward, rows, positions + 1, self.text, draft, range(num_held, num))

    def _catch_up(self, text: Ints) -> tuple[int, tuple[Ints, Ints] | None]:
        """Say how many tokens of a text are cached, once the accepted nodes have been moved behind it."""
        num_held = len(self.text)
        num_same = _common_prefix(self.text, text)
        if num_same < num_held:
            return num_same, None
        path = tree.follow(self.draft.tokens, self.draft.parents, text[num_held:])
        return num_held + len(path), tree.compaction(num_held, path)


def _see_tree(text_slots: Ints, end: int, draft: Draft) -> Sees:
    """Rows of the text see what is before them; nodes see the text and their ancestors."""
    num, num_rows = len(draft), len(text_slots)
    own = np.zeros((num_rows + num, num_rows + num), bool)
    own[num_rows:, num_rows:] = tree.ancestors(draft.parents)
    ends = np.concatenate([text_slots + 1, np.full(num, end)])
    return Visible(np.zeros(num_rows + num, np.int64), ends, own)


def _common_prefix(one: Ints, other: Ints) -> int:
    num = min(len(one), len(other))
    differs = one[:num] != other[:num]
    return int(np.argmax(differs)) if differs.any() else num
