"""What is proposed for verification: a tree of tokens, and how each of them was chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from chordal.forward import Bools, Floats, Forward, Ints, Reading
from chordal.ops import tree
from chordal.ops.acceptance import Offers, without_replacement


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree of draft tokens behind the last committed token, its root; see `ops.tree`.

    Attributes:
        tokens: Token of each node, int `[n]`.
        parents: Its parent, int `[n]`, -1 for a child of the root.
        laws: Of drawn tokens: for each parent the probabilities `[V]` its children were drawn with, on the
            device. None says that the tokens were chosen, not drawn, and then nothing needs to be
            known of how.
        offers: The acceptance rule that fits the way in which children of one parent were drawn.
        confidence: Probability that the drafter gave each token, float `[n]`, where no laws tell it; only
            shown, never judged by.
    """

    tokens: Ints
    parents: Ints
    laws: Mapping[int, Tensor] | None = None
    offers: Offers = without_replacement
    confidence: Floats | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether no node has a sibling."""
        return bool((self.parents == tree.chain(len(self.parents))).all())

    def cut(self, depth: int) -> Draft:
        """Leave out what is deeper than that."""
        return self if len(self) <= depth else self.keep(tree.depths(self.parents) <= depth)

    def keep(self, stays: Bools) -> Draft:
        """Leave out all nodes but those, bool `[n]`; below a node that is left out nothing may stay."""
        # Parents stand before children, so a node's number only falls by what is left out before it.
        number = np.append(np.cumsum(stays) - 1, -1)
        laws = self.laws
        if laws is not None:
            laws = {int(number[node]): law_V for node, law_V in laws.items() if node < 0 or stays[node]}
        confidence = None if self.confidence is None else self.confidence[stays]
        return Draft(self.tokens[stays], number[self.parents[stays]], laws, self.offers, confidence)

    def known_confidence(self) -> Floats | None:
        """Give the probability that the drafter gave each token; laws are read off the device for it."""
        if self.confidence is not None or self.laws is None:
            return self.confidence
        laws = self.laws
        drawn = zip(self.parents.tolist(), self.tokens.tolist(), strict=True)
        return np.array([float(laws[parent][token]) if parent in laws else np.nan for parent, token in drawn])

    @classmethod
    def chain(cls, tokens: Ints) -> Draft:
        """Make a draft without branches from chosen tokens."""
        return cls(tokens, tree.chain(len(tokens)))


NO_DRAFT = Draft.chain(np.empty(0, np.int64))

# What a drafter runs if it asks a model: a part of a decoder's coroutine that ends with a draft.
Drafting: TypeAlias = Generator[Forward, Any, Draft]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What verification brought.

    Attributes:
        root: The token that was the root.
        draft: What was proposed.
        kept: Nodes that were accepted, from the root's child down, int `[a]`.
        reading: Of the root and of every node, in this order.
    """

    root: int
    draft: Draft
    kept: Ints
    reading: Reading


class Drafter(ABC):
    """Proposes what may come next.

    Attributes:
        candidates: How many of the target's most likely tokens it wants to be shown for each row.
    """

    candidates: int = 0

    @abstractmethod
    def propose(self, text: Ints, budget: int) -> Draft | Drafting:
        """Propose what may follow.

        Args:
            text: The committed tokens, prompt included.
            budget: Longest path that can be of use, at least 1.

        Returns:
            A draft, which may be empty, or a coroutine that gives one if a model must be asked.
        """

    def ask(self, text: Ints, budget: int) -> Drafting:
        """Propose as a coroutine in any case, nothing deeper than the budget, which may be 0 or less."""
        if budget < 1:
            return NO_DRAFT
        proposed = self.propose(text, budget)
        return ((yield from proposed) if isinstance(proposed, Generator) else proposed).cut(budget)

    def observe(self, outcome: Outcome) -> None:  # noqa: B027  not every drafter learns
        """Learn from what became of the draft; called once for each, also for empty ones."""
