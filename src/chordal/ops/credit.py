"""Trace credit of tokens that were most likely before (CreditDecoding, arXiv 2510.06133).

Credit is held in a few slots a position, token and value, token -1 for an empty one: only what was
most likely at some step has any, so the slots lose nothing while they suffice. Of K slots the poorest
makes room.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update_credit(
    tokens_NK: Tensor, credit_NK: Tensor, logits_NV: Tensor, *, decay: float, concavity: float
) -> tuple[Tensor, Tensor]:
    """Let credit decay and give the most likely token of each row p^concavity.

    With decay .7 and concavity .2, a token at p = .6 in every step has .9029, 1.5349, 1.9773, 2.2870.

    Args:
        tokens_NK: Token of each slot, int64, -1 for none.
        credit_NK: Its credit, at least 0, in float32 or wider.
        logits_NV: Of this step, before any credit.
        decay: Share that is left (beta).
        concavity: Power of the probability (gamma).

    Returns:
        Tokens and credit after the step.
    """
    best_N1 = logits_NV.argmax(1, keepdim=True)
    probs_N1 = (logits_NV.gather(1, best_N1) - logits_NV.logsumexp(1, keepdim=True)).exp()
    credit_NK = credit_NK * decay
    holds_NK = tokens_NK == best_N1
    # The slot that holds the token, or the poorest one, which starts from nothing.
    slot_N = torch.where(holds_NK.any(1), holds_NK.int().argmax(1), credit_NK.argmin(1))
    is_slot_NK = torch.arange(tokens_NK.shape[1], device=slot_N.device) == slot_N[:, None]
    credit_NK = torch.where(is_slot_NK & ~holds_NK, 0.0, credit_NK)
    return (
        torch.where(is_slot_NK, best_N1, tokens_NK),
        torch.where(is_slot_NK, credit_NK + probs_N1.to(credit_NK.dtype) ** concavity, credit_NK),
    )


def add_credit(logits_NV: Tensor, tokens_NK: Tensor, credit_NK: Tensor, fusion: float) -> Tensor:
    """Add fusion * ln(1 + credit) to the logits of the tokens that have credit (alpha is fusion)."""
    bonus_NK = torch.where(tokens_NK >= 0, fusion * credit_NK.log1p(), 0.0)
    return logits_NV.scatter_add(1, tokens_NK.clamp(min=0), bonus_NK.to(logits_NV.dtype))
