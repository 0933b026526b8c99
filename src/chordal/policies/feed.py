"""Feeds: which positions of the canvas a forward pass recomputes, and what they see.

Canvas of a prompt P, finished blocks F, the current block C and later blocks L, and what one pass
inside the block feeds (#) and reads from the cache (.):

              P P P F F C C L L
    whole     # # # # # # # # #     exact: every key and value is current
    prefix    . . . . . # # # #     P and F as of the start of the block
    dual      . . . . . # # . .     P, F and L as of the start of the block
    block     . . . . . # #         exact for block-diffusion models, which never see L

`prefix` and `dual` are Fast-dLLM's approximate caches (arXiv 2505.22618): the first pass of each
block feeds the whole canvas and so refreshes everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from chordal.forward import Blocks, Full, Sees

FeedName: TypeAlias = Literal["whole", "prefix", "dual"]


@dataclass(frozen=True, slots=True)
class Block:
    """Positions `start <= position < end`, denoised together, on a canvas that ends at `canvas_end`."""

    start: int
    end: int
    canvas_end: int


@dataclass(frozen=True)
class CanvasFeed:
    """Feed of a full-attention model.

    Attributes:
        name: "whole" is exact; "prefix" and "dual" are approximate and become exact where the cached
            part cannot depend on what is fed.
    """

    name: FeedName = "whole"

    def span(self, block: Block, step: int) -> tuple[int, int]:
        """Give the half-open range fed in a step, counted from 0 in each block."""
        if self.name == "whole" or step == 0:
            return 0, block.canvas_end
        return block.start, block.canvas_end if self.name == "prefix" else block.end

    def sees(self, block: Block) -> Sees:
        """Every query sees the whole canvas."""
        return Full(block.canvas_end)


@dataclass(frozen=True)
class BlockFeed:
    """Feed of a block-diffusion model: the block alone, over the exact cache of those before it.

    Attributes:
        block_length: Of the model.
        carry: Feed the finished block once more together with the first step of the next one, so
            that its clean keys and values cost no forward pass of their own.
    """

    block_length: int
    carry: bool = True

    def span(self, block: Block, step: int) -> tuple[int, int]:
        """Give the half-open range fed in a step, counted from 0 in each block."""
        if self.carry and step == 0:
            return max(0, block.start - self.block_length), block.end
        return block.start, block.end

    def sees(self, block: Block) -> Sees:
        """Every query sees its own block and the blocks before it."""
        return Blocks(self.block_length)
