"""The reference samplers of LLaDA and Dream: commit a scheduled number of masked positions a step.

Source: LLaDA (arXiv 2502.09992; low-confidence and random remasking, semi-autoregressive blocks,
guidance, the two end-of-text options) and Dream (arXiv 2508.15487; four orders over a time grid).
Notation: num_steps is S, block_length is Lb; LLaDA spreads the masks of a block over S_b steps.

Promise: this is the reference. With one token a forward pass (num_steps = canvas length, the
default) greedy decoding is what lossless decoders must reproduce; fewer steps are approximate.
Cost: num_steps passes over the whole canvas, twice as many rows with guidance.

Departs from the papers: the mask token is never committed; ties go to the lower position; blocks need
not divide the canvas nor steps the blocks (equal wherever they do); `defer_eos` follows what LLaDA's
code does at temperature 0 at every temperature; decoding ends as soon as everything up to a stop
token is committed, where LLaDA would go on filling the rest (with ignore_eos it does too); top-k comes
before top-p, as everywhere in Chordal, where Dream has them the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.denoise import canvas_blocks, denoise, split_steps
from chordal.errors import InputError
from chordal.policies.commit import CommitRule, DreamTimes, Scheduled
from chordal.policies.feed import CanvasFeed
from chordal.sequence import Sequence

_LLADA_ORDERS: dict[str, Literal["confidence", "random", "left_to_right"]] = {
    "low_confidence": "confidence",
    "random": "random",
}


@dataclass(frozen=True, kw_only=True)
class LowConfidenceConfig:
    """Settings of `low_confidence`."""

    num_steps: int | None = None
    """Forward passes for the whole canvas, at least one a block; None commits one token a pass."""
    block_length: int | None = 32
    """Tokens of a semi-autoregressive block, at least 1; None takes the whole canvas as one. Dream's
    orders always take the whole canvas."""
    order: Literal["low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy"] = (
        "low_confidence"
    )
    """Which positions are committed first: LLaDA's two rules, then Dream's four."""
    order_temperature: float = 0.0
    """Randomness of Dream's order ("alg_temp"), at least 0; no effect on LLaDA's orders."""
    cfg_scale: float = 0.0
    """Classifier-free guidance, at least 0; above 0 every pass runs a second copy without the prompt."""
    ban_eos: bool = False
    """Never commit a stop token ("logits_eos_inf"), so the whole canvas is filled."""
    defer_eos: bool = False
    """Commit stop tokens only when nothing else is left ("confidence_eos_eot_inf")."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "block_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1; got {value}.")
        for name in ("order_temperature", "cfg_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be a finite number of at least 0; got {getattr(self, name)}.")


class LowConfidence(Decoder):
    """Fill the canvas on a fixed schedule, the most confident positions first."""

    name = "low_confidence"
    family = "diffusion"
    promise = "approximate"
    exact_when = "num_steps = canvas length"
    needs = ("masked",)
    paper = "arXiv 2502.09992, 2508.15487"
    Config = LowConfidenceConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: LowConfidenceConfig = self.config
        seq.open_canvas(seq.limit)
        length = seq.limit - seq.num_prompt
        is_dream = config.order not in _LLADA_ORDERS
        block_length = length if is_dream or config.block_length is None else config.block_length
        blocks = canvas_blocks(seq.num_prompt, seq.limit, block_length)

        num_steps = split_steps(config.num_steps, [block.end - block.start for block in blocks])
        rules: list[CommitRule] = [
            DreamTimes(steps, config.order, config.order_temperature)  # type: ignore[arg-type]
            if is_dream
            else Scheduled(steps, _LLADA_ORDERS[config.order])
            for steps in num_steps
        ]

        yield from denoise(
            seq,
            blocks,
            CanvasFeed("whole"),
            rules,
            num_steps=num_steps,
            cfg_scale=config.cfg_scale,
            banned=seq.family.eos_ids if config.ban_eos else (),
            unscored=seq.family.eos_ids if config.defer_eos else (),
        )
