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
from typing import Literal, Protocol, TypeAlias

import numpy as np

from chordal.forward import Blocks, Full, Ints, Sees
from chordal.sequence import UNCOMMITTED, Sequence

FeedName: TypeAlias = Literal["whole", "prefix", "dual"]


@dataclass(frozen=True, slots=True)
class Block:
    """Positions `start <= position < end`, denoised together, on a canvas that ends at `canvas_end`."""

    start: int
    end: int
    canvas_end: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What one pass feeds.

    Attributes:
        positions: Fed positions, ascending, int `[q]`. The loop adds those that predict what is read.
        sees: Attention spec of all of them.
        candidates: Masked positions that may be committed, ascending, int `[r]`.
    """

    positions: Ints
    sees: Sees
    candidates: Ints


class Feed(Protocol):
    """Plans the passes of a sequence; one that keeps state is made for each sequence anew."""

    def plan(self, seq: Sequence, block: Block, step: int) -> Plan:
        """Plan a step of a block; steps are counted from 0 in each block."""
        ...


@dataclass(frozen=True)
class CanvasFeed:
    """Feed of a full-attention model.

    Attributes:
        name: "whole" is exact; "prefix" and "dual" are approximate and become exact where the cached
            part cannot depend on what is fed.
    """

    name: FeedName = "whole"

    def plan(self, seq: Sequence, block: Block, step: int) -> Plan:
        """Feed the canvas, or in later steps of a block the part from the block on."""
        start, end = block.start, block.canvas_end if self.name == "prefix" else block.end
        if self.name == "whole" or step == 0:
            start, end = 0, block.canvas_end
        return Plan(np.arange(start, end), Full(block.canvas_end), seq.masked(block.start, block.end))


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

    def plan(self, seq: Sequence, block: Block, step: int) -> Plan:
        """Feed the block, in its first step behind the one before it."""
        start = max(0, block.start - self.block_length) if self.carry and step == 0 else block.start
        sees = Blocks(self.block_length)
        return Plan(np.arange(start, block.end), sees, seq.masked(block.start, block.end))


@dataclass(frozen=True)
class SubBlockFeed:
    """Feed of a block-diffusion model whose blocks are denoised in parts, from left to right.

    Attributes:
        block_length: Of the model; the `Block` of a step is a part of such a block.
        cached: Feed the part alone once its first token is committed, over the keys and values that
            the rest of the block had when all of it was last fed: approximate (arXiv 2509.26328).
        carry: As of `BlockFeed`.
    """

    block_length: int
    cached: bool = False
    carry: bool = True

    def plan(self, seq: Sequence, block: Block, step: int) -> Plan:
        """Feed the whole block, or in later steps of a part the part."""
        start = block.start // self.block_length * self.block_length
        end = start + self.block_length
        if self.cached and step > 0 and seq.committed_at[block.start] != UNCOMMITTED:
            start, end = block.start, block.end
        elif self.carry and step == 0 and (seq.committed_at[start:end] <= 0).all():  # prompt or nothing yet
            start = max(0, start - self.block_length)
        sees = Blocks(self.block_length)
        return Plan(np.arange(start, end), sees, seq.masked(block.start, block.end))


class WindowFeed:
    """Feed of a full-attention model that looks only so far ahead (Window-Diffusion, arXiv 2601.20332).

    Masks are counted from the left. D decided, M masked, two active, four in the window:

                   D D M D M M M M M
        refresh    # # # # # # # # #     every `refresh_period` passes; `prune` leaves out what is far
        between    . . # . # . .         fed (#), read from the cache (.), and far: seen by nobody

    What has been committed since the refresh is fed along, what the refresh committed only in the pass
    behind it. A window without masks is refreshed at once. The block of all steps is the canvas.

    Args:
        active_length: Masks that are fed and may be committed between two refreshes (A).
        window_length: Masks that are seen there (W), counted behind the commits of the refresh.
        refresh_period: Passes from one refresh to the next (R); 1 is always.
        prune: What is far is not seen in a refresh either; the window is then counted before its commits.
        slide: As masks are committed, later ones become active before the next refresh.
        contiguous: Feed all from the leftmost mask of the refresh up to the first mask that is not active.
        leftmost: A refresh may commit the leftmost mask only.
        cut_at_eos: Once a stop token is committed, the canvas ends there and every pass is a refresh.
    """

    def __init__(
        self,
        active_length: int,
        window_length: int,
        refresh_period: int,
        *,
        prune: bool = False,
        slide: bool = True,
        contiguous: bool = False,
        leftmost: bool = False,
        cut_at_eos: bool = False,
    ) -> None:
        self.active_length, self.window_length = active_length, window_length
        self.refresh_period, self.prune, self.slide = refresh_period, prune, slide
        self.contiguous, self.leftmost, self.cut_at_eos = contiguous, leftmost, cut_at_eos
        none = np.array([], np.int64)
        self._age = refresh_period  # passes since the refresh, itself included
        self._masked: Ints = none  # before the last pass
        self._recent: Ints = none  # committed since the refresh, not by it
        self._far: Ints = none  # masks that nobody sees
        self._start = self._stop = 0  # of what is active

    def plan(self, seq: Sequence, block: Block, step: int) -> Plan:
        """Refresh, or feed what is active."""
        end = self._end(seq, block)
        masked = seq.masked(block.start, end)
        is_cut = end < block.end
        if is_cut or self._age == self.refresh_period or not len(active := self._activate(masked, end)):
            # Nothing behind a cut is computed, so should it be lifted, all must be.
            self._age = self.refresh_period if is_cut else 1
            return self._refresh(masked, end)
        new, self._masked = np.setdiff1d(self._masked, masked), masked
        fed = np.concatenate([active, self._recent, new])
        if self._age > 1:
            self._recent = np.concatenate([self._recent, new])
        self._age += 1
        positions = np.arange(self._start, self._stop) if self.contiguous else np.sort(fed)
        return Plan(positions, Full(end, self._far), active)

    def _end(self, seq: Sequence, block: Block) -> int:
        """Give where the canvas ends: at its end, or behind the first stop token that has masks before it."""
        if not self.cut_at_eos:
            return block.end
        is_stop = np.isin(seq.tokens[seq.frontier : block.end], seq.family.eos_ids)
        return seq.frontier + int(np.argmax(is_stop)) + 1 if is_stop.any() else block.end

    def _refresh(self, masked: Ints, end: int) -> Plan:
        far = masked[self.window_length if self.prune else len(masked) :]
        self._masked, self._far = masked, far
        self._recent, self._start = masked[:0], int(masked[0])
        candidates = masked[: 1 if self.leftmost else len(masked) - len(far)]
        return Plan(np.setdiff1d(np.arange(end), far), Full(end, far), candidates)

    def _activate(self, masked: Ints, end: int) -> Ints:
        """Give the masks that are active now."""
        if self._age == 1 and not self.prune:
            self._far = masked[self.window_length :]
        if self._age == 1 or self.slide:
            num = min(self.active_length, len(masked) - len(self._far))
            self._stop = int(masked[num]) if num < len(masked) else end
        return masked[masked < self._stop]


def canvas_blocks(start: int, end: int, block_length: int) -> list[Block]:
    """Cut the canvas into blocks counted from its start; the last may be shorter."""
    return [Block(at, min(at + block_length, end), end) for at in range(start, end, block_length)]


def model_blocks(seq: Sequence, block_length: int, part_length: int | None = None) -> list[Block]:
    """Cut the canvas into the blocks of a block-diffusion model, or into parts of these.

    They are aligned to position 0; the first may hold the end of the prompt, the last may exceed the limit.
    """
    first = seq.num_prompt // block_length * block_length
    end = -(-seq.limit // block_length) * block_length
    parts = [
        Block(at, min(at + (part_length or block_length), start + block_length), end)
        for start in range(first, end, block_length)
        for at in range(start, start + block_length, part_length or block_length)
    ]
    return [part for part in parts if part.end > seq.num_prompt]
