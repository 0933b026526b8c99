"""Figures that follow from counts and times; docs/metrics.md defines each."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# Of the two-sided 95% interval of a normal variable.
_Z95 = 1.959963984540054

# Of AUP: how fast accuracy below the best loses weight, and how far below a method's own first point one
# may lie, in points of a hundred.
_AUP_DECAY = 3.0
_AUP_TOLERANCE = 5.0

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)


class Interval(NamedTuple):
    """Bounds of a share, from 0 to 1."""

    low: float
    high: float


class Spread(NamedTuple):
    """Median and quartiles of a figure that was measured in several rounds."""

    median: float
    low: float
    high: float


def wilson(num_right: int, num: int) -> Interval:
    """Give Wilson's 95% interval of a share.

    With n prompts, a share p of them right, and z = 1.96:
    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).
    It stays inside 0 and 1 and has a width where all or none are right: 8 of 10 gives 0.490 to 0.943.

    Args:
        num_right: From 0 to `num`.
        num: At least 1.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share, z2 = num_right / num, _Z95 * _Z95
    middle = share + z2 / (2 * num)
    half = _Z95 * math.sqrt(share * (1 - share) / num + z2 / (4 * num * num))
    scale = 1 + z2 / num
    return Interval(max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def spread(values: Sequence[float]) -> Spread:
    """Give median and quartiles, interpolated between the values: 1, 2, 3, 4 have 2.5, 1.75 and 3.25.

    Args:
        values: At least one.
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def tokens_per_forward(committed_tokens: int, forwards: int) -> float:
    """Divide total by total; 0 where the target never ran."""
    return committed_tokens / forwards if forwards else 0.0


def acceptance_length(draft_tokens: int, accepted_tokens: int, forwards: int) -> float | None:
    """Give the tokens committed for each verification, None where nothing was drafted."""
    return 1 + accepted_tokens / forwards if draft_tokens and forwards else None


def acceptance_rate(draft_tokens: int, accepted_tokens: int) -> float | None:
    """Give the share of drafted tokens that were kept, None where nothing was drafted."""
    return accepted_tokens / draft_tokens if draft_tokens else None


def aup(points: Iterable[tuple[float, float]], *, ymax: float) -> float:
    """Give a method's accuracy under parallelism: the area under its accuracy by tokens per forward.

    Points sorted by tokens per forward (t_i, y_i), those with y_i < y_1 - 5 left out, and
    W(y) = min(exp(-3 (1 - y / ymax)), 1):
    AUP = t_1 y_1 + sum over i > 1 of (t_i - t_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2.

    Args:
        points: Tokens per forward and accuracy in percent of each setting; at least one.
        ymax: The accuracy in percent that has full weight. As published the best of all methods that are
            compared, so that figures move when a method is added; 100 makes them comparable between runs.

    Source: d3LLM (hao-ai-lab), with the decay of its published code, 3.
    """
    ordered = sorted(points)
    first = ordered[0]
    kept = [point for point in ordered if point[1] >= first[1] - _AUP_TOLERANCE]

    def weighted(accuracy: float) -> float:
        return accuracy * min(math.exp(-_AUP_DECAY * (1 - accuracy / ymax)), 1.0) if ymax else 0.0

    area = first[0] * first[1]
    for (x0, y0), (x1, y1) in itertools.pairwise(kept):
        area += (x1 - x0) * (weighted(y1) + weighted(y0)) / 2
    return area


def student_tail(t: float, freedom: float) -> float:
    """Give the probability that a variable of Student's law is at least `t`.

    The tail is the integral of cos(x)^(freedom - 1) from atan(t / sqrt(freedom)) to pi / 2, divided by
    that from -pi / 2; with 1 degree of freedom the cosine is 1 and the tail of 1.0 is 1/4.

    Args:
        t: Any number.
        freedom: Degrees of freedom, at least 1.
    """
    if t < 0:
        return 1 - student_tail(-t, freedom)
    start = math.atan(t / math.sqrt(freedom))
    half = (math.pi / 2 - start) / 2
    angles = start + half * (_NODES + 1)
    integral = half * float((_WEIGHTS * np.cos(angles) ** (freedom - 1)).sum())
    whole = math.exp(math.lgamma(0.5) + math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    return min(integral / whole, 0.5)


def welch(before: Sequence[float], after: Sequence[float], margin: float = 0.0) -> float:
    """Test whether two means differ by more than a margin, without assuming equal variances.

    Returns:
        Two-sided p-value of "the means differ by at most `margin`": Welch's t of the distance beyond it.

    Args:
        before: At least two values.
        after: At least two values.
        margin: At least 0.

    Source: Welch 1947, "The generalization of Student's problem when several different population
    variances are involved".
    """
    variances = [statistics.variance(values) / len(values) for values in (before, after)]
    beyond = abs(statistics.fmean(after) - statistics.fmean(before)) - margin
    total = sum(variances)
    if total == 0:
        return 0.0 if beyond > 0 else 1.0
    freedom = total**2 / sum(
        variance**2 / (len(values) - 1) for variance, values in zip(variances, (before, after), strict=True)
    )
    return min(1.0, 2 * student_tail(beyond / math.sqrt(total), freedom))


def mcnemar(num_lost: int, num_won: int) -> float:
    """Test whether the same prompts are answered as often before as after.

    Where only one of the two is right, either is as likely if nothing changed, so the counts are those of
    a fair coin: 1 lost and 9 won have 2 (1 + 10) / 2^10 = 0.0215.

    Args:
        num_lost: Prompts right before and wrong after.
        num_won: Prompts wrong before and right after.

    Returns:
        Two-sided exact p-value.

    Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions".
    """
    num, fewer = num_lost + num_won, min(num_lost, num_won)
    tail = sum(math.comb(num, k) for k in range(fewer + 1))
    # Whole numbers, for a power of two beyond what a float can hold.
    return min(1.0, 2 * tail / (1 << num))


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Say which of several hypotheses are rejected, wrongly any one with probability `level` at most.

    The smallest of n p-values must be at most level / n, the next level / (n - 1) and so on, up to the
    first that is not.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    rejected = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for done, index in enumerate(order):
        if p_values[index] > level / (len(order) - done):
            break
        rejected[index] = True
    return rejected
