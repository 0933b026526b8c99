"""`chordal bench`: decoders on benchmark tasks, quality beside speed, in a folder with a report."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from chordal import strict_json
from chordal.cli import options
from chordal.cli.console import make_console, make_table, note, progress
from chordal.cli.lineup import all_that_fit, decoders_of, note_unmeasured, read_lineup
from chordal.errors import InputError

if TYPE_CHECKING:
    from chordal.bench.regression import Change
    from chordal.bench.results import Folder, Record
    from chordal.bench.tasks.workload import Workload
    from chordal.generation import Model

EXAMPLES = """\b
Examples:
  chordal bench --model tiny-mdm --decoders threshold --tasks lists --num-prompts 4 --out run
  chordal bench --guard --model tiny-mdm --decoders threshold:threshold=0.9 --num-prompts 4
"""

_ERRORS_SHOWN = 5
_GUARDED_PROMPTS = 8
_WORDS = ("decoder", "promise", "task", "speed", "quality")


@options.grouped
def bench(
    *,
    context: typer.Context,
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
            help="Tasks or groups by commas; else all the bundled models know, or parallelbench for others.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A file of ParallelBench, GSM8K, HumanEval or Spec-Bench, or of prompts. Repeatable.",
        ),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of each task, else 100; of each file, else all.")
    ] = None,
    turns: Annotated[
        Literal["first", "all"],
        typer.Option(metavar="first|all", help="What to ask of a file's conversations."),
    ] = "first",
    execute: Annotated[
        bool, typer.Option("--execute", help="Run the programs the model writes, which is what grades them.")
    ] = False,
    sampling: options.Sampling,
    repeats: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Timed rounds, else 5, with --guard 1.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts decoded at once.")] = 1,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of the results; the same command continues what is there."),
    ] = None,
    guard: Annotated[
        bool,
        typer.Option("--guard", help="A small run that fails if a decoder's quality is under the floor."),
    ] = False,
    guard_floor: Annotated[
        float, typer.Option(metavar="P", min=0, max=1, help="Share of plain decoding's quality it must have.")
    ] = 0.95,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="BEFORE AFTER", help="Compare two folders; fails if something got worse."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(metavar="P", min=0, help="With --compare: change in speed that does not count.")
    ] = 0.03,
    json_: options.Json = False,
) -> int:
    """Benchmark decoders: quality beside speed, in one report."""
    if context.invoked_subcommand is not None:
        # What stands in front of its name would have no effect.
        for name in context.params:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise InputError(f"options of {context.invoked_subcommand} go behind its name.")
        return 0
    if compare is not None:
        return _compare(*compare, tolerance, json_)
    if loading.tensor_parallel:
        raise InputError("--tensor-parallel does not go with bench; use --device-map auto.")
    if out is None and not guard:
        raise InputError("results need a folder; give --out DIR.")
    lineup = read_lineup(decoders, config)
    if guard and lineup is None:
        raise InputError("--guard needs a decoder to guard; give --decoders or --config.")
    from chordal.bench.results import Folder
    from chordal.bench.runner import run_benchmark

    settings = sampling.settings()
    workloads = _workloads(
        loading.model,
        tasks,
        data,
        num_prompts=num_prompts or (_GUARDED_PROMPTS if guard and data is None else None),
        guard=guard,
        seed=sampling.seed,
        max_new_tokens=settings.pop("max_new_tokens"),
        execute=execute,
        turns=turns,
    )
    model = loading.load(max_rows=batch_size)
    lineup = all_that_fit(model) if lineup is None else lineup
    if not any(workload.grade for workload in workloads):
        note_unmeasured(model, decoders_of(lineup))
    with contextlib.ExitStack() as stack:
        folder = Folder(out if out is not None else stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            with progress(None, "runs") as advance:
                run_benchmark(
                    model,
                    workloads,
                    lineup,
                    folder,
                    repeats=repeats or (1 if guard else 5),
                    command=_command(context.obj or []),
                    on_run=lambda done, total, words: advance(done, words, total),
                    **settings,
                )
        except KeyboardInterrupt:
            if out is not None:
                note(f"Interrupted. The same command goes on with what is in {out}.")
            raise
        return _finish(model, folder, json_, floor=guard_floor if guard else None, is_kept=out is not None)


def _workloads(
    model: str,
    tasks: str | None,
    data: Sequence[str] | None,
    *,
    guard: bool,
    turns: Literal["first", "all"],
    **more: Any,
) -> list[Workload]:
    from chordal.bench.tasks.workload import load_tasks
    from chordal.models.checkpoint import bundled_models

    if tasks is None and not data:
        if model in bundled_models():
            tasks = "lists,puzzles" if guard else "lists,puzzles,arithmetic,edits"
        else:
            tasks = "parallelbench"
    names = [name.strip() for name in tasks.split(",")] if tasks else []
    workloads = load_tasks(names, data=data or (), turns=turns, **more)
    if guard and not any(workload.grade for workload in workloads):
        raise InputError("--guard needs graded tasks; give --tasks, or --data with answers.")
    return workloads


def _command(given: Iterable[str]) -> str:
    """Give the command line as it was typed, without a token of the hub."""
    words = list(given)
    for at, word in enumerate(words):
        if word == "--token":
            words[at + 1 : at + 2] = ["..."]
        elif word.startswith("--token="):
            words[at] = "--token=..."
    return shlex.join(["chordal", *words])


def _finish(model: Model, folder: Folder, as_json: bool, *, floor: float | None, is_kept: bool) -> int:
    """Write the report, remember what was measured, show it, and judge it if that was asked for."""
    from chordal.bench import guard, report

    conditions, rows = folder.conditions(), folder.results()
    guard.remember(model, conditions, rows)
    verdicts = guard.judge(rows, floor) if floor is not None else []
    if as_json:
        document = {"conditions": conditions, "results": rows}
        if floor is not None:
            document["guard"] = [
                {**dataclasses.asdict(verdict), "is_held": verdict.is_held} for verdict in verdicts
            ]
        print(strict_json.dumps(document, indent=2))
    else:
        _print_rows(conditions, rows)
    _note_failures(folder)
    if is_kept:
        report.write(folder.path)
        note(f"Report: {folder.path / 'report.html'}")
    for verdict in verdicts:
        word = "holds" if verdict.is_held else "is under"
        note(f"Guard: {verdict.label} {word} the floor: {verdict.quality:.1%}, needed {verdict.needed:.1%}.")
    return 0 if all(verdict.is_held for verdict in verdicts) else 1


def _print_rows(conditions: Record, rows: Sequence[Record]) -> None:
    from chordal.bench.results import ALL

    overall = [row for row in rows if row["task"] == ALL]
    columns: dict[str, Callable[[Record], str]] = {
        "decoder": lambda row: row["label"],
        "promise": lambda row: row["promise"],
        "accuracy": lambda row: _quality(row["quality"]),
        "same\ntext": lambda row: f"{row['same_text']:.1%}",
        "tokens/\nforward": lambda row: f"{row['tokens_per_forward']:.2f}",
        "accept.\nlength": lambda row: _figure(row["acceptance_length"], ".2f"),
        "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "first\ntoken ms": lambda row: _figure(row["ttft_s"], ".1f", 1000),
        "peak\nMiB": lambda row: _figure(row["peak_memory_bytes"], ",.0f", 2**-20),
        "ratio": lambda row: _ratio(row["ratio"]),
        "failed": lambda row: str(row["num_errors"]),
    }
    for header, is_needed in (
        ("accuracy", any(row["quality"] for row in overall)),
        ("accept.\nlength", any(row["acceptance_length"] for row in overall)),
        ("failed", any(row["num_errors"] for row in overall)),
    ):
        if not is_needed:
            columns.pop(header)
    console = make_console(sys.stdout)
    console.print(make_table(columns, overall, words=_WORDS))
    console.print()
    num_prompts = sum(task["num_prompts"] for task in conditions["tasks"])
    console.print(
        f"{conditions['model']}, {num_prompts} prompts of {len(conditions['tasks'])} tasks, "
        f"{conditions['batch_size']} at once, {conditions['dtype']} on {conditions['hardware']['device']}, "
        f"threads: {conditions['threads']}, rounds: {conditions['repeats']}; ratio: median and quartiles",
        style="dim",
    )


def _note_failures(folder: Folder) -> None:
    failed = [
        f"{run['label']} on {run['task']}, prompt {sample['index']}: {sample['error']}"
        for run in folder.runs()
        for sample in run.get("samples", ())
        if sample["error"] is not None
    ]
    for line in failed[:_ERRORS_SHOWN]:
        note(f"Failed: {' '.join(line.split())}")
    if len(failed) > _ERRORS_SHOWN:
        note(f"Failed: {len(failed) - _ERRORS_SHOWN} more, in {folder.path / 'runs.jsonl'}.")


def _compare(before: str, after: str, tolerance: float, as_json: bool) -> int:
    """Say what changed from one folder to another; 1 if something got slower or worse."""
    from chordal.bench.regression import LEVEL, compare_folders
    from chordal.bench.results import Folder

    found = compare_folders(Folder(before), Folder(after), tolerance=tolerance)
    if as_json:
        print(strict_json.dumps({**dataclasses.asdict(found), "is_worse": found.is_worse}, indent=2))
        return int(found.is_worse)
    columns: dict[str, Callable[[Change], str]] = {
        "decoder": lambda change: change.label,
        "task": lambda change: change.task,
        "speed": lambda change: change.speed or "-",
        "ratio": lambda change: _from_to(change.ratio, ".2f", "x"),
        "quality": lambda change: change.quality or "-",
        "accuracy": lambda change: _from_to(change.accuracy, ".1%"),
        "tokens/forward": lambda change: _from_to(change.tokens_per_forward, ".2f"),
        "other texts": lambda change: str(change.num_texts_changed),
    }
    console = make_console(sys.stdout)
    console.print(make_table(columns, found.changes, words=_WORDS))
    console.print()
    for line in found.notes:
        console.print(line)
    console.print(
        f"Speed: Welch's test that rounds' ratios differ by more than {tolerance:.0%}. Quality: McNemar's "
        f"test of the same prompts. Of each, any change is claimed wrongly with probability {LEVEL} at most.",
        style="dim",
    )
    return int(found.is_worse)


def _quality(quality: Record | None) -> str:
    if quality is None:
        return "-"
    return f"{quality['value']:.1%} [{100 * quality['low']:.0f}-{100 * quality['high']:.0f}]"


def _ratio(ratio: Record | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f}x [{ratio['low']:.2f}-{ratio['high']:.2f}]"


def _figure(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def _from_to(pair: tuple[float, float] | None, form: str, unit: str = "") -> str:
    return "-" if pair is None else " -> ".join(format(value, form) + unit for value in pair)
