"""Grow a model into a larger one that computes the same function (Net2Net, arXiv 1511.05641).

What it answers is the small model's and what a forward pass costs is the large one's: a target on which
decoders can be timed at a size that was never trained. What layer skipping or pruning would save on it says
nothing, as much of it is idle.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM


@torch.no_grad()
def grow(plain: Any, *, factor: int = 4, num_layers: int = 12, intermediate_size: int = 3072) -> Any:
    """Make a larger Qwen3 with the logits of a smaller one.

    The residual stream keeps its d numbers and gets (factor - 1) d zeros behind them, and so do queries and
    keys. An RMS norm then sees a mean square that is `factor` times smaller: its eps is divided by `factor`
    and its weight by sqrt(factor). A head dimension i of n goes where the larger head rotates at the same
    speed, base ** (-2 i / n): to i * factor in each half. New layers are spread between the old ones and
    write nothing into the stream. Weights that cannot reach the logits are noise, not zeros.

    If `factor` is a power of 4, all of that is exact in any floating-point type, up to the order in which
    a sum is taken.

    Args:
        plain: A Qwen3 model.
        factor: How many times as wide hidden states and heads become, at least 1.
        num_layers: Layers, at least those of `plain`.
        intermediate_size: Neurons of a feed-forward layer, at least those of `plain`.

    Returns:
        A model of the same type of weights, the same ones each time.

    Raises:
        ValueError: Something would shrink, or `plain` has biases or scaled rotations.
    """
    old: Qwen3Config = plain.config
    kept = old.to_dict()
    if factor < 1 or num_layers < old.num_hidden_layers or intermediate_size < old.intermediate_size:
        raise ValueError(
            f"a model must not shrink: factor must be at least 1, num_layers {old.num_hidden_layers} and "
            f"intermediate_size {old.intermediate_size}; got {factor}, {num_layers}, {intermediate_size}."
        )
    if old.attention_bias or kept["rope_parameters"]["rope_type"] != "default":
        raise ValueError("only a model without biases, with plain rotary positions, can be grown exactly.")
    for name in ("model_type", "architectures", "layer_types", "max_window_layers", "dtype"):
        kept.pop(name, None)
    kept |= {
        "hidden_size": old.hidden_size * factor,
        "head_dim": old.head_dim * factor,
        "num_hidden_layers": num_layers,
        "intermediate_size": intermediate_size,
        "rms_norm_eps": old.rms_norm_eps / factor,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the noise
        model = Qwen3ForCausalLM(Qwen3Config(**kept)).to(plain.dtype).eval()

    width, inner, source = old.hidden_size, model.model, plain.model
    inner.embed_tokens.weight.zero_()
    inner.embed_tokens.weight[:, :width] = source.embed_tokens.weight
    if not old.tie_word_embeddings:
        model.lm_head.weight[:, :width] = plain.lm_head.weight
    _grow_norm(inner.norm, source.norm, factor)
    for layer in inner.layers:  # idle, unless it is an old one
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for index, old_layer in enumerate(source.layers, 1):
        _grow_layer(inner.layers[index * num_layers // old.num_hidden_layers - 1], old_layer, factor)
    return model


def grow_checkpoint(source: str | os.PathLike[str], out: str | os.PathLike[str], **size: int) -> int:
    """Grow the model of a folder into another folder that transformers and Chordal load.

    Args:
        source: Folder of a Qwen3 model and its tokenizer.
        out: Folder to write.
        **size: As `grow` takes it.

    Returns:
        The number of parameters.
    """
    model = grow(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), **size)
    model.save_pretrained(Path(out))
    AutoTokenizer.from_pretrained(source).save_pretrained(Path(out))
    return sum(weight.numel() for weight in model.parameters())


def _grow_layer(layer: Any, old: Any, factor: int) -> None:
    """Give a layer with seeded input weights and zero output weights the work of a smaller one."""
    _grow_norm(layer.input_layernorm, old.input_layernorm, factor)
    _grow_norm(layer.post_attention_layernorm, old.post_attention_layernorm, factor)

    attention, old_attention = layer.self_attn, old.self_attn
    size, width = old_attention.head_dim, old_attention.q_proj.in_features
    half = torch.arange(size // 2) * factor
    dims = torch.cat([half, half + size * factor // 2])
    for part in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(attention, part).weight.unflatten(0, (-1, size * factor))
        if part != "v_proj":  # whose new dimensions nobody reads; these two are normalised
            weight[:, :, :width] = 0
        weight[:, dims, :width] = getattr(old_attention, part).weight.unflatten(0, (-1, size))
    into_stream: Tensor = attention.o_proj.weight[:width].unflatten(1, (-1, size * factor))
    into_stream[:, :, dims] = old_attention.o_proj.weight.unflatten(1, (-1, size))
    # Scores are divided by sqrt(head size), which is sqrt(factor) more: queries stay that much larger.
    attention.q_norm.weight[dims] = old_attention.q_norm.weight
    attention.k_norm.weight[dims] = old_attention.k_norm.weight / math.sqrt(factor)

    mlp, neurons = layer.mlp, old.mlp.gate_proj.out_features
    mlp.gate_proj.weight[:neurons, :width] = old.mlp.gate_proj.weight
    mlp.up_proj.weight[:neurons, :width] = old.mlp.up_proj.weight
    mlp.down_proj.weight[:width, :neurons] = old.mlp.down_proj.weight


def _grow_norm(norm: Any, old: Any, factor: int) -> None:
    """Normalise by the mean square of a vector that has zeros behind the old numbers."""
    norm.weight[: len(old.weight)] = old.weight / math.sqrt(factor)
