from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from chordal.ops.coherence import coherent, mean_laws, pool_size
from chordal.ops.sampling import entropy


def sizes(num, limit, commits):
    """Give the pool of every step, where step i commits `commits(i, pool)`."""
    size, left, step, got = 1, num, 0, []
    while left > 0:
        size = pool_size(size, step, left, num, limit)
        got.append(size)
        left -= commits(step, size)
        step += 1
    return got


def test_the_pool_grows_from_the_fifth_step_up_to_its_limit_and_is_two_in_the_last_tenth():
    assert sizes(20, 5, lambda *_: 1) == [1, 1, 1, 1, 2, 3, 4, *[5] * 11, 2, 2]
    assert sizes(30, 3, lambda *_: 3) == [1, 1, 1, 1, 2, 3, 3, 3, 3, 2]


def test_the_pool_is_never_larger_than_its_limit():
    assert set(sizes(20, 1, lambda *_: 1)) == {1}


def test_a_tenth_is_counted_exactly():
    assert pool_size(5, 9, 3, 30, 5) == 2
    assert pool_size(5, 9, 3, 29, 5) == 5


@pytest.mark.parametrize(
    ("pooled", "num_tokens", "num_pooled", "all_", "want"),
    [
        # Of 7: a, 3: b, 5: c, 9: d, the most confident first.
        ({7: 0, 3: 1, 5: 2}, 1, 3, True, [0, 1, 2]),
        ({7: 0, 3: 1, 5: 2}, 1, 3, False, [0]),
        ({7: 0, 3: 1, 5: 2}, 1, 2, True, [0, 1]),  # the third is not in the pool now
        ({7: 0, 3: 2, 5: 2}, 1, 3, True, [0, 2]),
        # The first was in the pool with another token: it is rejected, others are not.
        ({7: 9, 3: 1}, 1, 3, True, [1]),
        ({7: 9, 3: 1, 5: 2}, 1, 3, False, [1]),
        # The first was not in the pool: a plain step, whatever else agrees.
        ({3: 1, 5: 2}, 1, 3, True, [0]),
        ({3: 1, 5: 2}, 2, 3, True, [1, 2]),  # but one of the first two was
        ({7: 0, 3: 2}, 2, 4, True, [0, 1]),  # too few agree
        ({}, 2, 4, True, [0, 1]),
        ({7: 0}, 6, 4, True, [0, 1, 2, 3]),  # fewer are left than a plain step takes
    ],
)
def test_what_agrees_with_the_last_pool_is_taken_or_else_the_first(
    pooled, num_tokens, num_pooled, all_, want
):
    positions, tokens = np.array([7, 3, 5, 9]), np.array([0, 1, 2, 3])
    got = coherent(positions, tokens, pooled, num_tokens, num_pooled, all_=all_)
    assert got.tolist() == want


def laws(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_laws_are_averaged_over_the_pools_that_have_the_position():
    now = laws([0.8, 0.2], [0.6, 0.4], [0.5, 0.5])
    history = [
        (np.array([9, 4]), laws([0.2, 0.8], [0.0, 1.0])),
        (np.array([4]), laws([0.3, 0.7])),
    ]
    kept, mean = mean_laws(np.array([4, 7, 9]), now, history)
    assert kept.tolist() == [0, 2]
    torch.testing.assert_close(mean, laws([1.1 / 3, 1.9 / 3], [0.35, 0.65]))
    torch.testing.assert_close(now, laws([0.8, 0.2], [0.6, 0.4], [0.5, 0.5]))


def test_averaging_laws_that_are_the_same_changes_nothing():
    law, at = laws([0.1, 0.7, 0.2], [0.3, 0.3, 0.4]), np.array([3, 5])
    kept, mean = mean_laws(at, law, [(at, law)] * 3)
    assert kept.tolist() == [0, 1]
    torch.testing.assert_close(mean, law)


def test_two_certain_laws_that_disagree_have_a_mean_of_one_bit():
    at = np.array([0])
    _, mean = mean_laws(at, laws([1.0, 0.0, 0.0]), [(at, laws([0.0, 0.0, 1.0]))])
    assert float(entropy(mean)[0]) == pytest.approx(math.log(2))


def test_without_history_nothing_is_kept():
    kept, mean = mean_laws(np.array([1, 2]), laws([0.5, 0.5], [0.1, 0.9]), [])
    assert (len(kept), mean.shape) == (0, (0, 2))
    kept, _ = mean_laws(np.array([1]), laws([1.0]), [(np.array([], np.int64), torch.zeros(0, 1).double())])
    assert len(kept) == 0
