from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from chordal.errors import InputError
from chordal.planning.acceptance import (
    NOT_DRAFTED,
    RIGHT,
    WRONG,
    WRONG_AND_LAST,
    Acceptance,
    alpha_of,
    expected_tokens,
    hits_by_rank,
    outcomes,
)
from chordal.sequence import Event

PROMPT = 10


def passes(*drafts_and_commits):
    """Make a trace of (draft, committed) pairs, each behind what was committed before."""
    at = PROMPT
    for number, (draft, committed) in enumerate(drafts_and_commits, 1):
        if draft:
            yield Event("draft", number, at + np.arange(len(draft)), np.array(draft))
        yield Event("commit", number, at + np.arange(len(committed)), np.array(committed))
        at += len(committed)


@pytest.mark.parametrize(
    ("alpha", "tokens"),
    [
        (0.6, (1.960, 2.306, 2.430, 2.475)),
        (0.8, (2.440, 3.362, 3.951, 4.329)),
        (0.9, (2.710, 4.095, 5.217, 6.126)),
    ],
)
def test_tokens_of_a_chain_are_those_of_the_formula(alpha, tokens):
    assert [round(expected_tokens(alpha, num), 3) for num in (2, 4, 6, 8)] == list(tokens)


def test_a_draft_that_is_always_right_gives_all_and_one_more():
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.0, 5) == 1


@pytest.mark.parametrize("num_draft", [1, 4, 16])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 0.99, 1.0])
def test_tau_and_alpha_are_each_others_inverse(alpha, num_draft):
    assert alpha_of(expected_tokens(alpha, num_draft), num_draft) == pytest.approx(alpha, abs=1e-9)


@pytest.mark.parametrize(("tau", "num_draft"), [(0.9, 4), (5.1, 4), (1.0, 0)])
def test_a_tau_that_no_chain_has_is_refused(tau, num_draft):
    with pytest.raises(InputError, match=r"tau must be from 1 to num_draft \+ 1"):
        alpha_of(tau, num_draft)


def test_a_trace_says_of_each_token_whether_its_draft_was_right():
    trace = passes(
        ([5, 6, 7], [5, 6, 1]),  # the third is wrong
        ([], [2]),
        ([3, 4], [3, 4, 9]),  # all there was is right, and the drafter had no more
        ([8, 8, 8], [8, 8, 8, 8]),  # only its length ended this one
        ([6], [5]),  # the drafter ended it with a token that is wrong
    )
    assert outcomes(trace, PROMPT, 12, 3).tolist() == [
        RIGHT, RIGHT, WRONG, NOT_DRAFTED, RIGHT, RIGHT, NOT_DRAFTED, RIGHT, RIGHT, RIGHT, RIGHT,
        WRONG_AND_LAST,
    ]  # fmt: skip


def test_a_text_that_ends_inside_a_draft_does_not_make_it_wrong():
    # The stop token is the second of the span; what the model committed behind it is no result.
    assert outcomes(passes(([5, 6, 7], [5, 6, 7, 1])), PROMPT, 2, 3).tolist() == [RIGHT, RIGHT]


def test_alpha_counts_only_tokens_that_were_judged():
    texts = [np.array([RIGHT, RIGHT, RIGHT, WRONG]), np.array([NOT_DRAFTED, RIGHT, WRONG_AND_LAST])]
    assert Acceptance.of_chains(texts).alpha == 4 / 6
    assert Acceptance.of_chains([np.array([NOT_DRAFTED])]).alpha == 0


def test_alpha_is_recovered_from_drafts_that_were_cut_off():
    rng = np.random.default_rng(0)
    kept = np.minimum(rng.geometric(0.3, 4000) - 1, 3)  # alpha .7, cut off after 3
    texts = [np.array([RIGHT] * num + [WRONG] * (num < 3)) for num in kept.tolist()]
    # The mean of kept / 3 would say .51; the standard error of this estimate is .005.
    assert Acceptance.of_chains(texts).alpha == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("per_rank", [(), (-0.1,), (0.7, 0.4)])
def test_chances_that_are_none_are_refused(per_rank):
    with pytest.raises(InputError, match="chances by rank"):
        Acceptance(per_rank)


def tree_passes(parents, *drafts_and_commits):
    """Make a trace as `passes` does, of trees of one shape."""
    for event in passes(*drafts_and_commits):
        yield dataclasses.replace(event, parents=np.array(parents)) if event.kind == "draft" else event


def test_hits_are_counted_by_rank_at_the_nodes_that_were_reached():
    trace = tree_passes(
        (-1, -1, 0, 0, 1, 1),
        ([1, 2, 3, 4, 5, 6], [1, 3, 9]),  # the first pass does not count
        ([1, 2, 3, 4, 5, 6], [2, 5, 9]),  # rank 1, then rank 0, and its two levels end
        ([1, 2, 3, 4, 5, 6], [1, 9]),  # rank 0, then none
        ([1, 2, 3, 4, 5, 6], [9]),
        ([], [9]),  # the drafter knew nothing
    )
    hits, num_nodes = hits_by_rank(trace, 2, 2, end=PROMPT + 99)
    assert (hits.tolist(), num_nodes) == ([2, 1], 2 + 2 + 1 + 1)


def test_nodes_behind_the_end_of_a_text_do_not_count():
    trace = [*tree_passes((-1, 0), ([], [7]), ([1, 2], [1, 2, 3]))]
    assert [hits_by_rank(trace, 1, 2, PROMPT + end)[1] for end in (1, 2, 3, 4)] == [0, 1, 2, 2]


def test_a_chain_is_a_tree_of_one_rank():
    hits, num_nodes = hits_by_rank(passes(([], [7]), ([1, 2], [1, 9])), 2, 2, end=PROMPT + 99)
    assert (hits.tolist(), num_nodes) == ([1, 0], 2)


def test_chances_by_rank_are_shares_of_all_nodes():
    counts = [(np.array([2, 1]), 6), (np.array([0, 0]), 2)]
    assert Acceptance.of_trees(counts).per_rank == (0.25, 0.125)
    assert Acceptance.of_trees([(np.array([0]), 0)]).alpha == 0
