from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch

from chordal.policies.route import (
    Bandit,
    Constant,
    Draft,
    Estimate,
    Gain,
    Hysteresis,
    LongSpan,
    Score,
    chance,
)


def draft(probs, tokens=None, *, num_confident=0, block_length=8, progress=0.0):
    probs = torch.tensor(probs, dtype=torch.float64)
    tokens = probs.argmax(1) if tokens is None else torch.tensor(tokens)
    confidence = probs.gather(1, tokens[:, None])[:, 0].numpy()
    return Draft(probs, confidence, num_confident, block_length, progress)


def of_chances(chances, **more):
    """A draft whose drafted tokens have these probabilities, which are its chances at power 1."""
    return draft([[c, 1 - c] for c in chances], [0] * len(chances), **more)


PLAIN = {"estimate": "confidence_power", "at": 1.0}

PROBS = [[0.6, 0.3, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.48, 0.44, 0.08, 0.0]]
ENTROPY = [-sum(p * math.log(p) for p in law if p) / math.log(4) for law in PROBS]


@pytest.mark.parametrize(
    ("estimate", "at", "wanted"),
    [
        ("entropy_decay", None, [math.exp(-h) for h in ENTROPY]),
        ("entropy_decay", 3.0, [math.exp(-3 * h) for h in ENTROPY]),
        ("entropy_limit", None, [0, 0, 1, 0]),
        ("entropy_limit", 0.65, [1, 0, 1, 0]),
        ("entropy_limit", 1.0, [1, 0, 1, 1]),
        ("margin_limit", None, [1, 0, 1, 0]),
        ("margin_limit", 0.03, [1, 0, 1, 1]),
        ("margin_limit", 0.0, [1, 0, 1, 1]),
        ("margin_slope", None, [0.3, 0, 1, 0.04]),
        ("margin_slope", 2.0, [0.6, 0, 1, 0.08]),
        ("confidence_power", None, [0.3**0.8, 0.25**0.8, 1, 0.48**0.8]),
        ("confidence_power", 2.0, [0.09, 0.0625, 1, 0.48**2]),
        ("collision", None, [0.46, 0.25, 1, 0.43040]),
        ("collision", 5.0, [0.46, 0.25, 1, 0.43040]),
    ],
)
def test_estimates_of_the_chance_that_a_token_is_kept(estimate, at, wanted):
    """All but confidence_power are of the law; that is of the token that was drawn."""
    given = draft(PROBS, [1, 0, 0, 0])
    assert chance(given, estimate, at).tolist() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("estimate", get_args(Estimate))
def test_a_sure_draft_is_expected_to_be_kept_whole(estimate):
    assert Gain(estimate, cost=0.0)(draft([[0.0, 1.0, 0.0]] * 5)) == pytest.approx(5)


def test_a_score_is_the_tokens_that_verification_is_expected_to_keep_less_its_cost():
    given = of_chances([0.9, 0.8, 0.5], num_confident=2)
    assert Gain(**PLAIN, cost=1.0)(given) == pytest.approx(0.98)
    assert Gain(**PLAIN, cost=2.0)(given) == pytest.approx(-0.02)
    assert Gain(**PLAIN, cost=0.75, per_confident=True)(given) == pytest.approx(1.98 - 1.5)
    assert Score(Gain(**PLAIN, cost=1.0), 0.0)(given)
    assert not Score(Gain(**PLAIN, cost=2.0), 0.0)(given)


def test_a_score_of_the_limit_is_verified():
    given = of_chances([0.5])
    assert Score(Gain(**PLAIN, cost=0.5), 0.0)(given)
    assert not Score(Gain(**PLAIN, cost=0.5), 1e-9)(given)


def test_the_published_conservative_setting_verifies_always():
    """A score cannot be below -c, so with c = 4 none is below -5."""
    route = Score(Gain(cost=4.0), -5.0)
    for num in range(1, 9):
        assert route(draft([[0.5, 0.5]] * num, num_confident=num))


def test_hysteresis_begins_off_goes_on_above_one_score_and_off_below_another():
    route = Hysteresis(Gain(**PLAIN, cost=0.0), on_score=2.0, off_score=1.0)
    decided = []
    for score in (1.5, 2.0, 2.5, 1.5, 1.0, 0.5, 1.5, 3.0):
        # As many sure tokens as the score has ones, then one of the rest's chance.
        chances = [1.0] * int(score) + ([score % 1] if score % 1 else [])
        decided.append(route(of_chances(chances)))
    assert decided == [False, False, True, True, True, False, False, True]


def test_spans_of_at_least_the_length_are_verified():
    assert [LongSpan(3)(of_chances([0.5] * num)) for num in (1, 2, 3, 4)] == [False, False, True, True]


def test_constants():
    assert Constant(True)(of_chances([0.1]))
    assert not Constant(False)(of_chances([1.0]))


def test_a_bandit_tries_both_verification_first_then_takes_what_paid():
    route, given = Bandit(exploration=0.0), of_chances([0.9] * 3)
    assert route(given)
    route.learn(2)  # 1 a pass
    assert not route(given)
    route.learn(3)  # 3 a pass
    for _ in range(5):
        assert not route(given)
        route.learn(3)


def test_a_bandit_verifies_if_both_pay_the_same():
    route, given = Bandit(exploration=0.0), of_chances([0.9] * 3)
    route(given)
    route.learn(4)
    route(given)
    route.learn(2)
    assert route(given)


def test_a_bandit_explores_what_it_has_tried_least():
    """mean + beta sqrt(ln t / n): after one of each and then t decisions for the better one."""
    beta, route, given = 1.0, Bandit(exploration=1.0), of_chances([0.9] * 3)
    rewards = {True: [], False: []}
    for t in range(1, 40):
        bounds = {
            choice: np.mean(seen) + beta * math.sqrt(math.log(t) / len(seen)) if seen else math.inf
            for choice, seen in rewards.items()
        }
        choice = route(given)
        assert choice == (bounds[True] >= bounds[False])
        route.learn(4 if choice else 3)
        rewards[choice].append(2.0 if choice else 3.0)
    assert len(rewards[True]) >= 3
    assert len(rewards[False]) > len(rewards[True])


@pytest.mark.parametrize(
    "other",
    [
        of_chances([0.5] * 5),
        of_chances([0.5] * 4, progress=0.5),
        of_chances([0.999] * 4),
    ],
    ids=["longer", "further", "surer"],
)
def test_a_bandit_keeps_eight_cases_apart(other):
    """By span length, progress and entropy, each in two halves."""
    route, given = Bandit(exploration=0.0), of_chances([0.5] * 4, progress=0.49)
    for reward in (0, 9, 9):
        route(given)
        route.learn(reward)
    assert not route(given)
    route.learn(9)
    assert route(other)
    route.learn(0)
    assert not route(given)


def test_a_bandit_takes_drafts_of_the_same_case_together():
    route = Bandit(exploration=0.0)
    for reward in (0, 9):
        route(of_chances([0.5] * 4, progress=0.3))
        route.learn(reward)
    assert not route(of_chances([0.6] * 2, progress=0.1))
