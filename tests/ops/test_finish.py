from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from chordal.errors import InputError
from chordal.ops.finish import Lengths

WIDE = Lengths(0.6, NormalDist(8, 2), NormalDist(14, 4))
WIDER = Lengths(0.6, NormalDist(8, 1), NormalDist(14, 6))
EQUAL = Lengths(0.6, NormalDist(8, 3), NormalDist(14, 3))


@pytest.mark.parametrize(
    ("lengths", "accuracies"),
    [(WIDE, (0.60, 0.80, 0.895, 0.913, 0.886)), (WIDER, (0.60, 0.76, 0.78, 0.67, 0.29))],
    ids=["wide", "wider"],
)
def test_accuracies_are_those_of_simulations(lengths, accuracies):
    got = [lengths.accuracy(num) for num in (1, 2, 4, 8, 32)]
    assert got == pytest.approx(accuracies, abs=0.005)


def test_the_shortest_of_normal_lengths_is_as_much_shorter_as_tables_say():
    one = Lengths(0.5, NormalDist(100, 10), NormalDist(100, 10))
    got = [(one.length(num) - 100) / 10 for num in (1, 2, 4, 8)]
    assert got == pytest.approx([0, -0.5642, -1.0294, -1.4236], abs=1e-4)


def test_accuracy_and_length_are_those_of_drawn_samples():
    """40,000 races of five; five standard errors."""
    rng = np.random.default_rng(0)
    is_right = rng.random((40_000, 5)) < WIDER.share
    lengths = np.where(is_right, rng.normal(8, 1, is_right.shape), rng.normal(14, 6, is_right.shape))
    first = np.arange(len(lengths)), lengths.argmin(1)
    assert WIDER.accuracy(5) == pytest.approx(is_right[first].mean(), abs=5 * 0.5 / 200)
    assert WIDER.length(5) == pytest.approx(lengths[first].mean(), abs=5 * lengths[first].std() / 200)


def test_shorter_is_always_better_where_right_and_wrong_spread_alike():
    odds = [EQUAL.log_odds(length) for length in range(-20, 40)]
    assert odds == sorted(odds, reverse=True)
    assert EQUAL.best_length is None
    assert EQUAL.best_num(16) == 16


def test_the_best_length_has_the_highest_odds_where_wrong_ones_spread_more():
    assert WIDE.best_length == pytest.approx(6.0)
    assert WIDE.log_odds(6.0) > max(WIDE.log_odds(5.9), WIDE.log_odds(6.1))
    assert WIDE.best_num() == 8
    assert WIDER.best_num() == 3


def test_log_odds_are_the_ratio_of_the_densities():
    for length in (3.0, 8.0, 20.0):
        ratio = 0.6 * WIDE.right.pdf(length) / (0.4 * WIDE.wrong.pdf(length))
        assert np.exp(WIDE.log_odds(length)) == pytest.approx(ratio)


def test_the_best_number_falls_as_tokens_are_charged():
    assert WIDE.best_num(per="step") == 32  # the latency still falls where accuracy hardly does
    assert WIDE.best_num(per="token") == 1


def test_a_fit_finds_what_lengths_were_drawn_from():
    rng = np.random.default_rng(1)
    is_right = rng.random(20_000) < 0.6
    lengths = np.where(is_right, rng.normal(8, 2, 20_000), rng.normal(14, 4, 20_000))
    found = Lengths.fit(lengths.tolist(), is_right.tolist())
    assert found.share == pytest.approx(0.6, abs=0.02)
    assert (found.right.mean, found.right.stdev) == pytest.approx((8, 2), abs=0.1)
    assert (found.wrong.mean, found.wrong.stdev) == pytest.approx((14, 4), abs=0.2)


@pytest.mark.parametrize(
    ("lengths", "is_right"),
    [
        ([5, 6, 7, 8], [True] * 4),
        ([5, 6, 7], [True, True, False]),
        ([5, 5, 7, 8], [True, True, False, False]),
    ],
    ids=["none wrong", "one wrong", "no spread"],
)
def test_a_fit_of_too_little_is_refused(lengths, is_right):
    with pytest.raises(InputError, match="Take more samples"):
        Lengths.fit(lengths, is_right)
