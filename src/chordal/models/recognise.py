"""Recognise a checkpoint: its architecture, tokenizer and family, before its weights are read.

Our own checkpoints and any causal language model of transformers are read as they are; the published
diffusion models go through `published`, whose table says which backbone they are.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chordal.errors import CheckpointError, InputError
from chordal.models.checkpoint import Checkpoint, first_line
from chordal.models.published import Published, identify

# The one published diffusion model that is a class of transformers.
DIFFUSION_GEMMA = "diffusion_gemma"


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
    with naming(checkpoint.path), reading(f"{checkpoint.path / 'config.json'}"):
        return _recognise(checkpoint, block_length)


def _recognise(checkpoint: Checkpoint, block_length: int | None) -> Recognised:
    import transformers

    from chordal.models.architecture import num_experts_of, refuse_unsupported
    from chordal.models.family import Family, make_family
    from chordal.models.looped import LoopedConfig, looped_family  # which transformers now knows

    path = checkpoint.path
    published = identify(checkpoint.config)
    with quiet(transformers.utils.logging):
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
    elif config.model_type == DIFFUSION_GEMMA:
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


def _transformers_config(transformers: Any, checkpoint: Checkpoint) -> Any:
    """Read a config that transformers knows, None if it does not."""
    if checkpoint.config.get("model_type") not in transformers.CONFIG_MAPPING:
        return None
    return transformers.AutoConfig.from_pretrained(
        checkpoint.path, local_files_only=True, trust_remote_code=False
    )


def _model_class(transformers: Any, config: Any) -> Any:
    if config is not None and config.model_type == DIFFUSION_GEMMA:
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
    with reading(f"the tokenizer of {path}"):
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


@contextmanager
def quiet(logging: Any) -> Iterator[None]:
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
def naming(path: Path) -> Iterator[None]:
    """Put the folder before a refusal that does not name it."""
    try:
        yield
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever goes wrong in transformers, safetensors or json into one line."""
    try:
        yield
    except (CheckpointError, InputError):
        raise
    except Exception as error:
        raise CheckpointError(f"{what} cannot be loaded: {first_line(error)}.") from error
