"""Load a checkpoint: a bundled model, a folder, or a hub repository; nothing in it is executed.

What a checkpoint is, `recognise` finds out; here its weights are read, placed and shown to run as they
should.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from tempfile import TemporaryDirectory
from typing import Any

from chordal.errors import CheckpointError, InputError
from chordal.models.checkpoint import Checkpoint
from chordal.models.memory import Trimmer
from chordal.models.placement import Placement, place
from chordal.models.quantization import Quantization, quantize
from chordal.models.recognise import DIFFUSION_GEMMA, Recognised, naming, quiet, reading, recognise
from chordal.models.weights import WeightMap

# Below this many parameters float32 is as fast as bfloat16 on a CPU, and exact comparisons stay so.
_FLOAT32_BELOW = 60_000_000

# Relative difference of logits that rounding explains. In half precision it may send a token to another
# expert; what is really wrong is off by all of the logits' size.
_LIKE_ITSELF, _LIKE_ITSELF_ROUNDED = 0.01, 0.2

# Only this tells transformers; it has no argument.
_READ_IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


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
        quantization: "int8" or "int4" keeps the weights of linear layers in that many bits (torchao);
            "int8-dynamic" also multiplies in 8 bits.
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

    from chordal.models.diffusion_gemma import DiffusionGemma
    from chordal.models.language_model import LanguageModel
    from chordal.models.looped_runner import LoopedLanguageModel

    chosen = _dtype(torch, dtype)
    placement = place(device, device_map, tensor_parallel)
    quantized = quantize(quantization, on_cpu=placement.is_on_cpu, dtype=dtype)
    checkpoint = Checkpoint.open(
        name_or_path, revision=revision, token=token, local_files_only=local_files_only
    )
    found = recognise(checkpoint, block_length=block_length)
    if chosen is None and quantization == "int4" and not placement.is_on_cpu:
        chosen = torch.bfloat16  # which its kernel is for
    elif chosen is None:
        chosen = getattr(torch, _own_dtype(checkpoint, on_cpu=placement.is_on_cpu))
    model = _load_weights(found, chosen, placement, quantized)
    what = f"{type(model).__name__} of {checkpoint.path}"
    if placement.num_processes > 1:
        what += f", split over {placement.num_processes} processes that must divide its attention heads,"
    with reading(what):
        runner = LanguageModel
        if found.config.model_type == DIFFUSION_GEMMA:
            runner = DiffusionGemma
        elif found.family.num_loops is not None:
            runner = LoopedLanguageModel
        loaded = runner(model, found.family, found.tokenizer, name=checkpoint.name, max_rows=max_rows)
        _refuse_unlike_itself(loaded)
    return loaded


def _load_weights(found: Recognised, dtype: Any, placement: Placement, quantized: Mapping[str, Any]) -> Any:
    """Make the model of a recognised checkpoint and fill it."""
    import transformers

    from chordal.models.fit import Fit

    checkpoint, published = found.checkpoint, found.published
    weight_map = published.weights(checkpoint.config) if published is not None else WeightMap()
    is_quantized = getattr(found.config, "quantization_config", None) is not None
    if is_quantized and quantized:
        raise InputError(f"{checkpoint.name} is already quantised; leave out quantization.")
    # A checkpoint that is already quantised has notes beside its weights, which only its own files have.
    with naming(checkpoint.path):
        trimmer = Trimmer()
        slices = {name: trimmer.watch(weight) for name, weight in checkpoint.slices().items()}
        source: dict[str, Any] = {"state_dict": weight_map.to_ours(slices)}
    if is_quantized:
        source = {"pretrained_model_name_or_path": checkpoint.path, "local_files_only": True}
    in_turn = _read_in_turn() if placement.is_on_cpu else nullcontext()
    with (
        ExitStack() as kept,
        quiet(transformers.utils.logging),
        in_turn,
        reading(f"the weights of {checkpoint.path}"),
    ):
        if placement.may_offload:
            source["offload_folder"] = kept.enter_context(TemporaryDirectory(prefix="chordal-"))
            _name_twice(source.get("state_dict", {}), found)
        fit = Fit.of(checkpoint, found.model_class, found.config, weight_map)
        if not is_quantized:
            fit.refuse_unread()
        model, report = found.model_class.from_pretrained(
            **({"pretrained_model_name_or_path": None} | source),
            config=found.config,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="sdpa" if found.model_class._supports_sdpa else "eager",
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **placement.arguments,
            **quantized,
        )
        weakref.finalize(model, kept.pop_all().close)  # what lies on disk, as long as the model lives
    fit.refuse_reported(report)
    return model


def _refuse_unlike_itself(loaded: Any) -> None:
    """Compare our way of running a model with its own, on a few tokens, whatever architecture it is.

    An architecture with positions, masks or logits of a kind we do not know would otherwise give text
    that is merely bad.
    """
    difference = _unlikeness(loaded)
    is_wide = loaded.dtype.itemsize >= 4 and getattr(loaded.model, "hf_quantizer", None) is None
    allowed = _LIKE_ITSELF if is_wide else _LIKE_ITSELF_ROUNDED
    if loaded.packs and difference > allowed:  # rather with padding than not at all
        loaded.packs = False
        difference = _unlikeness(loaded)
    if difference > allowed:
        raise CheckpointError(
            f"{type(loaded.model).__name__} gives other logits when its tokens are placed freely (by "
            f"{difference:.0%}), so it cannot be decoded in parallel here."
        )


def _unlikeness(loaded: Any) -> float:
    """Give the norm of the difference between our logits and a model's own, as a share of their norm."""
    given_TV, own_TV = (logits_TV.float().cpu().clone() for logits_TV in loaded.compare())
    if loaded.family.mask_id is not None:  # which ours never gives
        given_TV[:, loaded.family.mask_id] = own_TV[:, loaded.family.mask_id]
    difference, size = (given_TV - own_TV).norm(), own_TV.norm()
    if not size.isfinite() or difference == 0:  # no numbers of its own: that is how its weights are
        return 0.0
    return float((difference / size).nan_to_num(math.inf))


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


def _name_twice(weights: dict[str, Any], found: Recognised) -> None:
    """Give tied weights under all their names, as each is looked up by its own on disk."""
    if found.config.get_text_config().tie_word_embeddings:
        for name, other in (found.model_class._tied_weights_keys or {}).items():
            if other in weights:
                weights.setdefault(name, weights[other])


@contextmanager
def _read_in_turn() -> Iterator[None]:
    """Have transformers read each weight when it is needed, instead of ahead, in threads.

    Of experts that are read ahead and stacked later, the memory is not given back: they take it twice.
    """
    before = os.environ.get(_READ_IN_TURN)
    os.environ[_READ_IN_TURN] = "1"
    try:
        yield
    finally:
        del os.environ[_READ_IN_TURN]
        if before is not None:
            os.environ[_READ_IN_TURN] = before


def _dtype(torch: Any, name: str | None) -> Any:
    if name is None:
        return None
    if name not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}; got {name!r}.")
    return getattr(torch, name)
