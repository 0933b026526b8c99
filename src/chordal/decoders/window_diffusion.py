"""Window-Diffusion: compute a few masks on the left, reuse those behind them, leave out all that is far.

Source: "Window-Diffusion" (arXiv 2601.20332). Every R passes everything is computed; in between only the
first A masks and what was committed since, which see the decided tokens and the first W masks. The two
published ports differ, and each of their choices is a setting.
Notation: active_length is A, window_length is W, refresh_period is R.

Promise: approximate. refresh_period=1 without pruning equals `low_confidence` with block_length=None,
or with a threshold `threshold`, token for token.
Cost: by default one pass a token, a threshold makes it fewer; a pass feeds the canvas in a refresh, and
else A positions and those committed since it.

Departs from the published code: positions are gathered by index, so that tokens may be decided behind
the window; a window without masks is refreshed at once; decoding ends with the text, not after a number
of steps; a share that finds too few candidates is made up for behind the schedule, one token a pass.
Models with shifted logits feed the token before each candidate, which the Dream port cannot for the first
one of its slice; the time grid and random order of that port are not implemented.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.denoise import denoise
from chordal.errors import InputError
from chordal.ops.unmask import split_evenly
from chordal.policies.commit import CommitRule, Scheduled, Threshold
from chordal.policies.feed import Block, WindowFeed
from chordal.policies.parts import check_ranges
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class WindowDiffusionConfig:
    """Settings of `window_diffusion`; the defaults are those of the LLaDA port's scripts."""

    active_length: int = 16
    """Masks that a pass between two refreshes computes and may commit (A), at least 1."""
    window_length: int = 64
    """Masks that it sees (W), at least 1."""
    refresh_period: int = 32
    """Passes from one refresh to the next (R), at least 1; 1 recomputes everything in each pass."""
    prune_at_refresh: bool = False
    """Leave masks behind the window out of a refresh too, so that its cost does not grow with the canvas."""
    leftmost_at_refresh: bool = False
    """A refresh commits the leftmost mask only; else the best of the canvas."""
    contiguous: bool = False
    """Compute all between the leftmost mask of the refresh and the last active one, decided tokens too."""
    slide: bool = True
    """Let later masks become active as others are committed; else the next refresh brings them."""
    cut_at_eos: bool = False
    """End the canvas at the first stop token on it, and only refresh from then on ("early stop")."""
    order: Literal["confidence", "entropy"] = "confidence"
    """What a schedule commits first: high probability (LLaDA) or low entropy (Dream)."""
    threshold: float | None = None
    """Commit also what is this confident (tau), at least 0; None keeps to the schedule."""
    num_steps: int | None = None
    """Passes of the schedule for the whole canvas, at least 1; None is one a token."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.threshold is not None and self.order == "entropy":
            raise InputError("a threshold goes by confidence; got order=entropy. Leave out one of them.")


class WindowDiffusion(Decoder):
    """Fill the canvas through a window that moves on with its leftmost masks."""

    name = "window_diffusion"
    family = "diffusion"
    promise = "approximate"
    exact_when = "refresh_period = 1: low_confidence"
    needs = ("masked",)
    paper = "arXiv 2601.20332"
    Config = WindowDiffusionConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: WindowDiffusionConfig = self.config
        seq.open_canvas(seq.limit)
        feed = WindowFeed(
            config.active_length,
            config.window_length,
            config.refresh_period,
            prune=config.prune_at_refresh,
            slide=config.slide,
            contiguous=config.contiguous,
            leftmost=config.leftmost_at_refresh,
            cut_at_eos=config.cut_at_eos,
        )
        yield from denoise(seq, [Block(seq.num_prompt, seq.limit, seq.limit)], feed, [self._rule(seq)])

    def _rule(self, seq: Sequence) -> CommitRule:
        """Make the rule: a schedule, which a threshold can only hasten."""
        config: WindowDiffusionConfig = self.config
        length = seq.limit - seq.num_prompt
        num_steps = config.num_steps or length
        if config.threshold is not None:
            return Threshold(config.threshold, tuple(split_evenly(length, num_steps).tolist()))
        return Scheduled(num_steps, config.order, of="law" if config.order == "entropy" else "model")
