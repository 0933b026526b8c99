"""When the first finish of several samples is right, how soon it comes, and how many samples to take.

Right and wrong texts have normal lengths of their own. Of n samples the shortest is given, so with the
density f and the share S of texts longer than x,

    accuracy(n)  =  n * integral of share * f_right(x) * S(x)^(n - 1)
    length(n)    =  n * integral of x * f(x) * S(x)^(n - 1)

Where right texts are shorter and spread as wide as wrong ones, more samples are always better. Where they
spread less, the very shortest texts are wrong ones again, and some number of samples is best.

Source: A. Agarwal, A. Sengupta, T. Chakraborty (arXiv 2505.18149), rederived.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from chordal.errors import InputError

Floats = npt.NDArray[np.float64]

# The integrals: this many points over this many standard deviations to both sides.
_NUM_POINTS, _REACH = 4001, 9.0


@dataclass(frozen=True)
class Lengths:
    """How long the samples of a task are.

    Attributes:
        share: Share of samples that are right, between 0 and 1.
        right: Their lengths, in tokens or any other unit.
        wrong: Lengths of the others.
    """

    share: float
    right: NormalDist
    wrong: NormalDist

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.right.stdev == 0 or self.wrong.stdev == 0:
            raise InputError(
                f"the share of right samples must be between 0 and 1 and lengths must spread; got a share of "
                f"{self.share:g} and standard deviations {self.right.stdev:g} and {self.wrong.stdev:g}. "
                f"Take more samples."
            )

    @classmethod
    def fit(cls, lengths: Iterable[float], is_right: Iterable[bool]) -> Lengths:
        """Estimate from graded samples, of which 16 or more of a task are a fair start.

        Raises:
            InputError: There are not two right and two wrong ones.
        """
        graded = list(zip(lengths, is_right, strict=True))
        right = [length for length, good in graded if good]
        wrong = [length for length, good in graded if not good]
        if min(len(right), len(wrong)) < 2:
            raise InputError(
                f"a fit needs at least two right samples and two wrong ones; got {len(right)} and "
                f"{len(wrong)}. Take more samples."
            )
        return cls(len(right) / len(graded), NormalDist.from_samples(right), NormalDist.from_samples(wrong))

    def log_odds(self, length: float) -> float:
        """Give ln P(right) / P(wrong) of a text of some length."""
        z_right, z_wrong = self.right.zscore(length), self.wrong.zscore(length)
        prior = math.log(self.share / (1 - self.share)) + math.log(self.wrong.stdev / self.right.stdev)
        return prior - z_right**2 / 2 + z_wrong**2 / 2

    @property
    def best_length(self) -> float | None:
        """The length that is most likely right; None where shorter (or longer) is always better."""
        right, wrong = self.right, self.wrong
        if right.variance >= wrong.variance:
            return None
        return (right.mean * wrong.variance - wrong.mean * right.variance) / (wrong.variance - right.variance)

    def accuracy(self, num_samples: int) -> float:
        """Give the chance that the shortest of some samples is right."""
        at, right, _, longer = self._curves
        return float(np.trapezoid(num_samples * right * longer ** (num_samples - 1), at))

    def length(self, num_samples: int) -> float:
        """Give the mean length of the shortest of some samples: the latency of a race."""
        at, _, every, longer = self._curves
        return float(np.trapezoid(num_samples * at * every * longer ** (num_samples - 1), at))

    def best_num(self, max_samples: int = 32, *, per: Literal["answer", "step", "token"] = "answer") -> int:
        """Choose the number of samples with the highest accuracy; of equals the smallest.

        Args:
            max_samples: Most samples.
            per: "answer" takes accuracy as it is, "step" divides it by the latency, "token" by the tokens
                of all samples.
        """

        def worth(num: int) -> float:
            cost = {"answer": 1.0, "step": self.length(num), "token": num * self.length(num)}[per]
            return self.accuracy(num) / cost

        return max(range(1, max_samples + 1), key=worth)

    @cached_property
    def _curves(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Give the points, the densities of right and of all texts there, and the share that is longer."""
        both = (self.right, self.wrong)
        low = min(one.mean - _REACH * one.stdev for one in both)
        high = max(one.mean + _REACH * one.stdev for one in both)
        at = np.linspace(low, high, _NUM_POINTS)
        right, wrong = (np.array([one.pdf(x) for x in at.tolist()]) for one in both)
        below_right, below_wrong = (np.array([one.cdf(x) for x in at.tolist()]) for one in both)
        every = self.share * right + (1 - self.share) * wrong
        longer = 1 - self.share * below_right - (1 - self.share) * below_wrong
        return at, self.share * right, every, longer
