"""Routes: whether a draft is worth a forward pass that verifies it.

A route with memory is made for each sequence anew and told how every decision turned out. The rules are
those of S2D2 (arXiv 2603.25702).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
from torch import Tensor

from chordal.forward import Floats
from chordal.ops import sampling
from chordal.ops.acceptance import expected_accepted

Estimate: TypeAlias = Literal[
    "entropy_decay", "entropy_limit", "margin_limit", "margin_slope", "confidence_power", "collision"
]

_PUBLISHED_AT: dict[Estimate, float] = {
    "entropy_decay": 1.0,
    "entropy_limit": 0.5,
    "margin_limit": 0.05,
    "margin_slope": 1.0,
    "confidence_power": 0.8,
    "collision": 1.0,
}


@dataclass(frozen=True, slots=True)
class Draft:
    """What is known of a span of drafted tokens before it is verified.

    Attributes:
        probs_SV: Law that each token of the span was drawn from, on the device.
        confidence: Probability of each drafted token, float `[S]`.
        num_confident: Masked positions, the span's and others, that the base rule would commit for
            their confidence.
        block_length: Of the block.
        progress: Share of the block that decoding has committed so far.
    """

    probs_SV: Tensor
    confidence: Floats
    num_confident: int
    block_length: int
    progress: float

    @property
    def entropy(self) -> Floats:
        """Entropy of each law, as a share of the largest possible, float `[S]`."""
        entropy: Floats = sampling.entropy(self.probs_SV).double().cpu().numpy()
        return entropy / math.log(max(2, self.probs_SV.shape[1]))

    @property
    def margin(self) -> Floats:
        """Difference of the two largest probabilities of each law, float `[S]`."""
        margin: Floats = sampling.margin(self.probs_SV).double().cpu().numpy()
        return margin


class Route(Protocol):
    """Decides whether a draft is verified."""

    def __call__(self, draft: Draft) -> bool:
        """Decide."""
        ...

    def learn(self, num_committed: int) -> None:
        """Note how many tokens the step committed that was decided on last."""
        ...


class _Forgetful:
    """A route that learns nothing."""

    def learn(self, num_committed: int) -> None:
        pass


@dataclass(frozen=True)
class Constant(_Forgetful):
    """Verify every draft, or none."""

    verifies: bool

    def __call__(self, draft: Draft) -> bool:  # noqa: D102
        return self.verifies


@dataclass(frozen=True)
class LongSpan(_Forgetful):
    """Verify spans of at least so many tokens."""

    min_span: int

    def __call__(self, draft: Draft) -> bool:  # noqa: D102
        return len(draft.confidence) >= self.min_span


@dataclass(frozen=True)
class Gain:
    """Score a draft: the tokens that verification is expected to keep, less what it costs.

    Attributes:
        estimate: How the chance that a token is kept is estimated.
        at: Parameter of the estimate; None is the published one.
        cost: What verification costs, in tokens (c).
        per_confident: Count the cost for each token that would be committed without verification.
    """

    estimate: Estimate = "entropy_decay"
    at: float | None = None
    cost: float = 1.0
    per_confident: bool = False

    def __call__(self, draft: Draft) -> float:  # noqa: D102
        kept = expected_accepted(chance(draft, self.estimate, self.at))
        return kept - self.cost * (draft.num_confident if self.per_confident else 1)


@dataclass(frozen=True)
class Score(_Forgetful):
    """Verify what scores at least this much."""

    gain: Gain
    min_score: float

    def __call__(self, draft: Draft) -> bool:  # noqa: D102
        return self.gain(draft) >= self.min_score


@dataclass
class Hysteresis(_Forgetful):
    """Begin to verify above one score and go on until it falls below another; off at first."""

    gain: Gain
    on_score: float
    off_score: float
    is_on: bool = False

    def __call__(self, draft: Draft) -> bool:  # noqa: D102
        score = self.gain(draft)
        self.is_on = score >= self.off_score if self.is_on else score > self.on_score
        return self.is_on


@dataclass
class Bandit:
    """Learn what pays: tokens for each forward pass, by the draft's length, progress and entropy.

    Each of the three is low or high; for each of the eight cases the choice with the highest upper
    confidence bound, mean + beta sqrt(ln t / n), is taken. Ties verify.

    Attributes:
        exploration: Weight of what is not known yet (beta).
    """

    exploration: float
    _num_decided: int = 0
    _seen: dict[tuple[int, int, int, bool], tuple[int, float]] = field(default_factory=dict)
    _chosen: tuple[int, int, int, bool] = (0, 0, 0, False)

    def __call__(self, draft: Draft) -> bool:  # noqa: D102
        self._num_decided += 1
        length = (len(draft.confidence) - 1) / max(1, draft.block_length - 1)
        case = _half(length), _half(draft.progress), _half(float(draft.entropy.mean()))
        verifies = self._bound((*case, True)) >= self._bound((*case, False))
        self._chosen = (*case, verifies)
        return verifies

    def learn(self, num_committed: int) -> None:  # noqa: D102
        times, total = self._seen.get(self._chosen, (0, 0.0))
        num_passes = 2 if self._chosen[-1] else 1
        self._seen[self._chosen] = times + 1, total + num_committed / num_passes

    def _bound(self, choice: tuple[int, int, int, bool]) -> float:
        times, total = self._seen.get(choice, (0, 0.0))
        if times == 0:
            return math.inf
        return total / times + self.exploration * math.sqrt(math.log(self._num_decided) / times)


def chance(draft: Draft, estimate: Estimate, at: float | None = None) -> Floats:
    """Estimate the chance that each token of a draft is kept, float `[S]`, from its law alone.

    - entropy_decay: exp(-at h), h the entropy as a share of the largest possible;
    - entropy_limit: 1 where h < at;
    - margin_limit: 1 where the two largest probabilities differ by more than `at`;
    - margin_slope: `at` times that difference, at most 1;
    - confidence_power: the drafted token's probability to the power `at`;
    - collision: the sum of the squared probabilities; `at` has no part in it.

    Args:
        draft: The draft.
        estimate: Which one.
        at: Its parameter; None is the published one: 1, .5, .05, 1, .8.
    """
    if at is None:
        at = _PUBLISHED_AT[estimate]
    chances: Floats
    if estimate == "entropy_decay":
        chances = np.exp(-at * draft.entropy)
    elif estimate == "entropy_limit":
        chances = (draft.entropy < at).astype(np.float64)
    elif estimate == "margin_limit":
        chances = (draft.margin > at).astype(np.float64)
    elif estimate == "margin_slope":
        chances = np.minimum(at * draft.margin, 1)
    elif estimate == "confidence_power":
        chances = draft.confidence**at
    else:
        chances = draft.probs_SV.double().square().sum(1).cpu().numpy()
    return chances


def _half(share: float) -> int:
    """Say whether a share of 1 is in the lower half, 0, or the upper, 1."""
    return int(share >= 0.5)
