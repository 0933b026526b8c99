"""Fast-dLLM v2's decoding: denoise a block in parts, from left to right, over the exact cache of blocks.

Source: "Fast-dLLM v2" (arXiv 2509.26328). Blocks of the model's length are aligned to position 0. Inside
a block only one part ("sub-block") is committed at a time; the sub-block cache then feeds that part alone.
Notation: threshold is tau, sub_block_length is the small block size.

Promise: approximate. threshold=1 commits one token a pass: the model's own slow reference. The cache of
finished blocks is exact, the sub-block cache is not.
Cost: the passes of each part, feeding a block, or with the sub-block cache mostly a part. With shifted
logits (the published checkpoints) the pass that stores a finished block also commits the first token of
the next one; without, it is merged into the next block's first pass.

Departs from the published code: rows of a batch refresh their sub-block caches each by itself; the first
token of a block is drawn from the request's law, where published code takes the most likely one also when
it samples; a prompt of exactly one block is read, where published code loses it; the mask token is never
committed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.denoise import denoise
from chordal.errors import InputError
from chordal.forward import Blocks, Forward, Sees
from chordal.policies.commit import Threshold
from chordal.policies.feed import Block, SubBlockFeed
from chordal.sequence import UNCOMMITTED, Sequence
from chordal.stats import TARGET


@dataclass(frozen=True, kw_only=True)
class FastDLLMv2Config:
    """Settings of `fast_dllm_v2`."""

    threshold: float = 0.9
    """Commit every position more confident than this (tau), at least one, at least 0; 1 is one a pass."""
    sub_block_length: int = 8
    """Positions of a block that are denoised together, at least 1; the last part may be shorter."""
    sub_block_cache: bool = False
    """Feed only the part, over stale keys and values of the rest of its block; approximate."""

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise InputError(f"threshold must be at least 0; got {self.threshold}.")
        if self.sub_block_length < 1:
            raise InputError(f"sub_block_length must be at least 1; got {self.sub_block_length}.")


class FastDLLMv2(Decoder):
    """Denoise block by block, each in parts from left to right."""

    name = "fast_dllm_v2"
    family = "diffusion"
    promise = "approximate"
    exact_when = "threshold = 1, no sub-block cache"
    needs = ("block",)
    paper = "arXiv 2509.26328"
    Config = FastDLLMv2Config

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: FastDLLMv2Config = self.config
        length = seq.family.block_length
        assert length is not None, "a block model has a block length"
        # Storing a block that way costs nothing: without shifted logits it tells nothing of the next one.
        is_merged = seq.family.shift == 0
        feed = SubBlockFeed(length, cached=config.sub_block_cache, carry=is_merged)
        # A confidence must exceed the threshold: one of 1 never passes a threshold of 1.
        rule = Threshold(float(np.nextafter(config.threshold, np.inf)), of="law")

        first = seq.num_prompt // length * length
        end = -(-seq.limit // length) * length
        seq.open_canvas(end)
        num_stored = 0
        if is_merged and first > length:
            yield from store(seq, 0, first - length, Blocks(length))
        for start in range(first, end, length):
            if not is_merged and start > 0:
                yield from store(seq, num_stored, start, Blocks(length))
                num_stored = start
            parts = [
                Block(at, min(at + config.sub_block_length, start + length), end)
                for at in range(start, start + length, config.sub_block_length)
            ]
            yield from denoise(seq, parts, feed, [rule] * len(parts))
            if seq.done:
                return


def store(seq: Sequence, start: int, end: int, sees: Sees) -> Decoding:
    """Store the keys and values of finished blocks.

    If logits are shifted, the last row tells the first token of the next block, which is committed.
    """
    positions, following = np.arange(start, end), np.array([end])
    read = None
    if seq.family.shift and seq.committed_at[end] == UNCOMMITTED:
        read = seq.sample(
            following - 1 - start,
            following,
            draw=seq.stats.forwards.get(TARGET, 0),
            contexts=(seq.committed,) if seq.law.reads_context else None,
        )
    reading = yield Forward(seq.tokens[start:end], positions, sees, read, slots=positions)
    if read is not None:
        seq.commit(following, reading.tokens, confidence=reading.confidence())
