from __future__ import annotations

import numpy as np
import pytest

from chordal.ops.superposition import LOST, blend_weights, draft_scores, interpolate, sharpen


def test_weights_are_the_softmax_of_the_scores():
    weights = blend_weights(np.log([0.75, 0.25]))
    np.testing.assert_allclose(weights, [0.75, 0.25])
    for scores in ([0.0], [-900.0, -900.0, -901.0], [-1e5, 0.0]):
        weights = blend_weights(np.array(scores))
        assert weights.sum() == pytest.approx(1, abs=1e-15)
        np.testing.assert_allclose(weights, blend_weights(np.array(scores) + 7))


def test_one_draft_has_all_the_weight():
    assert blend_weights(np.array([-123.4])).tolist() == [1.0]


def test_a_sharpened_law_is_the_softmax_of_the_divided_logits():
    logits = np.array([2.0, 1.0, -0.5])
    probs = np.exp(logits) / np.exp(logits).sum()
    for temperature in (0.06, 0.5, 1.0, 3.0):
        want = np.exp((logits - 2) / temperature)
        np.testing.assert_allclose(np.exp(sharpen(probs, temperature)), want / want.sum())


def test_tokens_that_were_left_out_give_theirs_to_the_others():
    np.testing.assert_allclose(np.exp(sharpen(np.array([0.3, 0.1]), 1.0)), [0.75, 0.25])


def test_orders_are_mixed_by_weight_and_the_rest_is_the_models_own_law():
    orders = np.array([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 0.0], [0.0, 0.0]]])
    mixed = interpolate(orders, np.array([0.1, 0.4]), np.log([0.8, 0.2]), 0.05)
    np.testing.assert_allclose(mixed, [[0.1 + 0.2 + 0.04, 0.2 + 0.01], [0.04, 0.01]])


def test_the_hand_example_pairs_each_draft_with_the_token_its_bigram_knows():
    """p = (.5, .5), a is followed by 0 and b by 1: the winners are (a, 0) and (b, 1), never (a, 1)."""
    scores = draft_scores(np.log([0.5, 0.5]), np.array([[1.0, 0.0], [0.0, 1.0]]), 0.5)
    totals = scores + np.log([[0.75], [0.25]])
    np.testing.assert_allclose(np.diag(totals), np.log([0.75, 0.25]) + 0.5 * np.log(0.5))
    assert totals[0, 1] == totals[1, 0] == -np.inf


def test_without_ngrams_all_drafts_score_alike():
    log_probs = np.log([0.6, 0.4])
    scores = draft_scores(log_probs, np.array([[0.0, 1.0], [0.5, 0.5]]), 0.0)
    assert scores.tolist() == [log_probs.tolist()] * 2


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_draft_whose_tokens_are_all_unheard_of_all_but_dies(alpha):
    log_probs = np.log([0.6, 0.4])
    scores = draft_scores(log_probs, np.array([[0.0, 0.0], [0.0, 0.1]]), alpha)
    np.testing.assert_allclose(scores[0], (1 - alpha) * log_probs + LOST)
    assert scores[1, 0] == -np.inf
    assert scores[1, 1] == pytest.approx((1 - alpha) * np.log(0.4) + alpha * np.log(0.1))
