"""`chordal plan`: how much to draft, from what passes cost here and how often drafts are right."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chordal import strict_json
from chordal.cli import options
from chordal.cli.console import make_console, note, open_output, progress
from chordal.cli.prompts import read_all_prompts
from chordal.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from chordal.planning.acceptance import Acceptance

EXAMPLES = """\b
Examples:
  chordal plan --decoder prompt_lookup --tasks rename --num-prompts 4
  chordal plan --decoder prompt_lookup --tasks rename --num-prompts 4 --max-draft 4 --out plan.json
"""

# Options of a table, at most: these, the chosen one and its neighbours.
_SHOWN = {1, 2, 4, 8, 16, 32, 64}


@options.grouped
def plan(
    *,
    loading: options.Loading,
    decoder: Annotated[
        str, typer.Option(metavar="NAME", help="Decoder whose draft is planned.")
    ] = "prompt_lookup",
    set_: options.Set = None,
    tasks: Annotated[
        str, typer.Option(metavar="LIST", help="Graded tasks or groups by commas, for their prompts.")
    ] = "edits",
    num_prompts: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts of each task.")] = 8,
    data: Annotated[
        str | None,
        typer.Option(metavar="JSONL", help="Your prompts instead, as for chordal generate --file."),
    ] = None,
    batch_sizes: Annotated[
        str, typer.Option(metavar="LIST", help="Prompts decoded at once, by commas; one choice for each.")
    ] = "1",
    max_draft: Annotated[int, typer.Option(metavar="N", min=1, help="Longest path of a draft.")] = 16,
    max_nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Most nodes of a draft tree.")] = 64,
    margin: Annotated[
        float,
        typer.Option(metavar="P", min=0, help="Drafts must be faster than plain decoding by this share."),
    ] = 0.05,
    law: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Acceptance from a law instead of a measurement: JSON with num_draft, the points to fit "
            '("rows", each with tau and values such as tokens and parameters) and the "draft" to predict.',
        ),
    ] = None,
    sampling: options.Sampling,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Timed rounds of the check.")] = 3,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write the plan as JSON, for --config; its settings are the first batch's."
        ),
    ] = None,
    json_: options.Json = False,
) -> None:
    """Choose how much to draft, say why, and check it."""
    if loading.hush():
        out = None
    batches = _parse_batches(batch_sizes)
    prompts = read_all_prompts(data) if data is not None else None
    settings = options.parse_settings(set_ or ())
    acceptance = _acceptance_of(law) if law is not None else None
    from chordal.bench.compare import describe_setup
    from chordal.bench.tasks.workload import load_tasks
    from chordal.planning.plan import Limits, make_plan

    request = sampling.settings()
    if prompts is None:
        workloads = load_tasks(
            [name.strip() for name in tasks.split(",")], num_prompts, max_new_tokens=request["max_new_tokens"]
        )
        prompts = [prompt for workload in workloads for prompt in workload.prompts]
        request["max_new_tokens"] = max(workload.max_new_tokens or 1 for workload in workloads)
    limits = Limits(max_draft=max_draft, max_nodes=max_nodes, margin=margin)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_output(out)) if out else None
        loaded = loading.load(max_rows=max(batches))
        with progress(None, "steps") as advance:
            made = make_plan(
                loaded,
                decoder,
                prompts,
                settings=settings,
                batches=batches,
                limits=limits,
                acceptance=acceptance,
                repeats=repeats,
                on_step=lambda done, total, words: advance(done, words, total),
                **request,
            )
        setup = describe_setup(loaded, repeats=repeats)
        setup.pop("batch_size")
        document = {**made.to_dict(), "prompts": len(prompts), "setup": setup}
        if file is not None:
            with contextlib.suppress(OSError):  # pipes and devices hold nothing to cut
                file.truncate(0)
            print(strict_json.dumps(document, indent=2), file=file)
    if json_:
        print(strict_json.dumps(document, indent=2))
    else:
        _print_plan(document)


def _parse_batches(text: str) -> list[int]:
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise InputError(f"--batch-sizes must be whole numbers of at least 1 by commas; got {text!r}.")
    return batches


def _acceptance_of(path: str) -> Acceptance:
    """Fit a law to the points of a file and predict the acceptance of its draft."""
    from chordal.planning.acceptance import Acceptance, alpha_of
    from chordal.planning.laws import fit_acceptance

    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        draft, num_draft = dict(document["draft"]), int(document["num_draft"])
        variables = {name: [float(row[name]) for row in document["rows"]] for name in draft}
        tau = [float(row["tau"]) for row in document["rows"]]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f'{path} must be JSON with "num_draft", "rows" and "draft"; {type(error).__name__}: {error}.'
        ) from None
    law = fit_acceptance(variables, tau, num_draft=num_draft)
    note(str(law))
    return Acceptance((alpha_of(law.predict(**draft), num_draft),))


def _print_plan(document: dict[str, Any]) -> None:
    console = make_console(sys.stdout)
    console.print(_latency_table(document["table"]))
    for rung in document["ladder"]:
        console.print()
        console.print(f"batch {rung['batch']}", style="bold")
        console.print(_options_table(rung))
        console.print()
        console.print(rung["reason"])
        console.print(_check_line(rung))
    console.print()
    setup = document["setup"]
    console.print(
        f"{setup['model']}, {document['prompts']} prompts, {setup['dtype']} on {setup['device']}, "
        f"threads: {setup['threads']}, rounds: {setup['repeats']}",
        style="dim",
    )


def _latency_table(tables: dict[str, Any]) -> Table:
    widths = sorted({width for table in tables.values() for width in table["widths"]})
    shown = _table(["ms a pass of width", *map(str, widths)])
    for name, table in tables.items():
        for batch, row in zip(table["batches"], table["seconds"], strict=True):
            by_width = dict(zip(table["widths"], row, strict=True))
            cells = [f"{1e3 * by_width[width]:.2f}" if width in by_width else "" for width in widths]
            shown.add_row(f"{name}, batch {batch}", *cells)
    return shown


def _options_table(rung: dict[str, Any]) -> Table:
    shown = _table(["draft", "tokens/\nround", "ms/\nround", "tokens/s", "ratio", ""])
    options_ = rung["options"]
    at = next(
        place for place, one in enumerate(options_) if one["num_nodes"] == rung["predicted"]["num_nodes"]
    )
    for place, option in enumerate(options_):
        if not place or option["num_nodes"] in _SHOWN or abs(place - at) <= 1:
            pairs = ", ".join(f"{name}={value}" for name, value in option["settings"].items())
            shown.add_row(
                pairs or "off",
                f"{option['tokens']:.2f}",
                f"{1e3 * option['round_s']:.2f}",
                f"{option['tokens_per_s']:,.0f}",
                f"{option['ratio']:.2f}x",
                "chosen" if place == at else "",
            )
    return shown


def _check_line(rung: dict[str, Any]) -> str:
    from chordal.planning.plan import Check

    check = Check(**rung["measured"])
    predicted = rung["predicted"]
    line = (
        f"Predicted {predicted['tokens_per_s']:,.0f} tokens/s, {predicted['ratio']:.2f}x; measured "
        f"{check.tokens_per_s:,.0f}, {check.ratio:.2f}x plain decoding, {check.plain_tokens_per_s:,.0f}."
    )
    if check.is_misfit:
        line += (
            f" Misfit: the measured speed is {check.misfit:+.0%} off, its ratio "
            f"{check.ratio / predicted['ratio'] - 1:+.0%}; read the choice with that much doubt."
        )
    return line


def _table(headers: list[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, header in enumerate(headers):
        table.add_column(header, justify="right" if place else "left")
    return table
