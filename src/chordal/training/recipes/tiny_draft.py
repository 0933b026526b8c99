"""tiny-draft: a causal model a tenth the size of tiny-ar, with its vocabulary, to draft for it."""

from __future__ import annotations

from chordal.training.loop import Recipe, Stage
from chordal.training.objectives import causal_loss
from chordal.training.recipes.tiny_ar import BACKBONE

RECIPE = Recipe(
    name="tiny-draft",
    summary="causal, 2 layers of 96, drafts for tiny-ar",
    family={"family": "causal"},
    stages=(Stage(objective=causal_loss),),
    backbone={
        **BACKBONE,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    num_steps=3000,
)
