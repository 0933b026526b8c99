from __future__ import annotations

import math

import numpy as np
import pytest

from chordal.policies.stop import Prophet, answer_region


@pytest.fixture
def seq(make_sequence):
    """A prompt of 4 and a canvas of 8."""
    seq = make_sequence("abcd", 8)
    seq.open_canvas(seq.limit)
    return seq


@pytest.mark.parametrize(
    ("start", "length", "region"),
    [
        (0, 3, [4, 5, 6]),
        (5, 5, [9, 10, 11]),
        (8, 5, []),
        (99, 5, []),
        (-3, 2, [9, 10]),
        (-1, 5, [11]),
        (-10, 5, [4, 5, 6]),
        (-99, 5, []),
    ],
)
def test_the_region_of_an_answer_is_what_of_it_is_on_the_canvas(seq, start, length, region):
    assert answer_region(seq, start, length).tolist() == region


def test_thresholds_fall_at_a_third_and_at_two_thirds_of_the_passes():
    prophet = Prophet(256, np.array([4]))
    thresholds = [prophet.threshold(g) for g in range(1, 257)]
    assert thresholds == [7.5] * 84 + [5.0] * 87 + [2.5] * 85


def test_a_region_is_watched_beside_all_that_is_masked(seq):
    seq.commit(np.array([5, 6, 9]), np.array([1, 1, 1]))
    assert Prophet(8, np.array([8, 9])).watches(seq).tolist() == [4, 7, 8, 9, 10, 11]
    assert Prophet(8, np.array([], np.int64)).watches(seq).tolist() == [4, 7, 8, 10, 11]


def test_the_mean_gap_of_the_region_decides_committed_positions_included(seq):
    seq.stats.forwards["target"] = 1
    seq.commit(np.array([9]), np.array([1]))
    positions = np.array([4, 7, 8, 9, 10])
    stop = Prophet(8, np.array([8, 9]))
    assert stop(seq, positions, np.array([0, 0, 5.0, 10.0, 0]))  # 7.5 suffices
    assert not stop(seq, positions, np.array([99, 99, 5.0, 9.9, 99]))


@pytest.mark.parametrize("thresholds", [(7.5, 5.0, 2.5), (-math.inf,) * 3])
def test_without_a_region_nothing_stops(seq, thresholds):
    stop = Prophet(8, np.array([], np.int64), thresholds)
    seq.stats.forwards["target"] = 1
    assert not stop(seq, np.arange(4, 12), np.full(8, 99.0))
