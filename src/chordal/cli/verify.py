"""`chordal verify`: whether a decoder gives what plain decoding gives, on your model and prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chordal import strict_json
from chordal.cli import options
from chordal.cli.console import make_console, open_output, progress
from chordal.cli.prompts import read_all_prompts
from chordal.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXAMPLES = """\b
Examples:
  chordal verify --decoder prompt_lookup --num-samples 40
  chordal verify --decoder prompt_lookup --dtype bfloat16 --num-samples 0 --num-prompts 8
"""

_DEFAULT_TASKS = "copy,shuffle,arithmetic,rename"
# Characters of a line that a prompt and a token take at most, and divergences shown.
_PROMPT_WIDTH, _TOKEN_WIDTH, _SHOWN = 32, 16, 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(options.Sampling):
    """How tokens are drawn; greedy decoding is compared whatever the temperature."""

    max_new_tokens: options.MaxNewTokens = 32
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Of the sampled texts; 0 leaves them out.")
    ] = 1.0


@options.grouped
def verify(
    *,
    loading: options.Loading,
    decoding: options.Decoding,
    plain_set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Setting of the plain decoder it is compared with. Repeatable."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="JSONL", help="Your prompts, as for chordal generate --file.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"Else tasks or groups by commas, for their prompts.  [default: {_DEFAULT_TASKS}]",
        ),
    ] = None,
    num_prompts: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts of each task.")] = 2,
    sampling: Sampling,
    num_samples: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Sampled texts of each prompt and decoder; 0 is greedy only."),
    ] = 100,
    false_alarm: Annotated[
        float, typer.Option(metavar="P", help="Chance that texts of one law are called different.")
    ] = 0.001,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Texts decoded at once.")] = 16,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the JSON report there as well.")
    ] = None,
    json_: options.Json = False,
) -> int:
    """Check whether a decoder is exact; exit code 1 if not."""
    if loading.hush():
        out = None
    decoder, config = decoding.choice()
    if decoder is None:
        raise InputError("no decoder to verify; name one with --decoder (chordal list).")
    if data is not None and tasks is not None:
        raise InputError("--data and --tasks both say what to decode; give one.")
    plain_config = options.parse_settings(plain_set or ())
    prompts = read_all_prompts(data) if data is not None else None
    from chordal.bench.compare import describe_setup
    from chordal.bench.tasks.workload import load_tasks
    from chordal.verification.verify import verify

    settings = sampling.settings()
    if prompts is None:
        names = [name.strip() for name in (tasks or _DEFAULT_TASKS).split(",")]
        workloads = load_tasks(names, num_prompts, seed=sampling.seed)
        prompts = [prompt for workload in workloads for prompt in workload.prompts]
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_output(out)) if out else None
        loaded = loading.load(max_rows=batch_size)
        with progress(None, "texts") as advance:
            found = verify(
                loaded,
                decoder,
                prompts,
                config=config,
                plain_config=plain_config,
                num_samples=num_samples,
                false_alarm=false_alarm,
                on_text=lambda done, total, words: advance(done, words, total),
                **settings,
            )
        setup = describe_setup(loaded, repeats=1)
        setup.pop("repeats")
        document = {**found.to_dict(), "prompts": prompts, "request": settings, "setup": setup}
        if file is not None:
            with contextlib.suppress(OSError):  # pipes and devices hold nothing to cut
                file.truncate(0)
            print(strict_json.dumps(document, indent=2), file=file)
    if json_:
        print(strict_json.dumps(document, indent=2))
    else:
        _print_report(document)
    return 0 if found.is_exact else 1


def _print_report(report: dict[str, Any]) -> None:
    console, setup = make_console(sys.stdout), report["setup"]
    console.print(f"{_name(report, '')} against {_name(report, 'plain_')}", style="bold")
    console.print()
    _print_greedy(console, report)
    if report["sampled"] is not None:
        console.print()
        _print_sampled(console, report["sampled"])
    if report["errors"]:
        console.print()
        for error in report["errors"]:
            console.print(f"prompt {error['prompt']} failed: {error['error']}")
    console.print()
    console.print(_verdict(report))
    console.print(
        f"{setup['model']}, {report['greedy']['num_prompts']} prompts, {setup['batch_size']} texts at once, "
        f"{setup['dtype']} on {setup['device']}, threads: {setup['threads']}",
        style="dim",
    )


def _name(report: dict[str, Any], prefix: str) -> str:
    """Name a decoder with the settings that differ from its defaults."""
    from chordal.registry import decoder_class

    name = str(report["plain" if prefix else "decoder"])
    usual = dataclasses.asdict(decoder_class(name).Config())
    settings = [f"{key}={value}" for key, value in report[f"{prefix}settings"].items() if value != usual[key]]
    return f"{name} ({', '.join(settings)})" if settings else name


def _print_greedy(console: Console, report: dict[str, Any]) -> None:
    greedy = report["greedy"]
    found = greedy["divergences"]
    line = (
        f"greedy: {greedy['num_tokens']:,} tokens, {greedy['num_same']} of {greedy['num_prompts']} texts "
        f"the same"
    )
    if found:
        other = "bugs" if report["promise"] == "exact" else "differences"
        line += f", {greedy['num_ties']} ties, {greedy['num_bugs']} {other}"
    console.print(line)
    if greedy["tolerance"] is not None:
        console.print(
            f"A tie: both tokens within {greedy['tolerance']:.3g} of the best logit, twice the "
            f"{greedy['noise']:.3g} by which leads change here with the shape of a pass."
        )
    if found:
        console.print()
        console.print(_divergences(report))
        if len(found) > _SHOWN:
            console.print(f"... and {len(found) - _SHOWN} more, with --json")


def _divergences(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    headers = ("prompt", "position", report["plain"], report["decoder"], "gap", "")
    for place, header in enumerate(headers):
        table.add_column(header, justify="right" if place in (1, 4) else "left", no_wrap=True)
    otherwise = "bug" if report["promise"] == "exact" else "differs"
    for one in report["greedy"]["divergences"][:_SHOWN]:
        table.add_row(
            f"{one['prompt']}: {_short(report['prompts'][one['prompt']], _PROMPT_WIDTH)}",
            str(one["position"]),
            _token(one["plain_token"], one["plain_text"]),
            _token(one["token"], one["text"]),
            "-" if one["gap"] is None else f"{one['gap']:.4f}",
            "tie" if one["is_tie"] else otherwise,
        )
    return table


def _token(token: int | None, text: str) -> str:
    return "(end)" if token is None else f"{_short(text, _TOKEN_WIDTH)} {token}"


def _short(value: Any, width: int) -> str:
    """Show a prompt or a token's text on one line."""
    text = strict_json.dumps(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def _print_sampled(console: Console, sampled: dict[str, Any]) -> None:
    from rich.table import Table

    tests = sampled["tests"]
    console.print(
        f"sampled: {sampled['num_samples']} texts of each prompt by each decoder, temperature "
        f"{sampled['temperature']:g}"
    )
    console.print(
        f"A test fails below p = {sampled['false_alarm'] / len(tests):g}; the chance of a false alarm is "
        f"{sampled['false_alarm']:g}."
    )
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, header in enumerate(("test", "chi-square", "freedom", "p", "")):
        table.add_column(header, justify="right" if 1 <= place <= 3 else "left")
    for name, test in tests.items():
        told = "differ" if name in sampled["failed"] else "alike" if test["freedom"] else "nothing varied"
        table.add_row(name, f"{test['statistic']:.1f}", str(test["freedom"]), f"{test['p_value']:.2g}", told)
    console.print(table)


def _verdict(report: dict[str, Any]) -> str:
    if report["is_exact"]:
        what = "nothing but ties" if report["greedy"]["num_ties"] else "nothing"
        return f"Exact here: {what} tells it from plain decoding."
    if report["promise"] == "exact":
        return "Not exact, although the decoder promises it."
    return "Not exact; the decoder promises no more than an approximation."
