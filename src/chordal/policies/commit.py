"""Commit rules: which candidates of a step become final.

A rule is a small object called once a step with the `Candidates`; it returns the indices of those to
commit, and may put other tokens in their place. One that keeps state is made for each block of each
sequence anew. The formulas are in `ops.unmask` and `ops.coherence`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from chordal.errors import InputError
from chordal.forward import Floats, Ints, Reading, Sample, Score
from chordal.models.reading import read_logits
from chordal.ops import coherence, unmask
from chordal.ops.randomness import gumbel
from chordal.ops.sampling import adjust
from chordal.sequence import UNCOMMITTED, Sequence

Wanted: TypeAlias = Score | Literal["logits"]
Order: TypeAlias = Literal["confidence", "margin", "entropy", "random", "left_to_right"]

_ORDER_READS: dict[Order, tuple[Score, ...]] = {
    "confidence": ("probs",),
    "margin": ("margin",),
    "entropy": ("entropy",),
    "random": (),
    "left_to_right": (),
}

# CCD's code compares no earlier than this step.
_NUM_PLAIN_STEPS = 5


@dataclass(slots=True)
class Candidates:
    """The masked positions of a step with the token proposed for each.

    Attributes:
        positions: Absolute, ascending, int `[r]`.
        tokens: Proposed token of each, int `[r]`; a rule may change them.
        scores: What the rule's `reads` asked for: float `[r]` each, and "logits" as a device tensor
            `[r, V]`, in float32 or wider and before the request's law but for what is banned.
        step: Number of the step in its block, from 0.
        num_at_start: How many positions of the block were masked before its first step.
        seq: The sequence, for its random numbers.
        pass_number: Number of the forward pass in the request, which keys random orders.
    """

    positions: Ints
    tokens: Ints
    scores: Mapping[str, Any]
    step: int
    num_at_start: int
    seq: Sequence
    pass_number: int


class CommitRule(Protocol):
    """Decides what to commit; `reads` names the scores it needs, `of` whose distribution they are of."""

    @property
    def reads(self) -> tuple[Wanted, ...]: ...  # noqa: D102

    @property
    def of(self) -> Literal["model", "law"]: ...  # noqa: D102

    def __call__(self, candidates: Candidates) -> Ints: ...  # noqa: D102


@dataclass(frozen=True)
class Scheduled:
    """Commit a scheduled number each step: LLaDA's rule, and the static rule of block diffusion.

    Attributes:
        num_steps: Steps of a block; its tokens are spread evenly over them, the larger shares first.
            Where a feed offered fewer, later steps take one.
        order: "confidence" takes the most probable, "margin" the largest lead over the second most
            probable, "entropy" the lowest, "random" any, "left_to_right" the first.
        of: Whose probabilities these are.
        num_tokens: Tokens that are spread; None is the positions masked before the first step.
    """

    num_steps: int
    order: Order = "confidence"
    of: Literal["model", "law"] = "model"
    num_tokens: int | None = None

    @property
    def reads(self) -> tuple[Score, ...]:  # noqa: D102
        return _ORDER_READS[self.order]

    def __call__(self, candidates: Candidates) -> Ints:  # noqa: D102
        shares = unmask.split_evenly(self.num_tokens or candidates.num_at_start, self.num_steps)
        share = int(shares[candidates.step]) if candidates.step < self.num_steps else 1
        return unmask.top(_order_scores(self.order, candidates), share)


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
class LocalLeap:
    """Commit what is confident, and what is less so beside it (LocalLeap, arXiv 2510.07081).

    Attributes:
        threshold: Confidence that suffices anywhere.
        relaxed_threshold: Confidence that suffices near a candidate that reaches the threshold now.
        radius: How many positions near is.
        of: Whose probability confidence is.
    """

    threshold: float
    relaxed_threshold: float
    radius: int
    of: Literal["model", "law"] = "model"
    reads: tuple[Score, ...] = ("probs",)

    def __post_init__(self) -> None:
        if self.relaxed_threshold > self.threshold:
            raise InputError(
                f"relaxed_threshold must be at most threshold; got {self.relaxed_threshold} and "
                f"{self.threshold}."
            )

    def __call__(self, candidates: Candidates) -> Ints:  # noqa: D102
        return unmask.local_leap(
            candidates.scores["probs"],
            candidates.positions,
            self.threshold,
            self.relaxed_threshold,
            self.radius,
        )


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
class NearIndependent:
    """Commit the most certain while what they can tell of each other is bounded (arXiv 2505.24857).

    Attributes:
        bound: What the entropies (nats) of all but the least certain may add up to.
        of: Whose entropy it is.
    """

    bound: float
    of: Literal["model", "law"] = "law"
    reads: tuple[Score, ...] = ("entropy",)

    def __call__(self, candidates: Candidates) -> Ints:  # noqa: D102
        return unmask.nearly_independent(candidates.scores["entropy"], self.bound)


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


class Coherent:
    """Commit what stays confident with its token from one step to the next (CCD, arXiv 2512.02044).

    The rule of the published code: a pool of the most confident positions, which grows, is compared with
    that of the step before. The first five steps and the last are plain.

    Args:
        num_steps: Steps of a block; each plain one commits an even share, rounded down, at least one.
        adaptive: Commit all that agree (CCD-DS), rather than the share of a plain step (CCD).
        expand_ratio: By how many shares the pool may exceed one.
        order: What confidence is.
        of: Whose it is.
        is_greedy: Whether proposed tokens are the most likely ones; else logits tell which are.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        adaptive: bool = True,
        expand_ratio: float = 4.0,
        order: Order = "entropy",
        of: Literal["model", "law"] = "law",
        is_greedy: bool = True,
    ) -> None:
        self.num_steps, self.adaptive, self.expand_ratio = num_steps, adaptive, expand_ratio
        self.order, self.is_greedy = order, is_greedy
        self.of: Literal["model", "law"] = of
        self.reads: tuple[Wanted, ...] = (*_ORDER_READS[order], *(() if is_greedy else ("logits",)))
        self._pool_size = 1
        self._pooled: dict[int, int] = {}

    def __call__(self, candidates: Candidates) -> Ints:  # noqa: D102
        positions, step, ids = candidates.positions, candidates.step, candidates.tokens
        if not self.is_greedy:
            ids = candidates.scores["logits"].argmax(1).cpu().numpy()
        ranked = unmask.top(_order_scores(self.order, candidates), len(positions))
        num = max(1, candidates.num_at_start // self.num_steps)
        limit = num + int(num * self.expand_ratio)
        self._pool_size = coherence.pool_size(
            self._pool_size, step, len(positions), candidates.num_at_start, limit
        )

        chosen = ranked[:num]
        if _NUM_PLAIN_STEPS <= step < self.num_steps - 1:
            agreed = coherence.coherent(
                positions[ranked], ids[ranked], self._pooled, num, self._pool_size, all_=self.adaptive
            )
            chosen = ranked[agreed]
        pool = ranked[~np.isin(ranked, chosen)][: self._pool_size]
        self._pooled = dict(zip(positions[pool].tolist(), ids[pool].tolist(), strict=True))
        return chosen


class Averaged:
    """Commit by the laws averaged over the last steps (CCD, arXiv 2512.02044).

    The rule of the paper: candidates are the most confident positions that were in the pool of an earlier
    step too, and their averaged law gives token and confidence. Where there are too few the step is plain.

    Args:
        num_steps: Steps of a block; each plain one commits an even share, rounded down, at least one.
        history_length: Earlier steps whose pools are kept (d).
        pool_size: Most confident positions of a step (V), at least a plain step's share.
        adaptive: Commit all candidates whose averaged law has at most `max_entropy` (CCD-DS).
        max_entropy: In nats.
        order: What confidence is.
    """

    of: Literal["model", "law"] = "model"

    def __init__(
        self,
        num_steps: int,
        *,
        history_length: int = 3,
        pool_size: int = 4,
        adaptive: bool = True,
        max_entropy: float = 0.3,
        order: Order = "entropy",
    ) -> None:
        self.num_steps, self.pool_size, self.order = num_steps, pool_size, order
        self.max_entropy = max_entropy if adaptive else -np.inf
        self.reads: tuple[Wanted, ...] = (*_ORDER_READS[order], "logits")
        self._history: deque[tuple[Ints, Tensor]] = deque(maxlen=history_length)

    def __call__(self, candidates: Candidates) -> Ints:  # noqa: D102
        num = max(1, candidates.num_at_start // self.num_steps)
        size = max(num, self.pool_size)
        # What is committed comes from the first `size`, so the next pool is among twice as many.
        ranked = unmask.top(_order_scores(self.order, candidates), 2 * size)
        positions, laws_NV = candidates.positions[ranked], _laws(candidates, ranked)

        chosen = np.arange(min(num, len(ranked)))
        kept, mean_NV = coherence.mean_laws(positions[:size], laws_NV[:size], self._history)
        if len(kept) >= num:
            mean = self._read(candidates, positions[kept], mean_NV)
            candidates.tokens[ranked[kept]] = mean.tokens
            best = unmask.top(mean.probs if self.order == "confidence" else -mean.entropy, len(kept))
            chosen = kept[best[(np.arange(len(best)) < num) | (mean.entropy[best] <= self.max_entropy)]]
        pool = np.delete(np.arange(len(ranked)), chosen)[:size]
        self._history.append((positions[pool], laws_NV[pool.tolist()]))
        return ranked[chosen]

    def _read(self, candidates: Candidates, positions: Ints, mean_NV: Tensor) -> Reading:
        """Read tokens from averaged laws, which are adjusted already."""
        law, uniforms = candidates.seq.law.unadjusted, None
        if not law.is_greedy:
            uniforms = candidates.seq.uniforms(positions, "token", candidates.pass_number)
        read = Sample(np.arange(len(positions)), law, uniforms, ("probs", "entropy"))
        [reading] = read_logits(mean_NV.log(), [read])
        return reading


def _laws(candidates: Candidates, rows: Ints) -> Tensor:
    """Give the model's law `[n, V]` of some candidates, as the request adjusts it."""
    seq, logits_NV = candidates.seq, candidates.scores["logits"]
    logits_NV = logits_NV[torch.from_numpy(rows).to(logits_NV.device)]
    known = seq.tokens[np.flatnonzero(seq.committed_at[: seq.canvas_end] != UNCOMMITTED)]
    logits_NV = adjust(logits_NV, seq.law, [known] * len(logits_NV), seq.num_prompt)
    laws_NV: Tensor = logits_NV.softmax(1)
    return laws_NV


def _order_scores(order: Order, candidates: Candidates) -> Floats:
    if order == "random":
        return candidates.seq.uniforms(candidates.positions, "order", candidates.pass_number)
    if order == "left_to_right":
        return -candidates.positions.astype(np.float64)
    [name] = _ORDER_READS[order]
    scores: Floats = candidates.scores[name]
    return -scores if order == "entropy" else scores
