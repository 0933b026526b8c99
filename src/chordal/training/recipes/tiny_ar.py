"""tiny-ar: a causal model, the target of the autoregressive decoders."""

from __future__ import annotations

from chordal.training.loop import Recipe, Stage
from chordal.training.objectives import causal_loss

BACKBONE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

RECIPE = Recipe(
    name="tiny-ar",
    summary="causal, 6 layers of 192",
    family={"family": "causal"},
    stages=(Stage(objective=causal_loss),),
    backbone=BACKBONE,
    num_steps=3600,
)
