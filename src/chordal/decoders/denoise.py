"""Denoise a masked canvas: feed some positions, score the masked ones, commit some, repeat.

The loop of every masked-diffusion decoder that is a choice of feed and commit rule. Blocks are
filled from left to right; inside a block the rule decides. Committed positions never change.
"""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Sequence as Seq
from typing import Any, Protocol

import numpy as np

from chordal.decoders.decoder import Decoding
from chordal.forward import Floats, Forward, Ints, Logits, Reading, Sample, Sees, Together
from chordal.models.reading import read_logits
from chordal.ops.sampling import guide
from chordal.policies.commit import Candidates, CommitRule, Score
from chordal.policies.feed import Block
from chordal.sequence import Sequence
from chordal.stats import TARGET


class Feed(Protocol):
    """Says which positions a step recomputes and what they see; see `policies.feed`."""

    def span(self, block: Block, step: int) -> tuple[int, int]: ...  # noqa: D102

    def sees(self, block: Block) -> Sees: ...  # noqa: D102


def denoise(
    seq: Sequence,
    blocks: Seq[Block],
    feed: Feed,
    rules: Seq[CommitRule],
    *,
    num_steps: Seq[int] | None = None,
    cfg_scale: float = 0.0,
    banned: tuple[int, ...] = (),
    unscored: tuple[int, ...] = (),
) -> Decoding:
    """Fill the blocks of a canvas that was opened with `seq.open_canvas`.

    Args:
        seq: The sequence.
        blocks: Where to denoise, from left to right.
        feed: What each step recomputes.
        rules: What each step of each block commits, one rule a block.
        num_steps: Forward passes of each block; passes behind the last mask still run, as published
            samplers do. None stops a block when nothing is masked.
        cfg_scale: Classifier-free guidance; above 0 a second copy without the prompt runs beside each
            pass and the feed must be the whole canvas.
        banned: Tokens that are never committed.
        unscored: Tokens that score no confidence, so they are committed last.
    """
    for index, block in enumerate(blocks):
        masked = seq.masked(block.start, block.end)
        num_at_start, step = len(masked), 0
        while not seq.done and (step < num_steps[index] if num_steps else len(masked) > 0):
            rule = rules[index]
            pass_number = seq.stats.forwards.get(TARGET, 0)

            # Predict: the row before a position predicts it if the model's logits are shifted.
            start, end = feed.span(block, step)
            needed = np.maximum(masked - seq.family.shift, 0)
            start = min(start, int(needed.min(initial=start)))
            read = seq.sample(
                needed - start,
                masked,
                draw=pass_number,
                scores=rule.reads,
                of=rule.of,
                banned=banned,
                unscored=unscored,
                contexts=_contexts(seq, len(masked)),
            )
            positions = np.arange(start, end)
            if cfg_scale > 0:
                reading = yield from _guided(seq, positions, read, cfg_scale)
            else:
                reading = yield Forward(
                    tokens=seq.tokens[start:end],
                    positions=positions,
                    slots=positions,
                    sees=feed.sees(block),
                    read=read if len(masked) else None,
                )

            # Commit.
            if len(masked):
                scores: dict[Score, Floats] = {name: getattr(reading, name) for name in rule.reads}
                candidates = Candidates(masked, reading.tokens, scores, step, num_at_start, seq, pass_number)
                chosen = np.sort(rule(candidates))
                seq.commit(masked[chosen], reading.tokens[chosen])
            masked = seq.masked(block.start, block.end)
            step += 1
        if seq.done:
            return


def canvas_blocks(start: int, end: int, block_length: int) -> list[Block]:
    """Cut the canvas into blocks counted from its start; the last may be shorter."""
    return [Block(at, min(at + block_length, end), end) for at in range(start, end, block_length)]


def _guided(
    seq: Sequence, positions: Ints, read: Sample, scale: float
) -> Generator[tuple[Forward, ...], Any, Reading]:
    """Run the canvas with and without its prompt, both without cache, and read the guided logits."""
    assert seq.family.mask_id is not None, "open_canvas refuses a model without a mask token"
    hidden = seq.tokens[: len(positions)].copy()
    hidden[: seq.num_prompt] = seq.family.mask_id
    pair = tuple(
        Forward(tokens=tokens, positions=positions, sees=Together(), read=Logits(read.rows))
        for tokens in (seq.tokens[: len(positions)], hidden)
    )
    given, without = yield pair
    [reading] = read_logits(guide(given.logits, without.logits, scale), [read])
    return reading


def _contexts(seq: Sequence, count: int) -> tuple[Ints, ...] | None:
    """Every committed token, for the repetition penalty: masked positions have no order among them."""
    if seq.law.repetition_penalty == 1:
        return None
    return (seq.tokens[np.flatnonzero(seq.committed_at[: seq.canvas_end] >= 0)],) * count
