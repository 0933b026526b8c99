"""Prompt lookup: draft by copying what followed the last few tokens where they occurred before.

Promise: exact. Cost: no extra model; one wider forward pass where a match is found.
Source: A. Saxena, "Prompt Lookup Decoding", 2023 (apoorvumang/prompt-lookup-decoding); also LLMA
(arXiv 2304.04487). Beyond it: `match="last"` copies the latest occurrence rather than the first, which
follows loops better and edits worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.speculate import speculate
from chordal.drafters.ngram import NgramDrafter
from chordal.errors import InputError
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class PromptLookupConfig:
    """Settings of `prompt_lookup`."""

    num_draft: int = 10
    """Most draft tokens a forward pass, at least 0; 0 is plain decoding."""
    max_ngram: int = 3
    """Longest suffix that is looked up, in tokens, at least 1."""
    min_ngram: int = 1
    """Shortest suffix that is looked up, in tokens, from 1 to max_ngram."""
    match: Literal["first", "last"] = "first"
    """Which occurrence is copied."""

    def __post_init__(self) -> None:
        if self.num_draft < 0:
            raise InputError(f"num_draft must be at least 0; got {self.num_draft}.")
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise InputError(
                f"min_ngram must be at least 1 and at most max_ngram; "
                f"got {self.min_ngram} and {self.max_ngram}."
            )


class PromptLookup(Decoder):
    """Copy drafts from the prompt and the output, verify, keep the right prefix."""

    name = "prompt_lookup"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    constrains = True
    paper = "Saxena 2023; arXiv 2304.04487"
    Config = PromptLookupConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: PromptLookupConfig = self.config
        drafter = NgramDrafter(config.max_ngram, config.min_ngram, match=config.match)
        return speculate(seq, drafter, num_draft=config.num_draft)
