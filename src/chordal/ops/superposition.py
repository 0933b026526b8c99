"""Several drafts in one input (Superposed Decoding, arXiv 2405.18400): how they are weighed and told apart.

D is the number of drafts, M of the tokens that may follow, N of the n-gram orders.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]

LOST = -200.0
"""What a draft gets in place of an n-gram score if every continuation is unheard of: it all but dies."""


def blend_weights(scores_D: Floats) -> Floats:
    """Give the share of each draft in the superposed input: the softmax of their log scores."""
    weights_D = np.exp(scores_D - scores_D.max())
    shares_D: Floats = weights_D / weights_D.sum()
    return shares_D


def sharpen(probs_M: Floats, temperature: float) -> Floats:
    """Give log probabilities at another temperature, of the tokens that are left alone.

    Args:
        probs_M: Probabilities at temperature 1, above 0; they need not add up to 1.
        temperature: Above 0.
    """
    z_M = np.log(probs_M) / temperature
    z_M -= z_M.max()
    log_probs_M: Floats = z_M - np.log(np.exp(z_M).sum())
    return log_probs_M


def interpolate(orders_DNM: Floats, weights_N: Floats, log_probs_M: Floats, backoff: float) -> Floats:
    """Mix what n-grams of several orders say, and the model's own law for what none of them knows.

    Args:
        orders_DNM: Probability of each token behind the last 1, 2, .. N tokens of each draft.
        weights_N: Of the orders.
        log_probs_M: The model's law.
        backoff: Its weight.
    """
    mixed_DM: Floats = np.einsum("n,dnm->dm", weights_N, orders_DNM) + backoff * np.exp(log_probs_M)
    return mixed_DM


def draft_scores(log_probs_M: Floats, ngrams_DM: Floats, alpha: float) -> Floats:
    """Score each continuation of each draft: (1 - alpha) log p + alpha log P, `[D, M]`.

    The model's law is the same for all drafts; n-grams alone know which token fits which draft.

    Args:
        log_probs_M: The model's law p, finite.
        ngrams_DM: The n-gram law P of each draft, at least 0.
        alpha: Weight of the n-grams, 0 to 1.
    """
    shape = ngrams_DM.shape
    if alpha == 0:
        return np.broadcast_to(log_probs_M, shape)
    model_DM = np.broadcast_to((1 - alpha) * log_probs_M, shape)
    with np.errstate(divide="ignore"):
        scores_DM = model_DM + alpha * np.log(ngrams_DM)
    is_lost_D1 = np.isneginf(scores_DM).all(1, keepdims=True)
    return np.where(is_lost_D1, model_DM + LOST, scores_DM)
