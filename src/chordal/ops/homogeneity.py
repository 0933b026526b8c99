"""Whether two samples can be of one law: Pearson's chi-square test of homogeneity, over many tables."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Ints: TypeAlias = npt.NDArray[np.int64]

MIN_EXPECTED = 5
"""Below this many expected counts the chi-square law is a poor approximation."""


@dataclass(frozen=True, slots=True)
class Homogeneity:
    """Outcome of a test.

    Attributes:
        statistic: Distance of the two samples, in the mean `freedom` if they are of one law.
        freedom: Degrees of freedom; 0 if nothing varied enough to be compared.
        p_value: Probability of a distance at least as large if they are of one law.
    """

    statistic: float
    freedom: int
    p_value: float


def homogeneity(tables: Iterable[Ints]) -> Homogeneity:
    """Test whether the two rows of each table were drawn from one law, which may differ by table.

    Outcomes that expect fewer than five counts in either row are put together, by their sums alone, so
    that what is pooled does not depend on the difference that is tested. Counts 30, 10 and 20, 20 give
    (5^2 / 25 + 5^2 / 15) * 2 * 79/80: a table of n counts has a mean of n / (n - 1) times its freedom.

    Args:
        tables: Counts of each outcome in both samples, int `[2, K]`; of any number of outcomes.
    """
    statistic, freedom = 0.0, 0
    for table_2K in tables:
        pooled_2K = _pool(table_2K)
        num = pooled_2K.sum()
        if pooled_2K.shape[1] < 2:
            continue
        expected_2K = pooled_2K.sum(1, keepdims=True) * pooled_2K.sum(0) / num
        statistic += float(((pooled_2K - expected_2K) ** 2 / expected_2K).sum() * (num - 1) / num)
        freedom += pooled_2K.shape[1] - 1
    return Homogeneity(statistic, freedom, chi_square_tail(statistic, freedom))


def chi_square_tail(statistic: float, freedom: int) -> float:
    """Give the probability that a chi-square variable is at least as large; 1 without freedom."""
    if freedom == 0:
        return 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def count(pairs: Sequence[Iterable[tuple[Hashable, int]]]) -> list[Ints]:
    """Count the outcomes of two samples by context: a table `[2, K]` for each context.

    Args:
        pairs: Of both samples: context and outcome of each observation.
    """
    tables: dict[Hashable, dict[int, list[int]]] = {}
    for row, sample in enumerate(pairs):
        for context, outcome in sample:
            tables.setdefault(context, {}).setdefault(outcome, [0, 0])[row] += 1
    return [np.array(list(columns.values()), np.int64).T for columns in tables.values()]


def branches(samples: Sequence[Iterable[tuple[int, ...]]]) -> list[Ints]:
    """Count what follows each beginning that two samples of texts share: a table `[2, K]` for each.

    The tables of all beginnings together test the joint law of the tokens, as deep as there are texts
    to tell anything.

    Args:
        samples: The texts of both samples, as tokens.
    """
    tables = []
    groups = [([list(texts) for texts in samples], 0)]
    while groups:
        texts, depth = groups.pop()
        following: dict[int, list[list[tuple[int, ...]]]] = {}
        for row, mine in enumerate(texts):
            for text in mine:
                if len(text) > depth:
                    following.setdefault(text[depth], [[], []])[row].append(text)
        if len(following) > 1:
            tables.append(np.array([[len(mine) for mine in both] for both in following.values()]).T)
        # Two outcomes with enough expected counts in both samples need at least this many.
        groups += [
            (both, depth + 1) for both in following.values() if min(map(len, both)) >= 2 * MIN_EXPECTED
        ]
    return tables


def _pool(table_2K: Ints) -> Ints:
    """Put rare outcomes together, and with the next rarest one if they are rare together too."""
    total_K = table_2K.sum(0)
    order_K = np.argsort(total_K, kind="stable")
    needed = MIN_EXPECTED * total_K.sum() / max(1, table_2K.sum(1).min())
    num_rare = int((total_K < needed).sum())
    if num_rare and total_K[order_K[:num_rare]].sum() < needed:
        num_rare += 1
    rare_21 = table_2K[:, order_K[:num_rare]].sum(1, keepdims=True)
    kept_2K = table_2K[:, order_K[num_rare:]]
    return np.concatenate([rare_21, kept_2K], 1) if num_rare else kept_2K
