"""Tiny checkpoints in the layouts of published ones: the same files, keys, names and types, small and seeded.

This module has what all layouts share; each family is a module beside it, e.g. `published_llada`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

NUM_BYTES = 256


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    files: Mapping[str, Any],
    *,
    shards: int | Mapping[str, str] = 2,
) -> Path:
    """Write a checkpoint folder as hubs have it.

    Args:
        folder: Made if it is not there.
        config: Content of config.json.
        weights: By their published names, in the order they are spread over the shards.
        files: Other files by name: what goes into a JSON file, or text.
        shards: Number of weight files, or the file of each weight; 1 writes model.safetensors without an
            index.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": config, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    if shards == 1:
        _save(dict(weights), folder / "model.safetensors")
        return folder
    places = shards
    if isinstance(places, int):
        count, names = places, list(weights)
        places = {
            name: f"model-{at * count // len(names) + 1:05}-of-{count:05}.safetensors"
            for at, name in enumerate(names)
        }
    for file in sorted(set(places.values())):
        _save({name: weights[name] for name in weights if places[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": dict(places)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def random_weights(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    float32: str | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draw weights that let every layer, head and expert matter.

    Matrices keep the size of what they multiply, norms scatter around 1 and biases around 0.

    Args:
        shapes: Shape of each weight by name.
        dtype: They are stored in.
        float32: End of the names of those that are stored in float32 whatever `dtype` is.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weight *= 1.5 / shape[-1] ** 0.5
        elif name.endswith("bias"):
            weight *= 0.2
        else:
            weight = 1 + 0.3 * weight
        keeps = float32 is not None and name.endswith(float32)
        weights[name] = weight if keeps else weight.to(dtype)
    return weights


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Give a config.json with other values; None removes a key."""
    removed = [key for key, value in changes.items() if value is None]
    return {key: value for key, value in {**config, **changes}.items() if key not in removed}


def special_ids(special_tokens: Sequence[str], *, first: int = NUM_BYTES) -> dict[str, int]:
    """Number special tokens from `first` on, as the functions below do."""
    return {token: first + index for index, token in enumerate(special_tokens)}


def byte_vocabulary(special_tokens: Sequence[str] = (), *, first: int = NUM_BYTES) -> dict[str, int]:
    """Give a byte-level vocabulary: each byte has an id, in the order of ids that `special_tokens` leave."""
    taken = special_ids(special_tokens, first=first)
    ids = (number for number in range(NUM_BYTES + len(taken)) if number not in taken.values())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return dict(zip(letters, ids, strict=False))


def byte_tokenizer(special_tokens: Sequence[str], *, first: int = NUM_BYTES) -> dict[str, Any]:
    """Give the content of a tokenizer.json: a token for each byte, and special tokens that are found in text.

    Args:
        special_tokens: Their texts, in the order of their ids.
        first: Id of the first of them, at most 256; bytes have the ids that are left.
    """
    special = special_ids(special_tokens, first=first)
    tokenizer = Tokenizer(models.BPE(vocab=byte_vocabulary(special_tokens, first=first) | special, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def added_tokens(special_tokens: Sequence[str], *, first: int = NUM_BYTES) -> dict[str, Any]:
    """Give the `added_tokens_decoder` of a tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        str(number): {"content": token, **flags}
        for token, number in special_ids(special_tokens, first=first).items()
    }


def _save(weights: dict[str, Tensor], file: Path) -> None:
    save_file(weights, file, {"format": "pt"})
