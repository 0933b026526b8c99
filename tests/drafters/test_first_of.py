from __future__ import annotations

import numpy as np

from chordal.drafters.draft import Draft, Drafter, Outcome
from chordal.drafters.first_of import FirstOf
from chordal.forward import Causal, Forward


class Knows(Drafter):
    """Proposes so many zeros as it is allowed and knows, at once or after asking a model."""

    def __init__(self, num, *, asks=False, candidates=0):
        self.num, self.asks, self.candidates = num, asks, candidates
        self.budgets, self.seen = [], []

    def propose(self, text, budget):
        self.budgets.append(budget)
        draft = Draft.chain(np.zeros(min(self.num, budget), np.int64))
        return self._ask(draft) if self.asks else draft

    def _ask(self, draft):
        yield Forward(np.array([1]), np.array([0]), Causal(), slots=np.array([0]), model="draft")
        return draft

    def observe(self, outcome):
        self.seen.append(outcome)


def run(drafter, budget=9):
    """Give what it proposes and how many forwards it asks for."""
    coroutine, asked = drafter.propose(np.array([1]), budget), 0
    try:
        next(coroutine)
        while True:
            asked += 1
            coroutine.send(None)
    except StopIteration as stop:
        return len(stop.value), asked


def test_the_first_that_knows_something_proposes_with_its_own_longest_draft():
    first, second = Knows(9), Knows(9, asks=True)
    assert run(FirstOf((first, 4), (second, 6))) == (4, 0)
    assert run(FirstOf((first, 4), (second, 6)), budget=2) == (2, 0)
    assert (first.budgets, second.budgets) == ([4, 2], [])


def test_one_that_knows_nothing_passes_on_even_after_it_has_asked_a_model():
    nothing, last = Knows(0, asks=True), Knows(9, asks=True)
    assert run(FirstOf((nothing, 4), (last, 6))) == (6, 2)
    assert run(FirstOf((nothing, 4), (Knows(0), 6))) == (0, 1)


def test_only_the_one_that_proposed_learns():
    nothing, knows = Knows(0), Knows(3)
    drafter = FirstOf((nothing, 4), (knows, 4))
    run(drafter)
    outcome = Outcome(0, Draft.chain(np.zeros(3, np.int64)), np.arange(1), None)
    drafter.observe(outcome)
    assert (nothing.seen, knows.seen) == ([], [outcome])


def test_it_asks_for_the_most_candidates_any_of_them_wants():
    assert FirstOf((Knows(0, candidates=2), 4), (Knows(0, candidates=5), 4)).candidates == 5
