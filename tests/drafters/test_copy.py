from __future__ import annotations

import numpy as np
import pytest

from chordal.drafters.copy import CopyDrafter
from chordal.drafters.draft import Draft, Outcome
from chordal.drafters.ngram import NgramDrafter


def propose(text, budget=10, *, size, **settings):
    return CopyDrafter(size, **settings).propose(np.array(text), budget).tokens.tolist()


def outcome(drafted, kept):
    return Outcome(0, Draft.chain(np.arange(drafted)), np.arange(kept), None)


def test_what_followed_the_run_before_is_proposed():
    assert propose([5, 6, 7, 8, 5, 6, 7], size=3) == [8, 5, 6, 7]
    assert propose([5, 6, 7, 8, 5, 6, 7], 2, size=3) == [8, 5]


@pytest.mark.parametrize("text", [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4]])
def test_a_run_does_not_find_itself(text):
    assert propose(text, size=3) == []


def test_a_copy_may_overlap_the_run_and_ends_with_the_text():
    assert propose([1, 2, 1, 2, 1], size=2) == [2, 1]


@pytest.mark.parametrize("match", ["first", "last"])
def test_a_text_that_grows_gives_what_a_search_of_all_of_it_gives(match):
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 5):
        for _ in range(20):
            whole, end = rng.integers(0, 3, 40), 0
            copies, search = CopyDrafter(size, match=match), NgramDrafter(size, size, match=match)
            while end < len(whole):
                end += int(rng.integers(1, 6))
                got, want = copies.propose(whole[:end], 6), search.propose(whole[:end], 6)
                assert got.tokens.tolist() == want.tokens.tolist()


def test_the_length_adapts_to_what_is_kept_if_asked():
    text = np.resize(np.arange(3), 60)
    steady, adaptive = CopyDrafter(3), CopyDrafter(3, adaptive=True)
    lengths = []
    for drafted, kept in ((10, 0), (1, 1), (2, 2), (4, 4), (8, 8), (10, 3), (0, 0)):
        for drafter in (steady, adaptive):
            drafter.observe(outcome(drafted, kept))
        lengths.append(len(adaptive.propose(text, 99)))
        assert len(steady.propose(text, 99)) == 10
    assert lengths == [1, 2, 4, 8, 10, 4, 4]
