from __future__ import annotations

import numpy as np
import pytest

from chordal.drafters.ngram import NgramDrafter


def propose(text, budget, *sizes, **settings):
    return NgramDrafter(*sizes, **settings).propose(np.array(text, np.int64), budget).tokens.tolist()


def by_search(text, budget, max_ngram, min_ngram, match):
    """The same by comparing slices one by one."""
    for size in range(max_ngram, min_ngram - 1, -1):
        starts = [
            at for at in range(len(text) - size) if size <= len(text) and text[at : at + size] == text[-size:]
        ]
        if starts:
            behind = (starts[0] if match == "first" else starts[-1]) + size
            return text[behind : behind + budget]
    return []


def test_what_followed_the_last_tokens_before_is_proposed():
    assert propose([5, 6, 7, 8, 5, 6, 7], 10, 3) == [8, 5, 6, 7]


def test_the_longest_suffix_that_occurred_wins():
    text = [1, 2, 9, 4, 2, 7, 1, 2]
    assert propose(text, 2, 3) == [9, 4]
    assert propose(text, 2, 1, match="last") == [7, 1]


@pytest.mark.parametrize(("match", "draft"), [("first", [7, 5]), ("last", [8, 5])])
def test_the_occurrence_asked_for_is_copied(match, draft):
    assert propose([5, 7, 5, 8, 5], 2, 1, match=match) == draft


@pytest.mark.parametrize(("budget", "draft"), [(0, []), (1, [8]), (2, [8, 5]), (99, [8, 5, 6, 7])])
def test_no_more_than_the_budget_and_no_more_than_there_is(budget, draft):
    assert propose([5, 6, 7, 8, 5, 6, 7], budget, 3) == draft


def test_a_suffix_below_the_shortest_size_is_not_looked_up():
    assert propose([1, 2, 3, 2], 4, 3, 1) == [3, 2]
    assert propose([1, 2, 3, 2], 4, 3, 2) == []


@pytest.mark.parametrize("text", [[], [1], [1, 2], [1, 2, 3, 4]])
def test_nothing_is_proposed_where_nothing_occurred_before(text):
    assert propose(text, 5, 3) == []


def test_an_occurrence_may_overlap_the_suffix():
    assert propose([4, 4, 4], 5, 2) == [4]
    assert propose([1, 2, 1, 2, 1], 5, 3) == [2, 1]


def test_proposals_equal_a_search_slice_by_slice():
    rng = np.random.default_rng(0)
    for _ in range(500):
        text = rng.integers(0, 3, rng.integers(1, 25)).tolist()
        min_ngram = int(rng.integers(1, 4))
        max_ngram = min_ngram + int(rng.integers(0, 3))
        for match in ("first", "last"):
            expected = by_search(text, 4, max_ngram, min_ngram, match)
            assert propose(text, 4, max_ngram, min_ngram, match=match) == expected
