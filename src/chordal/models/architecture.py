"""What running a transformers model takes: its backbone, what its layers see, how its logits are made.

Nothing here goes by a model's name. Whatever an architecture does behind its backbone (scaling,
soft-capping) is kept by letting its own `forward` do it on hidden states computed elsewhere.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from chordal.errors import CheckpointError

LayerKind: TypeAlias = Literal["full_attention", "sliding_attention", "chunked_attention"]

# Where config classes keep the length of the window; the last is what ALiBi models extrapolate from.
_WINDOW_NAMES = ("max_position_embeddings", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class Architecture:
    """How to run one loaded model.

    Attributes:
        backbone: Gives hidden states; takes `input_ids`, `position_ids`, `attention_mask`,
            `past_key_values`.
        logits: Turns hidden states `[N, D]` into logits `[N, V]`.
        device: Where its inputs go; its layers may be on others.
        num_layers: Layers with a cache.
        window: Most tokens of a sequence.
        num_positions: Positions there are embeddings for; None where they are computed.
        vocab_size: Logits of a position.
        reach: Kinds of attention layers, with how many positions one sees at most (None: all).
        has_mask_per_kind: Whether the backbone takes a mask for each kind of layer.
        adds_mask: Whether masks are added to the scores instead of being boolean.
    """

    backbone: Any
    logits: Callable[[Tensor], Tensor]
    device: torch.device
    num_layers: int
    window: int
    num_positions: int | None
    vocab_size: int
    reach: dict[LayerKind, int | None]
    has_mask_per_kind: bool
    adds_mask: bool

    @classmethod
    def of(cls, model: Any) -> Architecture:
        """Read the architecture of a loaded `...ForCausalLM`."""
        config = model.config.get_text_config()
        reach = attention_reach(config)
        # Where the prefix names the place inside a larger model, the model is its own base.
        backbone = model.base_model if model.base_model is not model else model.model
        # accelerate's hook knows where a model runs whose layers are spread, some of them perhaps on disk.
        hook = getattr(model, "_hf_hook", None)
        device = torch.device(model.device if hook is None else hook.execution_device)
        return cls(
            backbone=backbone,
            logits=_logits(model, backbone, device),
            device=device,
            num_layers=config.num_hidden_layers,
            window=window_of(config),
            num_positions=_num_positions(backbone, window_of(config)),
            vocab_size=config.vocab_size,
            reach=reach,
            has_mask_per_kind=len(reach) > 1,
            adds_mask=model.config._attn_implementation == "eager",
        )


def window_of(config: Any) -> int:
    """Give the most tokens a sequence of this model may have.

    Where longer texts turn the queries and keys of all tokens otherwise (longrope), what is cached would
    be wrong from there on, and so would shorter texts of the same batch: such a window ends before.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # one for all layers, or one for each kind
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            return int(rope["original_max_position_embeddings"])
    for name in _WINDOW_NAMES:
        if isinstance(size := getattr(config, name, None), int):
            return size
    raise CheckpointError(f"config.json: none of {', '.join(_WINDOW_NAMES)} says how long a text may be.")


def _num_positions(backbone: Any, window: int) -> int | None:
    """Give how many positions a table of the backbone has, None if it has no such table."""
    names = [name for name, part in backbone.named_modules() if isinstance(part, torch.nn.Embedding)]
    # By name, for token types and the like have tables too. What begins with rows for padding has more
    # rows than the window has positions.
    return window if any(name.endswith("wpe") or "position" in name for name in names) else None


def num_experts_of(config: Any) -> int | None:
    """Give how many routed experts a layer has, None for models without."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    counts = [count for name in names if (count := getattr(config, name, None))]
    return counts[0] if counts else None


def attention_reach(config: Any) -> dict[LayerKind, int | None]:
    """Give the kinds of attention layers a config describes and how far each sees.

    Raises:
        CheckpointError: A kind keeps another state than keys and values by position.
    """
    kinds = list(dict.fromkeys(_declared(config, "layer_types") or ()))
    sliding_window = _declared(config, "sliding_window")
    if not kinds:
        is_sliding = sliding_window is not None and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if is_sliding else "full_attention"]
    if unknown := [kind for kind in kinds if kind not in get_args(LayerKind)]:
        raise CheckpointError(
            f"config.json: {config.model_type} has layers of the kind {unknown[0]}; only attention over "
            f"cached keys and values can be decoded in parallel ({', '.join(get_args(LayerKind))})."
        )
    sizes = {
        "full_attention": None,
        "sliding_attention": sliding_window,
        "chunked_attention": _declared(config, "attention_chunk_size"),
    }
    return {kind: sizes[kind] for kind in kinds}


def _declared(config: Any, name: str) -> Any:
    """Give what a config says under a key that its class knows; models have no use for the others."""
    return getattr(config, name, None) if hasattr(type(config)(), name) else None


def refuse_unsupported(model_class: Any, config: Any) -> None:
    """Refuse an architecture that a batch of slots and positions cannot express.

    Args:
        model_class: A transformers `...ForCausalLM`.
        config: Its config.

    Raises:
        CheckpointError: The model keeps a running state, makes up positions of its own, or is only half
            of a model that reads another input.
    """
    name = model_class.__name__
    text = config.get_text_config()
    if getattr(model_class, "_is_stateful", False):
        raise CheckpointError(f"{name} keeps a running state; it cannot take back a token it was fed.")
    takes = inspect.signature(model_class.forward).parameters
    # Encoders that can be made decoders say so in their config; some decoders have the key and no use for it.
    is_encoder = getattr(text, "is_decoder", None) is False and "encoder_hidden_states" in takes
    if config.is_encoder_decoder or is_encoder:
        raise CheckpointError(f"{name} is not a decoder-only language model.")
    missing = {"position_ids", "attention_mask", "past_key_values"} - set(takes)
    if getattr(text, "alibi", False):  # which counts the keys it sees, whatever positions it is given
        missing.add("position_ids")
    if missing:
        raise CheckpointError(
            f"{name} has no use for {', '.join(sorted(missing))}, so its tokens cannot be placed freely."
        )
    attention_reach(text)
    window_of(text)


@torch.inference_mode()
def reads_only_embeddings(backbone: Any, device: torch.device) -> bool:
    """Whether a backbone computes from embeddings alone what it computes from token ids.

    Some look at the ids once more, as those with an embedding for each layer do.

    Args:
        backbone: A backbone of transformers.
        device: Where its inputs go.
    """
    tokens_1T = torch.arange(1, 5, device=device)[None]
    want = backbone(input_ids=tokens_1T, use_cache=False).last_hidden_state.float()
    try:  # only here may it fail: some backbones refuse embeddings, each with an error of its own
        embeds_1TD = backbone.get_input_embeddings()(tokens_1T)
        got = backbone(inputs_embeds=embeds_1TD, use_cache=False).last_hidden_state.float()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def _logits(model: Any, backbone: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Use the output embedding alone where that is all there is, else the model's own way."""
    head = model.get_output_embeddings()
    whole = _own_logits(model, backbone, device)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, getattr(head, "in_features", head.weight.shape[-1]), generator=generator).to(
        device, model.dtype
    )
    with torch.inference_mode():
        try:
            is_plain = torch.equal(head(states).float(), whole(states).float())
        except (AttributeError, TypeError):  # it reaches into its backbone; loading checks the logits anyway
            is_plain = True
    return head if is_plain else whole


def _own_logits(model: Any, backbone: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Run a model's `forward` on hidden states, with a stand-in where its backbone was."""
    given = _Given()
    shell = copy.copy(model)
    modules = {name: given if part is backbone else part for name, part in model._modules.items()}
    shell.__dict__["_modules"] = modules
    no_tokens = torch.zeros(1, 1, dtype=torch.long, device=device)
    forward = type(model).forward  # not the instance's: a hook there would call the whole model

    def logits(states_ND: Tensor) -> Tensor:
        given.states = states_ND[None]
        output: Tensor = forward(shell, input_ids=no_tokens, use_cache=False).logits[0]
        return output

    return logits


class _Given(torch.nn.Module):
    """A backbone that gives what it was given."""

    states: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(last_hidden_state=self.states)


class _Output(BaseModelOutputWithPast):
    """What a backbone returns, with nothing in the fields that only some of them have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None
