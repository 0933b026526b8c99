"""Coherence: which predictions stay confident and the same while the canvas changes.

CCD (arXiv 2512.02044) commits from a pool of the most confident positions what was in the pools of
earlier steps too. Its code compares the most likely tokens of two steps; its paper averages the laws of
several, so that H(mean) = mean H + what the law still depends on the context.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]

# Steps at the beginning whose pool is one position.
_NUM_SMALL_POOLS = 4


def pool_size(size: int, step: int, num_left: int, num_at_start: int, limit: int) -> int:
    """Give how many positions the pool of a step has (V), from that of the step before.

    One in the first four steps, then one more in each, up to a limit; as long as a tenth of the
    positions or fewer are left, two.
    """
    if step < _NUM_SMALL_POOLS:
        return 1
    if 10 * num_left <= num_at_start:
        size = 1
    return min(size + 1, limit)


def coherent(
    positions: Ints, tokens: Ints, pooled: Mapping[int, int], num_tokens: int, num_pooled: int, *, all_: bool
) -> Ints:
    """Take what the pool of the step before held with the same token, or else the most confident.

    That is done if one of the `num_tokens` most confident positions was in that pool, whatever its
    token, and at least `num_tokens` agree. With a pool of 5: b and 6: c, of the positions 5, 6, 7 with
    tokens a, c, d the second alone is taken: the first is rejected, because its token has changed.

    Args:
        positions: Candidates, the most confident first.
        tokens: The most likely token of each.
        pooled: Token of each position of the pool of the step before.
        num_tokens: How many are committed in a plain step (b).
        num_pooled: Size of the pool now (V).
        all_: Take all that agree, rather than the first `num_tokens`.

    Returns:
        Indices into the candidates.
    """
    places = positions.tolist()
    if any(position in pooled for position in places[:num_tokens]):
        agree = [
            at for at in range(min(num_pooled, len(places))) if pooled.get(places[at]) == int(tokens[at])
        ]
        if len(agree) >= num_tokens:
            return np.array(agree if all_ else agree[:num_tokens], np.int64)
    return np.arange(min(num_tokens, len(places)))


def mean_laws(
    positions: Ints, probs_NV: Tensor, history: Iterable[tuple[Ints, Tensor]]
) -> tuple[Ints, Tensor]:
    """Average the law of each position over this step and the earlier ones whose pool had it.

    Args:
        positions: Candidates of this step.
        probs_NV: Their laws.
        history: Pool of each earlier step, with its laws.

    Returns:
        Indices of the positions that some earlier pool had, and the mean law `[n, V]` of each.
    """
    sum_NV, num_N = probs_NV.clone(), np.ones(len(positions), np.int64)
    for then, then_NV in history:
        _, now_at, then_at = np.intersect1d(positions, then, assume_unique=True, return_indices=True)
        sum_NV[now_at.tolist()] += then_NV[then_at.tolist()]
        num_N[now_at] += 1
    kept = np.flatnonzero(num_N > 1)
    return kept, (sum_NV / torch.from_numpy(num_N).to(sum_NV)[:, None])[kept.tolist()]
