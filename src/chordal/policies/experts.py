"""Experts: in which passes the rows of a mixture of experts agree on few of them."""

from __future__ import annotations

from dataclasses import dataclass

from chordal.ops.experts import Routing
from chordal.policies.feed import Block, Plan


@dataclass(frozen=True)
class SharedExperts:
    """Share experts inside a block (DES, arXiv 2602.00879).

    A pass that feeds positions before its block writes keys and values that others rely on, the prompt's
    among them, and has so many rows that few experts cannot serve them: by default it routes as ever.

    Attributes:
        routing: How.
        refresh: Share them in those passes too.
    """

    routing: Routing
    refresh: bool = False

    def __call__(self, plan: Plan, block: Block) -> Routing | None:
        """Give the routing of a pass."""
        return self.routing if self.refresh or plan.positions[0] >= block.start else None
