"""What a decoder is: a config, a few traits, and a coroutine for one sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, ClassVar, Literal, TypeAlias

from chordal.errors import InputError
from chordal.forward import Forward
from chordal.models.family import Family, Need
from chordal.sequence import Sequence

# Sent back is a Reading for a Forward and a tuple of them for a tuple; which one is up to the request,
# and that is more than a type checker can follow.
Decoding: TypeAlias = Generator[Forward | tuple[Forward, ...], Any, None]


class Decoder(ABC):
    """A way to decode, without a model, a cache or a batch in sight.

    Attributes:
        name: Lower-case name: registry key, file name, value of `--decoder`.
        family: "autoregressive" or "diffusion".
        promise: "exact" (what plain decoding gives, greedy token for token and sampled in
            distribution) or "approximate".
        exact_when: Of an approximate decoder, the setting at which it gives what its reference gives.
        needs: Kinds of model it runs on; "looped" is a causal one with a core that is repeated.
        needs_experts: Whether that must be a mixture of experts.
        paper: Where it comes from.
        Config: Its frozen settings dataclass.
    """

    name: ClassVar[str]
    family: ClassVar[Literal["autoregressive", "diffusion"]]
    promise: ClassVar[Literal["exact", "approximate"]]
    exact_when: ClassVar[str] = ""
    needs: ClassVar[tuple[Need, ...]]
    needs_experts: bool = False
    paper: ClassVar[str]
    Config: ClassVar[type[Any]]

    def __init__(self, config: Any = None) -> None:
        self.config: Any = self.Config() if config is None else config

    @abstractmethod
    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence: yield forwards, receive readings, commit through `seq` until it is done."""

    @classmethod
    def fits(cls, family: Family) -> bool:
        """Whether it runs on models of this family."""
        has_experts = family.num_experts is not None
        return any(need in cls.needs for need in family.offers) and (has_experts or not cls.needs_experts)

    def check(self, family: Family) -> None:
        """Refuse a model this decoder cannot run on.

        Raises:
            InputError: The model is of another kind; the message names what would fit.
        """
        if self.needs_experts and family.num_experts is None:
            raise InputError(
                f"{self.name} shares experts, and this model has none. Use a mixture of experts, or another "
                f"decoder; see chordal list."
            )
        if not self.fits(family):
            raise InputError(
                f"{self.name} needs a {' or '.join(self.needs)} model; this one is {family.kind}. "
                f"Use --decoder {family.default_decoder}, or see chordal list."
            )
