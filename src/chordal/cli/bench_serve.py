"""`chordal bench serve`: load on an OpenAI-compatible server, ours or another; quality beside speed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from chordal import __version__, strict_json
from chordal.cli import options
from chordal.cli.console import make_console, make_table, note, open_output, progress
from chordal.errors import InputError

if TYPE_CHECKING:
    from chordal.bench.load import Level, Record
    from chordal.bench.tasks.workload import Workload

EXAMPLES = """\b
Examples:
  chordal bench serve --concurrency 1,8,32 --tasks lists,edits --out load.json
  chordal bench serve --extra-body '{"chordal": {"decoder": "threshold"}}' --counts
"""

_DEFAULT_CONCURRENCY = (1, 8, 32)
# Of each task where only a duration says how many are needed.
_PROMPTS_OF_A_TASK = 256
# Above this share of a core the client may be what is slow.
_BUSY = 0.8
_TIMES = {
    "ttft_s": "first token (TTFT)",
    "itl_s": "between chunks (ITL)",
    "tpot_s": "per token (TPOT)",
    "e2el_s": "end to end (E2EL)",
}
_WORDS = ("ms",)


def serve(
    *,
    base_url: Annotated[
        str, typer.Option(metavar="URL", help="Of the server, with or without /v1.")
    ] = "http://localhost:8000",
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Else the first of /v1/models.")] = None,
    endpoint: Annotated[
        Literal["chat", "completions"], typer.Option(metavar="chat|completions", help="Which to ask.")
    ] = "chat",
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Requests at once, by commas; each is a level.  [default: 1,8,32; no limit with "
            "--request-rate]",
        ),
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Of each level.  [default: 64, or 4 times the concurrency if that is more]",
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(metavar="S", min=0, help="Seconds to send in at each level, instead or as well."),
    ] = None,
    request_rate: Annotated[
        float,
        typer.Option(metavar="R", help="Mean requests a second, at random times; inf: as soon as one ends."),
    ] = math.inf,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Graded tasks or groups by commas; else lists, or none with --data."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A file as for chordal bench --data, or of prompts. Repeatable."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Most new tokens; else the canvas of a task, 128 for others."),
    ] = None,
    temperature: options.Temperature = 0.0,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of prompts, arrivals and, above temperature 0, tokens.")
    ] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for texts of full length; they are not graded.")
    ] = False,
    extra_body: Annotated[
        str | None, typer.Option(metavar="JSON", help="An object of further fields of every request.")
    ] = None,
    counts: Annotated[
        bool, typer.Option("--counts", help="Ask a Chordal server for its counts: tokens per forward.")
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Else CHORDAL_API_KEY or OPENAI_API_KEY of the environment."),
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="Most seconds of a request.")] = 300.0,
    warmup: Annotated[int, typer.Option(metavar="N", min=0, help="Requests before the first level.")] = 1,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the document of --json, with every request.")
    ] = None,
    json_: options.Json = False,
) -> int:
    """Load a running server: throughput, latency, errors and accuracy."""
    from chordal.bench.load import Server, find_model, run_load

    if not timeout > 0:
        raise InputError(f"--timeout must be above 0 seconds; got {timeout}.")
    if not 0 <= temperature < math.inf:
        raise InputError(f"--temperature must be 0 or above; got {temperature}.")
    levels = _levels(concurrency, num_requests, duration, request_rate)
    fields = _fields(extra_body, counts=counts, temperature=temperature, seed=seed, ignore_eos=ignore_eos)
    server = Server(base_url=base_url, api_key=_api_key(api_key), timeout_s=timeout)
    workloads = _workloads(tasks, data, levels, warmup, seed=seed, max_new_tokens=max_tokens)
    if ignore_eos:
        workloads = [dataclasses.replace(workload, grade=None, grader=None) for workload in workloads]
    rows: list[Record] = []
    requests: list[list[Record]] = []
    with ExitStack() as stack:
        file = stack.enter_context(open_output(out)) if out is not None else None
        model = find_model(server, model)
        conditions = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "base_url": server.base_url,
            "model": model,
            "endpoint": endpoint,
            "fields": fields,
            "max_tokens": max_tokens,
            "levels": [dataclasses.asdict(level) for level in levels],
            "warmup": warmup,
            "timeout_s": timeout,
            "seed": seed,
            "tasks": [
                {
                    "name": workload.name,
                    "num_prompts": len(workload.prompts),
                    "hash": workload.hash,
                    "max_tokens": workload.max_new_tokens,
                    "grader": workload.grader,
                }
                for workload in workloads
            ],
            "client": {
                "machine": platform.machine(),
                "cpus": os.cpu_count(),
                "versions": {"chordal": __version__, "python": platform.python_version()},
            },
        }

        def add(row: Record, sent: list[Record]) -> None:
            rows.append(row)
            requests.append(sent)

        try:
            with progress(None, "requests") as advance:
                run_load(
                    server,
                    model,
                    workloads,
                    levels,
                    endpoint=endpoint,
                    fields=fields,
                    warmup=warmup,
                    seed=seed,
                    on_level=add,
                    on_answer=lambda done, level: advance(
                        done, _label(level.concurrency), level.num_requests
                    ),
                )
        finally:
            # Also what there is when it is interrupted.
            if rows:
                _finish({"conditions": conditions, "levels": rows}, requests, as_json=json_, file=file)
    return int(not any(row["num_ok"] for row in rows))


def _levels(
    concurrency: str | None, num_requests: int | None, duration: float | None, request_rate: float
) -> list[Level]:
    from chordal.bench.load import Level

    limits: Sequence[int | None]
    if concurrency is not None:
        try:
            limits = [int(word) for word in concurrency.split(",")]
        except ValueError:
            limits = [0]
        if any(limit is None or limit < 1 for limit in limits):
            raise InputError(f"--concurrency must be numbers from 1 by commas; got {concurrency!r}.")
    else:
        limits = _DEFAULT_CONCURRENCY if math.isinf(request_rate) else [None]
    default = None if duration is not None else 64
    return [
        Level(
            concurrency=limit,
            num_requests=num_requests or (default and max(default, 4 * (limit or 0))),
            duration_s=duration,
            request_rate=request_rate,
        )
        for limit in limits
    ]


def _fields(
    extra_body: str | None, *, counts: bool, temperature: float, seed: int, ignore_eos: bool
) -> dict[str, Any]:
    """Give what every request says besides prompt, model and length."""
    fields: dict[str, Any] = {"temperature": temperature}
    if temperature > 0:
        fields["seed"] = seed
    # Named only where it matters: not every server knows it.
    if ignore_eos:
        fields["ignore_eos"] = True
    if extra_body is not None:
        try:
            extra = json.loads(extra_body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise InputError(f"--extra-body must be JSON: {error}.") from None
        if not isinstance(extra, dict):
            raise InputError(f"--extra-body must be a JSON object; got {extra_body!r}.")
        fields |= extra
    if counts:
        own = fields.get("chordal") or {}
        if not isinstance(own, dict):
            raise InputError(f'"chordal" in --extra-body must be an object; got {own!r}.')
        fields["chordal"] = {**own, "counts": True}
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _api_key(given: str | None) -> str | None:
    return given or os.environ.get("CHORDAL_API_KEY") or os.environ.get("OPENAI_API_KEY") or None


def _workloads(
    tasks: str | None,
    data: Sequence[str] | None,
    levels: Sequence[Level],
    warmup: int,
    *,
    seed: int,
    max_new_tokens: int | None,
) -> list[Workload]:
    from chordal.bench.tasks.workload import load_tasks

    if tasks is None and not data:
        tasks = "lists"
    workloads = load_tasks(data=data or (), max_new_tokens=max_new_tokens)
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",")]
        num_tasks = len(load_tasks(names, 1)) + len(workloads)
        numbers = [level.num_requests for level in levels]
        # Enough that no prompt comes twice: a prefix cache would know it.
        total = warmup + sum(number or _PROMPTS_OF_A_TASK * num_tasks for number in numbers)
        per_task = math.ceil(total / num_tasks)
        workloads = [*load_tasks(names, per_task, seed=seed, max_new_tokens=max_new_tokens), *workloads]
    return workloads


def _finish(
    document: dict[str, Any], requests: Sequence[Sequence[Record]], *, as_json: bool, file: TextIO | None
) -> None:
    """Show what was measured, and write it to a file if one is given."""
    if file is not None:
        file.truncate(0)
        levels = [{**row, "requests": sent} for row, sent in zip(document["levels"], requests, strict=True)]
        file.write(strict_json.dumps({**document, "levels": levels}, indent=2) + "\n")
    if as_json:
        print(strict_json.dumps(document, indent=2))
    else:
        _print_levels(document["conditions"], document["levels"])
    _note_what_matters(document["conditions"], document["levels"])


def _print_levels(conditions: Mapping[str, Any], rows: Sequence[Record]) -> None:
    columns: dict[str, Callable[[Record], str]] = {
        "at once": lambda row: _label(row["concurrency"]),
        "peak": lambda row: str(row["peak_concurrency"]),
        "ok": lambda row: f"{row['num_ok']:,}",
        "failed": lambda row: f"{row['num_requests'] - row['num_ok']:,}",
        "requests/s": lambda row: _figure(row["requests_per_s"], ",.2f"),
        "tokens/s": lambda row: _figure(row["output_tokens_per_s"], ",.0f"),
        "prompt\ntokens/s": lambda row: _figure(row["prompt_tokens_per_s"], ",.0f"),
        "tokens/\nchunk": lambda row: _figure(row["tokens_per_chunk"], ".2f"),
        "tokens/\nforward": lambda row: _figure(row["tokens_per_forward"], ".2f"),
        "accuracy": lambda row: _quality(row["quality"]),
    }
    if not any(row["quality"] for row in rows):
        columns.pop("accuracy")
    if not any(row["tokens_per_forward"] for row in rows):
        columns.pop("tokens/\nforward")
    console = make_console(sys.stdout)
    console.print(make_table(columns, rows, words=_WORDS))
    console.print()
    latencies = [
        (_label(row["concurrency"]) if first else "", words, row[name])
        for row in rows
        for first, (name, words) in zip([True, *[False] * len(_TIMES)], _TIMES.items(), strict=False)
    ]
    ranks = ("mean", "p50", "p95", "p99")
    times: dict[str, Callable[[tuple[str, str, Record | None]], str]] = {
        "at once": lambda cell: cell[0],
        "ms": lambda cell: cell[1],
        **{rank: _milliseconds(rank) for rank in ranks},
    }
    console.print(make_table(times, latencies, words=_WORDS))
    console.print()
    names = ", ".join(task["name"] for task in conditions["tasks"])
    rate = conditions["levels"][0]["request_rate"]
    console.print(
        f"{conditions['model']} at {conditions['base_url']}, {conditions['endpoint']}: {names}; "
        + (f"{rate:g} requests/s asked for" if math.isfinite(rate) else "each request as soon as one ends"),
        style="dim",
    )


def _note_what_matters(conditions: Mapping[str, Any], rows: Sequence[Record]) -> None:
    for row in rows:
        where = f"at {_label(row['concurrency'])} at once"
        if not row["is_complete"]:
            note(f"Interrupted {where}: {row['num_requests']:,} requests were done.")
        for failure in row["failures"]:
            note(f"Failed {where}: {failure['num']:,} x {failure['kind']}: {failure['message']}")
        if row["num_without_usage"]:
            note(
                f"No usage {where}: the server did not count the tokens of {row['num_without_usage']:,} "
                "answers, so no tokens are told."
            )
        if row["client_load"] > _BUSY:
            note(
                f"Busy {where}: this command itself used {row['client_load']:.0%} of a core, so times may be "
                "its own."
            )
        delay, latency = row.get("delay_s"), row["e2el_s"]
        if delay and latency and delay["mean"] > latency["mean"]:
            note(
                f"Late {where}: requests waited {delay['mean']:.1f} s on average before they were "
                "sent, which no latency shows; the server or --concurrency cannot keep up with the rate."
            )
    sent = conditions["warmup"] + sum(row["num_requests"] for row in rows)
    # Workloads take turns, so the smallest is through first.
    distinct = len(conditions["tasks"]) * min(task["num_prompts"] for task in conditions["tasks"])
    if sent > distinct:
        note("Repeated: there were more requests than prompts; a prefix cache answers those sooner.")


def _milliseconds(rank: str) -> Callable[[tuple[str, str, Record | None]], str]:
    return lambda cell: _figure((cell[2] or {}).get(rank), ",.1f", 1000)


def _quality(quality: Record | None) -> str:
    if quality is None:
        return "-"
    return f"{quality['value']:.1%} [{100 * quality['low']:.0f}-{100 * quality['high']:.0f}]"


def _label(concurrency: int | None) -> str:
    return "any" if concurrency is None else f"{concurrency:,}"


def _figure(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)
