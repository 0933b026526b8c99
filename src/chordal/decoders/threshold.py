"""Fast-dLLM's parallel decoding: commit every position the model is sure enough of.

Source: "Fast-dLLM" (arXiv 2505.22618). Two rules: a confidence threshold (tau), or a factor (f) that
asks more of each further position, after the paper's theorem; and three feeds: the whole canvas, or
its approximate prefix and dual caches. Rule and feed are independent.

Promise: approximate. threshold above 1 with feed="whole" commits one token a pass and equals
`low_confidence` with the same block_length, token for token.
Cost: between one pass a block and one a token; a pass inside a block feeds the canvas (whole), the
canvas from the block on (prefix) or the block alone (dual).

Departs from the published code: a step always commits at least the best position (a later revision
lost that and could hang); the factor rule has no off-by-one; a block the refreshing pass already
finished costs no second one. Models with shifted logits feed the token before the block too, rather
than committing the block's first token unseen.
"""

from __future__ import annotations

from dataclasses import dataclass

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.denoise import canvas_blocks, denoise
from chordal.errors import InputError
from chordal.policies.commit import CommitRule, Factor, Threshold
from chordal.policies.feed import CanvasFeed, FeedName
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """Settings of `threshold`."""

    threshold: float = 0.9
    """Confidence from which a position is committed (tau), at least 0; above 1 is one token a pass."""
    factor: float | None = None
    """Use the factor rule (f) instead, above 0; larger commits more. The paper's scripts use 1."""
    block_length: int | None = 32
    """Tokens of a block, at least 1; None takes the whole canvas as one."""
    feed: FeedName = "whole"
    """What a pass recomputes: "whole" is exact, "prefix" and "dual" reuse approximate keys and values."""

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise InputError(f"threshold must be at least 0; got {self.threshold}.")
        if self.factor is not None and not self.factor > 0:
            raise InputError(f"factor must be above 0; got {self.factor}.")
        if self.block_length is not None and self.block_length < 1:
            raise InputError(f"block_length must be at least 1; got {self.block_length}.")


class ThresholdDecoder(Decoder):
    """Commit what is confident enough, at least one position a pass."""

    name = "threshold"
    family = "diffusion"
    promise = "approximate"
    exact_when = "threshold > 1 and feed = whole"
    needs = ("masked",)
    paper = "arXiv 2505.22618"
    Config = ThresholdConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: ThresholdConfig = self.config
        seq.open_canvas(seq.limit)
        length = config.block_length or seq.stop.max_new_tokens
        blocks = canvas_blocks(seq.num_prompt, seq.limit, length)
        rule: CommitRule = Threshold(config.threshold) if config.factor is None else Factor(config.factor)
        yield from denoise(seq, blocks, CanvasFeed(config.feed), [rule] * len(blocks))
