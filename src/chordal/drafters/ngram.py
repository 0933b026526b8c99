"""Draft what followed an earlier occurrence of the last tokens."""

from __future__ import annotations

from typing import Literal

import numpy as np

from chordal.drafters.draft import Draft, Drafter
from chordal.forward import Ints


class NgramDrafter(Drafter):
    """Look the longest suffix up in the text so far and copy what stood behind it.

    With text 5 6 7 8 5 6 7 and suffixes of up to 3 tokens the suffix 5 6 7 is found at the start, so
    8 5 6 7 is proposed. Scope: one sequence, no state. Cost: one pass over the text a suffix length.

    Args:
        max_ngram: Longest suffix.
        min_ngram: Shortest suffix.
        match: Which of several occurrences is copied.
    """

    def __init__(
        self, max_ngram: int, min_ngram: int = 1, *, match: Literal["first", "last"] = "first"
    ) -> None:
        self.max_ngram, self.min_ngram, self.match = max_ngram, min_ngram, match

    def propose(self, text: Ints, budget: int) -> Draft:
        """Propose at most `budget` tokens, none if no suffix occurred before."""
        num = len(text)
        for size in range(min(self.max_ngram, num - 1), self.min_ngram - 1, -1):
            # Ends of earlier occurrences: compare the text with itself shifted by each suffix token.
            is_end = text[size - 1 : num - 1] == text[num - 1]
            for back in range(1, size):
                is_end = is_end & (text[size - 1 - back : num - 1 - back] == text[num - 1 - back])
            ends = np.flatnonzero(is_end)
            if len(ends):
                start = int(ends[-1 if self.match == "last" else 0]) + size
                return Draft.chain(text[start : start + budget])
        return Draft.chain(text[:0])
