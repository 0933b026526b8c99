"""`chordal list`: the decoders, or the bundled models."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from chordal import strict_json
from chordal.cli import options
from chordal.cli.console import make_console

EXAMPLES = """\b
Examples:
  chordal list
  chordal list --models --json
"""


def list_(
    models: Annotated[bool, typer.Option("--models", help="List the bundled models instead.")] = False,
    json_: options.Json = False,
) -> None:
    """List the decoders and what they promise, or the models."""
    from rich.table import Table

    rows = _models() if models else _decoders()
    if json_:
        print(strict_json.dumps(rows, indent=2))
        return
    if not rows:
        print("No models are bundled with this installation.")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in rows[0]:
        justify: Any = "right" if name == "parameters" else "left"
        table.add_column(
            name.replace("_", " "), justify=justify, no_wrap=name in ("name", "family", "promise")
        )
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    make_console(sys.stdout).print(table)


def _decoders() -> list[dict[str, Any]]:
    from chordal.registry import list_decoders

    return list_decoders()


def _models() -> list[dict[str, Any]]:
    from chordal.models.checkpoint import bundled_models, zoo_dir

    rows = []
    for name in bundled_models():
        config = json.loads((zoo_dir() / name / "config.json").read_text(encoding="utf-8"))
        facts = json.loads((zoo_dir() / name / "training.json").read_text(encoding="utf-8"))
        family = config.get("chordal", {}).get("family", "causal")
        rows.append({"name": name, "family": family, "parameters": facts["parameters"]})
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:,}" if isinstance(value, int) else value or "-"
