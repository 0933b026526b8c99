"""Several drafters, of which the first that has something to propose does."""

from __future__ import annotations

from chordal.drafters.draft import NO_DRAFT, Draft, Drafter, Drafting, Outcome
from chordal.forward import Ints


class FirstOf(Drafter):
    """Ask drafters in turn until one proposes something; only that one learns what came of it.

    Args:
        *choices: Each drafter with its longest draft.
    """

    def __init__(self, *choices: tuple[Drafter, int]) -> None:
        self.choices = choices
        self.candidates = max(drafter.candidates for drafter, _ in choices)
        self.chosen: Drafter | None = None

    def propose(self, text: Ints, budget: int) -> Drafting:
        """Propose what the first drafter proposes that knows something."""
        draft: Draft = NO_DRAFT
        for drafter, longest in self.choices:
            self.chosen = drafter
            draft = yield from drafter.ask(text, min(budget, longest))
            if len(draft):
                break
        return draft

    def observe(self, outcome: Outcome) -> None:
        """Tell the drafter whose draft it was."""
        if self.chosen is not None:
            self.chosen.observe(outcome)
