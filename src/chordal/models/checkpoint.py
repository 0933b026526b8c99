"""A checkpoint on disk: found by name, folder or hub id, and checked before a byte of it is used.

A folder holds `config.json`, weights as safetensors (one file, or shards with an index) and a tokenizer.
Nothing in it is executed, files outside it are never opened, and whatever is wrong is said in one line
that names the file and the weight.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import struct
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from chordal.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What a snapshot of a hub repository may bring along: no code and no pickles.
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")

# As the safetensors library has it. A header is read whole, so its size must not be the file's to choose.
_MAX_HEADER_BYTES = 100_000_000

_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weight:
    """Where a weight is stored, and as what.

    Attributes:
        file: The safetensors file.
        dtype: As safetensors names it, e.g. "BF16".
        shape: Its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files agree with each other.

    Attributes:
        path: The folder.
        config: Its `config.json`.
        weights: Every stored weight by name.
    """

    path: Path
    config: dict[str, Any]
    weights: dict[str, Weight]

    @classmethod
    def open(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Checkpoint:
        """Find a checkpoint and check everything that can be checked without reading weights.

        Args:
            name_or_path: Bundled name, folder, or hub id in the form owner/name.
            revision: Branch, tag or commit of a hub repository.
            token: Access token of the hub.
            local_files_only: Take a hub repository from the local cache only.

        Raises:
            CheckpointError: There is no such checkpoint, or its files are missing, damaged or unsafe.
        """
        path = _find(os.fspath(name_or_path), revision, token, local_files_only)
        config = read_json(path / "config.json")
        if config is None:
            if (path / "adapter_config.json").exists():
                raise CheckpointError(
                    f"{path} is a LoRA adapter; merge it into its base model and load that."
                )
            raise CheckpointError(f"{path} has no config.json; is it a checkpoint folder?")
        if not isinstance(config, dict):
            raise CheckpointError(f"{path / 'config.json'} must hold an object.")
        return cls(path, config, _read_weights(path))

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object of the folder, empty if there is no such file."""
        content = read_json(self.path / name)
        return content if isinstance(content, dict) else {}

    def slices(self) -> dict[str, Any]:
        """Give every weight as something that reads its values when it is indexed, and not before.

        Files are read, not mapped: a mapped page counts as used memory as long as the file is open.
        """
        found: dict[str, Any] = {}
        for file in sorted({weight.file for weight in self.weights.values()}):
            try:
                reader = safe_open(file, "pt", backend="pread")
                found |= {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} cannot be read: {error}") from None
        return found

    def where(self, name: str) -> str:
        """Say which file holds a weight, for messages."""
        return self.weights[name].file.name if name in self.weights else self.path.name


def zoo_dir() -> Path:
    """Folder of the bundled models."""
    return Path(str(resources.files("chordal") / "models" / "zoo"))


def bundled_models() -> list[str]:
    """List the names of the bundled models."""
    return sorted(path.parent.name for path in zoo_dir().glob("*/config.json"))


def read_json(path: Path) -> Any:
    """Read a JSON file, None if there is none.

    Raises:
        CheckpointError: It is not readable as JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _find(text: str, revision: str | None, token: str | None, local_files_only: bool) -> Path:
    if text in bundled_models():
        return zoo_dir() / text
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if text.count("/") == 1 and not path.is_absolute() and not text.startswith((".", "~")):
        return _fetch(text, revision, token, local_files_only)
    near = difflib.get_close_matches(text, bundled_models(), n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise CheckpointError(
        f"unknown model {text!r}: neither a bundled model nor a folder nor a hub id (owner/name).{hint} "
        f"Bundled: {', '.join(bundled_models())}."
    )


def _fetch(repo_id: str, revision: str | None, token: str | None, local_files_only: bool) -> Path:
    """Bring a snapshot of a hub repository into the local cache, or find it there."""
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=list(_HUB_FILES),
        )
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{repo_id!r} is no folder here and cannot be fetched from the hub: {lines[0]}"
        ) from error
    return Path(path)


def _read_weights(path: Path) -> dict[str, Weight]:
    """Read the headers of all weight files and check them against the index."""
    index_path = path / INDEX_FILE
    index = read_json(index_path)
    if index is None:
        return _read_header(_only_file(path))
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index_path} must have a weight_map from weights to files.")
    weights: dict[str, Weight] = {}
    for name in sorted({str(file) for file in places.values()}):
        # A name that leads out of the folder could make us read any file of this machine.
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index_path}: {name!r} must be the name of a safetensors file beside it.")
        if not (path / name).is_file():
            lost = next(weight for weight, file in places.items() if file == name)
            raise CheckpointError(f"{path / name} is missing; the index says it holds {lost}.")
        for weight, stored in _read_header(path / name).items():
            if weight in weights:
                raise CheckpointError(f"{path}: {weight} is in {weights[weight].file.name} and in {name}.")
            weights[weight] = stored
    for weight, name in places.items():
        if weight not in weights or weights[weight].file.name != name:
            raise CheckpointError(f"{path / name} does not hold {weight}, though the index says so.")
    return weights


def _only_file(path: Path) -> Path:
    """Find the weights of a folder without an index."""
    if (path / SINGLE_FILE).is_file():
        return path / SINGLE_FILE
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{path} holds {len(found)} safetensors files and neither {SINGLE_FILE} nor {INDEX_FILE}."
        )
    pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(path.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"{path} holds no safetensors; {pickles[0]} is a pickle, which could run code. Convert it where "
            f"you trust it: load it with torch.load(weights_only=True), write it with "
            f"safetensors.torch.save_file."
        )
    raise CheckpointError(f"{path} holds no safetensors weights.")


def _read_header(file: Path) -> dict[str, Weight]:
    """Read which weights a safetensors file holds, and check that it holds them whole."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            lead = stream.read(8)
            length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else -1
            if not 0 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file} is damaged: its header must fit the file of {size} bytes and "
                    f"{_MAX_HEADER_BYTES} bytes; it says {max(length, 0)}."
                )
            header = json.loads(stream.read(length))
        weights: dict[str, Weight] = {}
        for name, facts in header.items():
            if name == "__metadata__":
                continue
            shape, (start, end) = tuple(facts["shape"]), facts["data_offsets"]
            if not 0 <= start <= end <= size - 8 - length:
                raise CheckpointError(
                    f"{file} is truncated: {name} needs {end + 8 + length} bytes, the file has {size}."
                )
            item_bytes = _ITEM_BYTES.get(facts["dtype"])
            if item_bytes is not None and math.prod(shape) * item_bytes != end - start:
                raise CheckpointError(
                    f"{file} is damaged: {name} of shape {list(shape)} and type {facts['dtype']} cannot "
                    f"take {end - start} bytes."
                )
            weights[name] = Weight(file, facts["dtype"], shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from None
    return weights
