"""How much of a draft is kept: rules of draft and verify, each a pure function.

A draft of N tokens is judged from left to right and kept up to the first token that is rejected. p is
the law each draft token was drawn from and q that of the target given the draft tokens before it, both
behind temperature and truncation.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def accept_greedy(draft: Ints, best: Ints) -> int:
    """Count the leading draft tokens that are also the target's most likely ones."""
    return _leading(draft == best)


def accept_by_ratio(ratio: Floats, uniforms: Floats) -> int:
    """Count the leading draft tokens whose number in [0, 1) is below their ratio."""
    return _leading(uniforms < ratio)


def acceptance_ratio(draft_N: Tensor, draft_NV: Tensor, target_NV: Tensor, power: float = 1.0) -> Tensor:
    """Give the probability of keeping each draft token x: min(1, (q(x) / p(x))^power).

    With power 1 and `residual` for the first rejected token, what is committed has the law q whatever p
    is (speculative sampling, arXiv 2211.17192, 2302.01318). A lower power keeps more and loses that.

    Args:
        draft_N: Token ids.
        draft_NV: Probabilities p they were drawn with; of a token that was not drawn but taken, 1.
        target_NV: Probabilities q.
        power: Above 0.
    """
    p_N = draft_NV.gather(1, draft_N[:, None])[:, 0].clamp(min=torch.finfo(draft_NV.dtype).tiny)
    q_N = target_NV.gather(1, draft_N[:, None])[:, 0]
    return (q_N / p_N).pow(power).clamp(max=1)


def residual(draft_NV: Tensor, target_NV: Tensor) -> Tensor:
    """Give the law of the token in place of a rejected one: max(q - p, 0), normalized.

    p = .6, .3, .1 and q = .3, .5, .2 give 0, 2/3, 1/3. Where nothing is left, because p = q up to
    rounding, it is q.
    """
    left_NV = (target_NV - draft_NV).clamp(min=0)
    mass_N1 = left_NV.sum(1, keepdim=True)
    return torch.where(mass_N1 > 0, left_NV / mass_N1, target_NV)


def expected_accepted(chances: Floats) -> float:
    """Give the mean number of draft tokens that are kept if each is kept with a chance of its own.

    Chances .9, .8, .5 give .9 + .72 + .36 = 1.98.
    """
    return float(np.cumprod(chances).sum())


def _leading(is_kept: Bools) -> int:
    return len(is_kept) if is_kept.all() else int(np.argmin(is_kept))
