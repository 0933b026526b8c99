"""What a decoder is: a config, a few traits, and a coroutine for one sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator
from typing import Any, ClassVar, Literal, TypeAlias

from chordal.errors import InputError
from chordal.forward import Forward
from chordal.models.family import Family, Need
from chordal.ops.sampling import Law
from chordal.sequence import Sequence

# What runs beside other things, asking for one forward after the other, and what it returns.
Part: TypeAlias = Generator[Forward, Any, Any]
# A tuple holds what may run at the same time. Sent back is a Reading for a Forward, and for a tuple a tuple
# of readings and of what its parts return; that follows from the request, and no type checker can see it.
Decoding: TypeAlias = Generator[Forward | tuple[Forward | Part, ...], Any, None]


class Decoder(ABC):
    """A way to decode, without a model, a cache or a batch in sight.

    Attributes:
        name: Lower-case name: registry key, file name, value of `--decoder`.
        family: "autoregressive" or "diffusion".
        promise: "exact" (what plain decoding gives, greedy token for token and sampled in
            distribution) or "approximate"; with default settings, and of an instance with its own.
        exact_when: Of an approximate decoder, the setting at which it gives what its reference gives.
        needs: Kinds of model it runs on; "looped" is a causal one with a core that is repeated.
        needs_experts: Whether that must be a mixture of experts.
        needs_models: Names of the models it asks beside the target.
        samples: Whether it draws tokens; a search does not, and refuses requests with a temperature.
        chooses: Whether it draws several texts, and where they end decides which one it gives.
        constrains: Whether it keeps to a constraint: each token is drawn behind all tokens before it.
        tells_logprobs: Whether it reads the log-probability of every token it commits.
        remembers: Whether it drafts with what it learnt in earlier requests; they then change how fast the
            next one goes, and never what it gives.
        local_settings: Settings that name files or may cost without bound, for whoever owns the machine: a
            server takes them from nobody else.
        paper: Where it comes from.
        Config: Its frozen settings dataclass.
    """

    name: ClassVar[str]
    family: ClassVar[Literal["autoregressive", "diffusion"]]
    promise: Literal["exact", "approximate"]
    exact_when: str = ""
    needs: ClassVar[tuple[Need, ...]]
    needs_experts: bool = False
    needs_models: tuple[str, ...] = ()
    samples: ClassVar[bool] = True
    chooses: ClassVar[bool] = False
    constrains: bool = False
    tells_logprobs: bool = True
    remembers: bool = False
    local_settings: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str]
    Config: ClassVar[type[Any]]

    def __init__(self, config: Any = None) -> None:
        self.config: Any = self.Config() if config is None else config

    @abstractmethod
    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence: yield forwards, receive readings, commit through `seq` until it is done."""

    def reset(self) -> None:  # noqa: B027  not every decoder remembers
        """Forget what was learnt in earlier requests, as it must before another model is decoded."""

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

    def check_law(self, law: Law) -> None:
        """Refuse a law that cannot be decoded from.

        Raises:
            InputError: This is a search and the temperature is above 0, or tokens have no order to be
                constrained in.
        """
        if law.constraint is not None and not self.constrains:
            raise InputError(
                f"{self.name} cannot keep to a constraint, which needs every token drawn behind all tokens "
                f"before it. Use an autoregressive decoder, such as autoregressive or prompt_lookup."
            )
        if not (self.samples or law.is_greedy):
            raise InputError(
                f"{self.name} is a search and draws no tokens; temperature must be 0, got {law.temperature}. "
                f"Leave it out, or use a decoder that samples."
            )

    def check_models(self, given: Collection[str]) -> None:
        """Refuse to run without a model it asks.

        Args:
            given: Names of the models there are.

        Raises:
            InputError: One is missing.
        """
        for name in self.needs_models:
            if name not in given:
                raise InputError(
                    f"{self.name} needs a {name} model beside the target; load one with {name}=... or "
                    f"--{name} NAME (tiny-draft goes with tiny-ar)."
                )
