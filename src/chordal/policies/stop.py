"""Stops: when to leave the search and commit everything that is still masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from chordal.forward import Floats, Ints
from chordal.sequence import Sequence
from chordal.stats import TARGET


class StopRule(Protocol):
    """Watches positions and says when to stop; made for each sequence anew."""

    def watches(self, seq: Sequence) -> Ints:
        """Give the positions that must be read in every pass besides the candidates, ascending."""
        ...

    def __call__(self, seq: Sequence, positions: Ints, gaps: Floats) -> bool:
        """Decide after a pass, given the positions it read and the gap of their two best logits."""
        ...


@dataclass(frozen=True)
class Prophet:
    """Stop when the answer is decided: the mean gap over a region reaches a falling threshold.

    Prophet (arXiv 2508.19982). Thresholds are in logits, so they belong to a model's scale.

    Attributes:
        num_steps: Passes of the whole decoding without a stop (T_max).
        region: Positions of the answer, ascending; empty never stops.
        thresholds: Before 33% of the passes, before 67%, and from there on.
    """

    num_steps: int
    region: Ints
    thresholds: tuple[float, float, float] = (7.5, 5.0, 2.5)

    def watches(self, seq: Sequence) -> Ints:
        """Watch the region, and all that a stop would commit."""
        return np.union1d(self.region, seq.masked(seq.num_prompt, seq.canvas_end))

    def __call__(self, seq: Sequence, positions: Ints, gaps: Floats) -> bool:
        """Compare the mean gap of the region, committed positions included, with the threshold."""
        if not len(self.region):
            return False
        mean_gap = gaps[np.searchsorted(positions, self.region)].mean()
        return bool(mean_gap >= self.threshold(seq.stats.forwards[TARGET]))

    def threshold(self, num_passes: int) -> float:
        """Give what the mean gap must reach after a number of passes, the first being 1.

        With 256 steps that is the early threshold up to pass 84, the late one from 172 on.
        """
        early, middle, late = self.thresholds
        progress = num_passes / self.num_steps
        return early if progress < 0.33 else middle if progress < 0.67 else late


def answer_region(seq: Sequence, start: int, length: int) -> Ints:
    """Give the positions of an answer, as far as they are on the canvas.

    Args:
        seq: The sequence.
        start: Offset of the first in the canvas; negative offsets count from its end.
        length: How many.
    """
    first = start + (seq.num_prompt if start >= 0 else seq.limit)
    return np.arange(max(first, seq.num_prompt), min(first + length, seq.limit))
