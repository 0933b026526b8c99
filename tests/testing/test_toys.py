from __future__ import annotations

import itertools

import numpy as np
import pytest

from chordal.forward import Causal, Forward, Full, Logits, Sample, Together, Visible
from chordal.models.family import Family
from chordal.testing import UNSEEN, TableModel, ToyModel


class Remembers(ToyModel):
    """Notes every view it is asked about."""

    def __init__(self, **family):
        super().__init__(Family(**family), 10, window=6, max_rows=2)
        self.asked = []

    def logits(self, position, view):
        self.asked.append((position, view.tolist()))
        return np.arange(10.0)


def ints(*values):
    return np.array(values, np.int64)


def feed(tokens, positions, sees, slots=None, rows=None):
    read = Logits(np.arange(len(tokens)) if rows is None else ints(*rows))
    slots = None if slots is None else ints(*slots)
    return Forward(ints(*tokens), ints(*positions), sees, read, slots=slots)


def test_a_toy_shows_each_query_what_its_request_lets_it_see():
    toy = Remembers()
    toy.run([(0, feed([4, 5, 6], [0, 1, 2], Causal(), slots=[0, 1, 2]))])
    toy.run([(0, feed([7], [1], Full(3), slots=[1]))])
    other = Visible(ints(0), ints(1), np.eye(1, dtype=bool))
    toy.run([(0, feed([8], [3], other)), (1, feed([9], [0], Causal(), slots=[0]))])
    toy.run([(0, feed([2], [0], Full(3, ints(1)), slots=[0]))])
    none = UNSEEN
    assert toy.asked == [
        (0, [4, none, none, none, none, none]),
        (1, [4, 5, none, none, none, none]),
        (2, [4, 5, 6, none, none, none]),
        (1, [4, 7, 6, none, none, none]),
        (3, [4, none, none, 8, none, none]),
        (0, [9, none, none, none, none, none]),
        (0, [2, none, 6, none, none, none]),
    ]


def test_read_only_requests_of_a_row_do_not_see_each_other_and_leave_nothing():
    toy = Remembers()
    toy.run([(0, feed([4], [0], Causal(), slots=[0]))])
    toy.run([(0, feed([5, 6], [0, 1], Together())), (0, feed([7, 8], [0, 1], Together()))])
    assert [view[:2] for _, view in toy.asked[1:]] == [[5, 6], [5, 6], [7, 8], [7, 8]]
    with pytest.raises(AssertionError, match=r"sees slots \[1, 2\], to which nothing was written"):
        toy.run([(0, feed([4], [0], Full(3), slots=[0]))])


def test_a_query_that_sees_an_empty_slot_or_a_position_twice_fails():
    with pytest.raises(AssertionError, match="to which nothing was written"):
        Remembers().run([(0, feed([4], [3], Causal(), slots=[3]))])
    with pytest.raises(AssertionError, match="two tokens at one position"):
        Remembers().run([(0, feed([4, 5], [0, 0], Full(2), slots=[0, 1]))])


def test_a_toy_refuses_to_blend_tokens():
    blend = np.array([[1, 2]]), np.array([[0.5, 0.5]])
    asked = Forward(ints(1), ints(0), Causal(), Logits(ints(0)), slots=ints(0), blend=blend)
    with pytest.raises(NotImplementedError, match="cannot blend several"):
        TableModel().run([(0, asked)])


def test_rows_of_a_toy_move_and_are_freed():
    toy = Remembers()
    toy.run([(1, feed([4], [0], Causal(), slots=[0]))])
    toy.move_row(1, 0)
    toy.free_row(1)
    toy.run([(0, feed([5], [1], Causal(), slots=[1]))])
    assert toy.asked[-1][1][:2] == [4, 5]
    with pytest.raises(AssertionError, match="nothing was written"):
        toy.run([(1, feed([5], [1], Causal(), slots=[1]))])


def test_no_toy_predicts_the_mask_token():
    toy = Remembers(kind="masked", mask_id=9, shift=0)
    [reading] = toy.run([(0, Forward(ints(9), ints(0), Full(1), Sample(ints(0)), slots=ints(0)))])
    assert reading.tokens.tolist() == [8]


def test_a_table_model_refuses_a_context_that_is_not_the_text():
    model = TableModel()
    model.run([(0, feed([0, 1, 2], [0, 1, 2], Causal(), slots=[0, 1, 2]))])
    for sees, position in ((Full(3), 1), (Visible(ints(1), ints(3)), 2)):
        with pytest.raises(AssertionError, match="sees the positions"):
            model.run([(0, feed([2], [position], sees, slots=[position]))])


def test_the_joint_law_of_a_table_is_the_product_of_its_conditionals():
    model, prompt = TableModel(vocab_size=3, seed=1), ints(2, 0)
    joint = model.joint(prompt, 3, temperature=0.5)
    assert joint.shape == (3, 3, 3)
    assert joint.sum() == pytest.approx(1)
    for a, b, c in itertools.product(range(3), repeat=3):
        chance = 1.0
        for before, last, token in ((2, 0, a), (0, a, b), (a, b, c)):
            z = model.table_VVV[before, last] / 0.5
            chance *= np.exp(z[token]) / np.exp(z).sum()
        assert joint[a, b, c] == pytest.approx(chance)
    assert model.joint(ints(1), 1).tolist() == pytest.approx(
        (np.exp(model.table_VVV[3, 1]) / np.exp(model.table_VVV[3, 1]).sum()).tolist()
    )
