"""Draft what followed the last few tokens where they occurred before, found by an index."""

from __future__ import annotations

from typing import Literal

from chordal.drafters.draft import Draft, Drafter, Outcome
from chordal.forward import Ints


class CopyDrafter(Drafter):
    """Look the last tokens up in an index of all earlier runs of that length.

    With text 5 6 7 8 5 6 7 and runs of 3 the run 5 6 7 is found at the start, so 8 5 6 7 is proposed.
    Scope: one sequence, whose text may only grow. Memory: one entry for each distinct run. Cost: `size`
    operations for a look-up and for each new token, however long the text.

    Args:
        size: Length of a run (gamma), at least 1.
        max_draft: Most tokens that are copied.
        match: Which of several occurrences is copied.
        adaptive: Copy twice as far after a copy that was kept whole, up to `max_draft`, and no further
            than was kept, and one, after another.
    """

    def __init__(
        self,
        size: int,
        *,
        max_draft: int = 10,
        match: Literal["first", "last"] = "first",
        adaptive: bool = False,
    ) -> None:
        self.size, self.max_draft, self.match, self.adaptive = size, max_draft, match, adaptive
        self.length = max_draft
        self._behind: dict[tuple[int, ...], int] = {}  # where each run ends
        self._num_seen = size

    def propose(self, text: Ints, budget: int) -> Draft:
        """Propose at most `budget` tokens, none if the last tokens did not occur before."""
        # A run is entered once something follows it, so the last one does not find itself.
        ids, start = text[self._num_seen - self.size :].tolist(), self._num_seen
        for end in range(start, len(text)):
            run = tuple(ids[end - start : end - start + self.size])
            if self.match == "last" or run not in self._behind:
                self._behind[run] = end
        self._num_seen = max(start, len(text))
        behind = self._behind.get(tuple(ids[-self.size :]), len(text))
        return Draft.chain(text[behind : behind + min(budget, self.length)])

    def observe(self, outcome: Outcome) -> None:
        """Adapt the length to how much of a copy was kept."""
        if self.adaptive and len(outcome.draft):
            num_kept = len(outcome.kept)
            is_whole = num_kept == len(outcome.draft)
            self.length = min(self.max_draft, 2 * self.length if is_whole else num_kept + 1)
