"""tiny-mdm: a full-attention masked-diffusion model, converted from tiny-block.

Departs from LLaDA, which trains from scratch: tiny-block, itself converted from a causal model, only
has to learn to look ahead, as Dream's conversion of a causal model does (arXiv 2508.15487). From
scratch, four times the steps left arithmetic at half the accuracy.
"""

from __future__ import annotations

from functools import partial

from chordal.training.data import HARD
from chordal.training.loop import Recipe, Stage
from chordal.training.objectives import masked_loss
from chordal.training.recipes.tiny_ar import BACKBONE
from chordal.training.recipes.tiny_block import MASK_ID

# A canvas may be this much longer than its answer. A model that only saw tight ones takes the length
# of the canvas for that of the answer.
SLACKS = range(57)

RECIPE = Recipe(
    name="tiny-mdm",
    summary="masked diffusion, full attention, converted from tiny-block",
    family={"family": "masked", "mask_token_id": MASK_ID},
    stages=(
        Stage(mixture=HARD, objective=partial(masked_loss, mask_id=MASK_ID, slacks=SLACKS)),
        Stage(
            start=1000,
            mixture=HARD,
            objective=partial(masked_loss, mask_id=MASK_ID, slacks=SLACKS, suffix_share=0.6),
        ),
    ),
    backbone=BACKBONE,
    num_steps=1700,
    learning_rate=2e-3,
    init_from="tiny-block",
    slack=max(SLACKS),
)
