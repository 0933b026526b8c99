from __future__ import annotations

import numpy as np
import pytest

from chordal.drafters.draft import Outcome
from chordal.drafters.source import SourceDrafter

THE, CAT, DOG, SAT = range(4)
START = 2  # tokens of the text before the output


class Edit:
    """An output that grows as if a model wrote it, with a drafter that follows."""

    def __init__(self, source, **settings):
        self.drafter = SourceDrafter(np.array(source), START, **settings)
        self.text = [90] * START

    def draft(self, budget=99):
        return self.drafter.propose(np.array(self.text), budget).tokens.tolist()

    def write(self, *tokens, budget=99):
        """Draft, then commit as much of it as is right, and the token behind it."""
        left = list(tokens)
        while left:
            draft = self.drafter.propose(np.array(self.text), budget)
            kept = 0
            while kept < min(len(draft), len(left) - 1) and draft.tokens[kept] == left[kept]:
                kept += 1
            self.text += left[: kept + 1]
            left = left[kept + 1 :]
            self.drafter.observe(Outcome(0, draft, np.arange(kept), None))
        return self


@pytest.mark.parametrize("match", ["unique", "next"])
def test_an_empty_output_begins_as_the_source_if_that_is_expected(match):
    assert Edit([5, 6, 7], match=match).draft() == [5, 6, 7]
    assert Edit([5, 6, 7], match=match).draft(2) == [5, 6]
    assert Edit([5, 6, 7], match=match, from_start=False).draft() == []
    assert Edit([], match=match).draft() == []


@pytest.mark.parametrize(
    ("output", "draft"), [([THE], []), ([CAT], [THE, DOG]), ([DOG], []), ([SAT], []), ([CAT, THE], [DOG])]
)
def test_the_output_joins_behind_a_run_that_occurs_once(output, draft):
    """An output that ends in "cat the" ends in "the", which is no use, and in a run that occurs once."""
    edit = Edit([THE, CAT, THE, DOG])
    edit.text += output
    assert edit.draft() == draft


def test_a_run_longer_than_the_longest_is_not_looked_up():
    source = [1, 2, 3, 8, 9, 2, 3, 7]
    for max_ngram, draft in ((2, []), (3, [8, 9, 2, 3, 7])):
        edit = Edit(source, max_ngram=max_ngram)
        edit.text += [1, 2, 3]
        assert edit.draft() == draft


def test_next_joins_at_the_first_place_behind_what_was_copied():
    source = [1, 4, 5, 1, 6, 1, 7]
    edit = Edit(source, match="next").write(1, 4, 5, 50, 1)
    assert edit.draft() == [6, 1, 7]
    assert Edit(source, match="unique").write(1, 4, 5, 50, 1).draft() == []


def test_next_takes_a_token_the_source_does_not_hold_for_a_replaced_one():
    edit = Edit([1, 2, 3, 4, 5], match="next").write(1, 50)
    assert edit.draft() == [3, 4, 5]
    assert edit.write(51).draft() == []  # nor this one: it is no longer clear where the output is
    assert Edit([1, 2, 3, 4, 5], match="unique").write(1, 50).draft() == []


def test_next_goes_back_to_a_place_that_occurs_once():
    """Whatever was copied wrongly before, a run that occurs once tells where the output is."""
    assert Edit([1, 2, 3, 4, 5], match="next").write(4, 5, 2).draft() == [3, 4, 5]


def test_drafts_equal_a_search_of_the_source():
    rng = np.random.default_rng(0)
    for _ in range(300):
        source = rng.integers(0, 4, rng.integers(1, 15)).tolist()
        output = rng.integers(0, 4, rng.integers(1, 8)).tolist()
        edit, expected = Edit(source), []
        edit.text += output
        for size in (1, 2, 3):
            ends = [
                end
                for end in range(size, len(source) + 1)
                if size <= len(output) and source[end - size : end] == output[-size:]
            ]
            if len(ends) == 1:
                expected = source[ends[0] :]
            if len(ends) < 2:
                break
        assert edit.draft() == expected
