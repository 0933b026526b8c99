"""`chordal tune`: which decoder, with which settings, on this model, these prompts, this machine."""

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
from chordal.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from chordal.tuning.search import Result

EXAMPLES = """\b
Examples:
  chordal tune --tasks rename --num-prompts 4 --trials 6
  chordal tune --model tiny-mdm --tasks copy --num-prompts 4 --trials 6 --out mdm.yaml
"""

_DEFAULT_TASKS = "copy,shuffle,sudoku,latin,arithmetic,rename"


@options.grouped
def tune(
    *,
    loading: options.Loading,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts like those that it is for, as for chordal bench --data."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help=f"Graded tasks or groups instead, by commas.  [default: {_DEFAULT_TASKS}]"
        ),
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Prompts of each task or file.  [default: 8, all of a file]"),
    ] = None,
    decoders: Annotated[
        str | None, typer.Option(metavar="LIST", help="Search these, by commas; else all that fit.")
    ] = None,
    quality_floor: Annotated[
        float,
        typer.Option(metavar="P", help="Share of the plain decoder's quality that approximate ones keep."),
    ] = 0.99,
    trials: Annotated[int, typer.Option(metavar="N", min=1, help="Settings to try.")] = 60,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="Begin no trial after so many seconds.")
    ] = None,
    planner: Annotated[bool, typer.Option(help="Ask chordal plan for draft lengths to try first.")] = True,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Last rounds, beside plain decoding.")] = 5,
    finalists: Annotated[int, typer.Option(metavar="N", min=1, help="Decoders in the last rounds.")] = 3,
    sampling: options.Sampling,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts decoded at once.")] = 1,
    out: Annotated[
        str, typer.Option(metavar="FILE", help="Write the choice as YAML, for --config.")
    ] = "tuned.yaml",
    study: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Keep the trials here, and go on with those that it holds; "
            "else beside --out, with the ending .study.",
        ),
    ] = None,
    json_: options.Json = False,
) -> None:
    """Choose a decoder and its settings for this machine."""
    if loading.hush():
        raise InputError("tuning on several processes is not supported; leave out --tensor-parallel.")
    if data is not None and tasks is not None:
        raise InputError("--data and --tasks both say what to decode; give one.")
    import yaml

    from chordal.bench.compare import describe_setup
    from chordal.bench.tasks.workload import load_tasks
    from chordal.tuning.tune import tune as choose

    request = sampling.settings()
    max_new_tokens = request.pop("max_new_tokens")
    names = [] if data is not None else _names(tasks or _DEFAULT_TASKS)
    workloads = load_tasks(
        names,
        num_prompts if data is not None else num_prompts or 8,
        seed=sampling.seed,
        data=[data] if data is not None else [],
        max_new_tokens=max_new_tokens,
    )
    journal = Path(study) if study is not None else Path(out).with_suffix(".study")
    is_new = not Path(out).exists()
    with open_output(out) as file:
        loaded = loading.load(max_rows=batch_size)
        try:
            with progress(None, "") as advance:
                tuned = choose(
                    loaded,
                    workloads,
                    decoders=_names(decoders) if decoders is not None else None,
                    floor=quality_floor,
                    num_trials=trials,
                    timeout_s=timeout,
                    study=journal,
                    use_planner=planner,
                    repeats=repeats,
                    num_finalists=finalists,
                    on_note=note,
                    on_step=lambda done, total, words: advance(done, words, total),
                    on_trial=_Watch(advance),
                    **request,
                )
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                note(f"The trials are kept in {journal}; the same command goes on with them.")
            if is_new:
                Path(out).unlink()
            raise
        setup = {
            **describe_setup(loaded, repeats=repeats),
            "request": {**request, "stop_strings": list(request["stop_strings"])},
        }
        # Through JSON, as YAML has no way to write the tuples and kinds of text in it.
        document = json.loads(strict_json.dumps({**tuned.to_dict(), "setup": setup}))
        with contextlib.suppress(OSError):  # pipes and devices hold nothing to cut
            file.truncate(0)
        yaml.safe_dump(document, file, sort_keys=False, allow_unicode=True, width=100)
    if json_:
        print(strict_json.dumps(document, indent=2))
    else:
        _print_choice(document)


class _Watch:
    """Shows how far the search is and what is best so far; the latter as a line where it changes."""

    def __init__(self, advance: Any) -> None:
        self._advance, self._best, self._label = advance, 1.0, "plain decoding"

    def __call__(self, done: int, total: int, result: Result) -> None:
        if result.is_complete and (result.value or 0.0) > self._best:
            self._best, self._label = result.value or 0.0, result.contender.label
            note(f"trial {done:04d} | {self._best:.2f}x | {self._label}")
        if result.problem is not None:
            note(f"trial {done:04d} | refused | {result.contender.label}: {result.problem}")
        self._advance(done, f"trials | best {self._best:.2f}x {self._label}", total)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _print_choice(document: dict[str, Any]) -> None:
    console = make_console(sys.stdout)
    measured, setup = document["measured"], document["setup"]
    console.print(_table(document))
    console.print()
    console.print(document["why"])
    console.print()
    console.print(
        f"{setup['model']}, {measured['prompts']} prompts, {setup['batch_size']} at once, "
        f"{setup['dtype']} on {setup['device']}, threads: {setup['threads']}, rounds: {measured['rounds']}",
        style="dim",
    )


def _table(document: dict[str, Any]) -> Table:
    from rich.table import Table

    from chordal.bench.compare import Contender

    measured = document["measured"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("decoder", "promise"):
        table.add_column(header)
    for header in (
        measured["metric"] + "\nkept",
        "tokens/\nforward",
        "tokens/s",
        "ratio",
        "lowest",
        "highest",
    ):
        table.add_column(header, justify="right")
    plain = measured["plain"]
    table.add_row(
        plain["decoder"],
        "",
        "",
        f"{plain['tokens_per_forward']:.2f}",
        f"{plain['tokens_per_s']:,.0f}",
        "1.00x",
    )
    for one in document["finalists"]:
        table.add_row(
            Contender(one["decoder"], one["settings"]).label,
            one["promise"],
            f"{one['quality']:.1%}",
            f"{one['tokens_per_forward']:.2f}",
            f"{one['tokens_per_s']:,.0f}",
            *(f"{one[name]:.2f}x" for name in ("ratio", "low", "high")),
        )
    return table
