"""Turn a published checkpoint into a folder in transformers' own layout, and back.

Tensors are copied, never computed with: what comes back is byte for byte what was there. Of the files
that ours replaces, the published ones are kept in the folder `published`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chordal.errors import CheckpointError, InputError
from chordal.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, read_json
from chordal.models.published import FAMILIES
from chordal.models.recognise import Recognised, recognise

MAX_SHARD_BYTES = 5_000_000_000

_KEPT = "published"
_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    block_length: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Convert a published diffusion model to our layout, or one of ours back to the published one.

    Ours is a backbone of transformers with its own names and config, and Chordal's facts under the key
    "chordal"; every tool that trains or quantises the backbone can read it. Memory holds one shard.

    Args:
        source: Folder or hub id; which layout it has is told from its config.json.
        out: Folder to make; must not exist or be empty.
        block_length: Of a block-diffusion model whose files do not say it.
        max_shard_bytes: Larger checkpoints are split into files of at most this size.

    Returns:
        The new folder.

    Raises:
        CheckpointError: The source cannot be read, or is in neither layout.
        InputError: The target is not empty.
    """
    target = Path(out).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"the folder to convert into must be new or empty; {target} is not.")
    checkpoint = Checkpoint.open(source)
    facts = checkpoint.config.get("chordal")
    kept = facts.get(_KEPT) if isinstance(facts, dict) else None
    target.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and moved there when whole, so that an interruption leaves no half of it.
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f".{target.name}-", ignore_cleanup_errors=True
    ) as made:
        if kept is not None:
            _write_published(checkpoint, kept, Path(made), max_shard_bytes)
        else:
            found = recognise(checkpoint, block_length=block_length)
            if found.published is None:
                raise CheckpointError(
                    f"{checkpoint.path} is in transformers' own layout already ({found.family.name}); there "
                    "is nothing to convert."
                )
            _write_ours(found, Path(made), max_shard_bytes)
        if target.exists():
            target.rmdir()
        Path(made).rename(target)
    target.chmod(0o755)
    return target


def _write_ours(found: Recognised, target: Path, max_shard_bytes: int) -> None:
    checkpoint, published, family = found.checkpoint, found.published, found.family
    from chordal.models.fit import Fit

    assert published is not None, "only a published checkpoint has another layout"
    (target / _KEPT).mkdir()
    for file in _other_files(checkpoint.path):
        shutil.copyfile(file, target / file.name)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (checkpoint.path / name).exists():
            shutil.copyfile(checkpoint.path / name, target / _KEPT / name)

    config = found.config.to_dict() | {
        "architectures": [found.model_class.__name__],
        "chordal": {
            "family": family.kind,
            "mask_token_id": family.mask_id,
            "shift": family.shift,
            "block_length": family.block_length,
            "settings": dict(family.settings),
            _KEPT: published.name,
        },
    }
    config.pop("auto_map", None)
    _write_json(target / "config.json", config)
    _write_json(
        target / "generation_config.json",
        checkpoint.read_json("generation_config.json") | {"eos_token_id": list(family.eos_ids)},
    )
    tokenizer_config = checkpoint.read_json("tokenizer_config.json")
    if tokenizer_config.pop("auto_map", None) is not None:
        tokenizer_config["tokenizer_class"] = published.tokenizer
        _write_json(target / "tokenizer_config.json", tokenizer_config)

    weight_map = published.weights(checkpoint.config)
    Fit.of(checkpoint, found.model_class, found.config, weight_map).refuse_unread()
    weights = weight_map.to_ours(checkpoint.slices())
    _write_weights(((name, weight[...]) for name, weight in weights.items()), target, max_shard_bytes)


def _write_published(checkpoint: Checkpoint, name: str, target: Path, max_shard_bytes: int) -> None:
    published = next((family for family in FAMILIES if family.name == name), None)
    config = read_json(checkpoint.path / _KEPT / "config.json")
    if published is None or config is None:
        raise CheckpointError(
            f"{checkpoint.path} was made from a {name} checkpoint, but {_KEPT}/config.json is missing; copy "
            f"the folder {_KEPT} from where it was converted."
        )
    for file in _other_files(checkpoint.path):
        shutil.copyfile(file, target / file.name)
    (target / "generation_config.json").unlink(missing_ok=True)  # ours may have made it
    for file in sorted((checkpoint.path / _KEPT).iterdir()):
        shutil.copyfile(file, target / file.name)

    slices = checkpoint.slices()
    parts = published.weights(config).to_published(slices)
    lost = sorted({part for names in parts.values() for part in names} - set(slices))
    if lost:
        raise CheckpointError(f"{checkpoint.path}: the weights lack {lost[0]}.")
    _write_weights(
        ((name, _join([slices[part][...] for part in names])) for name, names in parts.items()),
        target,
        max_shard_bytes,
    )


def _join(parts: list[Any]) -> Any:
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _other_files(path: Path) -> Iterator[Path]:
    """Give the files beside the weights: never code, and nothing that is rewritten."""
    rewritten = ("config.json", "generation_config.json", INDEX_FILE)
    for file in sorted(path.iterdir()):
        if file.is_file() and file.suffix in _COPIED and file.name not in rewritten:
            yield file


def _write_weights(tensors: Iterator[tuple[str, Any]], target: Path, max_shard_bytes: int) -> None:
    """Write tensors one after the other into as many shards as they need."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    held: dict[str, Any] = {}
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        save_file(held, target / f"{len(shards)}.safetensors", {"format": "pt"})
        shards.append(list(held))
        held, size = {}, 0

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if held and size + num_bytes > max_shard_bytes:
            flush()
        held[name] = tensor.contiguous()
        size += num_bytes
        total += num_bytes
    flush()
    if len(shards) == 1:
        (target / "0.safetensors").rename(target / SINGLE_FILE)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (target / f"{number}.safetensors").rename(target / file)
        places |= dict.fromkeys(names, file)
    _write_json(target / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
