"""Looped models: made of a plain one, and trained at depths drawn at random (arXiv 2502.05171)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chordal.models.looped import LoopedConfig, LoopedForCausalLM, fresh_states
from chordal.training.data import Batch
from chordal.training.objectives import causal_loss

# Of the normal law whose exponential is the Poisson mean.
_SIGMA = 0.5


@torch.no_grad()
def loop_layers(
    plain: Any, *, prelude: Sequence[int], core: Sequence[int], coda: Sequence[int], num_loops: int
) -> Any:
    """Make a looped model of some layers of a Qwen3; the rest of its weights are kept.

    At first every loop adds the normalised state to the prelude's output.

    Args:
        plain: A Qwen3 model.
        prelude: Its layers before the loop.
        core: Its layers in the loop.
        coda: Its layers behind the loop.
        num_loops: The looped model's usual number of loops.
    """
    kept = plain.config.to_dict()
    for name in ("model_type", "architectures", "chordal", "layer_types", "num_hidden_layers", "dtype"):
        kept.pop(name, None)
    config = LoopedConfig(
        **kept,
        num_prelude_layers=len(prelude),
        num_core_layers=len(core),
        num_coda_layers=len(coda),
        num_loops=num_loops,
    )
    config._attn_implementation = "eager"
    model = LoopedForCausalLM(config)
    inner, source = model.model, plain.model
    inner.embed_tokens.load_state_dict(source.embed_tokens.state_dict())
    inner.norm.load_state_dict(source.norm.state_dict())
    for part, layers in ((inner.prelude, prelude), (inner.core, core), (inner.coda, coda)):
        for own, layer in zip(part, layers, strict=True):
            own.load_state_dict(source.layers[layer].state_dict())
    same = torch.eye(config.hidden_size)
    inner.adapter.weight.copy_(torch.cat([same, same], 1))
    return model


def looped_loss(
    model: Any, batch: Batch, generator: torch.Generator, *, mean_loops: float, max_loops: int
) -> Tensor:
    """Take the causal loss at a number of loops drawn for the batch, from states drawn for its tokens.

    The number is 1 + Poisson(exp(x)), x normal, so that it has about the given mean and a long tail;
    what is above `max_loops` counts as that. Departs from the paper: gradients flow through all loops.
    """
    shift = np.log(mean_loops - 1) - _SIGMA**2 / 2
    rate = torch.exp(shift + _SIGMA * torch.randn((), generator=generator))
    num_loops = min(1 + int(torch.poisson(rate, generator=generator)), max_loops)
    states_BTD = fresh_states((*batch.tokens_BT.shape, model.config.hidden_size), generator)
    return causal_loss(model, batch, generator, num_loops=num_loops, states=states_BTD)
