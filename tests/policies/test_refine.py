from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.policies.refine import Credit

AT_60 = torch.tensor([[0.6, 0.4]]).log()


def certainty(credit, seq, *positions):
    """The refined probability of the first token at each position, from .6 everywhere."""
    refined = credit(AT_60.expand(len(positions), 2), np.array(positions, np.int64), seq)
    return refined.softmax(1)[:, 0].tolist()


def test_each_position_gathers_its_own_credit_and_keeps_it_while_it_is_not_read(make_sequence):
    seq, credit = make_sequence(), Credit(0.65, 0.7, 0.2)
    first, second, third = 0.6950, 0.7330, 0.7530
    assert certainty(credit, seq, 2, 3) == pytest.approx([first, first], abs=1e-4)
    assert certainty(credit, seq, 3) == pytest.approx([second], abs=1e-4)
    assert certainty(credit, seq) == []
    assert certainty(credit, seq, 2, 3, 9) == pytest.approx([second, third, first], abs=1e-4)


def test_what_is_given_is_not_changed(make_sequence):
    seq, credit, logits = make_sequence(), Credit(0.65, 0.7, 0.2), AT_60.clone()
    credit(logits, np.array([2]), seq)
    assert torch.equal(logits, AT_60)
