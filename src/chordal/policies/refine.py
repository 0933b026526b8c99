"""Refinements: what changes the logits of the candidates before tokens and scores are read from them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from chordal.forward import Ints
from chordal.ops.credit import add_credit, update_credit
from chordal.sequence import Sequence


class Refine(Protocol):
    """Changes logits; one that keeps state is made for each sequence anew."""

    def __call__(self, logits_NV: Tensor, positions: Ints, seq: Sequence) -> Tensor:
        """Give other logits for the candidates at these positions; what is given is not changed."""
        ...


class Credit:
    """CreditDecoding (arXiv 2510.06133): what was most likely in earlier steps becomes more so.

    A position has no credit before it is first a candidate, and keeps what it has in steps that do not
    read it. Only the decision is changed, never what the model sees.

    Args:
        fusion: Weight of the credit in the logits (alpha); 0 changes nothing.
        decay: Share of the credit that is left after a step (beta).
        concavity: Power of the probability that is credited (gamma).
        num_slots: Tokens of a position that can hold credit.
    """

    def __init__(self, fusion: float, decay: float, concavity: float, *, num_slots: int = 8) -> None:
        self.fusion, self.decay, self.concavity, self.num_slots = fusion, decay, concavity, num_slots
        self._held: tuple[Tensor, Tensor] | None = None

    def __call__(self, logits_NV: Tensor, positions: Ints, seq: Sequence) -> Tensor:
        """Credit the most likely token of each candidate, then add the credit of all."""
        if self._held is None:
            shape, device = (len(seq.tokens), self.num_slots), logits_NV.device
            empty_TK = torch.full(shape, -1, dtype=torch.int64, device=device)
            self._held = empty_TK, torch.zeros(shape, device=device)
        tokens_TK, credit_TK = self._held
        at_N = torch.from_numpy(positions).to(logits_NV.device)
        tokens_NK, credit_NK = update_credit(
            tokens_TK[at_N], credit_TK[at_N], logits_NV, decay=self.decay, concavity=self.concavity
        )
        tokens_TK[at_N], credit_TK[at_N] = tokens_NK, credit_NK
        return add_credit(logits_NV, tokens_NK, credit_NK, self.fusion)
