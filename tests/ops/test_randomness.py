from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.ops.randomness import gumbel, uniforms
from chordal.testing import chi_square

# Every chi-square test has a fixed seed and a false-alarm chance of one in a million.
NUM = 12_800
EXTREME_SEEDS = [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63)]


def along(axis):
    """Give many numbers that differ only in the seed, the position or the draw, from 0 up."""
    if axis == "position":
        return uniforms(7, "token", np.arange(NUM))
    if axis == "seed":
        return np.array([uniforms(seed, "token", [5])[0] for seed in range(NUM)])
    return np.array([uniforms(7, "token", [5], draw)[0] for draw in range(NUM)])


def test_numbers_never_change_between_versions_or_machines():
    """Whoever stored a seed gets the same text again."""
    assert uniforms(0, "token", [0, 1, 1000]).tolist() == [
        0.46620436875181437,
        0.6576737209351057,
        0.10914998286463384,
    ]
    assert uniforms(-3, "order", [0, 1, 1000], draw=2).tolist() == [
        0.5402981801451152,
        0.1968842402137252,
        0.4744020471473406,
    ]


def test_each_number_depends_on_its_own_position_only():
    positions = np.array([9, 0, 3, 3, 100_000])
    alone = [uniforms(1, "order", [position], 4)[0] for position in positions]
    assert uniforms(1, "order", positions, 4).tolist() == alone


def test_repeating_a_call_repeats_its_numbers_and_leaves_global_generators_alone():
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    assert np.array_equal(uniforms(3, "token", np.arange(9), 1), uniforms(3, "token", np.arange(9), 1))
    assert np.array_equal(gumbel(3, np.arange(9), 1), gumbel(3, np.arange(9), 1))
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.random.get_rng_state(), before[1])


@pytest.mark.parametrize("axis", ["position", "seed", "draw"])
def test_numbers_are_uniform_and_neighbours_independent(axis):
    numbers = along(axis)
    assert numbers.dtype == np.float64
    assert 0 <= numbers.min() < numbers.max() < 1
    assert chi_square(np.bincount((numbers * 100).astype(int), minlength=100), np.full(100, 1 / 100)) > 1e-6
    # Pairs of neighbours over a 16 x 16 grid, each number in one pair.
    cells = (numbers * 16).astype(int).reshape(-1, 2) @ [16, 1]
    assert chi_square(np.bincount(cells, minlength=256), np.full(256, 1 / 256)) > 1e-6


def test_purposes_are_independent():
    token, order = (uniforms(7, purpose, np.arange(NUM)) for purpose in ("token", "order"))
    cells = (token * 16).astype(int) * 16 + (order * 16).astype(int)
    assert chi_square(np.bincount(cells, minlength=256), np.full(256, 1 / 256)) > 1e-6


def test_seed_position_and_draw_are_not_interchangeable():
    keys = [(a, b, c) for a in range(12) for b in range(12) for c in range(12)]
    assert len({uniforms(seed, "token", [position], draw)[0] for seed, position, draw in keys}) == len(keys)


def test_every_seed_of_64_bits_works_and_gives_its_own_numbers():
    rows = {tuple(uniforms(seed, "token", np.arange(4))) for seed in EXTREME_SEEDS}
    assert len(rows) == len(EXTREME_SEEDS)
    assert all(0 <= number < 1 for row in rows for number in row)


def test_any_number_of_draws_gives_no_warning():
    """Draws from the second on used to warn of an overflow that is part of the formula."""
    for draw in (0, 1, 2, 1000, 2**63):
        assert 0 <= uniforms(0, "order", [0], draw)[0] < 1


def test_gumbel_is_the_inverse_of_its_distribution_at_the_numbers_for_orders():
    noise, numbers = gumbel(3, np.arange(1000), 2), uniforms(3, "order", np.arange(1000), 2)
    np.testing.assert_allclose(np.exp(-np.exp(-noise)), numbers, atol=1e-12)
    assert np.isfinite(noise).all()


def test_the_largest_of_scores_plus_gumbel_is_a_draw_from_their_softmax():
    """5,000 draws; what makes `order_temperature` a draw without replacement."""
    scores = np.log([0.1, 0.2, 0.3, 0.4])
    winners = [np.argmax(scores + gumbel(0, np.arange(4), draw)) for draw in range(5_000)]
    assert chi_square(np.bincount(winners, minlength=4), np.exp(scores)) > 1e-6
