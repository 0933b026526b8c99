"""LocalLeap: a token the model is sure of lowers the bar for its neighbours.

Source: "Accelerating Diffusion LLM Inference via Local Determinism Propagation" (arXiv 2510.07081).
Notation: threshold is tau, relaxed_threshold is tau_r, radius is r; a candidate of confidence tau is an
anchor, and near means within r positions of one.

Promise: approximate. relaxed_threshold = threshold or radius=0 equals `threshold` token for token, and
threshold above 1 is one token a pass.
Cost: as `threshold`, in fewer passes: an anchor never commits less.

Departs from the published code: distances are positions of the text whatever the feed; feeds are those
of `threshold`, where the paper leaves open which of them its figures have.
"""

from __future__ import annotations

from dataclasses import dataclass

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.denoise import canvas_blocks, denoise
from chordal.policies.commit import LocalLeap
from chordal.policies.feed import CanvasFeed, FeedName
from chordal.policies.parts import check_ranges
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class LocalLeapConfig:
    """Settings of `localleap`; the defaults are the published demo's."""

    threshold: float = 0.9
    """Confidence that suffices anywhere (tau), at least 0; above 1 is one token a pass."""
    relaxed_threshold: float = 0.75
    """Confidence that suffices near an anchor (tau_r), from 0 to threshold."""
    radius: int = 4
    """How many positions near is (r), at least 0."""
    block_length: int | None = 32
    """Tokens of a block, at least 1; None takes the whole canvas as one."""
    feed: FeedName = "whole"
    """What a pass recomputes: "whole" is exact, "prefix" and "dual" reuse approximate keys and values."""

    def __post_init__(self) -> None:
        check_ranges(self)
        self.rule()

    def rule(self) -> LocalLeap:
        """Make the commit rule, which refuses thresholds that do not go together."""
        return LocalLeap(self.threshold, self.relaxed_threshold, self.radius)


class LocalLeapDecoder(Decoder):
    """Commit what is confident enough, and what is less so near it."""

    name = "localleap"
    family = "diffusion"
    promise = "approximate"
    exact_when = "relaxed_threshold = threshold: threshold"
    needs = ("masked",)
    paper = "arXiv 2510.07081"
    Config = LocalLeapConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: LocalLeapConfig = self.config
        seq.open_canvas(seq.limit)
        length = config.block_length or seq.stop.max_new_tokens
        blocks = canvas_blocks(seq.num_prompt, seq.limit, length)
        yield from denoise(seq, blocks, CanvasFeed(config.feed), [config.rule()] * len(blocks))
