"""Log-linear laws: acceptance by the draft's training tokens and parameters, speed by the batch.

Fitted by ordinary least squares in natural logarithms, never extrapolated in silence. tau counts the tokens
of a verification, the one it draws itself included, so it lies between 1 and num_draft + 1; it bends
towards that bound, so fit rows of one draft length, one temperature and one kind of prompt.

Source: "Scaling Laws for Speculative Decoding" (Scylla, arXiv 2505.07858). Only the form of its laws
is taken; their constants belong to its models.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from chordal.errors import InputError
from chordal.forward import Floats

Term: TypeAlias = tuple[str, ...]  # the variables whose logarithms are multiplied; none for the constant

MIN_POINTS = 4


@dataclass(frozen=True, eq=False)
class Fit:
    """A least-squares fit.

    Attributes:
        coefficients: One for each column.
        errors: Their standard errors.
        r2: Share of the variance that is explained.
        loo_error: Root mean square of what each point is missed by if it is left out of the fit.
        aic: n ln(RSS / n) + 2 k, to choose between fits of the same points; lower is better.
    """

    coefficients: Floats
    errors: Floats
    r2: float
    loo_error: float
    aic: float


def least_squares(x_NK: Floats, y_N: Floats) -> Fit:
    """Fit y = x c.

    Args:
        x_NK: Columns, the constant one among them.
        y_N: Values; more than columns.

    Raises:
        InputError: Too few points, or points that do not tell the columns apart.
    """
    num, width = x_NK.shape
    if num < max(MIN_POINTS, width + 1) or np.linalg.matrix_rank(x_NK) < width:
        raise InputError(
            f"a law of {width} coefficients needs at least {max(MIN_POINTS, width + 1)} points that "
            f"differ in every variable; got {num}."
        )
    inverse_KK = np.linalg.inv(x_NK.T @ x_NK)
    coefficients = inverse_KK @ (x_NK.T @ y_N)
    missed_N = y_N - x_NK @ coefficients
    rss, tss = float(missed_N @ missed_N), float(np.square(y_N - y_N.mean()).sum())
    # Leaving a point out moves the fit by its leverage; no second fit is needed.
    leverage_N = np.einsum("nk,kl,nl->n", x_NK, inverse_KK, x_NK)
    left_out_N = missed_N / np.maximum(1 - leverage_N, 1e-12)
    return Fit(
        coefficients,
        np.sqrt(np.diag(inverse_KK) * rss / (num - width)),
        1 - rss / tss if tss else 1.0,
        float(np.sqrt(np.square(left_out_N).mean())),
        num * float(np.log(max(rss / num, 1e-300))) + 2 * width,
    )


@dataclass(frozen=True, eq=False)
class AcceptanceLaw:
    """tau as a sum of logarithms.

    Attributes:
        terms: What each coefficient multiplies.
        fit: The fit.
        ranges: Smallest and largest value of each variable among the points.
        num_draft: Draft length of the points.
    """

    terms: tuple[Term, ...]
    fit: Fit
    ranges: Mapping[str, tuple[float, float]]
    num_draft: int

    def predict(self, **values: float) -> float:
        """Give tau, within 1 to `num_draft` + 1; warns outside of the range that was fitted.

        Raises:
            InputError: A variable is missing, unknown or not above 0.
        """
        if values.keys() != self.ranges.keys() or min(values.values()) <= 0:
            raise InputError(f"the law needs {' and '.join(self.ranges)}, above 0; got {values}.")
        for name, value in values.items():
            low, high = self.ranges[name]
            if not low <= value <= high:
                warnings.warn(
                    f"{name} = {value:g} lies outside of {low:g} to {high:g}, where the law was fitted.",
                    stacklevel=2,
                )
        columns_1K = _columns(self.terms, {name: np.array([value]) for name, value in values.items()})
        tau = float((columns_1K @ self.fit.coefficients)[0])
        return min(max(tau, 1.0), self.num_draft + 1.0)

    def __str__(self) -> str:
        """Write the formula with standard errors, and how well it fits."""
        fit = self.fit
        parts = [
            " * ".join([f"{value:.4g} (+- {error:.2g})", *(f"ln {name}" for name in term)])
            for value, error, term in zip(fit.coefficients, fit.errors, self.terms, strict=True)
        ]
        return f"tau = {' + '.join(parts)}; R^2 {fit.r2:.4f}, leave-one-out error {fit.loo_error:.3g}"


def fit_acceptance(variables: Mapping[str, Seq[float]], tau: Seq[float], *, num_draft: int) -> AcceptanceLaw:
    """Fit tau = c0 + c1 ln x1 + c2 ln x2 + ..., with products of two logarithms where these lower the AIC.

    Args:
        variables: Values by name, such as training tokens and parameters of the draft, above 0.
        tau: Tokens of a verification, from 1 to `num_draft` + 1.
        num_draft: Draft length that all of them were measured with.

    Raises:
        InputError: A value out of range, or too few points.
    """
    values = {name: np.asarray(value, float) for name, value in variables.items()}
    y_N = np.asarray(tau, float)
    if any(len(value) != len(y_N) or (value <= 0).any() for value in values.values()) or not values:
        raise InputError(f"every variable needs {len(y_N)} values above 0, one for each tau.")
    if len(y_N) and (y_N.min() < 1 or y_N.max() > num_draft + 1):
        raise InputError(
            f"tau must be from 1 to num_draft + 1 = {num_draft + 1}; got {y_N.min():g} to {y_N.max():g}."
        )
    terms: tuple[Term, ...] = ((), *((name,) for name in values))
    fit = least_squares(_columns(terms, values), y_N)
    for pair in itertools.combinations(values, 2):
        more = (*terms, pair)
        try:
            other = least_squares(_columns(more, values), y_N)
        except InputError:  # too few points to ask
            continue
        if other.aic < fit.aic:
            terms, fit = more, other
    ranges = {name: (float(value.min()), float(value.max())) for name, value in values.items()}
    return AcceptanceLaw(terms, fit, ranges, num_draft)


def is_worth_growing(slope: float, tau: float, draft_share: float) -> bool:
    """Whether a draft of more parameters would be faster.

    tau grows by `slope` with each unit of ln N, the draft's part of a cycle in proportion to N: throughput
    rises as long as slope / tau is above that part.

    Args:
        slope: Coefficient of ln N.
        tau: Tokens of a verification now.
        draft_share: Share of a cycle that is spent in the draft, from 0 to 1.
    """
    return slope / tau > draft_share


@dataclass(frozen=True, eq=False)
class BatchLaw:
    """Speed against the batch.

    Attributes:
        fit: Of speed = f + e ln B, over the batches below saturation.
        saturates_at: Smallest batch at which speed departs from that line; None if it never does.
        loses_at: Batch at which drafting stops to be faster than plain decoding, interpolated in ln B; None
            if it does not within the batches given.
    """

    fit: Fit
    saturates_at: int | None
    loses_at: float | None


def fit_batch(
    batches: Seq[int], tokens_per_s: Seq[float], ratios: Seq[float], *, tolerance: float = 0.1
) -> BatchLaw:
    """Fit speed to ln B as far as it is a line, and find where drafting loses.

    Args:
        batches: Ascending, at least `MIN_POINTS`.
        tokens_per_s: Measured speed with drafts at each.
        ratios: How many times as fast as plain decoding that is.
        tolerance: Share of its value by which speed may miss the line through all batches before.

    Raises:
        InputError: Too few batches.
    """
    log_B, speed_B, ratio_B = np.log(batches), np.asarray(tokens_per_s, float), np.asarray(ratios, float)
    x_BK = np.stack([np.ones_like(log_B), log_B], 1)
    num = min(MIN_POINTS, len(log_B))
    fit = least_squares(x_BK[:num], speed_B[:num])
    while num < len(log_B) and abs(x_BK[num] @ fit.coefficients - speed_B[num]) <= tolerance * speed_B[num]:
        num += 1
        fit = least_squares(x_BK[:num], speed_B[:num])
    loses_at: float | None = None
    if below := np.flatnonzero(ratio_B < 1).tolist():
        at = below[0]
        loses_at = float(batches[0])
        if at:
            share = (ratio_B[at - 1] - 1) / (ratio_B[at - 1] - ratio_B[at])
            loses_at = float(np.exp(log_B[at - 1] + share * (log_B[at] - log_B[at - 1])))
    return BatchLaw(fit, int(batches[num]) if num < len(log_B) else None, loses_at)


def _columns(terms: Seq[Term], values: Mapping[str, Floats]) -> Floats:
    num = len(next(iter(values.values())))
    columns = [np.prod([np.log(values[name]) for name in term], axis=0) * np.ones(num) for term in terms]
    return np.stack(columns, 1)
