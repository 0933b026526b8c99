"""Commit rules: which candidates of a step become final.

A rule is a small frozen object called once a step with the `Candidates`; it returns the indices of
those to commit. The formulas are in `ops.unmask`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np

from chordal.forward import Floats, Ints
from chordal.ops import unmask
from chordal.ops.randomness import gumbel
from chordal.sequence import Sequence

Score: TypeAlias = Literal["probs", "margin", "entropy"]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The masked positions of a step with the token proposed for each.

    Attributes:
        positions: Absolute, ascending, int `[r]`.
        tokens: Proposed token of each, int `[r]`.
        scores: What the rule's `reads` asked for, float `[r]` each.
        step: Number of the step in its block, from 0.
        num_at_start: How many positions of the block were masked before its first step.
        seq: The sequence, for its random numbers.
        pass_number: Number of the forward pass in the request, which keys random orders.
    """

    positions: Ints
    tokens: Ints
    scores: Mapping[Score, Floats]
    step: int
    num_at_start: int
    seq: Sequence
    pass_number: int


class CommitRule(Protocol):
    """Decides what to commit; `reads` names the scores it needs, `of` whose distribution they are of."""

    @property
    def reads(self) -> tuple[Score, ...]: ...  # noqa: D102

    @property
    def of(self) -> Literal["model", "law"]: ...  # noqa: D102

    def __call__(self, candidates: Candidates) -> Ints: ...  # noqa: D102


@dataclass(frozen=True)
class Scheduled:
    """Commit a scheduled number each step: LLaDA's rule, and the static rule of block diffusion.

    Attributes:
        num_steps: Steps of a block; its tokens are spread evenly over them, the larger shares first.
        order: "confidence" takes the most probable, "random" any, "left_to_right" the first.
        of: Whose probability confidence is.
        num_tokens: Tokens that are spread; None is the positions masked before the first step.
    """

    num_steps: int
    order: Literal["confidence", "random", "left_to_right"] = "confidence"
    of: Literal["model", "law"] = "model"
    num_tokens: int | None = None

    @property
    def reads(self) -> tuple[Score, ...]:  # noqa: D102
        return ("probs",) if self.order == "confidence" else ()

    def __call__(self, candidates: Candidates) -> Ints:  # noqa: D102
        shares = unmask.split_evenly(self.num_tokens or candidates.num_at_start, self.num_steps)
        return unmask.top(_order_scores(self.order, candidates), int(shares[candidates.step]))


@dataclass(frozen=True)
class Threshold:
    """Commit every candidate at least this confident, or else the most confident ones.

    Attributes:
        threshold: Confidence that suffices.
        at_least: How many are committed in each step of a block whatever their confidence; later
            steps take one. Fast-dLLM (arXiv 2505.22618) takes one, SDAR (2510.06303) the share of its
            static schedule.
        of: Whose probability confidence is.
    """

    threshold: float
    at_least: tuple[int, ...] = ()
    of: Literal["model", "law"] = "model"
    reads: tuple[Score, ...] = ("probs",)

    def __call__(self, candidates: Candidates) -> Ints:  # noqa: D102
        floor = self.at_least[candidates.step] if candidates.step < len(self.at_least) else 1
        return unmask.above_threshold(candidates.scores["probs"], self.threshold, max(1, floor))


@dataclass(frozen=True)
class Factor:
    """Commit as many as are jointly safe: (n + 1) (1 - n-th best confidence) < factor (Fast-dLLM)."""

    factor: float
    of: Literal["model", "law"] = "model"
    reads: tuple[Score, ...] = ("probs",)

    def __call__(self, candidates: Candidates) -> Ints:  # noqa: D102
        return unmask.by_factor(candidates.scores["probs"], self.factor)


@dataclass(frozen=True)
class EntropyBound:
    """Commit the most certain positions while their entropies add up to less than the bound (nats)."""

    bound: float
    of: Literal["model", "law"] = "law"
    reads: tuple[Score, ...] = ("entropy",)

    def __call__(self, candidates: Candidates) -> Ints:  # noqa: D102
        return unmask.within_entropy(candidates.scores["entropy"], self.bound)


@dataclass(frozen=True)
class DreamTimes:
    """Dream's rule (arXiv 2508.15487): a time grid says how many, one of four orders says which.

    Scores are of the law, so temperature and truncation change the order too, as published.

    Attributes:
        num_steps: Steps of the whole canvas.
        order: "origin" commits each position with probability 1 - t'/t; "maskgit_plus" takes the most
            probable, "topk_margin" the largest margins, "entropy" the lowest entropies.
        order_temperature: Above 0, draws without replacement with probability softmax(score / this).
    """

    num_steps: int
    order: Literal["origin", "maskgit_plus", "topk_margin", "entropy"]
    order_temperature: float = 0.0
    of: Literal["model", "law"] = "law"

    @property
    def reads(self) -> tuple[Score, ...]:  # noqa: D102
        by_order: dict[str, tuple[Score, ...]] = {
            "maskgit_plus": ("probs",),
            "topk_margin": ("margin",),
            "entropy": ("entropy",),
        }
        return by_order.get(self.order, ())

    def __call__(self, candidates: Candidates) -> Ints:  # noqa: D102
        times, step = unmask.dream_times(self.num_steps), candidates.step
        if self.order == "origin":
            share = 1.0 if step == self.num_steps - 1 else float(1 - times[step + 1] / times[step])
            noise = candidates.seq.uniforms(candidates.positions, "order", candidates.pass_number)
            return np.flatnonzero(noise < share)
        scores = candidates.scores[self.reads[0]]
        if self.order == "entropy":
            scores = -scores
        if self.order_temperature > 0:
            # Gumbel noise and the top k are a draw without replacement from the softmax.
            noise = gumbel(candidates.seq.seed, candidates.positions, candidates.pass_number)
            scores = scores / self.order_temperature + noise
        return unmask.top(scores, unmask.dream_count(len(scores), step, times))


def _order_scores(order: str, candidates: Candidates) -> Floats:
    if order == "confidence":
        return candidates.scores["probs"]
    if order == "random":
        return candidates.seq.uniforms(candidates.positions, "order", candidates.pass_number)
    return -candidates.positions.astype(np.float64)
