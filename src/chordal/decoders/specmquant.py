"""SpecMQuant: a cheap drafter drafts for a middle model, whose text is the draft for the target.

A pass over many positions may cost a quantised target more than it saves. So the cheap drafter's guesses are
spent on a middle model, smaller or in fewer bits, and the target sees one chain of its tokens, which are
more often right.

Promise: exact, to the target as it is loaded: against the weights before quantisation nothing is promised.
Cost: a round is one pass of the target over 1 + n positions, n from `min_draft` to `min_draft` + `num_draft`,
and 1 to `min_draft` passes of the middle model, for 1 to 1 + n tokens; with draft="model" each of the latter
also takes up to `num_draft` passes of the draft model.
Source: "Speculative Decoding Meets Quantization: Compatibility Evaluation and Hierarchical Framework Design",
2025 (arXiv 2505.22179; AI9Stars/SpecMQuant). Not implemented: its EAGLE head; the cheap drafter copies
n-grams, or is a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.rsd import RSDConfig, TreeDrafter
from chordal.decoders.speculate import speculate
from chordal.drafters.draft import Drafter
from chordal.drafters.hierarchy import HierarchyDrafter
from chordal.drafters.model import ModelDrafter
from chordal.drafters.ngram import NgramDrafter
from chordal.errors import InputError
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class SpecMQuantConfig:
    """Settings of `specmquant`."""

    draft: Literal["ngram", "model"] = "ngram"
    """Who drafts for the middle model: copies of what followed the last tokens before, or the draft model."""
    min_draft: int = 6
    """Tokens from which the middle model's text is long enough for the target (m), at least 1."""
    # The paper's 3 is for a head that must run once a level; copies cost nothing.
    num_draft: int = 10
    """Longest path of a draft for the middle model (d), at least 0; with 0 it writes by itself."""
    width: int = 1
    """Nodes of each level of the draft model's tree (W), at least 1; 1 is a chain."""
    max_ngram: int = 3
    """Longest suffix that is looked up, in tokens, at least 1."""
    acceptance: Literal["ratio", "follow"] = "ratio"
    """How the target judges sampled tokens of the middle model: rejection sampling by the ratio of both
    models' probabilities, or its own draw with the random number of the draft."""

    def __post_init__(self) -> None:
        if self.min_draft < 1 or self.num_draft < 0:
            raise InputError(
                f"min_draft must be at least 1 and num_draft at least 0; got {self.min_draft} and "
                f"{self.num_draft}."
            )
        if self.width < 1 or self.max_ngram < 1:
            raise InputError(
                f"width and max_ngram must be at least 1; got {self.width} and {self.max_ngram}."
            )
        if self.width > 1 and self.draft != "model":
            raise InputError(f"width={self.width} is for draft=model; n-grams are copied as a chain.")


class SpecMQuant(Decoder):
    """Speculate twice: a drafter for a middle model, the middle model for the target."""

    name = "specmquant"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    constrains = True
    needs_models: tuple[str, ...] = ("middle",)
    paper = "arXiv 2505.22179"
    Config = SpecMQuantConfig

    def __init__(self, config: SpecMQuantConfig | None = None) -> None:
        super().__init__(config)
        if self.config.draft == "model":
            self.needs_models = ("middle", "draft")

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: SpecMQuantConfig = self.config
        middle = HierarchyDrafter(
            seq,
            _cheap_drafter(seq, config),
            min_draft=config.min_draft,
            num_draft=config.num_draft,
            acceptance=config.acceptance,
        )
        return speculate(seq, middle, num_draft=config.min_draft + config.num_draft)


def _cheap_drafter(seq: Sequence, config: SpecMQuantConfig) -> Drafter:
    if config.draft == "ngram":
        return NgramDrafter(config.max_ngram)
    if config.width > 1:
        return TreeDrafter(seq, RSDConfig(beam_width=config.width, depth=config.num_draft))
    # With the middle model's random numbers, which then draws the same wherever both have one law.
    purpose: Literal["draft", "token"] = "draft" if config.acceptance == "ratio" else "token"
    return ModelDrafter(seq, offers=None, purpose=purpose)
