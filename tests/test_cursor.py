from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.cursor import Cursor
from chordal.drafters.draft import NO_DRAFT, Draft
from chordal.forward import Forward, Logits
from chordal.ops import tree
from chordal.testing import random_prompt, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(window=96)


def cold(model, text):
    """The logits behind the last token of a text, from an empty row."""
    positions = np.arange(len(text))
    model.free_row(3, clear=True)
    [reading] = model.run([(3, Cursor().feed(np.asarray(text)).logits())])
    assert len(positions) == len(text)
    return reading.logits[-1]


def random_draft(rng, num, vocab=29):
    parents = np.array([int(rng.integers(-1, node)) for node in range(num)], np.int64)
    return Draft(rng.integers(0, vocab, num), parents)


def test_only_what_is_not_cached_is_fed(model):
    cursor, text = Cursor(), random_prompt(9)
    for end, fed in ((5, 5), (6, 1), (9, 3), (7, 1), (9, 2)):
        feed = cursor.feed(text[:end])
        assert len(feed.forward.tokens) == fed
        assert feed.following.tolist() == [end]


def test_a_text_that_changes_is_fed_from_where_it_differs():
    cursor, text = Cursor(), random_prompt(9)
    cursor.feed(text)
    changed = text.copy()
    changed[6] = (changed[6] + 1) % 29
    assert cursor.feed(changed).forward.positions.tolist() == [6, 7, 8]


def test_a_read_of_several_tokens_feeds_them_again():
    cursor, text = Cursor(), random_prompt(9)
    cursor.feed(text)
    feed = cursor.feed(text, num_read=3)
    assert feed.forward.positions.tolist() == [6, 7, 8]
    assert (feed.rows.tolist(), feed.following.tolist()) == ([0, 1, 2], [7, 8, 9])


@pytest.mark.parametrize("seed", range(6))
def test_after_every_step_the_cache_is_that_of_a_cold_text(model, seed):
    """Random trees of which random paths become text: what follows is as if nothing else had been fed."""
    rng = np.random.default_rng(seed)
    model.free_row(0, clear=True)
    cursor, text = Cursor(), random_prompt(4, seed)
    for _ in range(6):
        draft = random_draft(rng, int(rng.integers(0, 8)))
        [reading] = model.run([(0, cursor.feed(text, draft).logits())])
        node = int(rng.integers(-1, len(draft)))
        for row, leaf in enumerate([-1, *range(len(draft))]):
            want = cold(model, np.concatenate([text, draft.tokens[tree.path(draft.parents, leaf)]]))
            assert torch.allclose(reading.logits[row], want, atol=1e-9)
        path = tree.path(draft.parents, node)
        text = np.concatenate([text, draft.tokens[path], rng.integers(0, 29, 1)])


def test_accepted_rows_are_moved_and_not_fed_again(model):
    cursor, text = Cursor(), random_prompt(4)
    draft = Draft(np.array([1, 2, 3, 4]), np.array([-1, -1, 1, 2]))
    cursor.feed(text, draft)
    feed = cursor.feed(np.concatenate([text, [2, 3, 4, 9]]))
    assert [part.tolist() for part in feed.forward.moves] == [[5, 6, 7], [4, 5, 6]]
    assert feed.forward.positions.tolist() == [7]


def test_without_the_moves_the_cache_is_wrong(model):
    """The check above would notice."""
    model.free_row(0, clear=True)
    cursor, text = Cursor(), random_prompt(4)
    draft = Draft(np.array([1, 2, 3]), np.array([-1, -1, 1]))
    model.run([(0, cursor.feed(text, draft).logits())])
    longer = np.concatenate([text, [2, 3, 9]])
    ask = cursor.feed(longer).forward
    stale = Forward(ask.tokens, ask.positions, ask.sees, Logits(np.array([0])), slots=ask.slots)
    [reading] = model.run([(0, stale)])
    assert not torch.allclose(reading.logits[0], cold(model, longer), atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_a_tree_that_grows_level_by_level_is_the_tree_fed_at_once(model, seed):
    rng = np.random.default_rng(seed)
    text, whole = random_prompt(5, seed), random_draft(rng, 9)
    order = np.argsort(tree.depths(whole.parents), kind="stable")
    number = np.append(np.argsort(order), -1)
    whole = Draft(whole.tokens[order], number[whole.parents[order]])
    model.free_row(0, clear=True)
    [want] = model.run([(0, Cursor().feed(text, whole).logits())])

    model.free_row(0, clear=True)
    cursor = Cursor()
    got = [model.run([(0, cursor.feed(text).logits())])[0].logits]
    depths = tree.depths(whole.parents)
    for depth in range(1, depths.max() + 1):
        num = int((depths <= depth).sum())
        feed = cursor.grow(Draft(whole.tokens[:num], whole.parents[:num]))
        assert len(feed.rows) == (depths == depth).sum()
        got.append(model.run([(0, feed.logits())])[0].logits)
    assert torch.allclose(torch.cat(got), want.logits, atol=1e-9)


def test_contexts_are_what_precedes_each_row():
    cursor, text = Cursor(), np.array([5, 6, 7])
    draft = Draft(np.array([1, 2, 3]), np.array([-1, 0, 0]))
    feed = cursor.feed(text, draft, num_read=2)
    assert [context.tolist() for context in feed.contexts] == [
        [5, 6],
        [5, 6, 7],
        [5, 6, 7, 1],
        [5, 6, 7, 1, 2],
        [5, 6, 7, 1, 3],
    ]
    grown = cursor.grow(Draft(np.array([1, 2, 3, 4]), np.array([-1, 0, 0, 2])))
    assert [context.tolist() for context in grown.contexts] == [[5, 6, 7, 1, 3, 4]]


def test_a_draft_is_cut_at_a_depth_with_what_belongs_to_it():
    laws = {-1: torch.ones(3), 0: torch.zeros(3), 2: torch.ones(3)}
    draft = Draft(np.array([1, 2, 3, 4, 5]), np.array([-1, 0, -1, 2, 3]), laws)
    cut = draft.cut(1)
    assert (cut.tokens.tolist(), cut.parents.tolist()) == ([1, 3], [-1, -1])
    assert {node: int(law.sum()) for node, law in cut.laws.items()} == {-1: 3, 0: 0, 1: 3}
    assert draft.cut(3).parents.tolist() == [-1, 0, -1, 2, 3]
    assert len(draft.cut(0)) == len(NO_DRAFT) == 0
