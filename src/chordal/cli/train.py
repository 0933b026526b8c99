"""`chordal train`: train a bundled model's recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chordal.cli.console import is_terminal, make_console, note, progress
from chordal.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from chordal.training.loop import Progress, Recipe

EXAMPLES = """\b
Examples:
  chordal train --list
  chordal train tiny-ar --out runs/tiny-ar
"""

_STEPS_A_LINE = 20


def train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Which model.")] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Run folder; a run found there is resumed.  [runs/RECIPE]"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Training steps; else the recipe's.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of weights, data and masks.")] = 0,
    save_every: Annotated[int, typer.Option(metavar="N", min=1, help="Steps between checkpoints.")] = 200,
    list_: Annotated[bool, typer.Option("--list", help="List the recipes and exit.")] = False,
) -> None:
    """Train a recipe; run it again to go on after an interruption."""
    if recipe is None and not list_:
        raise InputError("no recipe; chordal train --list shows them.")
    from transformers.utils import logging

    from chordal.training import loop
    from chordal.training.recipes import RECIPES

    if list_:
        _print_recipes(RECIPES)
        return
    if recipe not in RECIPES:
        raise UnknownNameError("recipe", str(recipe), RECIPES)
    chosen = RECIPES[recipe]
    directory = Path(out or f"runs/{recipe}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror}.") from None
    init_dir = _find_init(chosen, directory.parent) if chosen.init_from else None
    # A model that starts from another one keeps its vocabulary.
    tokenizer_dir = init_dir or _make_tokenizer(directory.parent / "tokenizer")

    logging.disable_progress_bar()  # of transformers, while it writes the weights
    run = loop.train(
        chosen,
        directory,
        tokenizer_dir=tokenizer_dir,
        init_dir=init_dir,
        num_steps=steps,
        seed=seed,
        save_every=save_every,
    )
    shows_bar = is_terminal(sys.stderr)
    with progress(steps or chosen.num_steps, "steps") as advance:
        for at in run:
            advance(at.step, f"| {_speed(at)}")
            if not shows_bar and (at.step % _STEPS_A_LINE == 0 or at.step == at.num_steps):
                note(f"step {at.step:05d} | {_speed(at)}")
    model = directory / "model"
    print(f"Trained {recipe}: {model}")
    print(f'Use it:  chordal generate --model {model} "copy: Ana Ben Cleo"')


def _speed(at: Progress) -> str:
    return f"loss {at.loss:.3f} | {at.tokens_per_second:,.0f} tok/s | {at.memory_gb:.1f} GB"


def _find_init(recipe: Recipe, runs: Path) -> Path:
    """Find the model a recipe starts from: trained beside it, or else bundled."""
    from chordal.models.checkpoint import zoo_dir

    for path in (runs / str(recipe.init_from) / "model", zoo_dir() / str(recipe.init_from)):
        if (path / "config.json").exists():
            return path
    raise InputError(
        f"{recipe.name} starts from {recipe.init_from}, which is neither in {runs} nor bundled. "
        f"Run chordal train {recipe.init_from} first."
    )


def _make_tokenizer(directory: Path) -> Path:
    """Train the tokenizer that the recipes share, unless there is one."""
    from chordal.training.tokenizer import train_tokenizer

    if not (directory / "tokenizer.json").exists():
        note(f"Training the tokenizer into {directory}")
        train_tokenizer(directory)
    return directory


def _print_recipes(recipes: dict[str, Recipe]) -> None:
    from rich.table import Table

    table = Table("recipe", "model", "starts from", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("steps", justify="right")
    for recipe in recipes.values():
        table.add_row(recipe.name, recipe.summary, recipe.init_from or "-", f"{recipe.num_steps:,}")
    make_console(sys.stdout).print(table)
