"""What a decoder must know of a model besides its logits; one small record for each checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from chordal.errors import CheckpointError

Kind: TypeAlias = Literal["causal", "masked", "block", "masked_causal", "uniform"]

# What a decoder may need: a kind, or what only some models of a kind can do.
Need: TypeAlias = Kind | Literal["looped"]

_DEFAULT_DECODERS: dict[Kind, str] = {
    "causal": "autoregressive",
    "masked": "low_confidence",
    "block": "block_diffusion",
    "masked_causal": "wedlm",
    "uniform": "renoise",
}

# Settings at which the default decoder commits one token a pass, where they are not its own defaults.
_PLAIN_SETTINGS: dict[Kind, Mapping[str, Any]] = {"masked_causal": {"entropy_threshold": None}}

_ATTENTION: dict[Kind, str] = {
    "causal": "causal",
    "masked": "full",
    "block": "full inside blocks, causal between them",
    "masked_causal": "causal in the order of feeding",
    "uniform": "causal prefix, full canvas",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of a checkpoint.

    Attributes:
        name: Family it was recognised as; "chordal" for our own checkpoints, else transformers' model
            type.
        kind: "causal" (each token sees those before it), "masked" (full attention, fills in mask
            tokens), "block" (full attention inside blocks, causal between them), "masked_causal"
            (fills in mask tokens under causal attention, known tokens fed first) or "uniform" (refines
            a canvas of random tokens behind a causal prefix; there is no mask token).
        mask_id: The mask token, None for kinds that have none.
        shift: 0 if the logits at a position predict the token at it, 1 if they predict the next one.
        block_length: Tokens of a block, aligned to position 0, for the block kind; of a canvas for the
            uniform kind.
        vocab_size: Tokens that noise is drawn from, for the uniform kind and looped models.
        num_loops: How often a looped model runs its core unless a request says otherwise; None for
            models that are not looped.
        num_experts: Routed experts of a layer; None for models without.
        eos_ids: Tokens that end a text.
        settings: Settings of the default decoder that the checkpoint was published with.
    """

    name: str = ""
    kind: Kind = "causal"
    mask_id: int | None = None
    shift: int = 1
    block_length: int | None = None
    vocab_size: int | None = None
    num_loops: int | None = None
    num_experts: int | None = None
    eos_ids: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def offers(self) -> tuple[Need, ...]:
        """What decoders may need of which this model has."""
        return (self.kind,) if self.num_loops is None else (self.kind, "looped")

    @property
    def default_decoder(self) -> str:
        """Name of the decoder that is the plain reference for this kind."""
        return _DEFAULT_DECODERS[self.kind]

    @property
    def plain_settings(self) -> Mapping[str, Any]:
        """Settings of the default decoder at which it is that reference."""
        return _PLAIN_SETTINGS.get(self.kind, {})

    @property
    def attention(self) -> str:
        """What a token of this kind of model sees, in words."""
        return _ATTENTION[self.kind]


def make_family(facts: Mapping[str, Any], *, name: str, vocab_size: int, eos_ids: tuple[int, ...]) -> Family:
    """Make a family from facts in the form of config.json's key "chordal", checked.

    Args:
        facts: "family" (the kind), "mask_token_id", "shift", "block_length", "settings".
        name: Of the family.
        vocab_size: Ids are below it.
        eos_ids: Tokens that end a text.

    Raises:
        CheckpointError: A fact is missing or impossible.
    """
    kind: Any = facts.get("family")
    mask_id, block_length = facts.get("mask_token_id"), facts.get("block_length")
    shift = facts.get("shift", 1 if kind == "causal" else 0)
    settings = facts.get("settings") or {}
    where = "config.json: chordal." if name == "chordal" else "config.json: "
    if kind not in get_args(Kind):
        raise CheckpointError(f"{where}family must be one of {get_args(Kind)}; got {kind!r}.")
    if kind not in ("causal", "uniform") and mask_id is None:
        raise CheckpointError(f"{where}mask_token_id is missing, and a {kind} model needs it.")
    if mask_id is not None and (type(mask_id) is not int or not 0 <= mask_id < vocab_size):
        raise CheckpointError(f"{where}mask_token_id must be from 0 to {vocab_size - 1}; got {mask_id!r}.")
    if mask_id is not None and mask_id in eos_ids:
        raise CheckpointError(f"{where}mask_token_id must not be a stop token; got {mask_id} for both.")
    if kind in ("block", "uniform") and (type(block_length) is not int or block_length < 1):
        raise CheckpointError(
            f"{where}block_length of a {kind} model must be at least 1; got {block_length!r}."
        )
    allowed = {"causal": (1,), "masked_causal": (0,), "uniform": (0,)}.get(kind, (0, 1))
    if type(shift) is not int or shift not in allowed:
        raise CheckpointError(
            f"{where}shift of a {kind} model must be {' or '.join(map(str, allowed))}; got {shift!r}."
        )
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{where}settings must be an object; got {settings!r}.")
    return Family(
        name=name,
        kind=kind,
        mask_id=mask_id,
        shift=shift,
        block_length=block_length,
        vocab_size=vocab_size if kind == "uniform" else None,
        eos_ids=eos_ids,
        settings=dict(settings),
    )
