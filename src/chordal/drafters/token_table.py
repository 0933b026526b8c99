"""Draft a fixed tree from what the target last found likely behind each token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from chordal.drafters.draft import Draft, Drafter, Outcome
from chordal.forward import Ints
from chordal.ops import tree

_NONE = -1


class TokenTable:
    """The tokens that were most likely behind each token when the target last read it.

    Grows with the largest token that was read: at most 4 * V * k bytes.

    Args:
        num_candidates: Tokens kept behind each (k), at least 1.
    """

    def __init__(self, num_candidates: int) -> None:
        self._likely_VK: npt.NDArray[np.int32] = np.empty((0, num_candidates), np.int32)

    def write(self, tokens: Ints, candidates: Ints) -> None:
        """Replace what is likely behind some tokens; of equal tokens the last one counts.

        Args:
            tokens: The tokens, int `[n]`.
            candidates: What is likely behind each, int `[n, k]`, or fewer of a small vocabulary.
        """
        num_held, k = self._likely_VK.shape
        if (num := int(tokens.max()) + 1) > num_held:
            # Doubled, so that growing costs little in all.
            extra = np.full((max(num, 2 * num_held) - num_held, k), _NONE, np.int32)
            self._likely_VK = np.concatenate([self._likely_VK, extra])
        # Numpy assigns in order, so the last of equal rows stays.
        self._likely_VK[tokens, : candidates.shape[1]] = candidates

    def read(self, tokens: Ints, ranks: Ints) -> Ints:
        """Give the token of each rank behind each token, -1 for those not known and behind -1."""
        found = np.full(len(tokens), _NONE, np.int64)
        is_held = (tokens >= 0) & (tokens < len(self._likely_VK))
        found[is_held] = self._likely_VK[tokens[is_held], ranks[is_held]]
        return found


class TokenTableDrafter(Drafter):
    """Fill a tree of fixed shape: the child of rank r holds the r-th most likely token behind its parent's.

    With 1 2 behind 0, 3 0 behind 1 and 0 1 behind 2, the tree 2/2,1 behind 0 is 1 2 / 3 0, 0. A node whose
    parent's token was never read is left out, and all below it. Every row of a verification is learnt
    from, accepted or not. Scope: that of the table. Cost: one look-up a level.

    Args:
        table: The table.
        parents: Shape of the tree, level by level as `ops.tree.parse` gives it.
        num_candidates: How much of each row the table keeps.
    """

    def __init__(self, table: TokenTable, parents: Ints, num_candidates: int) -> None:
        self.table, self.parents, self.candidates = table, parents, num_candidates
        self._ranks = tree.ranks(parents)
        # A level is a span of nodes.
        edges = np.flatnonzero(np.diff(tree.depths(parents), prepend=0, append=0))
        self._levels = [slice(*span) for span in zip(edges.tolist(), edges[1:].tolist(), strict=False)]

    def propose(self, text: Ints, budget: int) -> Draft:
        """Fill as many levels as can be of use, with what is known."""
        tokens = np.full(len(self.parents) + 1, _NONE)
        tokens[-1] = text[-1]  # where the parent of the first level, -1, points to
        for level in self._levels[:budget]:
            tokens[level] = self.table.read(tokens[self.parents[level]], self._ranks[level])
        return Draft(tokens[:-1], self.parents).keep(tokens[:-1] != _NONE)

    def observe(self, outcome: Outcome) -> None:
        """Learn what is likely behind the root and behind every node."""
        self.table.write(np.append(outcome.root, outcome.draft.tokens), outcome.reading.candidates)
