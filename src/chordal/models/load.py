"""Find, check and load a checkpoint: a bundled model by name, or a folder in transformers' layout."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from chordal.errors import CheckpointError, InputError

# Below this many parameters float32 is as fast as bfloat16 on a CPU, and exact comparisons stay so.
_FLOAT32_BELOW = 60_000_000


def zoo_dir() -> Path:
    """Folder of the bundled models."""
    return Path(str(resources.files("chordal") / "models" / "zoo"))


def bundled_models() -> list[str]:
    """List the names of the bundled models."""
    return sorted(path.parent.name for path in zoo_dir().glob("*/config.json"))


def find_checkpoint(name_or_path: str | os.PathLike[str]) -> Path:
    """Resolve a bundled name or a path to a checkpoint folder and check what it holds.

    Raises:
        CheckpointError: Unknown name, no such folder, or files missing or unreadable.
    """
    text = os.fspath(name_or_path)
    if text in bundled_models():
        path = zoo_dir() / text
    else:
        path = Path(text).expanduser()
        if not path.is_dir():
            near = difflib.get_close_matches(text, bundled_models(), n=2, cutoff=0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise CheckpointError(
                f"unknown model {text!r}: neither a bundled model nor a folder.{hint} "
                f"Bundled: {', '.join(bundled_models())}."
            )
    _read_json(path / "config.json")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)]
        hint = (
            f" {pickles[0]} is a pickle, which could run code; convert it to safetensors." if pickles else ""
        )
        raise CheckpointError(f"{path} holds no .safetensors weights.{hint}")
    for file in weights:
        try:
            with safe_open(file, "numpy"):
                pass  # the header names every tensor and says where the file must end
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
    return path


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | None = None,
    dtype: str | None = None,
    max_rows: int = 64,
) -> Any:
    """Load a checkpoint and its tokenizer; nothing in it is executed.

    Args:
        name_or_path: Bundled name (`chordal list --models`) or a folder with `config.json`,
            safetensors weights and a tokenizer.
        device: As torch names it; None takes "cuda" if there is one, else "cpu".
        dtype: "float32", "bfloat16", "float16" or "float64"; None takes the checkpoint's own, but
            float32 for small models on a CPU.
        max_rows: Sequences at once, at most.

    Returns:
        A `LanguageModel`.

    Raises:
        CheckpointError: The folder is missing, damaged or of a kind that is not supported.
        InputError: No such device or type.
    """
    import torch
    import transformers

    from chordal.models.family import family_of
    from chordal.models.language_model import LanguageModel

    path = find_checkpoint(name_or_path)
    place = _device(torch, device)
    chosen = _dtype(torch, dtype)
    auto: Any = transformers.AutoModelForCausalLM  # its types do not know output_loading_info
    # Without trust in remote code, nothing a checkpoint brings along is imported, nor asked about.
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _quiet(transformers.utils.logging):
        with _reading(f"{path / 'config.json'}"):
            config = transformers.AutoConfig.from_pretrained(path, **local)
        if type(config) not in auto._model_mapping:
            raise CheckpointError(
                f"{path}: {type(config).__name__} has no causal language model in transformers."
            )
        _refuse_unsupported(config.get_text_config(), path)
        with _reading(f"the weights of {path}"):
            model, report = auto.from_pretrained(
                path,
                config=config,
                dtype=chosen or "auto",
                use_safetensors=True,
                attn_implementation="sdpa",
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
                **local,
            )
        with _reading(f"the tokenizer of {path}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **local)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            names = ", ".join(sorted(map(str, report[problem]))[:3])
            raise CheckpointError(f"{path}: {problem.replace('_', ' ')} in the weights: {names}.")
    size = sum(p.numel() for p in model.parameters())
    if chosen is None and place.type == "cpu" and size < _FLOAT32_BELOW:
        model = model.float()
    family = family_of(config, _eos_ids(model, tokenizer))
    return LanguageModel(model.to(place), family, tokenizer, name=path.name, max_rows=max_rows)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Keep transformers' progress bars and tables off the terminal; an error says it in one line."""
    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn whatever goes wrong in transformers, safetensors or json into one line."""
    try:
        yield
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{what} cannot be loaded: {first_line}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; is it a checkpoint folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _refuse_unsupported(config: Any, path: Path) -> None:
    """Refuse what this version would compute wrongly rather than run it wrongly."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "attn_logit_softcapping"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise CheckpointError(f"{path}: {config.model_type} models with {name} are not supported yet.")
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if kinds or (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)):
        raise CheckpointError(
            f"{path}: {config.model_type} layers with a sliding window are not supported yet."
        )


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    return tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),)


def _device(torch: Any, name: str | None) -> Any:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not usable here: {str(error).splitlines()[0]}") from None
    return device


def _dtype(torch: Any, name: str | None) -> Any:
    names = ("float32", "bfloat16", "float16", "float64")
    if name is None:
        return None
    if name not in names:
        raise InputError(f"dtype must be one of {', '.join(names)}; got {name!r}.")
    return getattr(torch, name)
