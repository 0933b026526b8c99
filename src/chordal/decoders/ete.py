"""Explore-Then-Exploit: try several tokens where the model is unsure, keep what makes most others sure.

Source: "From Bits to Rounds" (arXiv 2511.21103). Its argument: a token of confidence tau tells at most
log(1/tau) nats, so whoever commits only such tokens needs as many passes as the information of the text
takes. Tokens that tell much must be committed on purpose; what follows from them then falls into place
at once. No code is published, and of the method only two ingredients are known: several blocks are open
at once, and uncertain positions are explored. How they are put together here is ours.
Notation: num_branches is K, threshold is tau, explore_below is m, cascade_weight is lambda, window_blocks
is W. Exploited is what the model is sure of, explored is the position of which it is least sure.

Promise: approximate. explore_below=0 with window_blocks=1 equals `threshold` with the same block_length
and feed, token for token.
Cost: one pass for one to all tokens of the window, never more passes than tokens. The pass that decides
an explored position runs up to K copies of what its feed feeds (`rows`), which pays as long as that takes
little longer than one; they stand in the cache beside each other, which has room for three windows of the
model. Exploring has no pass of its own: what the copy that is kept has read is the next round's.

Departs from the paper: where, is not known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from chordal.decoders.decoder import Decoder, Decoding
from chordal.forward import (
    Bools,
    Confidence,
    Floats,
    Forward,
    Full,
    Ints,
    Logits,
    Reading,
    Sees,
    Together,
    Visible,
)
from chordal.models.reading import read_logits
from chordal.ops.exploration import best_branch, propose
from chordal.ops.unmask import top
from chordal.policies.feed import FeedName
from chordal.policies.parts import check_ranges
from chordal.sequence import Sequence
from chordal.stats import TARGET


@dataclass(frozen=True, kw_only=True)
class ETEConfig:
    """Settings of `ete`; those of the paper are not known."""

    num_branches: int = 4
    """Tokens that are tried at a position (K), at least 1; 1 commits the most likely one as it is."""
    threshold: float = 0.9
    """Confidence from which a position is exploited (tau), at least 0."""
    explore_below: int = 2
    """Explore when fewer positions than this were exploited (m), at least 0; 0 never does."""
    cascade_weight: float = 1.0
    """What a position that a token makes certain is worth, in nats of its log p (lambda), at least 0."""
    window_blocks: int = 2
    """Blocks that are open at once, from the first unfinished one on (W), at least 1."""
    eos_threshold: float = 0.99
    """Confidence that a stop token needs behind the first unfinished block, if above the threshold."""
    block_length: int | None = 32
    """Tokens of a block, at least 1; None takes the whole canvas as one."""
    feed: FeedName = "whole"
    """What a pass recomputes: "whole" is exact, "prefix" and "dual" reuse approximate keys and values."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, slots=True)
class Round:
    """What a pass spent and got: the bookkeeping of bits to rounds.

    Attributes:
        num_committed: Tokens that were committed after it.
        information: Sum of their -log p in the readings they come from, in nats.
        num_branches: Canvases that it ran.
        explored: Position that it decided among branches, None if there was none.
        rank: Of the token it got among those tried, 0 for the most likely, or the first that was drawn.
    """

    num_committed: int
    information: float
    num_branches: int
    explored: int | None
    rank: int


class ETE(Decoder):
    """Commit what is certain, and look a pass ahead which uncertain token makes more so."""

    name = "ete"
    family = "diffusion"
    promise = "approximate"
    exact_when = "explore_below = 0, window_blocks = 1: threshold"
    needs = ("masked",)
    tells_logprobs = False
    paper = "arXiv 2511.21103"
    Config = ETEConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        yield from explore_then_exploit(seq, self.config, [])


def explore_then_exploit(seq: Sequence, config: ETEConfig, rounds: list[Round]) -> Decoding:
    """Decode one sequence, and add what each pass did to `rounds`."""
    seq.open_canvas(seq.limit)
    length = config.block_length or seq.stop.max_new_tokens
    stored: int | None = None  # start of the window that the cache is for
    guess: _Guess | None = None
    while not seq.done:
        # Look: one pass over the open blocks, on a canvas of its own for each token that is tried.
        start = seq.frontier - (seq.frontier - seq.num_prompt) % length
        window = _Window(start, *(min(start + num * length, seq.limit) for num in (1, config.window_blocks)))
        targets, canvases = seq.masked(window.start, window.stop), [seq.tokens]
        if guess is not None:
            targets, canvases = targets[targets != guess.position], guess.fill(seq.tokens)
        pass_number = seq.stats.forwards.get(TARGET, 0)
        readings = yield _ask(seq, config.feed, canvases, targets, window, is_stored=start == stored)
        looks = _read(seq, config, readings, canvases, targets, window, pass_number)
        stored = start

        # Choose the token with the largest log p + lambda * (positions that it makes certain). A draw
        # has its chance already.
        kept, explored = 0, None
        if guess is not None:
            cascades = np.array([look.cascade for look in looks])
            probs = guess.probs if seq.law.is_greedy else np.ones(len(looks))
            kept, explored = best_branch(probs, cascades, config.cascade_weight), guess.position
        look = looks[kept]

        # Exploit: commit what is certain. Who never explores commits at least the best of the block.
        sure = np.flatnonzero(look.is_sure)
        if config.explore_below == 0 and not len(sure):
            sure = top(look.probs[targets < window.end], 1)
        settled = look.settle(sure) + ([] if guess is None else [guess.settle(kept)])

        # Explore the least certain position of the first block with masks, if others hang on it.
        guess, left = None, np.delete(np.arange(len(targets)), sure)
        if len(sure) < config.explore_below and len(left):
            blocks = (targets[left] - seq.num_prompt) // length
            in_block = left[blocks == blocks[0]]
            row = in_block[np.argmax(look.entropy[in_block])]
            guess = look.explore(row, seq, config.num_branches, pass_number)
            if len(left) == 1 or len(guess.tokens) == 1:
                settled, guess = [*settled, guess.settle(0)], None

        if settled:
            positions, tokens, known = zip(*sorted(settled), strict=True)
            seq.commit(np.array(positions), np.array(tokens), confidence=Confidence(np.array(known)))
        # A hot law may draw what the model gives no probability at all.
        information = sum(-math.log(prob) if prob else math.inf for *_, prob in settled)
        rounds.append(Round(len(settled), information, len(canvases), explored, kept))


_Settled: TypeAlias = tuple[int, int, float]  # position, token, its probability


@dataclass(frozen=True, slots=True)
class _Window:
    """Open blocks: the first unfinished one up to `end`, all of them up to `stop`."""

    start: int
    end: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Guess:
    """A position to explore and the tokens that are tried there: most likely, or drawn, first."""

    position: int
    tokens: Ints
    probs: Floats

    def fill(self, canvas: Ints) -> list[Ints]:
        """Make a copy of the canvas for each token."""
        copies = np.tile(canvas, (len(self.tokens), 1))
        copies[:, self.position] = self.tokens
        return list(copies)

    def settle(self, index: int) -> _Settled:
        return self.position, int(self.tokens[index]), float(self.probs[index])


@dataclass(frozen=True, slots=True)
class _Look:
    """What a canvas tells of the masked positions of the window.

    Attributes:
        targets: The positions.
        logits_NV: Of the model.
        context: Known tokens of the canvas, for the repetition penalty.
        tokens: Proposed tokens.
        probs: Their probabilities.
        entropy: Of each position.
        is_sure: Whether the token can be committed.
        cascade: How many of these tokens are text: a stop token makes certain what nobody will see.
    """

    targets: Ints
    logits_NV: Tensor
    context: Ints
    tokens: Ints
    probs: Floats
    entropy: Floats
    is_sure: Bools
    cascade: int

    def settle(self, rows: Ints) -> list[_Settled]:
        columns = (column[rows].tolist() for column in (self.targets, self.tokens, self.probs))
        return list(zip(*columns, strict=True))

    def explore(self, row: int, seq: Sequence, num_branches: int, pass_number: int) -> _Guess:
        """Choose the tokens to try at a position."""
        [uniform] = seq.uniforms(self.targets[[row]], "token", pass_number)
        tried = propose(
            self.logits_NV[row], seq.law, self.context, seq.num_prompt, num_branches, float(uniform)
        )
        return _Guess(int(self.targets[row]), *tried)


def _ask(
    seq: Sequence, feed: FeedName, canvases: Seq[Ints], targets: Ints, window: _Window, *, is_stored: bool
) -> tuple[Forward, ...]:
    """Ask for the logits of the targets on each canvas, in this order.

    A single canvas goes through the cache. Several only read it, so that those that are not kept leave
    nothing behind; where it is to be refreshed, what is committed runs beside them.
    """
    needed = np.maximum(targets - seq.family.shift, 0)
    everything = positions = np.arange(seq.limit)
    if feed != "whole" and is_stored:
        positions = np.arange(window.start, window.stop if feed == "dual" else seq.limit)
        positions = np.union1d(positions, needed)
    read, full = Logits(np.searchsorted(positions, needed)), Full(seq.limit)
    if feed != "whole" and len(canvases) == 1:
        return (Forward(canvases[0][positions], positions, full, read, slots=positions),)

    sees: Sees = Together()
    if feed != "whole" and is_stored:
        seen, num = full.visible(positions), len(positions)
        sees = Visible(seen.start, seen.end, np.ones((num, num), dtype=bool), hidden=positions)
    copies = tuple(Forward(canvas[positions], positions, sees, read) for canvas in canvases)
    if feed != "whole" and not is_stored:
        copies += (Forward(seq.tokens[everything], everything, full, slots=everything),)
    return copies


def _read(
    seq: Sequence,
    config: ETEConfig,
    readings: Seq[Reading],
    canvases: Seq[Ints],
    targets: Ints,
    window: _Window,
    pass_number: int,
) -> list[_Look]:
    """Read tokens, confidences and entropies of the targets on each canvas, with one transfer."""
    logits = [reading.logits for reading in readings[: len(canvases)]]
    contexts = [canvas[canvas != seq.family.mask_id] for canvas in canvases]
    scores = ("probs", "entropy")
    reads = [
        seq.sample(
            np.arange(len(targets)), targets, pass_number, scores=scores, contexts=(context,) * len(targets)
        )
        for context in contexts
    ]
    looks = []
    for one, logits_NV, context in zip(read_logits(torch.cat(logits), reads), logits, contexts, strict=True):
        is_stop = np.isin(one.tokens, seq.family.eos_ids)
        is_early = is_stop & (targets >= window.end)
        needed = np.where(is_early, max(config.threshold, config.eos_threshold), config.threshold)
        is_sure = one.probs >= needed
        cascade = int((is_sure & ~is_stop).sum())
        looks.append(_Look(targets, logits_NV, context, one.tokens, one.probs, one.entropy, is_sure, cascade))
    return looks
