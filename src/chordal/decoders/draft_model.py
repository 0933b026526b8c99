"""Draft with a smaller model, verify with the target.

Source: Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318); assisted generation of
transformers, for drafts that end with confidence and the heuristic schedule; typical acceptance of Medusa
(arXiv 2401.10774). Beyond them: `acceptance="follow"`, which draws draft and target with the same random
numbers, so that even sampled output is plain decoding's token for token.

Promise: exact; approximate with `acceptance="typical"` or a lenience below 1.
Cost: a round is up to `num_draft` passes of the draft model and one of the target, for 1 to 1 + `num_draft`
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.speculate import speculate
from chordal.drafters.model import ModelDrafter
from chordal.errors import InputError
from chordal.forward import Ints
from chordal.ops.acceptance import Offers, lenient, typical, without_replacement
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class DraftModelConfig:
    """Settings of `draft_model`."""

    num_draft: int = 8
    """Most draft tokens of a round, at least 0; 0 is plain decoding."""
    min_confidence: float = 0.4
    """A draft ends behind the first token whose probability under the draft's law is below this, from 0
    (never) to 1."""
    schedule: Literal["constant", "heuristic"] = "constant"
    """heuristic begins with drafts of up to 5 tokens, then takes 2 more after one that was kept whole and 1
    less after any other."""
    acceptance: Literal["ratio", "follow", "typical"] = "ratio"
    """How sampled drafts are judged: rejection sampling by the ratio of both models' probabilities; the
    target's own draw with the random number of the draft; or typical acceptance, which is approximate."""
    lenience: float = 1.0
    """Divides the chance that a draft token is accepted by ratio, above 0; below 1 it is approximate."""
    eps: float = 0.09
    """Probability that is always enough for typical acceptance, from 0 to 1."""
    delta: float = 0.3
    """Share of exp(-entropy) that is enough for typical acceptance, at least 0."""

    def __post_init__(self) -> None:
        if self.num_draft < 0:
            raise InputError(f"num_draft must be at least 0; got {self.num_draft}.")
        if not 0 <= self.min_confidence <= 1:
            raise InputError(f"min_confidence must be from 0 to 1; got {self.min_confidence}.")
        if not 0 < self.lenience <= 1:
            raise InputError(f"lenience must be above 0 and at most 1; got {self.lenience}.")
        if self.lenience < 1 and self.acceptance != "ratio":
            raise InputError(f"lenience belongs to acceptance=ratio; got {self.acceptance}.")
        if not (0 <= self.eps <= 1 and self.delta >= 0):
            raise InputError(
                f"eps must be from 0 to 1 and delta at least 0; got {self.eps} and {self.delta}."
            )


class DraftModel(Decoder):
    """A smaller model writes ahead, the target checks all of it at once."""

    name = "draft_model"
    family = "autoregressive"
    promise: Literal["exact", "approximate"] = "exact"
    needs = ("causal",)
    constrains = True
    needs_models = ("draft",)
    paper = "arXiv 2211.17192, 2302.01318"
    Config = DraftModelConfig

    def __init__(self, config: DraftModelConfig | None = None) -> None:
        super().__init__(config)
        if self.config.acceptance == "typical" or self.config.lenience < 1:
            self.promise = "approximate"
            self.exact_when = "acceptance ratio or follow and lenience 1; at temperature 0"

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: DraftModelConfig = self.config
        drafter = ModelDrafter(
            seq, min_confidence=config.min_confidence, offers=_offers(config), schedule=config.schedule
        )
        return speculate(seq, drafter, num_draft=config.num_draft)


def _offers(config: DraftModelConfig) -> Offers | None:
    if config.acceptance == "follow":
        return None
    if config.acceptance == "ratio":
        return without_replacement if config.lenience == 1 else lenient(without_replacement, config.lenience)

    def offer(p_V: Tensor, q_V: Tensor, children: Ints) -> Iterator[tuple[float, Tensor]]:
        is_likely = typical(p_V.expand(len(children), -1), children, config.eps, config.delta)
        for is_accepted in is_likely.tolist():
            yield float(is_accepted), p_V

    return offer
