"""tiny-recurrent: a causal model of one layer that is looped, which has to work the answers out in depth."""

from __future__ import annotations

from functools import partial

from chordal.training.data import EVEN
from chordal.training.loop import Recipe, Stage
from chordal.training.looping import loop_layers, looped_loss

NUM_LOOPS = 8

# Many small steps: at first each loop has to find its part in the work.
HALF = {group: (count // 2, weight) for group, (count, weight) in EVEN.items()}

RECIPE = Recipe(
    name="tiny-recurrent",
    summary=f"causal, one layer of 192 looped {NUM_LOOPS} times, begun with the first layer of tiny-ar",
    family={"family": "causal"},
    stages=(Stage(mixture=HALF, objective=partial(looped_loss, mean_loops=5.0, max_loops=NUM_LOOPS)),),
    backbone={},  # of tiny-ar
    num_steps=3500,
    init_from="tiny-ar",
    remake=partial(loop_layers, prelude=(), core=(0,), coda=(), num_loops=NUM_LOOPS),
)
