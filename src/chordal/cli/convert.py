"""`chordal convert`: published checkpoints into transformers' own layout, and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from chordal.cli import options

EXAMPLES = """\b
Examples:
  chordal convert GSAI-ML/LLaDA-8B-Instruct llada
  chordal convert llada llada-published
"""


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id, in either layout.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; new or empty.")],
    block_length: options.BlockLength = None,
    max_shard_bytes: Annotated[
        int, typer.Option(metavar="N", min=1, help="Split the weights into files of at most N bytes.")
    ] = 5_000_000_000,
) -> None:
    """Write a published model in transformers' layout, or back.

    Tensors are copied byte for byte; code that came with the checkpoint is left behind.
    """
    from chordal.models.convert import convert as convert_checkpoint

    made = convert_checkpoint(model, out, block_length=block_length, max_shard_bytes=max_shard_bytes)
    print(made)
    print("Load it with --model, see it with chordal inspect.", file=sys.stderr)
