"""tiny-mdm: a full-attention masked-diffusion model, trained from scratch as LLaDA was."""

from __future__ import annotations

from functools import partial

from chordal.training.data import EVEN, LONG
from chordal.training.loop import Recipe
from chordal.training.objectives import masked_loss
from chordal.training.recipes.tiny_ar import BACKBONE

MASK_ID = 1
MAX_SLACK = 48

RECIPE = Recipe(
    name="tiny-mdm",
    summary="masked diffusion, full attention, 6 layers of 192",
    family={"family": "masked", "mask_token_id": MASK_ID},
    objective=partial(masked_loss, mask_id=MASK_ID, max_slack=MAX_SLACK),
    backbone=BACKBONE,
    num_steps=5400,
    mixtures=((0, EVEN), (1600, LONG)),
    slack=MAX_SLACK,
)
