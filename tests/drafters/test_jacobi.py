from __future__ import annotations

import numpy as np

from chordal.drafters.draft import Outcome
from chordal.drafters.jacobi import JacobiDrafter
from chordal.forward import Reading
from chordal.models.family import Family
from chordal.ops import tree
from chordal.sequence import Sequence, StopRules


def drafter(**settings):
    seq = Sequence(
        prompt=np.array([7]), family=Family(kind="causal"), stop=StopRules(max_new_tokens=50), seed=3
    )
    return JacobiDrafter(seq, **settings)


def paths(draft):
    """Give the tokens of every path from the root to a leaf, sorted."""
    leaves = [node for node in range(len(draft)) if node not in draft.parents]
    return sorted(draft.tokens[tree.path(draft.parents, leaf)].tolist() for leaf in leaves)


def step(drafter, text, model, kept=(), budget=99):
    """Propose behind a text, and let a model that looks at one token tell what follows each."""
    draft = drafter.propose(np.array(text), budget)
    drawn = np.array([model(token) for token in [text[-1], *draft.tokens.tolist()]])
    drafter.observe(Outcome(text[-1], draft, np.array(kept, np.int64), Reading(tokens=drawn)))
    return draft


def plus(n):
    return lambda token: token + n


def test_with_bigrams_the_next_guess_is_what_was_drawn_behind_each_guess():
    jacobi = drafter(window=4, ngram=2)
    first = step(jacobi, [7], plus(10))
    assert first.is_chain
    assert first.tokens.tolist() == [7, 7, 7]  # a text of one token has no other to guess
    # 17 is committed; the draws behind the three guesses stay in place, one further from the text.
    second = step(jacobi, [7, 17], plus(10))
    assert second.tokens[:2].tolist() == [17, 17]
    assert len(second) == 3


def test_accepted_guesses_move_the_window_along():
    jacobi = drafter(window=5, ngram=2)
    step(jacobi, [7], lambda token: 7, kept=[0, 1])
    assert [len(row) for row in jacobi._columns_WN.T] == [3]
    draft = jacobi.propose(np.array([7, 7, 7, 7]), 99)
    assert draft.tokens.tolist() == [7, 7, 7, 7]


def test_the_window_is_a_tree_of_columns():
    """W = 3, N = 4: a chain of heads, and behind each head its column."""
    jacobi = drafter(window=3, ngram=4)
    jacobi._columns_WN = np.array([[0, 20, 30], [11, 21, 31], [12, 22, 32]])
    draft = jacobi.propose(np.array([10]), 99)
    assert paths(draft) == [[11, 12, 22, 32], [11, 21, 31], [20, 30]]


def test_a_column_becomes_an_ngram_that_is_proposed_behind_its_first_token():
    jacobi = drafter(window=3, ngram=4, num_branches=2)
    jacobi._columns_WN = np.array([[0, 20, 30], [11, 21, 31], [12, 22, 32]])
    step(jacobi, [10], plus(10))
    # The columns were 10 20 30, 11 21 31 and 12 22 32, and behind each stands its last token + 10.
    assert [21, 31, 41] in paths(jacobi.propose(np.array([10, 11]), 99))
    assert jacobi._columns_WN[:, 1:].tolist() == [[30, 40], [31, 41], [32, 42]]


def test_the_latest_ngrams_of_a_token_are_kept():
    jacobi = drafter(window=1, ngram=2, num_branches=2)
    for follows in (1, 2, 3, 2, 4):
        step(jacobi, [10], lambda token, follows=follows: follows)
    draft = jacobi.propose(np.array([10]), 99)
    assert draft.tokens.tolist() == [4, 2]
    assert draft.parents.tolist() == [-1, -1]


def test_ngrams_of_the_text_are_proposed_if_asked():
    text = np.array([5, 6, 7, 8, 5])
    for learn_text, branch in ((True, [[6, 7]]), (False, [])):
        jacobi = drafter(window=1, ngram=3, num_branches=4, learn_text=learn_text)
        jacobi._columns_WN = np.array([[0, 99]])
        assert paths(jacobi.propose(text, 99)) == [*branch, [99]]


def test_rejected_guesses_are_tried_again_behind_a_token_they_hold():
    jacobi = drafter(window=4, ngram=2, recycle=1)
    jacobi._columns_WN = np.array([[0], [50], [60], [70]])
    step(jacobi, [10], plus(1))  # drew 11 51 61 71
    jacobi._columns_WN = np.array([[0], [1], [2], [3]])
    assert paths(jacobi.propose(np.array([10, 51]), 99)) == [[1, 2, 3], [61, 71]]
    assert paths(jacobi.propose(np.array([10, 61]), 1)) == [[1], [71]]


def test_nothing_reaches_further_than_it_is_of_use():
    for budget in range(1, 9):
        jacobi = drafter(window=4, ngram=4, num_branches=3, recycle=3, learn_text=True)
        for length in range(4, 9):
            draft = step(jacobi, np.resize([7, 8, 9], length).tolist(), plus(1), budget=budget)
            assert tree.depths(draft.parents).max(initial=0) <= budget


def test_the_same_seed_guesses_the_same():
    text = np.arange(20)
    guesses = [drafter(window=5, ngram=3).propose(text, 99).tokens.tolist() for _ in range(2)]
    assert guesses[0] == guesses[1]
    assert len(set(guesses[0])) > 1
