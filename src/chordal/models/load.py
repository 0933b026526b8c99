"""Load a checkpoint: a bundled model, a folder, or a hub repository; nothing in it is executed.

Our own checkpoints and any causal language model of transformers are read as they are; the published
diffusion models go through `published`, whose table says which backbone they are.
"""

from __future__ import annotations

import os
import re
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from chordal.errors import CheckpointError, InputError
from chordal.models.checkpoint import Checkpoint, first_line
from chordal.models.memory import Trimmer
from chordal.models.placement import Placement, place
from chordal.models.published import Published, identify
from chordal.models.quantization import Quantization, quantize
from chordal.models.weights import WeightMap

# Below this many parameters float32 is as fast as bfloat16 on a CPU, and exact comparisons stay so.
_FLOAT32_BELOW = 60_000_000

# Relative difference of logits that rounding explains. In half precision it may send a token to another
# expert; what is really wrong is off by all of the logits' size.
_LIKE_ITSELF, _LIKE_ITSELF_ROUNDED = 0.01, 0.2

# The one published diffusion model that is a class of transformers.
_DIFFUSION_GEMMA = "diffusion_gemma"

# Only this tells transformers; it has no argument.
_READ_IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"

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
    with _naming(checkpoint.path), _reading(f"{checkpoint.path / 'config.json'}"):
        return _recognise(checkpoint, block_length)


def _recognise(checkpoint: Checkpoint, block_length: int | None) -> Recognised:
    import transformers

    from chordal.models.architecture import num_experts_of, refuse_unsupported
    from chordal.models.family import Family, make_family
    from chordal.models.looped import LoopedConfig, looped_family  # which transformers now knows

    path = checkpoint.path
    published = identify(checkpoint.config)
    with _quiet(transformers.utils.logging):
        if published is not None:
            backbone = published.backbone(checkpoint.config)
            model_class = getattr(transformers, f"{backbone}ForCausalLM")
            config = model_class.config_class(**published.config(checkpoint.config))
        else:
            config = _transformers_config(transformers, checkpoint)
            model_class = _model_class(transformers, config)
        if model_class is None:
            raise CheckpointError(f"{path}: {_unknown(checkpoint)}")
        if model_class.config_class is type(config.get_text_config()):
            config = config.get_text_config()  # of a config that also describes what reads images
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
    elif config.model_type == _DIFFUSION_GEMMA:
        from chordal.models.diffusion_gemma import read_facts

        facts, name = read_facts(config, checkpoint.read_json("generation_config.json")), config.model_type
    else:
        facts, name = checkpoint.config.get("chordal"), "chordal"
        if facts is not None and not isinstance(facts, dict):
            raise CheckpointError(f"config.json: chordal must be an object; got {facts!r}.")
    if facts is None:
        family = Family(name=config.model_type, eos_ids=eos_ids)
    else:
        family = make_family(facts, name=name, vocab_size=vocab_size, eos_ids=eos_ids)
    family = replace(family, num_experts=num_experts_of(config.get_text_config()))
    if isinstance(config, LoopedConfig):
        family = looped_family(family, config)
    if block_length is not None and (published is None or published.kind != "block"):
        raise InputError(
            f"block_length is for published block-diffusion models; {checkpoint.name} is {family.kind}. "
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
    with _reading(what):
        runner = LanguageModel
        if found.config.model_type == _DIFFUSION_GEMMA:
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
    with _naming(checkpoint.path):
        trimmer = Trimmer()
        slices = {name: trimmer.watch(weight) for name, weight in checkpoint.slices().items()}
        source: dict[str, Any] = {"state_dict": weight_map.to_ours(slices)}
    if is_quantized:
        source = {"pretrained_model_name_or_path": checkpoint.path, "local_files_only": True}
    in_turn = _read_in_turn() if placement.is_on_cpu else nullcontext()
    with (
        ExitStack() as kept,
        _quiet(transformers.utils.logging),
        in_turn,
        _reading(f"the weights of {checkpoint.path}"),
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
    given_TV, own_TV = (logits_TV.float().cpu().clone() for logits_TV in loaded.compare())
    if loaded.family.mask_id is not None:  # which ours never gives
        given_TV[:, loaded.family.mask_id] = own_TV[:, loaded.family.mask_id]
    difference, size = (given_TV - own_TV).norm(), own_TV.norm()
    # Where its own logits are not finite, that is how its weights are.
    is_wide = loaded.dtype.itemsize >= 4 and getattr(loaded.model, "hf_quantizer", None) is None
    allowed = _LIKE_ITSELF if is_wide else _LIKE_ITSELF_ROUNDED
    if size.isfinite() and not difference <= allowed * size:
        raise CheckpointError(
            f"{type(loaded.model).__name__} gives other logits when its tokens are placed freely (by "
            f"{difference / size:.0%}), so it cannot be decoded in parallel here."
        )


def _transformers_config(transformers: Any, checkpoint: Checkpoint) -> Any:
    """Read a config that transformers knows, None if it does not."""
    if checkpoint.config.get("model_type") not in transformers.CONFIG_MAPPING:
        return None
    return transformers.AutoConfig.from_pretrained(
        checkpoint.path, local_files_only=True, trust_remote_code=False
    )


def _model_class(transformers: Any, config: Any) -> Any:
    if config is not None and config.model_type == _DIFFUSION_GEMMA:
        return transformers.DiffusionGemmaForBlockDiffusion
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
    more: dict[str, Any] = {}
    if published is not None and published.tokenizer is not None:
        # Whatever the files name: tokenizer.json may spell a special token otherwise than its config does.
        name = published.tokenizer
    elif published is not None:
        # An empty config: transformers does not know theirs, and would look there for a tokenizer class.
        more = {"config": transformers.PreTrainedConfig()}
    with _reading(f"the tokenizer of {path}"):
        return getattr(transformers, name).from_pretrained(
            path, local_files_only=True, trust_remote_code=False, **more
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
    if any(number != other for number in said.values() for other in said.values()):
        listed = ", ".join(f"{place} says {number!r}" for place, number in said.items())
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
    length = next(one for one in (given, stated, published.block_length) if one is not None)
    hint = re.search(r"-b(\d+)$", checkpoint.name)
    if hint and int(hint[1]) != length and given is None:
        warnings.warn(
            f"{checkpoint.name} may have blocks of {hint[1]}, by its name; its files do not say so and "
            f"{length} is used. Give block_length={hint[1]} if that is right.",
            stacklevel=5,
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
    if wrong := [number for some in ids for number in some if type(number) is not int]:
        raise CheckpointError(
            f"{checkpoint.path}: eos_token_id must be a number or several; got {wrong[0]!r}."
        )
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


def _name_twice(weights: dict[str, Any], found: Recognised) -> None:
    """Give tied weights under all their names, as each is looked up by its own on disk."""
    if found.config.get_text_config().tie_word_embeddings:
        for name, other in (found.model_class._tied_weights_keys or {}).items():
            if other in weights:
                weights.setdefault(name, weights[other])


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


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the folder before a refusal that does not name it."""
    try:
        yield
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn whatever goes wrong in transformers, safetensors or json into one line."""
    try:
        yield
    except (CheckpointError, InputError):
        raise
    except Exception as error:
        raise CheckpointError(f"{what} cannot be loaded: {first_line(error)}.") from error


def _dtype(torch: Any, name: str | None) -> Any:
    if name is None:
        return None
    if name not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}; got {name!r}.")
    return getattr(torch, name)
