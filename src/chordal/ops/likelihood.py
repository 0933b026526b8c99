"""Log-likelihoods: what a model gives to known tokens, and how many to hide where it has to be estimated."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def token_logprobs(logits_NV: Tensor, tokens: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Score one known token at each row.

    Args:
        logits_NV: Raw logits, float32 or wider.
        tokens: The token of each row, int `[N]`.

    Returns:
        Its log-probability in nats, `[N]`, and whether no token is more likely, bool `[N]`.
    """
    given_N = logits_NV.gather(1, torch.from_numpy(tokens).to(logits_NV.device)[:, None])[:, 0]
    return given_N - logits_NV.logsumexp(1), given_N == logits_NV.amax(1)


def mask_counts(length: int, num_samples: int, offset: float) -> npt.NDArray[np.int64]:
    """Say how many of some tokens each sample of a masked-diffusion likelihood hides.

    Systematic sampling: one random number for all samples, spread evenly over 1 to `length`, so each count
    alone is uniform and together they cover the range. 4 samples of 8 tokens at offset 0.1: 1 3 5 7.

    Source: LLaDA (Nie et al. 2025, arXiv 2502.09992), Algorithm 3, with the spreading of its published
    evaluation; the offset is a real number there rounded to a count, which gives the same law.

    Args:
        length: Tokens that may be hidden, at least 1.
        num_samples: At least 1.
        offset: From 0 to below 1, uniform.
    """
    spread = (offset + np.arange(num_samples) / num_samples) % 1
    return np.minimum(spread * length, length - 1).astype(np.int64) + 1
