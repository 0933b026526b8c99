"""Dynamic Expert Sharing: the positions that are denoised together agree on a small set of experts.

Source: "Dynamic Expert Sharing" (arXiv 2602.00879). A mixture of experts reads the weights of every expert
that some token takes, and many tokens together take nearly all. In each layer of a pass the tokens agree
on a coreset first, and each then takes its K best of that. What is fed and what is committed is another
matter: here it is `threshold`.
Notation: expert_share is beta, expert_choices is k, experts="vote" is DES-Vote and "seq" DES-Seq; "max" is
how LLaDA2.2 admits experts.

Promise: approximate. expert_share=1, or as many expert_choices as the model has experts for a token, equals
`threshold` (or `block_diffusion`) with the same feed, bit for bit.
Cost: as those, with at most expert_share of a layer's experts in the passes that share them.

Departs from the paper: groups that a router keeps count only where they leave a token enough experts;
the batch is never asked as a whole, so that a request does not depend on who else runs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.denoise import Denoise, DenoiseConfig
from chordal.models.family import Family, Kind
from chordal.ops.experts import RoutingRule
from chordal.policies.feed import FeedName
from chordal.policies.parts import BlockLength, check_ranges
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class DESConfig:
    """Settings of `des`."""

    experts: RoutingRule = "vote"
    """How a coreset is found: "vote" takes the experts with the largest sums of scores, "max" those with
    the largest scores of any position, "seq" the first choices of every position."""
    expert_share: float = 0.6
    """Of "vote" and "max": share of a layer's experts (beta), above 0 and at most 1. Published for 64
    experts; with 256 it is 0.15."""
    expert_choices: int = 3
    """Of "seq": first choices of a position (k), at least 1."""
    expert_refresh: bool = False
    """Share experts also in passes that feed what lies before their block."""
    threshold: float = 0.9
    """Confidence from which a position is committed (tau), at least 0; above 1 is one token a pass."""
    block_length: BlockLength = 32
    """Tokens of a block, at least 1, or "canvas" for all as one; block models have their own."""
    feed: FeedName = "dual"
    """What a pass recomputes; block models have a feed of their own."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def composed(self, kind: Kind) -> DenoiseConfig:
        """Give the same as settings of `denoise`, for a kind of model."""
        settings = asdict(self)
        del settings["expert_choices" if self.experts != "seq" else "expert_share"]
        if kind == "block":
            del settings["feed"], settings["block_length"]
        return DenoiseConfig(commit="threshold", **settings)


class DES(Decoder):
    """Commit what is confident enough, with few experts shared by all positions of a pass."""

    name = "des"
    family = "diffusion"
    promise = "approximate"
    exact_when = "expert_share = 1: threshold"
    needs = ("masked", "block")
    needs_experts = True
    paper = "arXiv 2602.00879"
    Config = DESConfig

    def check(self, family: Family) -> None:
        """Refuse a model without experts, and a feed that leaves no pass to share them in."""
        super().check(family)
        Denoise(self.config.composed(family.kind)).check(family)

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        yield from Denoise(self.config.composed(seq.family.kind)).decode(seq)
