"""stutter: draft the last token again; a whole decoder in one file.

Silly on most text and good on rows of equal tokens. It needs no model to be written and none to be
understood: `propose` is all there is to it, and `speculate` verifies whatever it proposes.

Promise: exact, as everything that `speculate` verifies. Cost: one pass of 1 + num_draft positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.speculate import speculate
from chordal.drafters.draft import Draft, Drafter
from chordal.errors import InputError
from chordal.forward import Ints
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class StutterConfig:
    """Settings of `stutter`."""

    num_draft: int = 2
    """Draft tokens a forward pass, at least 0."""

    def __post_init__(self) -> None:
        if self.num_draft < 0:
            raise InputError(f"num_draft must be at least 0; got {self.num_draft}.")


class Stutter(Decoder):
    """Propose the last committed token `num_draft` times."""

    name = "stutter"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    paper = "-"
    Config = StutterConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        return speculate(seq, LastToken(), num_draft=self.config.num_draft)


class LastToken(Drafter):
    """Propose the last token, as often as the budget allows."""

    def propose(self, text: Ints, budget: int) -> Draft:
        """Propose what may follow a text."""
        return Draft.chain(np.repeat(text[-1:], budget))
