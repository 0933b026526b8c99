"""Draws without replacement: each token's log-probability plus noise of its own, and then the largest."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_noise(uniforms: Tensor) -> Tensor:
    """Turn numbers in [0, 1) into standard Gumbel variables, in float64.

    Added to log-probabilities, the k largest sums are k draws without replacement, in the order they would
    be drawn one by one (Gumbel-top-k, arXiv 1903.06059).
    """
    return -torch.log(-torch.log(uniforms.double().clamp(min=2.0**-54)))


def condition_on_maximum(perturbed_NV: Tensor, maximum_N: Tensor) -> Tensor:
    """Turn Gumbel variables into ones whose maximum is known; their order stays, and -inf stays.

    G~ = -log(exp(-T) - exp(-Z) + exp(-G)), where Z is the largest G and T the maximum that is wanted,
    computed without overflow.

    Source: arXiv 1903.06059, appendix B.3.

    Args:
        perturbed_NV: Log-probabilities plus noise, each row on its own.
        maximum_N: What the largest of each row becomes.
    """
    largest_N1, wanted_N1 = perturbed_NV.amax(1, keepdim=True), maximum_N[:, None]
    v_NV = wanted_N1 - perturbed_NV + torch.log1p(-torch.exp(perturbed_NV - largest_N1))
    return wanted_N1 - v_NV.clamp(min=0) - torch.log1p(torch.exp(-v_NV.abs()))
