"""Load a checkpoint: a bundled model, a folder, or a hub repository; nothing in it is executed.

Our own checkpoints and any causal language model of transformers are read as they are; the published
diffusion models go through `published`, whose table says which backbone they are.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from chordal.errors import CheckpointError, InputError
from chordal.models.checkpoint import Checkpoint
from chordal.models.published import Published, identify

Quantization = Literal["int8", "int4"]

# Below this many parameters float32 is as fast as bfloat16 on a CPU, and exact comparisons stay so.
_FLOAT32_BELOW = 60_000_000

# Relative difference of logits that rounding explains, in half precision too.
_LIKE_ITSELF = 0.05

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


@dataclass(frozen=True)
class Recognised:
    """A checkpoint whose architecture and family are known, before its weights are read.

    Attributes:
        checkpoint: Its files.
        published: Its entry in the table of published models, if it has one.
        config: Its backbone's config.
        model_class: Its backbone, with an output embedding.
        tokenizer: Its tokenizer.
        family: What decoders need to know.
    """

    checkpoint: Checkpoint
    published: Published | None
    config: Any
    model_class: Any
    tokenizer: Any
    family: Any


def recognise(checkpoint: Checkpoint, *, block_length: int | None = None) -> Recognised:
    """Find out from a checkpoint's own files what it is.

    Args:
        checkpoint: The files.
        block_length: Of a block-diffusion model whose files do not say it.

    Raises:
        CheckpointError: It is nothing this version can run, or its files contradict each other.
        InputError: A block length is given for a model without blocks.
    """
    import transformers

    from chordal.models.architecture import refuse_unsupported
    from chordal.models.family import Family, make_family

    path = checkpoint.path
    published = identify(checkpoint.config)
    with _quiet(transformers.utils.logging):
        if published is not None:
            backbone = published.backbone(checkpoint.config)
            model_class = getattr(transformers, f"{backbone}ForCausalLM")
            with _reading(f"{path / 'config.json'}"):
                config = model_class.config_class(**published.config(checkpoint.config))
        else:
            config = _transformers_config(transformers, checkpoint)
            model_class = _model_class(transformers, config)
        if model_class is None:
            raise CheckpointError(f"{path}: {_unknown(checkpoint)}")
        with _reading(f"{path / 'config.json'}"):
            refuse_unsupported(model_class, config)
        tokenizer = _tokenizer(transformers, checkpoint, published)

    vocab_size = config.get_text_config().vocab_size
    eos_ids = _eos_ids(checkpoint, tokenizer, published)
    facts: Any
    if published is not None:
        facts = {
            "family": published.kind,
            "mask_token_id": _mask_id(checkpoint, tokenizer, published),
            "shift": published.shift,
            "block_length": _block_length(checkpoint, published, block_length),
            "settings": published.settings,
        }
        name = published.name
    else:
        facts, name = checkpoint.config.get("chordal"), "chordal"
        if facts is not None and not isinstance(facts, dict):
            raise CheckpointError(f"config.json: chordal must be an object; got {facts!r}.")
    if facts is None:
        family = Family(name=config.model_type, eos_ids=eos_ids)
    else:
        family = make_family(facts, name=name, vocab_size=vocab_size, eos_ids=eos_ids)
    if block_length is not None and (published is None or published.kind != "block"):
        raise InputError(
            f"block_length is for published block-diffusion models; {path.name} is {family.kind}. "
            "Leave it out."
        )
    return Recognised(checkpoint, published, config, model_class, tokenizer, family)


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    quantization: Quantization | None = None,
    tensor_parallel: bool = False,
    block_length: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    max_rows: int = 64,
) -> Any:
    """Load a checkpoint and its tokenizer; nothing in it is executed.

    Weights are read one by one: memory peaks at little more than they take in the end.

    Args:
        name_or_path: Bundled name (`chordal list --models`), a folder with `config.json`, safetensors
            weights and a tokenizer, or a hub id (owner/name).
        device: As torch names it; None takes "cuda" if there is one, else "cpu".
        dtype: "float32", "bfloat16", "float16" or "float64"; None takes the checkpoint's own, but
            float32 for small models on a CPU.
        device_map: Spread the layers over devices, as accelerate has it, e.g. "auto"; instead of `device`.
        quantization: "int8" or "int4" keeps the weights of linear layers in that many bits (torchao).
        tensor_parallel: Split every layer over the processes that torchrun started.
        block_length: Of a block-diffusion model whose files do not say it.
        revision: Branch, tag or commit of a hub repository.
        token: Access token of the hub.
        local_files_only: Take a hub repository from the local cache only.
        max_rows: Sequences at once, at most.

    Returns:
        A `LanguageModel`.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or of a kind that is not supported.
        InputError: No such device or type, or settings that exclude each other.
    """
    import torch

    from chordal.models.language_model import LanguageModel

    chosen = _dtype(torch, dtype)
    if sum([device is not None, device_map is not None, tensor_parallel]) > 1:
        raise InputError("device, device_map and tensor_parallel exclude each other; give one.")
    placement = _placement(torch, device, device_map, tensor_parallel)
    extra = _quantization(quantization)
    checkpoint = Checkpoint.open(
        name_or_path, revision=revision, token=token, local_files_only=local_files_only
    )
    found = recognise(checkpoint, block_length=block_length)
    if chosen is None:
        chosen = getattr(torch, _own_dtype(checkpoint, on_cpu=placement.get("device_map") == "cpu"))
    model = _load_weights(found, chosen, {**placement, **extra})
    loaded = LanguageModel(model, found.family, found.tokenizer, name=checkpoint.path.name, max_rows=max_rows)
    _refuse_unlike_itself(loaded)
    return loaded


def _load_weights(found: Recognised, dtype: Any, more: Mapping[str, Any]) -> Any:
    """Make the model of a recognised checkpoint and fill it."""
    import transformers

    checkpoint, published = found.checkpoint, found.published
    weights = checkpoint.slices()
    if published is not None:
        weights = published.weights(checkpoint.config).to_ours(weights)
    is_quantized = getattr(found.config, "quantization_config", None) is not None
    # A checkpoint that is already quantised has notes beside its weights, which only its own files have.
    source: dict[str, Any] = {"state_dict": weights}
    if is_quantized:
        source = {"pretrained_model_name_or_path": checkpoint.path, "local_files_only": True}
    with _quiet(transformers.utils.logging), _reading(f"the weights of {checkpoint.path}"):
        model, report = found.model_class.from_pretrained(
            **({"pretrained_model_name_or_path": None} | source),
            config=found.config,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="sdpa" if found.model_class._supports_sdpa else "eager",
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **more,
        )
    _refuse_misfits(found, report)
    return model


def _refuse_misfits(found: Recognised, report: Mapping[str, Any]) -> None:
    """Say which weight of which file does not fit the architecture that config.json describes."""
    checkpoint, published = found.checkpoint, found.published
    path = checkpoint.path
    back = (
        published.weights(checkpoint.config).to_published if published else lambda names: dict.fromkeys(names)
    )

    def theirs(name: Any) -> str:
        return str(next(iter(back([str(name)]))))

    if mismatched := report.get("mismatched_keys"):
        name, stored, wanted = sorted(mismatched)[0]
        raise CheckpointError(
            f"{path / checkpoint.where(theirs(name))}: {theirs(name)} has shape {list(stored)}, but "
            f"config.json needs {list(wanted)}."
        )
    if missing := report.get("missing_keys"):
        name = theirs(sorted(missing)[0])
        raise CheckpointError(f"{path}: the weights lack {name} (and {len(missing) - 1} more).")
    if unexpected := report.get("unexpected_keys"):
        name = theirs(sorted(unexpected)[0])
        raise CheckpointError(
            f"{path / checkpoint.where(name)} holds {name} (and {len(unexpected) - 1} more), which "
            f"{found.model_class.__name__} of this config.json has no place for."
        )
    if errors := report.get("error_msgs"):
        raise CheckpointError(f"{path}: {str(errors[0]).splitlines()[0]}")


def _refuse_unlike_itself(loaded: Any) -> None:
    """Compare our way of running a model with its own, on a few tokens, whatever architecture it is.

    An architecture with positions, masks or logits of a kind we do not know would otherwise give text
    that is merely bad.
    """
    import numpy as np
    import torch

    from chordal.forward import Causal, Forward, Logits

    tokens = np.arange(1, 7) % loaded.vocab_size
    positions = np.arange(len(tokens))
    forward = Forward(tokens, positions, Causal(), Logits(positions), slots=positions)
    [reading] = loaded.run([(0, forward)])
    loaded.free_row(0, clear=True)
    with torch.inference_mode():
        tokens_1T = torch.from_numpy(tokens)[None].to(loaded.device)
        own_TV = loaded.model(input_ids=tokens_1T, use_cache=False).logits[0].float()
    given_TV = reading.logits.to(own_TV.device)
    # The mask token, which ours never gives, is left out. Two kernels may differ in the last bits.
    is_given_TV = given_TV.isfinite()
    error = (given_TV - own_TV)[is_given_TV].norm() / own_TV[is_given_TV].norm()
    if error.isfinite() and error > _LIKE_ITSELF:
        raise CheckpointError(
            f"{type(loaded.model).__name__} gives other logits when its tokens are placed one by one (by "
            f"{error:.0%}), so it cannot be decoded in parallel here."
        )


def _transformers_config(transformers: Any, checkpoint: Checkpoint) -> Any:
    """Read a config that transformers knows, None if it does not."""
    if checkpoint.config.get("model_type") not in transformers.CONFIG_MAPPING:
        return None
    with _reading(f"{checkpoint.path / 'config.json'}"):
        return transformers.AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )


def _model_class(transformers: Any, config: Any) -> Any:
    auto = transformers.AutoModelForCausalLM
    return auto._model_mapping.get(type(config), None)


def _unknown(checkpoint: Checkpoint) -> str:
    """Say what was seen of a checkpoint that is nothing we know."""
    config = checkpoint.config
    seen = ", ".join(
        f"{key} {config[key]!r}" for key in ("architectures", "model_type", "auto_map") if key in config
    )
    weight = next(iter(sorted(checkpoint.weights)), "none")
    return (
        f"no causal language model of transformers and no published diffusion model that is known here. "
        f"Seen: {seen or 'none of architectures, model_type, auto_map'}; first weight {weight}. Code that "
        f"comes with a checkpoint is never run."
    )


def _tokenizer(transformers: Any, checkpoint: Checkpoint, published: Published | None) -> Any:
    """Load the tokenizer, by a class of transformers even if the files name one of their own."""
    path = checkpoint.path
    name = "AutoTokenizer"
    if published is not None and published.tokenizer is not None:
        has_code = "auto_map" in checkpoint.read_json("tokenizer_config.json")
        name = published.tokenizer if has_code else name
    with _reading(f"the tokenizer of {path}"):
        return getattr(transformers, name).from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )


def _mask_id(checkpoint: Checkpoint, tokenizer: Any, published: Published) -> int | None:
    """Find the mask token wherever the files name it; all that name one must agree."""
    vocabulary = tokenizer.get_added_vocab()
    named = {
        "config.json": checkpoint.config.get("mask_token_id"),
        "the tokenizer's mask_token": tokenizer.mask_token_id,
        f"the added token {published.mask_token}": vocabulary.get(published.mask_token),
    }
    said = {place: number for place, number in named.items() if number is not None}
    if len(set(said.values())) > 1:
        listed = ", ".join(f"{place} says {number}" for place, number in said.items())
        raise CheckpointError(f"{checkpoint.path}: the files must agree on the mask token; {listed}.")
    return next(iter(said.values()), published.mask_id)


def _block_length(checkpoint: Checkpoint, published: Published, given: int | None) -> int | None:
    if published.kind != "block":
        return None
    stated = checkpoint.config.get(published.block_key or "")
    if given is not None and stated is not None and given != stated:
        raise InputError(
            f"config.json says {published.block_key} {stated}; block_length {given} contradicts it."
        )
    length = given or stated or published.block_length
    hint = re.search(r"-b(\d+)$", checkpoint.path.name)
    if hint and int(hint[1]) != length and given is None:
        warnings.warn(
            f"{checkpoint.path.name} may have blocks of {hint[1]}, by its name; its files do not say so and "
            f"{length} is used. Give block_length={hint[1]} if that is right.",
            stacklevel=4,
        )
    return length


def _eos_ids(checkpoint: Checkpoint, tokenizer: Any, published: Published | None) -> tuple[int, ...]:
    """Collect the tokens that end a text.

    The generation config is believed first, as transformers does. The published models leave some of
    theirs to the tokenizer or to the caller, so all that their files and the table name are taken.
    """
    stated = [
        checkpoint.read_json("generation_config.json").get("eos_token_id"),
        checkpoint.config.get("eos_token_id"),
        tokenizer.eos_token_id,
    ]
    ids = [list(one) if isinstance(one, list) else [one] for one in stated if one is not None]
    if published is None:
        return tuple(ids[0]) if ids else ()
    vocabulary = tokenizer.get_added_vocab()
    ids.append([vocabulary[token] for token in published.stop_tokens if token in vocabulary])
    return tuple(dict.fromkeys(number for some in ids for number in some))


def _own_dtype(checkpoint: Checkpoint, *, on_cpu: bool) -> str:
    """Name the type that most of the weights are stored in, or float32 for a small model on a CPU."""
    sizes: dict[str, int] = {}
    for weight in checkpoint.weights.values():
        size = 1
        for length in weight.shape:
            size *= length
        sizes[weight.dtype] = sizes.get(weight.dtype, 0) + size
    if on_cpu and sum(sizes.values()) < _FLOAT32_BELOW:
        return "float32"
    stored = [name for name in sizes if name in _STORED_DTYPES]
    return _STORED_DTYPES[max(stored, key=lambda name: sizes[name])] if stored else "bfloat16"


def _placement(torch: Any, device: str | None, device_map: Any, tensor_parallel: bool) -> dict[str, Any]:
    """Say to transformers where the weights go."""
    if tensor_parallel:
        if "WORLD_SIZE" not in os.environ:
            raise InputError(
                "tensor parallelism needs several processes; start them with torchrun --nproc-per-node N."
            )
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    if device_map is not None:
        try:
            import accelerate  # noqa: F401
        except ImportError:
            raise InputError(
                "device_map needs accelerate; install it with: pip install 'chordal[device-map]'."
            ) from None
        return {"device_map": device_map}
    return {"device_map": str(_device(torch, device))}


def _quantization(bits: Quantization | None) -> dict[str, Any]:
    """Say to transformers how weights are quantised while they are read."""
    if bits is None:
        return {}
    if bits not in ("int8", "int4"):
        raise InputError(f"quantization must be int8 or int4; got {bits!r}.")
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError:
        raise InputError(
            "quantization needs torchao; install it with: pip install 'chordal[quantization]'."
        ) from None
    from transformers import TorchAoConfig

    kind = Int8WeightOnlyConfig() if bits == "int8" else Int4WeightOnlyConfig()
    return {"quantization_config": TorchAoConfig(kind)}


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
    except (CheckpointError, InputError):
        raise
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{what} cannot be loaded: {first_line}") from error


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
    if name is None:
        return None
    if name not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}; got {name!r}.")
    return getattr(torch, name)
