"""Draft the rest of a source text that the output is an edit of."""

from __future__ import annotations

from typing import Literal

from chordal.drafters.draft import Draft, Drafter, Outcome
from chordal.forward import Ints


class SourceDrafter(Drafter):
    """Copy a source from its start, and after an edit from where the output joins it again.

    The output joins behind the shortest run of its last tokens that the source holds once. With the source
    "the cat the dog" an output that ends in "cat" goes on with "the dog", one that ends in "the" does not.
    By "next" it then joins at the first place behind what was copied last, if there are several; if there
    is none, the token that ended a copy is taken to replace one of the source.

    Scope: one sequence. Memory: one entry for each run of the source. Cost: `max_ngram` look-ups.

    Args:
        source: Tokens of the source.
        start: Where the output starts in the text.
        max_ngram: Longest run that is looked up, at least 1.
        match: "unique" or "next".
        from_start: Whether the output is expected to begin as the source does.
    """

    def __init__(
        self,
        source: Ints,
        start: int,
        *,
        max_ngram: int = 3,
        match: Literal["unique", "next"] = "unique",
        from_start: bool = True,
    ) -> None:
        self.source, self.start, self.max_ngram, self.match = source, start, max_ngram, match
        self._begin = 0 if from_start else None
        self._ends: dict[tuple[int, ...], list[int]] = {}
        ids = source.tolist()
        for size in range(1, max_ngram + 1):
            for end in range(size, len(ids) + 1):
                self._ends.setdefault(tuple(ids[end - size : end]), []).append(end)
        self._proposed = start, 0  # where in the text, and where in the source
        self._used = start, 0  # how far either is known to have been the same

    def propose(self, text: Ints, budget: int) -> Draft:
        """Propose at most `budget` tokens of the source, none if it is not known where to begin."""
        at = self._begin if len(text) == self.start else self._join(text)
        if at is None:
            return Draft.chain(text[:0])
        self._proposed = len(text), at
        return Draft.chain(self.source[at : at + budget])

    def observe(self, outcome: Outcome) -> None:
        """Note how far the source has been used."""
        if num := len(outcome.kept):
            self._used = self._proposed[0] + num, self._proposed[1] + num

    def _join(self, text: Ints) -> int | None:
        """Find the place of the source that the output has come to."""
        output = text[self.start :][-self.max_ngram :].tolist()
        text_used, source_used = self._used
        places: list[int] = []
        for size in range(1, len(output) + 1):
            ends = self._ends.get(tuple(output[-size:]))
            if ends is None:
                break
            if len(ends) == 1:
                return ends[0]
            places = ends
        if self.match == "next":
            if ahead := [end for end in places if end > source_used]:
                return ahead[0]
            if len(text) == text_used + 1:
                return source_used + 1
        return None
