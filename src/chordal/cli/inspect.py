"""`chordal inspect`: what a checkpoint is, and which decoders fit it."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from chordal import strict_json
from chordal.cli import options
from chordal.cli.console import make_console

EXAMPLES = """\b
Examples:
  chordal inspect tiny-block
  chordal inspect tiny-mdm --json
"""


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Bundled model, folder or hub id.")],
    block_length: options.BlockLength = None,
    revision: options.Revision = None,
    token: options.Token = None,
    local_files_only: options.LocalFilesOnly = False,
    json_: options.Json = False,
) -> None:
    """Say what a model is and which decoders fit, without its weights."""
    from chordal.models.describe import describe

    facts = describe(
        model, block_length=block_length, revision=revision, token=token, local_files_only=local_files_only
    )
    if json_:
        print(strict_json.dumps(facts, indent=2))
        return
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _cell(name, value))
    make_console(sys.stdout).print(table)


def _cell(name: str, value: Any) -> str:
    if name == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.2f} MB"
    if name == "layers":
        return ", ".join(kind + (f" ({size})" if size else "") for kind, size in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(value) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    return f"{value:,}" if name in ("parameters", "window", "vocab_size") else str(value)
