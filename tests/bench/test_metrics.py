from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from chordal.bench import metrics


def test_wilson_interval_of_eight_of_ten():
    # z = 1.96: (0.8 + 0.19207 -+ 1.96 sqrt(0.016 + 0.0096037)) / 1.38415
    assert metrics.wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)


@pytest.mark.parametrize(("num_right", "low", "high"), [(0, 0.0, 0.2775), (10, 0.7225, 1.0)])
def test_wilson_interval_has_a_width_where_all_or_none_are_right(num_right, low, high):
    assert metrics.wilson(num_right, 10) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_holds_the_true_share_about_as_often_as_it_says():
    n, share = 40, 0.9
    chance = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    covered = sum(
        chance[k] for k in range(n + 1) if metrics.wilson(k, n).low <= share <= metrics.wilson(k, n).high
    )
    assert 0.93 < covered < 0.98


def test_spread_is_the_median_and_the_quartiles():
    assert metrics.spread([4, 1, 3, 2]) == (2.5, 1.75, 3.25)
    assert metrics.spread([7]) == (7, 7, 7)


def test_acceptance_figures_of_the_worked_example():
    assert metrics.tokens_per_forward(5, 2) == 2.5
    assert metrics.acceptance_length(8, 3, 2) == 2.5
    assert metrics.acceptance_rate(8, 3) == 0.375


def test_what_never_drafted_has_no_acceptance():
    assert metrics.acceptance_length(0, 0, 9) is None
    assert metrics.acceptance_rate(0, 0) is None
    assert metrics.tokens_per_forward(4, 0) == 0.0


def test_aup_of_the_published_example():
    points = [(8.47, 78.77), (1.0, 79.60)]
    assert metrics.aup(points, ymax=80.21) == pytest.approx(648.98, abs=0.01)


def test_aup_of_one_point_is_the_rectangle_under_it():
    assert metrics.aup([(1.0, 70.0)], ymax=100.0) == 70.0
    assert metrics.aup([(3.0, 70.0)], ymax=100.0) == 210.0


def test_aup_at_the_best_accuracy_throughout_is_the_whole_area():
    assert metrics.aup([(1.0, 80.0), (5.0, 80.0)], ymax=80.0) == pytest.approx(5 * 80.0)


def test_aup_leaves_out_points_more_than_five_under_the_first():
    kept, dropped = (2.0, 75.0), (4.0, 74.9)
    first = 1.0, 80.0
    assert metrics.aup([first, kept, dropped], ymax=80.0) == metrics.aup([first, kept], ymax=80.0)
    assert metrics.aup([first, kept], ymax=80.0) > metrics.aup([first], ymax=80.0)


def test_aup_falls_when_a_better_method_is_compared():
    points = [(1.0, 70.0), (4.0, 69.0)]
    assert metrics.aup(points, ymax=90.0) < metrics.aup(points, ymax=70.0)


def test_aup_where_nothing_is_right_is_nothing():
    assert metrics.aup([(1.0, 0.0), (4.0, 0.0)], ymax=0.0) == 0.0


@pytest.mark.parametrize(
    ("t", "freedom", "tail"),
    [
        (1.0, 1, 0.25),  # Cauchy: 1/2 - atan(1) / pi
        (2.0, 2, 0.5 - 2 / (2 * math.sqrt(2 + 4))),
        (2.2281388519649385, 10, 0.025),  # tabulated quantiles
        (4.143700493, 10, 0.001),
        (-1.0, 1, 0.75),
        (0.0, 7.3, 0.5),
    ],
)
def test_tail_of_student_law(t, freedom, tail):
    assert metrics.student_tail(t, freedom) == pytest.approx(tail, rel=1e-6)


def test_welch_of_a_worked_example():
    before, after = [1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]
    # Means 2.5 and 5, squared standard errors 5/12 and 20/12: t = 1.7321, freedom = 4.4118.
    t, freedom = 2.5 / math.sqrt(25 / 12), (25 / 12) ** 2 / ((5 / 12) ** 2 / 3 + (20 / 12) ** 2 / 3)
    assert freedom == pytest.approx(4.4118, abs=1e-4)
    assert metrics.welch(before, after) == pytest.approx(2 * metrics.student_tail(t, freedom))


def test_welch_with_a_margin_does_not_see_what_is_inside_it():
    before = [1.00, 1.01, 0.99, 1.00]
    after = [value + 0.05 for value in before]
    assert metrics.welch(before, after) < 0.001
    assert metrics.welch(before, after, margin=0.06) > 0.5
    assert metrics.welch([1.0, 1.0], [1.1, 1.1], margin=0.05) == 0.0
    assert metrics.welch([1.0, 1.0], [1.0, 1.0]) == 1.0


def test_welch_is_wrong_as_often_as_it_says():
    """5,000 pairs of five and eight normal values, of other variances: 5% with a standard error of 0.3%."""
    rng = np.random.default_rng(0)
    p_values = [
        metrics.welch(rng.normal(size=5).tolist(), (3 * rng.normal(size=8)).tolist()) for _ in range(5_000)
    ]
    assert 0.035 < statistics.fmean(p < 0.05 for p in p_values) < 0.065


def test_mcnemar_counts_a_fair_coin():
    assert metrics.mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert metrics.mcnemar(9, 1) == metrics.mcnemar(1, 9)
    assert metrics.mcnemar(0, 0) == metrics.mcnemar(3, 3) == 1.0
    assert 0 <= metrics.mcnemar(2_000, 0) < 1e-100


def test_holm_asks_less_of_each_after_the_first():
    # 0.05 / 3, 0.05 / 2, 0.05 / 1
    assert metrics.holm([0.04, 0.01, 0.02], 0.05) == [True, True, True]
    assert metrics.holm([0.04, 0.01, 0.03], 0.05) == [False, True, False]
    assert metrics.holm([0.02, 0.03], 0.05) == [True, True]
    assert metrics.holm([], 0.05) == []
