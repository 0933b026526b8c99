"""`chordal compare`: several decoders on the same prompts, one table."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chordal import strict_json
from chordal.cli import options
from chordal.cli.console import make_console, make_table, progress
from chordal.cli.lineup import all_that_fit, decoders_of, note_unmeasured, read_lineup
from chordal.cli.prompts import read_all_prompts
from chordal.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from rich.table import Table

    from chordal.bench.compare import Contender
    from chordal.bench.tasks.workload import Workload
    from chordal.generation import Model

EXAMPLES = """\b
Examples:
  chordal compare --demo
  chordal compare --model tiny-mdm --decoders threshold --tasks copy,shuffle
"""

_DEFAULT_TASKS = "copy,shuffle,sudoku,latin,arithmetic,rename"
_TASKS_A_TABLE = 6
_WORDS = ("decoder", "promise", "accuracy by task")


@options.grouped
def compare(
    *,
    loading: options.Loading,
    decoders: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Decoders by commas, each with settings if wanted: threshold:threshold=0.7,feed=dual. "
            "The model's plain decoder is always there; else all that fit.",
        ),
    ] = None,
    config: options.Config = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Graded tasks or groups (lists, puzzles, arithmetic, edits) by commas.  "
            f"[default: {_DEFAULT_TASKS}]",
        ),
    ] = None,
    num_prompts: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts of each task.")] = 8,
    data: Annotated[
        str | None,
        typer.Option(metavar="JSONL", help="Ungraded prompts instead, as for chordal generate --file."),
    ] = None,
    sampling: options.Sampling,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Timed rounds; medians are shown.")] = 3,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts decoded at once.")] = 1,
    demo: Annotated[
        bool,
        typer.Option("--demo", help="A quick tour of the bundled models; other options but --json rest."),
    ] = False,
    json_: options.Json = False,
) -> None:
    """Compare decoders on the same prompts: quality and speed."""
    loading.hush()
    if demo:
        _run_demo(json_)
        return
    if data is not None and tasks is not None:
        raise InputError("--data and --tasks both say what to decode; give one.")
    lineup = read_lineup(decoders, config)
    prompts = read_all_prompts(data) if data is not None else None
    from chordal.bench.tasks.workload import Workload, load_tasks

    settings = sampling.settings()
    max_new_tokens = settings.pop("max_new_tokens")
    if data is not None and prompts is not None:
        workloads = [Workload(data, prompts, max_new_tokens)]
    else:
        names = [name.strip() for name in (tasks or _DEFAULT_TASKS).split(",")]
        workloads = load_tasks(names, num_prompts, seed=sampling.seed, max_new_tokens=max_new_tokens)
    loaded = loading.load(max_rows=batch_size)
    lineup = all_that_fit(loaded) if lineup is None else lineup
    if prompts is not None:
        note_unmeasured(loaded, decoders_of(lineup))
    report = _measure(loaded, workloads, lineup, repeats=repeats, **settings)
    if json_:
        print(strict_json.dumps(report, indent=2))
    else:
        _print_report(report)


def _run_demo(as_json: bool) -> None:
    from chordal.bench.demo import DEMO
    from chordal.bench.tasks.workload import load_tasks
    from chordal.generation import load
    from chordal.models.checkpoint import bundled_models

    if missing := sorted({scene.model for scene in DEMO} - set(bundled_models())):
        raise CheckpointError(
            f"the demo needs the bundled models {' and '.join(missing)}, which this installation lacks. "
            "Install chordal again, or train them: make models."
        )
    reports, console = [], make_console(sys.stdout)
    for scene in DEMO:
        report = _measure(
            load(scene.model, max_rows=scene.batch_size, prefix_cache_mib=0),
            load_tasks(scene.tasks, scene.num_prompts),
            scene.contenders,
            repeats=scene.repeats,
        )
        reports.append({"title": scene.title, **report, "note": scene.note})
        if not as_json:
            console.print(scene.title, style="bold")
            console.print()
            _print_report(report)
            console.print(scene.note)
            console.print()
    if as_json:
        print(strict_json.dumps(reports, indent=2))


def _measure(
    model: Model, workloads: Sequence[Workload], lineup: Sequence[Contender], *, repeats: int, **settings: Any
) -> dict[str, Any]:
    """Run the comparison under a progress bar and give it as plain values."""
    from chordal.bench.compare import compare, describe_setup

    with progress(None, "runs") as advance:
        rows = compare(
            model,
            workloads,
            lineup,
            repeats=repeats,
            on_run=lambda done, total, contender: advance(done, contender.label, total),
            **settings,
        )
    return {
        **describe_setup(model, repeats=repeats),
        "prompts": {workload.name: len(workload.prompts) for workload in workloads},
        "rows": [{"label": row.label, **dataclasses.asdict(row)} for row in rows],
    }


def _print_report(report: dict[str, Any]) -> None:
    console = make_console(sys.stdout)
    rows, names = report["rows"], list(report["rows"][0]["accuracies"])
    console.print(_main_table(rows))
    console.print()
    if len(names) > 1:
        for start in range(0, len(names), _TASKS_A_TABLE):
            console.print(_accuracy_table(rows, names[start : start + _TASKS_A_TABLE]))
            console.print()
    num_prompts = sum(report["prompts"].values())
    console.print(
        f"{report['model']}, {num_prompts} prompts, {report['batch_size']} at once, {report['dtype']} on "
        f"{report['device']}, threads: {report['threads']}, rounds: {report['repeats']}",
        style="dim",
    )


def _main_table(rows: Sequence[dict[str, Any]]) -> Table:
    columns: dict[str, Any] = {
        "decoder": lambda row: row["label"],
        "promise": lambda row: row["promise"],
        "accuracy": lambda row: _percent(row["accuracy"]),
        "same\ntext": lambda row: _percent(row["same_text"]),
        "tokens/\nforward": lambda row: f"{row['tokens_per_forward']:.2f}",
        "forwards": lambda row: f"{row['forwards']:,}",
        "draft\nforwards": lambda row: f"{row['draft_forwards']:,}",
        "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "ratio": lambda row: f"{row['ratio']:.2f}x",
    }
    # Agreement with plain decoding stands in for accuracy where nobody can grade.
    columns.pop("same\ntext" if rows[0]["accuracy"] is not None else "accuracy")
    if not any(row["draft_forwards"] for row in rows):
        columns.pop("draft\nforwards")
    return make_table(columns, rows, words=_WORDS)


def _accuracy_table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    columns: dict[str, Any] = {"accuracy by task": lambda row: row["label"]}
    for name in names:
        columns[name] = lambda row, name=name: _percent(row["accuracies"][name])
    return make_table(columns, rows, words=_WORDS)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
