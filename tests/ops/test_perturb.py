from __future__ import annotations

import numpy as np
import torch

from chordal.ops.perturb import condition_on_maximum, gumbel_noise
from chordal.testing import chi_square

Q = np.array([0.5, 0.3, 0.15, 0.05])


def perturbed(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(num, len(Q), generator=generator, dtype=torch.float64)
    return torch.from_numpy(Q).log() + gumbel_noise(uniforms)


def test_the_largest_are_draws_without_replacement_in_order():
    """P(first = i) = q_i and P(second = j | i) = q_j / (1 - q_i)."""
    num = 40_000
    top = perturbed(num).topk(2, dim=1).indices.numpy()
    counts = np.zeros((4, 4), np.int64)
    np.add.at(counts, (top[:, 0], top[:, 1]), 1)
    law = Q[:, None] * Q[None] / (1 - Q[:, None])
    np.fill_diagonal(law, 0)
    assert chi_square(counts, law) > 1e-6


def test_the_other_order_has_another_law():
    top = perturbed(40_000).topk(2, dim=1).indices.numpy()[:, ::-1]
    counts = np.zeros((4, 4), np.int64)
    np.add.at(counts, (top[:, 0], top[:, 1]), 1)
    law = Q[:, None] * Q[None] / (1 - Q[:, None])
    np.fill_diagonal(law, 0)
    assert chi_square(counts, law) < 1e-6


def test_numbers_at_both_ends_give_finite_noise():
    noise = gumbel_noise(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert torch.isfinite(noise).all() and noise[0] < noise[1]


def test_the_maximum_becomes_what_is_wanted_and_the_order_stays():
    given, wanted = perturbed(200), torch.linspace(-20, 5, 200, dtype=torch.float64)
    got = condition_on_maximum(given, wanted)
    assert torch.allclose(got.amax(1), wanted, atol=1e-9, rtol=0)
    assert torch.equal(got.argsort(1), given.argsort(1))


def test_conditioned_variables_have_the_law_of_truncated_ones():
    """-log(exp(-T) - exp(-Z) + exp(-G)), which overflows where it is written like this."""
    given, wanted = perturbed(50), torch.full((50,), 1.5, dtype=torch.float64)
    largest = given.amax(1, keepdim=True)
    plain = -torch.log(torch.exp(-wanted[:, None]) - torch.exp(-largest) + torch.exp(-given))
    assert torch.allclose(condition_on_maximum(given, wanted), plain, atol=1e-8)


def test_what_cannot_be_drawn_stays_so():
    given = perturbed(3)
    given[:, 2] = float("-inf")
    got = condition_on_maximum(given, torch.zeros(3, dtype=torch.float64))
    assert torch.isneginf(got[:, 2]).all()
    assert torch.isfinite(got[:, [0, 1, 3]]).all()
