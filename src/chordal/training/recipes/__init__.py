"""The training recipes by name."""

from __future__ import annotations

from chordal.training.loop import Recipe
from chordal.training.recipes import tiny_ar, tiny_block, tiny_draft, tiny_mdm, tiny_moe, tiny_recurrent

RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE
    for module in (tiny_ar, tiny_block, tiny_mdm, tiny_draft, tiny_moe, tiny_recurrent)
}
