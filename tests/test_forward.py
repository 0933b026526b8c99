from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from chordal.forward import Blocks, Causal, Forward, Full, Logits, Together, Tree, Visible, Window

SLOTS = np.array([0, 3, 4, 5])
ROW = np.zeros(1, np.int64)


def spans(sees, slots=SLOTS):
    visible = sees.visible(slots)
    assert visible.own is None
    return [*zip(visible.start.tolist(), visible.end.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("sees", "expected"),
    [
        (Causal(), [(0, 1), (0, 4), (0, 5), (0, 6)]),
        (Window(1), [(0, 1), (3, 4), (4, 5), (5, 6)]),
        (Window(2), [(0, 1), (2, 4), (3, 5), (4, 6)]),
        (Window(100), [(0, 1), (0, 4), (0, 5), (0, 6)]),
        (Full(9), [(0, 9)] * 4),
        (Blocks(1), [(0, 1), (0, 4), (0, 5), (0, 6)]),
        (Blocks(2), [(0, 2), (0, 4), (0, 6), (0, 6)]),
        (Blocks(4), [(0, 4), (0, 4), (0, 8), (0, 8)]),
    ],
)
def test_each_query_sees_a_span_of_slots(sees, expected):
    assert spans(sees) == expected


def test_a_canvas_may_hide_some_of_its_slots():
    visible = Full(9, hidden=np.array([2, 7])).visible(SLOTS)
    assert (visible.end.tolist(), visible.hidden.tolist()) == ([9] * 4, [2, 7])
    assert Full(9).visible(SLOTS).hidden is None


def test_a_node_of_a_tree_sees_the_prefix_and_its_ancestors():
    visible = Tree(7, (-1, 0, 0, 1, 2)).visible(np.arange(7, 12))
    assert visible.start.tolist() == [0] * 5
    assert visible.end.tolist() == [7] * 5
    assert visible.own.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]


def test_a_chain_is_a_tree_of_width_one_and_roots_do_not_see_each_other():
    assert np.array_equal(Tree(0, (-1, 0, 1, 2)).visible(SLOTS).own, np.tri(4, dtype=bool))
    assert np.array_equal(Tree(0, (-1, -1, -1)).visible(SLOTS[:3]).own, np.eye(3, dtype=bool))


@pytest.mark.parametrize(("parents", "row", "parent"), [((0,), 0, 0), ((-1, 2, 1), 1, 2), ((-1, -2), 1, -2)])
def test_a_tree_with_a_parent_behind_its_child_is_refused(parents, row, parent):
    with pytest.raises(ValueError, match=f"before its child; node {row} has parent {parent}$"):
        Tree(3, parents).visible(np.arange(len(parents)))


def test_rows_fed_together_see_each_other_and_no_slot():
    visible = Together().visible(np.arange(20, 23))
    assert (visible.start >= visible.end).all()
    assert visible.own.all()
    assert visible.own.shape == (3, 3)


@pytest.mark.parametrize(
    ("tokens", "positions", "slots"),
    [([], [], None), ([1, 2], [0], [0, 1]), ([1, 2], [0, 1], [0]), ([1], [0, 1], None)],
)
def test_a_forward_needs_as_many_positions_and_slots_as_tokens(tokens, positions, slots):
    given = (
        f"{len(tokens)} tokens, {len(positions)} positions and {'no' if slots is None else len(slots)} slots"
    )
    with pytest.raises(ValueError, match=given):
        Forward(
            np.array(tokens),
            np.array(positions),
            Together(),
            slots=None if slots is None else np.array(slots),
        )


@pytest.mark.parametrize("sees", [Causal(), Window(3), Full(4), Blocks(2)])
def test_a_read_only_forward_needs_a_spec_that_names_rows(sees):
    with pytest.raises(ValueError, match=f"got {type(sees).__name__}"):
        Forward(ROW, ROW, sees)
    assert Forward(ROW, ROW, sees, slots=ROW).slots is ROW


@pytest.mark.parametrize("sees", [Tree(0, (-1,)), Together(), Visible(ROW, ROW, np.ones((1, 1), bool))])
def test_a_read_only_forward_takes_specs_that_name_rows(sees):
    assert Forward(ROW, ROW, sees, Logits(ROW)).slots is None


def test_a_forward_needs_as_many_injected_rows_as_tokens():
    forward = Forward(np.arange(3), np.arange(3), Together(), inject=np.zeros((3, 9)))
    assert forward.inject.shape == (3, 9)
    with pytest.raises(ValueError, match="a forward of 3 tokens needs as many injected rows; got 2"):
        dataclasses.replace(forward, inject=np.zeros((2, 9)))


@pytest.mark.parametrize("shapes", [((3, 2), (3, 3)), ((2, 4), (2, 4)), ((3,), (3,))])
def test_a_forward_needs_as_many_rows_of_blended_tokens_as_tokens(shapes):
    ids, weights = np.zeros(shapes[0], np.int64), np.ones(shapes[1])
    forward = Forward(np.arange(3), np.arange(3), Together(), blend=(np.zeros((3, 5), int), np.ones((3, 5))))
    assert forward.blend[0].shape == (3, 5)
    with pytest.raises(
        ValueError, match="a forward of 3 tokens needs blended tokens and weights of the same"
    ):
        dataclasses.replace(forward, blend=(ids, weights))


def test_a_forward_cannot_change_once_it_is_asked_for():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Forward(ROW, ROW, Causal(), slots=ROW).slots = None
