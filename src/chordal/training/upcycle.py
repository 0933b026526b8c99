"""Turn a dense model into a mixture of experts that starts from what it knows (arXiv 2212.05055)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


@torch.no_grad()
def upcycle(dense: Any, *, num_experts: int, num_active: int, expert_size: int) -> Any:
    """Make a Qwen3-MoE of a Qwen3: everything but the feed-forward layers is kept.

    Each expert takes `expert_size` neurons of the dense layer, one run after the other and from the first
    again, so that together they hold every neuron at least once; their outputs are scaled so that a
    neuron at work counts as it did. Departs from the paper, whose experts are whole copies: these are
    smaller than the layer they come from (as in LLaDA-MoE), and training has to make up for that.

    Args:
        dense: A Qwen3 model.
        num_experts: Experts of a layer.
        num_active: Experts of a token.
        expert_size: Neurons of an expert.

    Raises:
        ValueError: The experts cannot hold all neurons of a layer.
    """
    kept = dense.config.to_dict()
    width = kept["intermediate_size"]
    if num_experts * expert_size < width:
        raise ValueError(f"{num_experts} experts of {expert_size} cannot hold {width} neurons.")
    for name in ("model_type", "architectures", "chordal", "layer_types", "max_window_layers", "dtype"):
        kept.pop(name, None)
    config = Qwen3MoeConfig(
        **kept,
        num_experts=num_experts,
        num_experts_per_tok=num_active,
        moe_intermediate_size=expert_size,
        norm_topk_prob=True,
    )
    config._attn_implementation, config._experts_implementation = "eager", "grouped_mm"
    model = Qwen3MoeForCausalLM(config)
    dense_weights = dense.state_dict()
    own = model.state_dict()
    own.update({name: weight for name, weight in dense_weights.items() if name in own})
    # The weights of a token's experts add up to 1.
    neurons = torch.arange(num_experts * expert_size).reshape(num_experts, expert_size) % width
    for layer in range(config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (dense_weights[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        own[f"{mlp}.experts.gate_up_proj"] = torch.cat([gate[neurons], up[neurons]], 1)
        own[f"{mlp}.experts.down_proj"] = down[:, neurons].movedim(1, 0) * num_active
    model.load_state_dict(own)
    return model
