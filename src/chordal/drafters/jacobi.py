"""Draft with guesses that the target's own passes refine: Jacobi iteration, with n-grams of its past."""

from __future__ import annotations

from collections import deque

import numpy as np

from chordal.drafters.draft import Draft, Drafter, Outcome
from chordal.forward import Ints
from chordal.ops import tree
from chordal.sequence import Sequence

_NONE = np.empty(0, np.int64)


class JacobiDrafter(Drafter):
    """Guess the next tokens, and guess again from what the target drew behind every guess.

    A window of W columns begins at the root. Each holds what was guessed in the last N - 1 passes, one
    position further in each; below, W = 3 and N = 4. The first row stands behind the root, each column
    behind the token at its head, so the window is a tree; whatever of it is right is accepted.

        root a1 a2      columns: root b0 c0, a1 b1 c1, a2 b2 c2
         b0  b1 b2      paths:   b0 c0       behind the root
         c0  c1 c2               a1 b1 c1
                                 a1 a2 b2 c2

    What is drawn behind the last token of a column makes an n-gram of it, which is kept by its first
    token; then the first row falls out and the window moves with the root. With N = 2 this is Jacobi
    iteration. A position's guesses are drawn with the random number the target will draw with, so
    sampled guesses settle as greedy ones do. Places without a history get a run of tokens from a random
    place of the text.

    Scope: one sequence; at most `num_branches` n-grams for each first token, W new ones a pass.

    Args:
        seq: The sequence.
        window: Columns (W), at least 1.
        ngram: Length of the n-grams (N), at least 2.
        num_branches: Most n-grams that are drafted behind the root (G), the latest first.
        recycle: Guesses of so many earlier passes are kept; where one holds the root, what it guessed
            behind it is drafted too.
        learn_text: Whether n-grams of the text are kept beside those of the window.
    """

    def __init__(
        self,
        seq: Sequence,
        *,
        window: int,
        ngram: int,
        num_branches: int = 0,
        recycle: int = 0,
        learn_text: bool = False,
    ) -> None:
        self.seq, self.window, self.ngram = seq, window, ngram
        self.num_branches, self.learn_text = num_branches, learn_text
        self._columns_WN = np.empty((0, ngram - 1), np.int64)
        self._ends = _NONE  # the last node of each column that was drafted
        self._known: dict[int, dict[tuple[int, ...], None]] = {}  # in the order of use
        self._num_learnt = 0  # n-grams of the text
        self._rows: deque[Ints] = deque(maxlen=recycle)

    def propose(self, text: Ints, budget: int) -> Draft:
        """Propose the window, and what is known to have followed the root."""
        if self.learn_text:
            for start in range(self._num_learnt, len(text) - self.ngram + 1):
                self._learn(text[start : start + self.ngram])
            self._num_learnt = max(self._num_learnt, len(text) - self.ngram + 1)
        self._fill(text)

        # A column is of use if all of it is fed.
        num = max(0, min(self.window, budget - self.ngram + 3))
        heads = self._columns_WN[1:num, 0]
        columns = [np.append(heads[:at], self._columns_WN[at, 1:]) for at in range(num)]
        root = int(text[-1])
        known = [np.array(gram, np.int64) for gram in reversed(self._known.get(root, {}))]
        recycled = [row[at[0] + 1 :] for row in self._rows if len(at := np.flatnonzero(row == root))]

        branches = [branch[:budget] for branch in (*known, *recycled)]
        tokens, parents, paths = tree.merge([*columns, *branches])
        self._ends = np.array([path[-1] if len(path) else -1 for path in paths[:num]], np.int64)
        return Draft(tokens, parents)

    def observe(self, outcome: Outcome) -> None:
        """Put what was drawn behind each column under it and move the window behind the new root."""
        ends, self._ends = self._ends, _NONE
        drawn = outcome.reading.tokens[ends + 1]
        columns_WN = np.column_stack([self._columns_WN[: len(ends)], drawn])
        for gram in columns_WN:
            self._learn(gram)
        self._rows.append(drawn)
        self._columns_WN = columns_WN[len(outcome.kept) :, 1:]

    def _learn(self, gram: Ints) -> None:
        if not self.num_branches:
            return
        first, *rest = gram.tolist()
        known = self._known.setdefault(first, {})
        known.pop(tuple(rest), None)
        known[tuple(rest)] = None
        if len(known) > self.num_branches:
            del known[next(iter(known))]

    def _fill(self, text: Ints) -> None:
        """Make the window whole: the root at its head, runs of the text where it has no column."""
        num_held, root = len(self._columns_WN), len(text) - 1
        positions = np.arange(root + num_held, root + self.window)
        starts = (self.seq.uniforms(positions, "draft") * len(text)).astype(np.int64)
        runs_WN = text[(starts[:, None] + np.arange(self.ngram - 1)) % len(text)]
        self._columns_WN = np.concatenate([self._columns_WN, runs_WN])
        self._columns_WN[0, 0] = text[root]
