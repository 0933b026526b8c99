"""CCD: commit what stays confident, and the same, from one step to the next.

Source: "Beyond Confidence: Adaptive and Coherent Decoding for Diffusion Language Models" (arXiv
2512.02044). Paper and published code differ, and both are here. The code ("release") compares the most
likely tokens of two steps inside a pool that grows; the paper averages the laws of several steps, whose
entropy is that of a step plus what the prediction still depends on the context.
Notation: expand_ratio is r, pool_size is V, history_length is d; b = masks // steps is the plain budget.

Promise: approximate. expand_ratio=0 with variant=release, and history_length=0 without adaptive with
variant=paper, are plain decoding in that order: with order=confidence `low_confidence`, token for token.
Cost: 1 pass for at least b tokens over the whole canvas. Logits of the candidates stay on the device for
a moment (paper; release where it samples), and laws of V positions for d steps (paper).

Departs from the published code: what rounding b down leaves is committed by further plain steps, where
it stays masked; the pool is never larger than what is masked. Of the paper's rule some is only known
from its figures. A candidate was in the pool of one of the last d steps: in all of them would commit
V / d tokens a pass at most, less than the paper reports. That CCD-DS bounds the entropy of the average
is stated, `max_entropy` is our value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.denoise import canvas_blocks, denoise, split_steps
from chordal.policies.commit import Averaged, Coherent, CommitRule
from chordal.policies.feed import CanvasFeed
from chordal.policies.parts import check_ranges
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class CCDConfig:
    """Settings of `ccd`; the defaults are the published script's and, for the paper's rule, the paper's."""

    variant: Literal["release", "paper"] = "release"
    """Compare the most likely tokens of two steps (published code), or average laws of several (paper)."""
    adaptive: bool = True
    """Commit all that is coherent (CCD-DS, "seek mode"); false keeps to the plain budget (CCD)."""
    expand_ratio: float = 4.0
    """For release: by how many plain budgets the pool may exceed one (r), at least 0."""
    history_length: int = 3
    """For paper: earlier steps that are averaged over (d), at least 0."""
    pool_size: int = 4
    """For paper: most confident positions of a step that are candidates (V), at least 1."""
    max_entropy: float = 0.3
    """For paper and adaptive: entropy of an averaged law that suffices, in nats, at least 0."""
    order: Literal["entropy", "confidence"] = "entropy"
    """What is confident: low entropy, as published for Dream, or high probability, as for LLaDA."""
    num_steps: int | None = None
    """Plain passes for the whole canvas, at least one a block; None is one a token."""
    block_length: int | None = None
    """Tokens of a block, at least 1; None takes the whole canvas as one. Each block starts anew."""

    def __post_init__(self) -> None:
        check_ranges(self)


class CCD(Decoder):
    """Commit what two or more steps agree on."""

    name = "ccd"
    family = "diffusion"
    promise = "approximate"
    exact_when = "expand_ratio = 0, order = confidence: low_confidence"
    needs = ("masked",)
    paper = "arXiv 2512.02044"
    Config = CCDConfig

    def __init__(self, config: CCDConfig | None = None) -> None:
        super().__init__(config)
        self.tells_logprobs = self.config.variant == "release"  # the paper's draws from averages

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: CCDConfig = self.config
        seq.open_canvas(seq.limit)
        length = config.block_length or seq.stop.max_new_tokens
        blocks = canvas_blocks(seq.num_prompt, seq.limit, length)
        num_steps = split_steps(config.num_steps, [block.end - block.start for block in blocks])
        rules = [self._rule(steps, seq) for steps in num_steps]
        yield from denoise(seq, blocks, CanvasFeed(), rules)

    def _rule(self, num_steps: int, seq: Sequence) -> CommitRule:
        """Make the rule of a block."""
        config: CCDConfig = self.config
        if config.variant == "release":
            return Coherent(
                num_steps,
                adaptive=config.adaptive,
                expand_ratio=config.expand_ratio,
                order=config.order,
                of="law" if config.order == "entropy" else "model",
                is_greedy=seq.law.is_greedy,
            )
        return Averaged(
            num_steps,
            history_length=config.history_length,
            pool_size=config.pool_size,
            adaptive=config.adaptive,
            max_entropy=config.max_entropy,
            order=config.order,
        )
