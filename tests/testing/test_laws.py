from __future__ import annotations

import numpy as np
import pytest

from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.testing import TableModel, chi_square, sample_joint


def test_chi_square_gives_known_probabilities():
    # One degree of freedom at 3.841 and two at 5.991 are the 5% points of every table.
    fair = np.array([0.5, 0.5])
    assert chi_square(np.array([500 - 31, 500 + 31]), fair) == pytest.approx(0.0499, abs=1e-3)
    third = np.full(3, 1 / 3)
    assert chi_square(np.array([1000, 1000, 1000]), third) == 1.0
    assert chi_square(np.array([1000 + 45, 1000 - 45, 1000]), third) == pytest.approx(0.132, abs=1e-3)


def test_chi_square_is_0_for_what_cannot_be_and_pools_what_is_rare():
    assert chi_square(np.array([99, 1]), np.array([1.0, 0.0])) == 0
    assert chi_square(np.array([50, 47, 1, 2]), np.array([0.5, 0.47, 0.01, 0.02])) > 0.9
    assert chi_square(np.array([97, 0, 3]), np.array([0.97, 0.03, 0.0])) == 0


def test_sampling_a_slightly_wrong_law_is_caught():
    """Two tokens, 1,500 runs: temperature 1.2 where 1 was promised."""
    model, prompt = TableModel(spread=2), np.array([0, 1])
    counts = sample_joint(make_decoder("autoregressive"), model, prompt, 2, 1500, Law(temperature=1.2))
    assert chi_square(counts, model.joint(prompt, 2, 1.2)) > 1e-6
    assert chi_square(counts, model.joint(prompt, 2)) < 1e-6


def test_the_counts_are_of_whole_continuations():
    model = TableModel(vocab_size=3)
    counts = sample_joint(make_decoder("autoregressive"), model, np.array([0]), 2, 30, Law())
    assert counts.shape == (3, 3)
    assert sorted(counts.ravel().tolist()) == [0] * 8 + [30]
