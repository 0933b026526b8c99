"""Block-diffusion decoding: denoise a block, cache it, go on to the next.

Source: SDAR (arXiv 2510.06303), BD3-LM (arXiv 2503.09573). Blocks of the model's length B are aligned
to position 0; the prompt's whole blocks are prefilled and its rest opens the first decoded block.
Notation: num_steps is S, threshold is tau; step s of a block commits k_s = B // S positions, one more
in the first B mod S steps.

Promise: approximate. With num_steps = B and no threshold (the default) a pass commits one token: the
model's own slow reference. The cache is exact.
Cost: a block's steps, each feeding B positions. The pass that stores a finished block's clean keys and
values is merged into the first step of the next one; merge=False runs it alone, as published.

Departs from the published code: the entropy rule uses the entropy of each position's distribution
(the script sums one number over all positions); a step's share is capped by the masks left, where the
script overwrites tokens that are already fixed (only possible if S < B); the mask token is never committed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.denoise import denoise
from chordal.errors import InputError
from chordal.forward import Blocks, Forward
from chordal.ops.unmask import split_evenly
from chordal.policies.commit import CommitRule, EntropyBound, Scheduled, Threshold
from chordal.policies.feed import Block, BlockFeed
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionConfig:
    """Settings of `block_diffusion`."""

    threshold: float | None = None
    """Commit every position more confident than this (tau), at least the static share; None is static."""
    num_steps: int | None = None
    """Steps of a block (S), from 1 to its length; None is one a token."""
    order: Literal["confidence", "left_to_right", "random"] = "confidence"
    """Which positions the static rule takes first."""
    entropy_bound: float | None = None
    """Instead, commit the most certain positions while their entropies (nats) add up to less; above 0."""
    merge: bool = True
    """Store a finished block's keys and values in the first pass of the next block."""

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 1:
            raise InputError(f"num_steps must be at least 1; got {self.num_steps}.")
        if self.threshold is not None and not self.threshold >= 0:
            raise InputError(f"threshold must be at least 0; got {self.threshold}.")
        if self.entropy_bound is not None and not self.entropy_bound > 0:
            raise InputError(f"entropy_bound must be above 0; got {self.entropy_bound}.")
        if self.entropy_bound is not None and self.threshold is not None:
            raise InputError("threshold and entropy_bound are two rules; got both. Give one.")


class BlockDiffusion(Decoder):
    """Denoise block by block over an exact cache."""

    name = "block_diffusion"
    family = "diffusion"
    promise = "approximate"
    exact_when = "num_steps = block length, no threshold"
    needs = ("block",)
    paper = "arXiv 2510.06303, 2503.09573"
    Config = BlockDiffusionConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: BlockDiffusionConfig = self.config
        length = seq.family.block_length
        assert length is not None, "a block model has a block length"
        if config.num_steps is not None and config.num_steps > length:
            raise InputError(f"num_steps must be at most the block length {length}; got {config.num_steps}.")

        # Prefill the whole blocks of the prompt but the last, which the first step carries along.
        first = seq.num_prompt // length * length
        num_prefill = max(0, first - length) if config.merge else first
        if num_prefill:
            positions = np.arange(num_prefill)
            yield Forward(seq.prompt[:num_prefill], positions, Blocks(length), slots=positions)

        end = -(-seq.limit // length) * length
        seq.open_canvas(end)
        feed, rule = BlockFeed(length, carry=config.merge), _rule(config, length)
        for start in range(first, end, length):
            block = Block(start, start + length, end)
            yield from denoise(seq, [block], feed, [rule])
            if seq.done:
                return
            if not config.merge:
                positions = np.arange(start, block.end)
                yield Forward(seq.tokens[start : block.end], positions, Blocks(length), slots=positions)


def _rule(config: BlockDiffusionConfig, length: int) -> CommitRule:
    """Make the rule of every block; confidence is of the law the token was drawn from, as in SDAR."""
    if config.entropy_bound is not None:
        return EntropyBound(config.entropy_bound)
    num_steps = config.num_steps or length
    if config.threshold is not None:
        # SDAR commits above the threshold, not at it: a confidence of 1 never passes a threshold of 1.
        above = float(np.nextafter(config.threshold, np.inf))
        return Threshold(above, tuple(split_evenly(length, num_steps).tolist()), of="law")
    return Scheduled(num_steps, config.order, of="law", num_tokens=length)
