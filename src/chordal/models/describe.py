"""Say what a checkpoint is and how it can be decoded, from its files, without reading its weights."""

from __future__ import annotations

import math
import os
from typing import Any

from chordal.models.checkpoint import Checkpoint
from chordal.models.recognise import recognise
from chordal.registry import decoder_class, decoder_names


def describe(
    name_or_path: str | os.PathLike[str],
    *,
    block_length: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> dict[str, Any]:
    """Describe a bundled model, a folder or a hub repository.

    Args:
        name_or_path: As for `load`, and so are the others.
        block_length: Of a block-diffusion model whose files do not say it.
        revision: Branch, tag or commit of a hub repository.
        token: Access token of the hub.
        local_files_only: Take a hub repository from the local cache only.

    Returns:
        Plain values by name: "model", "family", "kind", "backbone", "parameters", "bytes" (both as
        stored), "dtype", "layers" (how far each kind of attention layer sees, None for all),
        "attention", "window" (tokens), "vocab_size", "mask_id", "mask_token", "shift", "block_length",
        "num_experts" (of a layer), "stop_tokens" (token by id), "chat_template", "default_decoder",
        "settings" (of the default decoder), "decoders" (all that fit).

    Raises:
        CheckpointError: The checkpoint is missing, damaged or of a kind that is not supported.
    """
    from chordal.models.architecture import attention_reach, window_of

    checkpoint = Checkpoint.open(
        name_or_path, revision=revision, token=token, local_files_only=local_files_only
    )
    found = recognise(checkpoint, block_length=block_length)
    family, text = found.family, found.config.get_text_config()
    sizes: dict[str, int] = {}
    for weight in checkpoint.weights.values():
        sizes[weight.dtype] = sizes.get(weight.dtype, 0) + math.prod(weight.shape)
    return {
        "model": checkpoint.name,
        "family": family.name,
        "kind": family.kind,
        "backbone": found.model_class.__name__,
        "parameters": sum(sizes.values()),
        "bytes": sum(file.stat().st_size for file in {one.file for one in checkpoint.weights.values()}),
        "dtype": max(sizes, key=lambda dtype: sizes[dtype]).lower() if sizes else None,
        "layers": dict(attention_reach(text)),
        "attention": family.attention,
        "window": window_of(text),
        "vocab_size": text.vocab_size,
        "mask_id": family.mask_id,
        "mask_token": _token(found.tokenizer, family.mask_id),
        "shift": family.shift,
        "block_length": family.block_length,
        "num_experts": family.num_experts,
        "stop_tokens": {number: _token(found.tokenizer, number) for number in family.eos_ids},
        "chat_template": getattr(found.tokenizer, "chat_template", None) is not None,
        "default_decoder": family.default_decoder,
        "settings": dict(family.settings),
        "decoders": [name for name in decoder_names() if decoder_class(name).fits(family)],
    }


def _token(tokenizer: Any, number: int | None) -> str | None:
    return None if number is None else tokenizer.convert_ids_to_tokens(number)
