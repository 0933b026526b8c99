"""tiny-block: block diffusion, converted from tiny-ar as SDAR converts Qwen3 (arXiv 2510.06303)."""

from __future__ import annotations

from functools import partial

from chordal.training.data import LONG
from chordal.training.loop import Recipe, Stage
from chordal.training.objectives import block_loss
from chordal.training.recipes.tiny_ar import BACKBONE

MASK_ID = 1
BLOCK_LENGTH = 8

RECIPE = Recipe(
    name="tiny-block",
    summary=f"block diffusion, blocks of {BLOCK_LENGTH}, converted from tiny-ar",
    family={"family": "block", "mask_token_id": MASK_ID, "block_length": BLOCK_LENGTH},
    stages=(Stage(mixture=LONG, objective=partial(block_loss, mask_id=MASK_ID, block_length=BLOCK_LENGTH)),),
    backbone=BACKBONE,
    num_steps=2400,
    init_from="tiny-ar",
    slack=BLOCK_LENGTH,
)
