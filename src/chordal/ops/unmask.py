"""Which masked positions to commit: schedules and selection rules, each a pure function.

A rule takes scores of the candidates (masked positions, in text order) and returns the indices of
those to commit, best first. Ties go to the lower position, everywhere and on every device.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def split_evenly(total: int, parts: int) -> Ints:
    """Split a number into parts that differ by at most one, the larger ones first.

    LLaDA's schedule of tokens over the steps of a block: 32 over 5 is 7, 7, 6, 6, 6 and 4 over 6 is
    1, 1, 1, 1, 0, 0.
    """
    base, extra = divmod(total, parts)
    return np.array([base + (part < extra) for part in range(parts)], np.int64)


def split_by_weight(total: int, weights: npt.ArrayLike) -> Ints:
    """Split a number in proportion to weights, at least 1 each, by largest remainder.

    Distributes the steps of a canvas over its blocks; equal blocks get equal shares.
    """
    share = total * np.asarray(weights, np.float64) / np.sum(weights)
    parts: Ints = np.maximum(np.floor(share).astype(np.int64), 1)
    by_remainder = np.argsort(-(share - np.floor(share)), kind="stable")
    for index in by_remainder[: max(0, total - int(parts.sum()))]:
        parts[index] += 1
    return parts


def top(scores: Floats, k: int) -> Ints:
    """Take the k highest scores, or all if there are fewer."""
    return np.argsort(-scores, kind="stable")[: max(0, k)]


def above_threshold(scores: Floats, threshold: float, at_least: int = 1) -> Ints:
    """Take every score of at least the threshold, or the `at_least` best if fewer reach it."""
    order: Ints = np.argsort(-scores, kind="stable")
    return order[: max(at_least, int((scores >= threshold).sum()))]


def local_leap(
    scores: Floats, positions: Ints, threshold: float, relaxed_threshold: float, radius: int
) -> Ints:
    """Take every score of at least the threshold, and near those also what reaches the relaxed one.

    LocalLeap (arXiv 2510.07081). Near is within the radius of a candidate that reaches the threshold,
    counted in positions; what passes because it is near makes nothing else near. If nothing reaches
    the threshold the best is taken. With .9, .75 and radius 2, positions 10, 11, 12, 13, 14, 20 with
    scores .95, .8, .7, .78, .92, .88 give 10, 14, 11 and 13.

    Args:
        scores: Of the candidates.
        positions: Of the candidates, ascending.
        threshold: What suffices anywhere (tau).
        relaxed_threshold: What suffices near a candidate that reaches the threshold (tau_r).
        radius: How far near reaches (r).
    """
    order: Ints = np.argsort(-scores, kind="stable")
    anchors = positions[scores >= threshold]
    if not len(anchors):
        return order[:1]
    first, behind = (
        np.searchsorted(anchors, positions - radius),
        np.searchsorted(anchors, positions + radius, side="right"),
    )
    passes = (scores >= threshold) | ((first < behind) & (scores >= relaxed_threshold))
    return order[passes[order]]


def by_factor(scores: Floats, factor: float) -> Ints:
    """Take the longest run of best scores whose n-th satisfies (n + 1) (1 - score) < factor.

    The best is always taken and the first that fails ends the run (Fast-dLLM, arXiv 2505.22618; the
    published code also takes the failing one if it is the last). With factor 1 the second best needs
    2/3, the third 3/4: scores .99, .9, .8, .7 give three.
    """
    order = np.argsort(-scores, kind="stable")
    rank = np.arange(1, len(scores) + 1)
    fails = (rank + 1) * (1 - scores[order]) >= factor
    fails[:1] = False
    return order[: int(np.argmax(fails)) if fails.any() else len(order)]


def within_entropy(entropies: Floats, bound: float) -> Ints:
    """Take the lowest entropies while their sum stays below the bound, at least one."""
    order = np.argsort(entropies, kind="stable")
    return order[: max(1, int((np.cumsum(entropies[order]) < bound).sum()))]


def nearly_independent(entropies: Floats, bound: float) -> Ints:
    """Take the lowest entropies while those before the last add up to at most the bound.

    The sum without its largest term bounds what the taken positions can tell of each other
    (arXiv 2505.24857). The lowest is always taken: bound .5 takes three of .1, .9, .3, .2, and .05 one.
    """
    order = np.argsort(entropies, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(entropies[order])[:-1]])[: len(order)]
    return order[: int((before <= bound).sum())]


def dream_times(num_steps: int, epsilon: float = 1e-3) -> npt.NDArray[np.float32]:
    """Give Dream's time grid, from 1 down to epsilon in `num_steps + 1` points (arXiv 2508.15487)."""
    # torch computes in float32, where numpy would round in the end; a count can hang on the last bit.
    times: npt.NDArray[np.float32] = torch.linspace(1, epsilon, num_steps + 1).numpy()
    return times


def dream_count(num_masked: int, step: int, times: npt.NDArray[np.float32]) -> int:
    """Give how many of the masked positions Dream commits in a step; the last takes the rest.

    Rounded down in float32, as published: 8 positions in 4 steps are 1, 2, 2, 3.
    """
    if step >= len(times) - 2:
        return num_masked
    return int(np.float32(num_masked) * (1 - times[step + 1] / times[step]))
