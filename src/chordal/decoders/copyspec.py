"""CopySpec: when the last tokens were seen before, copy what followed; otherwise draft with a model, or not.

Source: "CopySpec: Accelerating LLMs with Speculative Copy-and-Paste Without Compromising Quality" (arXiv
2502.08923). Beyond it: the latest occurrence as a choice, a length that adapts, exact sampling.

Promise: exact. Without a draft model even sampled output is plain decoding's token for token.
Cost: one wider forward pass where a match is found, a plain one elsewhere; with `draft_model` up to
`num_draft` passes of it there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.speculate import speculate
from chordal.drafters.copy import CopyDrafter
from chordal.drafters.first_of import FirstOf
from chordal.drafters.model import ModelDrafter
from chordal.errors import InputError
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class CopySpecConfig:
    """Settings of `copyspec`."""

    ngram: int = 3
    """Tokens that must have occurred before (gamma), at least 1; more are found less often and surer."""
    num_copy: int = 10
    """Most tokens copied for a forward pass, at least 0."""
    match: Literal["first", "last"] = "first"
    """Which of several occurrences is copied."""
    adaptive: bool = False
    """Whether a copy that is rejected makes the next one shorter, and one that is kept whole longer again."""
    draft_model: bool = False
    """Whether the draft model writes on where nothing can be copied."""
    num_draft: int = 5
    """Most tokens of its drafts (delta), at least 0."""

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise InputError(f"ngram must be at least 1; got {self.ngram}.")
        if self.num_copy < 0 or self.num_draft < 0:
            raise InputError(
                f"num_copy and num_draft must be at least 0; got {self.num_copy} and {self.num_draft}."
            )


class CopySpec(Decoder):
    """Copy drafts from the text so far, or let a smaller model write them, and verify."""

    name = "copyspec"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    constrains = True
    paper = "arXiv 2502.08923"
    Config = CopySpecConfig

    def __init__(self, config: CopySpecConfig | None = None) -> None:
        super().__init__(config)
        if self.config.draft_model:
            self.needs_models = ("draft",)

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: CopySpecConfig = self.config
        copies = CopyDrafter(
            config.ngram, max_draft=config.num_copy, match=config.match, adaptive=config.adaptive
        )
        if not config.draft_model:
            return speculate(seq, copies, num_draft=config.num_copy)
        drafter = FirstOf((copies, config.num_copy), (ModelDrafter(seq), config.num_draft))
        return speculate(seq, drafter, num_draft=max(config.num_copy, config.num_draft))
