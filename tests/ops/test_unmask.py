from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from chordal.ops.unmask import (
    above_threshold,
    by_factor,
    dream_count,
    dream_times,
    local_leap,
    nearly_independent,
    split_by_weight,
    split_evenly,
    top,
    within_entropy,
)

NONE = np.empty(0)


def dream_schedule(num_masked, num_steps):
    """How many positions Dream's grid commits in each step, each step committing all it may."""
    times, counts = dream_times(num_steps), []
    for step in range(num_steps):
        counts.append(dream_count(num_masked - sum(counts), step, times))
    return counts


@pytest.mark.parametrize(
    ("total", "parts", "shares"),
    [
        (32, 5, [7, 7, 6, 6, 6]),
        (8, 3, [3, 3, 2]),
        (4, 6, [1, 1, 1, 1, 0, 0]),
        (32, 32, [1] * 32),
        (5, 1, [5]),
        (0, 3, [0, 0, 0]),
    ],
)
def test_even_split_gives_the_larger_shares_first(total, parts, shares):
    assert split_evenly(total, parts).tolist() == shares


def test_even_split_adds_up_with_shares_that_differ_by_at_most_one():
    for total in range(40):
        for parts in range(1, 20):
            shares = split_evenly(total, parts)
            assert shares.sum() == total
            assert np.ptp(shares) <= 1
            assert (np.diff(shares) <= 0).all()


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [
        (64, [32, 32], [32, 32]),
        (7, [32, 32, 32], [3, 2, 2]),  # equal remainders: the earlier block takes the rest
        (4, [32, 32, 1], [2, 1, 1]),  # too small for a share, but never without a step
        (10, [32, 32, 16], [4, 4, 2]),
        (3, [5, 5, 5], [1, 1, 1]),
        (9, [1], [9]),
    ],
)
def test_split_by_weight_is_by_largest_remainder_and_at_least_one_each(total, weights, parts):
    assert split_by_weight(total, weights).tolist() == parts


def test_steps_split_over_the_blocks_of_any_canvas_add_up():
    for length in range(1, 80):
        for block_length in (1, 3, 8, 32):
            blocks = [min(block_length, length - start) for start in range(0, length, block_length)]
            for total in range(len(blocks), 2 * length):
                parts = split_by_weight(total, blocks)
                assert parts.sum() == total
                assert parts.min() >= 1


def test_top_takes_the_best_first_and_ties_to_the_lower_position():
    scores = np.array([0.2, 0.9, 0.5, 0.9, 0.5])
    assert top(scores, 3).tolist() == [1, 3, 2]
    assert top(scores, 4).tolist() == [1, 3, 2, 4]
    assert top(np.ones(200), 7).tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("k", "count"), [(-1, 0), (0, 0), (5, 5), (6, 5)])
def test_top_takes_no_more_than_there_are_and_never_less_than_none(k, count):
    assert len(top(np.arange(5.0), k)) == count


def test_threshold_takes_all_that_reach_it_best_first():
    scores = np.array([0.9, 0.3, 0.95, 0.9, 0.89])
    assert above_threshold(scores, 0.9).tolist() == [2, 0, 3]
    assert above_threshold(scores, 0.0).tolist() == [2, 0, 3, 4, 1]


@pytest.mark.parametrize(("at_least", "taken"), [(1, [1]), (2, [1, 0]), (3, [1, 0, 2]), (9, [1, 0, 2])])
def test_threshold_nobody_reaches_takes_the_best(at_least, taken):
    assert above_threshold(np.array([0.4, 0.5, 0.4]), 0.9, at_least).tolist() == taken


def test_a_floor_below_what_reaches_the_threshold_changes_nothing():
    assert above_threshold(np.array([0.95, 0.1, 0.99]), 0.9, 1).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("scores", "factor", "count"),
    [
        ([0.99, 0.9, 0.8, 0.7], 1, 3),  # the published code takes 4
        ([0.3, 0.2], 1, 1),  # the published code takes 2
        ([0.1], 1, 1),
        ([0.99, 0.67], 1, 2),  # rank 2 needs more than 2/3
        ([0.99, 0.66], 1, 1),
        ([0.99, 0.99, 0.76], 1, 3),  # rank 3 needs more than 3/4
        ([0.99, 0.99, 0.74], 1, 2),
        ([0.99, 0.99, 0.99, 0.81], 1, 4),  # rank 4 needs more than 4/5
        ([0.99, 0.99, 0.99, 0.79], 1, 3),
        ([0.99, 0.99, 0.99, 0.99, 0.84], 1, 5),  # rank 5 needs more than 5/6
        ([0.99, 0.99, 0.99, 0.99, 0.83], 1, 4),
        ([0.95, 0.6, 0.94, 0.93], 1, 3),
        ([0.5, 0.25], 2.25, 1),  # 3 (1 - 1/4) is exactly the factor, and it must stay below
        ([0.5, 0.25], 2.5, 2),
        ([0.9, 0.9, 0.9], 1e-9, 1),
        ([0.1, 0.2, 0.3], 100, 3),
        ([1.0, 1.0, 1.0], 1e-9, 3),
    ],
)
def test_factor_takes_the_longest_run_that_holds(scores, factor, count):
    assert by_factor(np.array(scores), factor).tolist() == top(np.array(scores), count).tolist()


def leap(candidates, threshold=0.9, relaxed_threshold=0.75, radius=2):
    positions, scores = np.array([*candidates]), np.array([*candidates.values()])
    taken = local_leap(scores, positions, threshold, relaxed_threshold, radius)
    assert (np.diff(scores[taken]) <= 0).all()
    return sorted(positions[taken].tolist())


@pytest.mark.parametrize(
    ("candidates", "taken"),
    [
        # 12 misses the relaxed threshold; 20 and 25 are far from the anchors 10 and 14.
        ({10: 0.95, 11: 0.8, 12: 0.7, 13: 0.78, 14: 0.92, 20: 0.88, 25: 0.76}, [10, 11, 13, 14]),
        ({3: 0.6, 4: 0.85, 9: 0.85}, [4]),  # no anchor: the best alone, the first of equals
        # Position 10 was committed before, so it is no candidate and no anchor.
        ({11: 0.8, 12: 0.79}, [11]),
        ({5: 0.9, 7: 0.75}, [5, 7]),  # both thresholds and the radius may just be reached
        ({5: 0.9, 8: 0.89}, [5]),
        ({1: 0.9, 2: 0.8, 3: 0.8, 4: 0.8, 5: 0.8}, [1, 2, 3]),  # what passes near an anchor is none
        ({6: 0.75, 8: 0.9}, [6, 8]),  # to the left as well, across what is committed
    ],
)
def test_leap_takes_the_sure_and_what_is_nearly_sure_beside_them(candidates, taken):
    assert leap(candidates) == taken


def random_candidates(rng):
    positions = np.sort(rng.choice(40, rng.integers(1, 25), replace=False))
    return dict(zip(positions.tolist(), rng.uniform(0.4, 1, len(positions)).tolist(), strict=True))


def test_leap_equals_a_loop_over_anchors_and_candidates():
    rng = np.random.default_rng(0)
    for _ in range(300):
        candidates, radius = random_candidates(rng), int(rng.integers(0, 8))
        taken = {p for p, c in candidates.items() if c >= 0.9}
        for anchor in [*taken]:
            for p in range(anchor - radius, anchor + radius + 1):
                if candidates.get(p, 0) >= 0.75:
                    taken.add(p)
        wanted = sorted(taken) or [max(candidates, key=candidates.get)]
        assert leap(candidates, radius=radius) == wanted


def test_leap_without_relaxation_or_radius_is_the_threshold_rule():
    rng = np.random.default_rng(1)
    for _ in range(100):
        candidates = random_candidates(rng)
        for threshold in (0.6, 0.9, 1.1):
            above = above_threshold(np.array([*candidates.values()]), threshold)
            wanted = sorted(np.array([*candidates])[above].tolist())
            assert leap(candidates, threshold, threshold, 4) == wanted
            assert leap(candidates, threshold, 0.5, 0) == wanted


def test_leap_takes_more_with_a_larger_radius_or_a_lower_relaxed_threshold():
    rng = np.random.default_rng(2)
    for _ in range(100):
        candidates = random_candidates(rng)
        by_radius = [set(leap(candidates, radius=radius)) for radius in range(41)]
        by_relaxed = [set(leap(candidates, 0.9, relaxed)) for relaxed in (0.9, 0.8, 0.7, 0.6, 0.5)]
        for row in (by_radius, by_relaxed):
            assert all(one <= other for one, other in pairwise(row))
        if max(candidates.values()) >= 0.9:
            assert by_radius[40] == {p for p, c in candidates.items() if c >= 0.75}


@pytest.mark.parametrize(
    ("entropies", "bound", "taken"),
    [
        ([0.5, 0.125, 0.25], 0.5, [1, 2]),
        ([0.5, 0.125, 0.25], 0.375, [1]),  # the sum must stay below
        ([0.5, 0.125, 0.25], 0.01, [1]),
        ([0.5, 0.125, 0.25], 10, [1, 2, 0]),
        ([0.0, 0.0, 1.0], 1e-9, [0, 1]),
    ],
)
def test_entropy_bound_takes_the_most_certain_whose_sum_stays_below(entropies, bound, taken):
    assert within_entropy(np.array(entropies), bound).tolist() == taken


@pytest.mark.parametrize(
    ("entropies", "bound", "taken"),
    [
        ([0.5, 0.125, 0.25], 0.5, [1, 2, 0]),
        ([0.5, 0.125, 0.25], 0.375, [1, 2, 0]),  # those before the last may reach the bound
        ([0.5, 0.125, 0.25], 0.25, [1, 2]),
        ([0.5, 0.125, 0.25], 0.1, [1]),
        ([2.0, 3.0, 9.0], 0.1, [0]),
        ([3.0, 0.0, 2.0, 0.0], 1e-9, [1, 3, 2]),
    ],
)
def test_nearly_independent_positions_are_one_more_than_the_bound_holds(entropies, bound, taken):
    assert nearly_independent(np.array(entropies), bound).tolist() == taken


def test_every_rule_gives_ties_to_the_lower_position():
    same = np.full(100, 0.5)
    assert above_threshold(same, 0.9, 3).tolist() == [0, 1, 2]
    assert by_factor(same, 3).tolist() == [0, 1, 2, 3]
    assert within_entropy(same, 2.25).tolist() == [0, 1, 2, 3]
    assert nearly_independent(same, 1.25).tolist() == [0, 1, 2]


def test_nothing_left_masked_gives_nothing():
    assert [len(rule) for rule in (top(NONE, 3), above_threshold(NONE, 0.5), by_factor(NONE, 1))] == [0, 0, 0]
    assert [len(within_entropy(NONE, 1)), len(nearly_independent(NONE, 1))] == [0, 0]


@pytest.mark.parametrize(
    ("num_masked", "num_steps", "counts"),
    [
        (256, 128, [1, *[2] * 126, 3]),
        (256, 64, [3, *[4] * 62, 5]),
        (8, 4, [1, 2, 2, 3]),
        (10, 3, [3, 3, 4]),
        (5, 1, [5]),
        *((size, size, [0, *[1] * (size - 2), 2]) for size in (8, 16, 100, 256, 512)),
    ],
)
def test_dream_commits_the_published_counts(num_masked, num_steps, counts):
    assert dream_schedule(num_masked, num_steps) == counts


def test_dream_commits_everything_by_its_last_step():
    for num_steps in range(1, 40):
        counts = dream_schedule(33, num_steps)
        assert sum(counts) == 33
        assert min(counts) >= 0


def test_dream_grid_runs_from_one_down_to_epsilon():
    times = dream_times(4)
    assert times.dtype == np.float32
    np.testing.assert_allclose(times, [1, 0.75025, 0.5005, 0.25075, 0.001], rtol=1e-6)
