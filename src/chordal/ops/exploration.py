"""Exploration: which tokens to try at a position, and which of them to keep (ETE, arXiv 2511.21103)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chordal.ops import sampling
from chordal.ops.sampling import Law

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def propose(
    logits_V: Tensor, law: Law, context: Ints, num_prompt: int, num: int, uniform: float
) -> tuple[Ints, Floats]:
    """Give at most `num` different tokens to try at one position, with their probabilities.

    A greedy law gives the most likely ones. Another gives draws at `num` numbers that are evenly spaced
    from `uniform` on, modulo 1: each alone is a draw from the law, the first that of `uniform` itself.
    Tokens of probability .2, .5, .3 at two numbers from .6 on are 1 and 0.

    Args:
        logits_V: Of the position; probabilities are of these, as the law adjusts them.
        law: What tokens are drawn from.
        context: Token ids that penalties are for, those of the prompt first.
        num_prompt: How many of them are the prompt's.
        num: How many, at least 1.
        uniform: In [0, 1).
    """
    [logits_V] = sampling.adjust(logits_V[None], law, [context], num_prompt)
    probs_V = logits_V.softmax(0)
    if law.is_greedy:
        sorted_V = probs_V.sort(descending=True, stable=True)
        tokens_K = sorted_V.indices[:num][sorted_V.values[:num] > 0]  # there may be fewer tokens
    else:
        at_K = (uniform + torch.arange(num, dtype=torch.float64, device=logits_V.device) / num) % 1
        law_KV = sampling.transform(logits_V[None], [law]).expand(num, -1)
        tokens_K = sampling.draw(law_KV, at_K)
    tokens, probs = torch.stack([tokens_K.double(), probs_V[tokens_K].double()]).cpu().numpy()
    first = np.sort(np.unique(tokens, return_index=True)[1])
    return tokens[first].astype(np.int64), probs[first]


def best_branch(probs: Floats, cascades: Ints, weight: float) -> int:
    """Choose the token with the largest log p + weight * (size of its cascade); ties go to the first.

    With weight 1, probabilities .6, .3, .1 and cascades 0, 2, 2 it is the second.

    Args:
        probs: Of each token; all the same for draws, which are as likely as they should be already.
        cascades: How many further positions become certain once it is committed.
        weight: In nats a position (lambda).
    """
    return int(np.argmax(np.log(probs) + weight * cascades))
