"""A checkpoint on disk: found by name, folder or hub id, and checked before a byte of it is used.

A folder holds `config.json`, weights as safetensors (one file, or shards with an index) and a tokenizer.
Nothing in it is executed, no name in it leads out of it, and whatever is wrong is said in one line that
names the file and the weight.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import reprlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError, safe_open

from chordal.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What a snapshot of a hub repository may bring along: no code and no pickles. Weights in another layout
# lie in folders of their own or are called consolidated, and would only double the download.
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_HUB_LEFT_OUT = ("*/*", "consolidated*.safetensors")

# As the safetensors library has it. A header is read whole, so its size must not be the file's to choose.
_MAX_HEADER_BYTES = 100_000_000

_ITEM_BITS = {
    "C64": 64, "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
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
        name: Of the folder, or the hub id.
        path: The folder.
        config: Its `config.json`.
        weights: Every stored weight by name.
    """

    name: str
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
        name, path = _find(os.fspath(name_or_path), revision, token, local_files_only)
        config = read_json(path / "config.json")
        if config is None:
            if (path / "adapter_config.json").exists():
                raise CheckpointError(
                    f"{path} is a LoRA adapter; merge it into its base model and load that."
                )
            raise CheckpointError(f"{path} has no config.json; is it a checkpoint folder?")
        if not isinstance(config, dict):
            raise CheckpointError(f"{path / 'config.json'} must hold an object; got {reprlib.repr(config)}.")
        return cls(name, path, config, _read_weights(path))

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
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


def first_line(error: Exception) -> str:
    """Give what a library says of an error, without the advice that follows."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, second = (*lines, "", "")[:2]
    text = f"{first} {second}" if first.endswith(":") else first
    return text.removesuffix(".") or type(error).__name__


def _find(text: str, revision: str | None, token: str | None, local_files_only: bool) -> tuple[str, Path]:
    """Give the name and the folder of a checkpoint."""
    if text in bundled_models():
        return text, zoo_dir() / text
    path = Path(text).expanduser()
    if path.is_dir():
        return path.absolute().name, path
    if text.count("/") == 1 and not path.is_absolute() and not text.startswith((".", "~")):
        return text, _fetch(text, revision, token, local_files_only)
    near = difflib.get_close_matches(text, bundled_models(), n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise CheckpointError(
        f"unknown model {text!r}: neither a bundled model nor a folder nor a hub id (owner/name).{hint} "
        f"Bundled: {', '.join(bundled_models())}."
    )


def _fetch(repo_id: str, revision: str | None, token: str | None, local_files_only: bool) -> Path:
    """Bring a snapshot of a hub repository into the local cache, or find it there."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        path = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=list(_HUB_FILES),
            ignore_patterns=list(_HUB_LEFT_OUT),
        )
    except Exception as error:
        lost = f"it is not, or not whole, in {constants.HF_HUB_CACHE}"
        if isinstance(error, errors.GatedRepoError):
            reason = "its owner asks for consent; give it on the repository's page, and a token here"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = "there is no such repository, or it is private and the token does not open it"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"the repository has no revision {revision!r}"
        elif isinstance(error, errors.LocalEntryNotFoundError) and local_files_only:
            reason = f"local_files_only forbids to ask it, and {lost}"
        elif isinstance(error, errors.LocalEntryNotFoundError):
            reason = f"it does not answer ({first_line(error).removeprefix('Got: ')}), and {lost}"
        else:
            reason = first_line(error)
        raise CheckpointError(
            f"{repo_id!r} is no folder here and cannot be had from the hub {constants.ENDPOINT}: {reason}."
        ) from error
    return Path(path)


def _read_weights(path: Path) -> dict[str, Weight]:
    """Read the headers of all weight files and check them against the index."""
    index_path = path / INDEX_FILE
    # In this order, as transformers has it: who saves a small model over a large one leaves its index behind.
    if (path / SINGLE_FILE).is_file() or not index_path.exists():
        return _read_header(_only_file(path))
    index = read_json(index_path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index_path} must have a weight_map from weights to files.")
    weights: dict[str, Weight] = {}
    for name in sorted({str(file) for file in places.values()}):
        # A name that leads out of the folder could make us read any file of this machine.
        is_beside = name == Path(name).name and "\\" not in name and name.isprintable()
        if not is_beside or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index_path}: {name!r} must be the name of a safetensors file beside it.")
        if not (path / name).is_file():
            lost = next(weight for weight, file in places.items() if file == name)
            raise CheckpointError(f"{path / name} is missing; the index says it holds {lost!r}.")
        for weight, stored in _read_header(path / name).items():
            if weight in weights:
                raise CheckpointError(
                    f"{path / name} holds {weight}, and so does {weights[weight].file.name}; one must not."
                )
            weights[weight] = stored
    for weight, name in places.items():
        if weight not in weights or weights[weight].file.name != name:
            raise CheckpointError(f"{path / name} does not hold {weight!r}, though the index says so.")
    return weights


def _only_file(path: Path) -> Path:
    """Find the weights of a folder without an index."""
    if (path / SINGLE_FILE).is_file():
        return path / SINGLE_FILE
    found = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{path} holds {len(found)} safetensors files ({found[0].name}, ...) and no {INDEX_FILE} to say "
            f"which of them belong together; copy that too."
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
    """Read which weights a safetensors file holds, and check that it holds them whole.

    The file is 8 bytes that say how long the header is, the header as JSON, and the values.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file} is damaged: its header must have at most {_MAX_HEADER_BYTES} bytes; it claims "
                    f"{length}."
                )
            if size < 8 + length:
                raise CheckpointError(
                    f"{file} is truncated: its header ends at byte {8 + length}, the file at {size}."
                )
            header = json.loads(stream.read(length))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is damaged: its header must be an object; got {reprlib.repr(header)}.")

    weights: dict[str, Weight] = {}
    spans: list[tuple[int, int, str]] = []
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        weights[name], start, end = _read_facts(file, name, facts)
        spans.append((start, end, name))
    # The values fill the rest of the file, one weight right after the other.
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            raise CheckpointError(
                f"{file} is damaged: {name} must start at byte {position} of the values; it starts at "
                f"{start}."
            )
        if 8 + length + end > size:
            raise CheckpointError(
                f"{file} is truncated: {name} ends at byte {8 + length + end}, the file at {size}."
            )
        position = end
    if 8 + length + position < size:
        raise CheckpointError(
            f"{file} is damaged: its last {size - 8 - length - position} bytes belong to no weight."
        )
    return weights


def _read_facts(file: Path, name: str, facts: Any) -> tuple[Weight, int, int]:
    """Read what a header says of one weight; also gives where its values start and end."""
    if not name.isprintable():
        raise CheckpointError(f"{file} is damaged: {name!r} is no name of a weight.")
    fields = facts if isinstance(facts, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{file} is damaged: {name} must have a dtype, a shape and two data_offsets; got "
            f"{reprlib.repr(facts)}."
        )
    if dtype not in _ITEM_BITS:
        raise CheckpointError(
            f"{file}: {name} must be of one of the types {', '.join(_ITEM_BITS)}; got {dtype!r}."
        )
    start, end = offsets
    if math.prod(shape) * _ITEM_BITS[dtype] != (end - start) * 8:
        raise CheckpointError(
            f"{file} is damaged: {name} of shape {shape} and type {dtype} cannot take {end - start} bytes."
        )
    return Weight(file, dtype, tuple(shape)), start, end


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= 64  # no tensor has more dimensions, and their product stays small
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )
