"""tiny-moe: masked diffusion with a mixture of experts in every layer, upcycled from tiny-mdm."""

from __future__ import annotations

from functools import partial

from chordal.training.data import HARD
from chordal.training.loop import Recipe, Stage
from chordal.training.objectives import balanced_loss, masked_loss
from chordal.training.recipes.tiny_block import MASK_ID
from chordal.training.recipes.tiny_mdm import SLACKS
from chordal.training.upcycle import upcycle

NUM_EXPERTS, NUM_ACTIVE, EXPERT_SIZE = 16, 4, 48

RECIPE = Recipe(
    name="tiny-moe",
    summary=f"masked diffusion, {NUM_ACTIVE} of {NUM_EXPERTS} experts a token, made of tiny-mdm",
    family={"family": "masked", "mask_token_id": MASK_ID},
    stages=(
        Stage(
            mixture=HARD,
            objective=partial(
                balanced_loss,
                objective=partial(masked_loss, mask_id=MASK_ID, slacks=SLACKS, suffix_share=0.5),
                weight=0.01,
            ),
        ),
    ),
    backbone={},  # of tiny-mdm
    num_steps=1200,
    learning_rate=2e-3,
    init_from="tiny-mdm",
    remake=partial(upcycle, num_experts=NUM_EXPERTS, num_active=NUM_ACTIVE, expert_size=EXPERT_SIZE),
    slack=max(SLACKS),
)
