"""CreditDecoding: what was most likely in earlier steps gets credit, and reaches the threshold sooner.

Source: "CreditDecoding" (arXiv 2510.06133, equations 6 and 7). Each step a masked position lets its
credit decay, gives its most likely token p^gamma more, and adds alpha ln(1 + credit) to the logits; then
the threshold rule decides. The model sees nothing of it.
Notation: fusion is alpha, decay is beta, concavity is gamma, threshold is tau.

Promise: approximate. fusion=0 equals `threshold` token for token.
Cost: as `threshold`, in fewer passes, with the logits of the block kept on the device for a moment.

Departs from the published code: the threshold rule is that of `threshold`, which commits what reaches
tau, or else the best, where dInfer also takes what is within 1e-5 of the best; credit is kept for the 8
tokens of a position that have most. The paper's variant without parameters is not implemented: its
schedule is only known second-hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.denoise import canvas_blocks, denoise
from chordal.policies.commit import Threshold
from chordal.policies.feed import CanvasFeed, FeedName
from chordal.policies.parts import check_ranges
from chordal.policies.refine import Credit
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class CreditDecodingConfig:
    """Settings of `credit_decoding`; the defaults are the published constants."""

    threshold: float = 0.9
    """Confidence, credit included, that suffices (tau), at least 0; above 1 is one token a pass."""
    fusion: float = 0.65
    """Weight of the credit in the logits (alpha), at least 0; 0 is no credit."""
    decay: float = 0.7
    """Share of the credit that is left after a step (beta), from 0 to 1."""
    concavity: float = 0.2
    """Power of the probability that is credited (gamma), above 0."""
    block_length: int | None = 32
    """Tokens of a block, at least 1; None takes the whole canvas as one."""
    feed: FeedName = "whole"
    """What a pass recomputes: "whole" is exact, "prefix" and "dual" reuse approximate keys and values."""

    def __post_init__(self) -> None:
        check_ranges(self)


class CreditDecoding(Decoder):
    """Commit what is confident enough once its past counts too."""

    name = "credit_decoding"
    family = "diffusion"
    promise = "approximate"
    exact_when = "fusion = 0: threshold"
    needs = ("masked",)
    paper = "arXiv 2510.06133"
    Config = CreditDecodingConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: CreditDecodingConfig = self.config
        seq.open_canvas(seq.limit)
        length = config.block_length or seq.stop.max_new_tokens
        blocks = canvas_blocks(seq.num_prompt, seq.limit, length)
        yield from denoise(
            seq,
            blocks,
            CanvasFeed(config.feed),
            [Threshold(config.threshold)] * len(blocks),
            refine=Credit(config.fusion, config.decay, config.concavity),
        )
