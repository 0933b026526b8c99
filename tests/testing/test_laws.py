from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.testing import TableModel, chi_square, committed_law, sample_joint, ways_to_draw


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


def test_all_ways_to_draw_are_listed_once_in_order_with_their_probability():
    law = torch.tensor([0.5, 0, 0.3, 0.2], dtype=torch.float64)
    twice = {tuple(tokens.tolist()): chance for tokens, chance in ways_to_draw(law, 2, replace=True)}
    assert len(twice) == 9
    assert twice[0, 0] == pytest.approx(0.25)
    assert twice[2, 0] == pytest.approx(0.15)
    once = {tuple(tokens.tolist()): chance for tokens, chance in ways_to_draw(law, 2, replace=False)}
    assert len(once) == 6
    assert once[2, 0] == pytest.approx(0.3 * 0.5 / 0.7)
    # More than there are: all of them.
    every = list(ways_to_draw(law, 9, replace=False))
    assert {len(tokens) for tokens, _ in every} == {3}
    for ways in (twice.values(), once.values(), [chance for _, chance in every]):
        assert sum(ways) == pytest.approx(1)


def test_the_law_that_is_committed_is_what_is_accepted_and_what_is_owed_behind_the_last():
    """Children 0 and 1, accepted with .5 and then .2; token 2 stands in if neither is."""

    def rule(p_V, q_V, children):
        yield 0.5, torch.zeros(3)
        yield 0.2, torch.tensor([0.0, 0, 1])

    p = torch.full((3,), 1 / 3, dtype=torch.float64)
    law, accepted = committed_law(rule, p, p, [(np.array([0, 1]), 1.0)])
    assert law.tolist() == pytest.approx([0.5, 0.1, 0.4])
    assert accepted == pytest.approx(0.6)
    law, accepted = committed_law(lambda *_: iter(()), p, p, [(np.array([], np.int64), 1.0)])
    assert torch.equal(law, p)
    assert accepted == 0
