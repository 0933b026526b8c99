"""tiny-mdm: a full-attention masked-diffusion model, trained from scratch as LLaDA was."""

from __future__ import annotations

from functools import partial

from chordal.training.data import EVEN, HARD, LONG
from chordal.training.loop import Recipe, Stage
from chordal.training.objectives import masked_loss
from chordal.training.recipes.tiny_ar import BACKBONE

MASK_ID = 1

# Slack of a batch, one drawn in turn: most are nearly tight.
TIGHT = (2,) * 12 + (8,) * 5 + (48,) * 3

RECIPE = Recipe(
    name="tiny-mdm",
    summary="masked diffusion, full attention, 6 layers of 192",
    family={"family": "masked", "mask_token_id": MASK_ID},
    # Lists and puzzles first, on tight canvases; then longer answers; then any canvas up to 56 wider.
    stages=(
        Stage(mixture=EVEN, objective=partial(masked_loss, mask_id=MASK_ID, slacks=TIGHT)),
        Stage(start=1600, mixture=LONG, objective=partial(masked_loss, mask_id=MASK_ID, slacks=TIGHT)),
        Stage(start=2800, mixture=HARD, objective=partial(masked_loss, mask_id=MASK_ID, slacks=range(57))),
    ),
    backbone=BACKBONE,
    num_steps=4800,
    slack=56,
)
