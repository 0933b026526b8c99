from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.ops.exploration import best_branch, propose
from chordal.ops.sampling import Law

NONE = np.array([], np.int64)
PROBS = [0.2, 0.5, 0.05, 0.25]


def logits(probs):
    return torch.tensor(probs, dtype=torch.float64).log()


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_a_greedy_law_tries_the_most_likely_tokens_first(num):
    tokens, probs = propose(logits(PROBS), Law(), NONE, 0, num, 0.9)
    assert tokens.tolist() == [1, 3, 0, 2][:num]
    assert probs == pytest.approx([0.5, 0.25, 0.2, 0.05][:num])


def test_equal_tokens_are_tried_in_their_order():
    tokens, probs = propose(torch.zeros(5), Law(), NONE, 0, 3, 0.0)
    assert tokens.tolist() == [0, 1, 2]
    assert probs.tolist() == pytest.approx([0.2] * 3)


@pytest.mark.parametrize("law", [Law(), Law(temperature=1.0)])
def test_a_token_without_probability_is_never_tried(law):
    tokens, _ = propose(logits([0.7, 0.0, 0.3]), law, NONE, 0, 4, 0.0)
    assert tokens.tolist() == [0, 2]


def test_the_probability_is_the_models_after_the_penalty_whatever_the_temperature():
    given = torch.tensor([1.0, 0.9, 0.0], dtype=torch.float64)
    tokens, probs = propose(given, Law(repetition_penalty=2.0), np.array([0, 0]), 0, 2, 0.0)
    assert tokens.tolist() == [1, 0]
    want = torch.tensor([0.5, 0.9, 0.0], dtype=torch.float64).softmax(0)
    assert probs == pytest.approx([float(want[1]), float(want[0])])
    _, hot = propose(given, Law(temperature=5.0, repetition_penalty=2.0), np.array([0]), 0, 3, 0.0)
    assert set(np.round(hot, 9)) <= set(np.round(want.numpy(), 9))


def test_sampled_tokens_are_draws_at_evenly_spaced_numbers():
    """Of .2, .5, .05, .25: numbers .1, .35, .6, .85 give 0, 1, 1, 3, and the second 1 is dropped."""
    tokens, probs = propose(logits(PROBS), Law(temperature=1.0), NONE, 0, 4, 0.1)
    assert tokens.tolist() == [0, 1, 3]
    assert probs == pytest.approx([0.2, 0.5, 0.25])
    tokens, _ = propose(logits(PROBS), Law(temperature=1.0), NONE, 0, 2, 0.72)  # .72 and .22
    assert tokens.tolist() == [2, 1]


def test_a_drawn_token_is_tried_even_if_the_model_gives_it_no_probability_that_a_float_can_hold():
    tokens, probs = propose(torch.tensor([0.0, 200.0]), Law(temperature=100.0), NONE, 0, 1, 0.05)
    assert (tokens.tolist(), probs.tolist()) == ([0], [0.0])


def test_one_sampled_token_follows_the_law():
    at = (np.arange(1000) + 0.5) / 1000
    got = [int(propose(logits(PROBS), Law(temperature=1.0), NONE, 0, 1, u)[0][0]) for u in at]
    assert np.bincount(got).tolist() == [200, 500, 50, 250]
    only = Law(temperature=1.0, top_k=1)
    assert {int(propose(logits(PROBS), only, NONE, 0, 3, u)[0][0]) for u in at} == {1}


@pytest.mark.parametrize(
    ("cascades", "weight", "best"),
    [
        ([0, 2, 2], 1.0, 1),
        ([0, 2, 2], 0.0, 0),
        ([0, 0, 2], 1.0, 2),
        ([0, 0, 2], 0.5, 0),
        ([3, 3, 3], 1.0, 0),
    ],
)
def test_the_branch_with_the_best_sum_of_likelihood_and_cascade_is_kept(cascades, weight, best):
    assert best_branch(np.array([0.6, 0.3, 0.1]), np.array(cascades), weight) == best


def test_ties_go_to_the_more_likely_token():
    assert best_branch(np.array([0.4, 0.4, 0.2]), np.array([1, 1, 1]), 1.0) == 0
    assert best_branch(np.array([0.4, 0.4]), np.array([0, 1]), 1.0) == 1
