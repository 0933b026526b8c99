from __future__ import annotations

import numpy as np
import pytest

from chordal.drafters.draft import Outcome
from chordal.drafters.token_table import TokenTable, TokenTableDrafter
from chordal.forward import Reading
from chordal.ops import tree


def table(rows, k=2):
    made = TokenTable(k)
    for token, candidates in rows.items():
        made.write(np.array([token]), np.array([candidates]))
    return made


def rows(made, tokens, k=2):
    return [made.read(np.full(k, token), np.arange(k)).tolist() for token in tokens]


def test_a_tree_is_filled_with_what_was_likely_behind_each_parent():
    known = table({0: [1, 2], 1: [3, 0], 2: [0, 1], 3: [2, 2]})
    drafter = TokenTableDrafter(known, tree.parse("2/2,1"), 2)
    draft = drafter.propose(np.array([3, 0]), 9)
    assert draft.tokens.tolist() == [1, 2, 3, 0, 0]
    assert draft.parents.tolist() == [-1, -1, 0, 0, 1]


@pytest.mark.parametrize(("budget", "tokens"), [(1, [1, 2]), (2, [1, 2, 3, 0, 0]), (3, [1, 2, 3, 0, 0, 2])])
def test_no_level_is_deeper_than_the_budget(budget, tokens):
    known = table({0: [1, 2], 1: [3, 0], 2: [0, 1], 3: [2, 2]})
    draft = TokenTableDrafter(known, tree.parse("2/2,1/1,0,0"), 2).propose(np.array([0]), budget)
    assert draft.tokens.tolist() == tokens


def test_what_was_never_read_is_left_out_with_all_below_it():
    """Behind 1 nothing is known: its children and their children go, those of 2 stay and are renumbered."""
    known = table({0: [1, 2], 2: [5, 6], 5: [7, 8]})
    drafter = TokenTableDrafter(known, tree.parse("2/1,2/1,1,1/0,1,0"), 2)
    draft = drafter.propose(np.array([0]), 9)
    assert draft.tokens.tolist() == [1, 2, 5, 6, 7]
    assert draft.parents.tolist() == [-1, -1, 1, 1, 2]
    assert len(drafter.propose(np.array([1]), 9)) == len(drafter.propose(np.array([99]), 9)) == 0


def test_every_row_is_learnt_the_last_of_equal_tokens_counts_and_others_stay():
    known = table({4: [9, 8], 6: [1, 0]})
    drafter = TokenTableDrafter(known, tree.parse("2/1,0"), 2)
    draft = drafter.propose(np.array([4]), 9)  # 9, 8; nothing is known behind 9
    candidates = np.array([[8, 9], [4, 5], [4, 9]])
    outcome = Outcome(4, draft, np.array([1]), Reading(tokens=np.array([8, 0, 0]), candidates=candidates))
    drafter.observe(outcome)
    assert rows(known, [4, 9, 8, 6, 7]) == [[8, 9], [4, 5], [4, 9], [1, 0], [-1, -1]]
    known.write(np.array([4, 7, 4, 7]), np.array([[1, 1], [2, 2], [3, 3], [5, 4]]))
    assert rows(known, [4, 7, 9]) == [[3, 3], [5, 4], [4, 5]]


def test_a_vocabulary_smaller_than_a_row_leaves_the_rest_unknown():
    known = table({0: [1, 2]}, k=4)
    assert rows(known, [0], k=4) == [[1, 2, -1, -1]]
    draft = TokenTableDrafter(known, tree.parse("4"), 4).propose(np.array([0]), 1)
    assert draft.tokens.tolist() == [1, 2]


def test_a_table_that_grows_keeps_what_it_knows():
    known = table({token: [token + 1, token + 2] for token in (0, 3, 1000, 7, 70_000)})
    assert rows(known, [0, 3, 1000, 7, 70_000, 69_999]) == [
        [1, 2], [4, 5], [1001, 1002], [8, 9], [70_001, 70_002], [-1, -1],
    ]  # fmt: skip
