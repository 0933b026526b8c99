"""What a decoder must know of a model besides its logits; one small record for each checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from chordal.errors import CheckpointError

Kind = Literal["causal", "masked", "block"]

_DEFAULT_DECODERS: dict[Kind, str] = {
    "causal": "autoregressive",
    "masked": "low_confidence",
    "block": "block_diffusion",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of a checkpoint.

    Attributes:
        kind: "causal" (each token sees those before it), "masked" (full attention, fills in mask
            tokens) or "block" (full attention inside blocks, causal between them).
        mask_id: The mask token, None for causal models.
        shift: 0 if the logits at a position predict the token at it, 1 if they predict the next one.
        block_length: Tokens of a block, aligned to position 0, for the block kind.
        eos_ids: Tokens that end a text.
    """

    kind: Kind = "causal"
    mask_id: int | None = None
    shift: int = 1
    block_length: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def default_decoder(self) -> str:
        """Name of the decoder that is the plain reference for this kind."""
        return _DEFAULT_DECODERS[self.kind]


def family_of(config: Any, eos_ids: tuple[int, ...]) -> Family:
    """Read the family of a checkpoint from its own configuration.

    Args:
        config: transformers configuration; Chordal's facts are under its key "chordal".
        eos_ids: Stop tokens from the generation config or the tokenizer.

    Raises:
        CheckpointError: The facts contradict each other.
    """
    facts = getattr(config, "chordal", None)
    if facts is None:
        return Family(eos_ids=eos_ids)
    if not isinstance(facts, dict):
        raise CheckpointError(f"config.json: chordal must be an object; got {facts!r}.")
    kind: Any = facts.get("family")
    mask_id, block_length = facts.get("mask_token_id"), facts.get("block_length")
    if kind not in get_args(Kind):
        raise CheckpointError(f"config.json: chordal.family must be one of {get_args(Kind)}; got {kind!r}.")
    if kind != "causal" and mask_id is None:
        raise CheckpointError(f"config.json: a {kind} model needs chordal.mask_token_id; it is missing.")
    last_id = config.get_text_config().vocab_size - 1
    if mask_id is not None and mask_id not in range(last_id + 1):
        raise CheckpointError(
            f"config.json: chordal.mask_token_id must be from 0 to {last_id}; got {mask_id!r}."
        )
    if kind == "block" and not (isinstance(block_length, int) and block_length > 0):
        raise CheckpointError(
            f"config.json: a block model needs chordal.block_length of at least 1; got {block_length!r}."
        )
    shift = facts.get("shift", 1 if kind == "causal" else 0)
    if shift not in (0, 1):
        raise CheckpointError(f"config.json: chordal.shift must be 0 or 1; got {shift!r}.")
    return Family(kind=kind, mask_id=mask_id, shift=shift, block_length=block_length, eos_ids=eos_ids)
