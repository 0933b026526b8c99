"""Prophet: as soon as the answer is decided, commit everything that is left in one go.

Source: "Diffusion Language Models Know the Answer Before Decoding" (arXiv 2508.19982). The wrapped
sampler is LLaDA's, `low_confidence`. After each pass the two best logits are compared at the positions of
the answer; once their mean gap reaches a threshold that falls with progress, decoding ends.
Notation: num_steps is T_max, the answer region is A.

Promise: approximate. Infinite thresholds, or no answer_start, equal `low_confidence` token for token.
Cost: as `low_confidence` up to the pass that stops, which commits every masked position. Text before
the answer may not have been thought through: judge the answer.

Departs from the published code: the region is given, not derived from tokens that are written into the
canvas beforehand; that constraint is not implemented, a decoder has no tokenizer and its results hold
what the model decided. Each row of a batch stops by itself. The mask token has no logit, so it is not
among the two best.
"""

from __future__ import annotations

from dataclasses import dataclass

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.denoise import canvas_blocks, denoise, split_steps
from chordal.errors import InputError
from chordal.policies.commit import Scheduled
from chordal.policies.feed import CanvasFeed, FeedName
from chordal.policies.parts import check_ranges
from chordal.policies.stop import Prophet, answer_region
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class ProphetConfig:
    """Settings of `prophet`; the defaults are the published ones but for the answer, which must be told."""

    answer_start: int | None = None
    """Offset of the answer in the canvas, negative from its end; None never stops."""
    answer_length: int = 5
    """Positions of the answer, at least 1; those behind the canvas do not count."""
    early_threshold: float = 7.5
    """Mean gap of the two best logits that stops before 33% of the passes; infinite never does."""
    middle_threshold: float = 5.0
    """The same before 67%."""
    late_threshold: float = 2.5
    """The same from there on."""
    num_steps: int | None = None
    """Passes for the whole canvas without a stop (T_max), at least one a block; None is one a token."""
    block_length: int | None = 32
    """Tokens of a semi-autoregressive block, at least 1; None takes the whole canvas as one."""
    feed: FeedName = "whole"
    """What a pass recomputes: "whole" is exact, "prefix" reuses approximate keys and values."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.feed == "dual":
            raise InputError(
                "feed must be whole or prefix; got dual, which leaves out later blocks, and a stop commits "
                "them as the pass sees them."
            )


class ProphetDecoder(Decoder):
    """Fill the canvas on a schedule until the answer is decided."""

    name = "prophet"
    family = "diffusion"
    promise = "approximate"
    exact_when = "thresholds = inf: low_confidence"
    needs = ("masked",)
    paper = "arXiv 2508.19982"
    Config = ProphetConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: ProphetConfig = self.config
        seq.open_canvas(seq.limit)
        length = config.block_length or seq.stop.max_new_tokens
        blocks = canvas_blocks(seq.num_prompt, seq.limit, length)
        num_steps = split_steps(config.num_steps, [block.end - block.start for block in blocks])
        stop = None
        if config.answer_start is not None:
            region = answer_region(seq, config.answer_start, config.answer_length)
            thresholds = config.early_threshold, config.middle_threshold, config.late_threshold
            stop = Prophet(sum(num_steps), region, thresholds)

        yield from denoise(
            seq,
            blocks,
            CanvasFeed(config.feed),
            [Scheduled(steps) for steps in num_steps],
            num_steps=num_steps,
            stop=stop,
        )
