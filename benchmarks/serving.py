"""Measure `chordal serve` beside `transformers serve` on the same weights: in turns, in one run.

    python benchmarks/serving.py [--concurrency 1,8,32] [--requests 40,120,320] [--repeats 5]
        [--tasks lists,arithmetic] [--max-tokens N] [--json FILE]

Every server is a process of its own with one thread for its model, float32, and is idle while another is
asked. A round asks each of them the same prompts at each concurrency with the load of `chordal bench serve`:
greedy chats, streamed, each request as soon as one ends. Tokens are those of the server's own `usage`;
ratios of tokens/s are taken within a round to `transformers serve` as it is by default: median, and
quartiles in brackets. Client and server share the machine, so the client's own work is in every figure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import conditions, markdown, quartiles

from chordal.bench.load import Level, Server, run_load
from chordal.bench.tasks.workload import Workload, load_tasks
from chordal.cli.console import progress
from chordal.models.checkpoint import zoo_dir

MODEL = "tiny-ar"
START_S = 120


@dataclass(frozen=True)
class System:
    """A server to measure.

    Attributes:
        name: For the table.
        command: Starts it; {port} and {model} are filled in.
        is_chordal: Whether the model goes by its bundled name.
        fields: Sent with every request.
    """

    name: str
    command: Sequence[str]
    is_chordal: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


_OURS = (sys.executable, "-m", "chordal", "serve", MODEL, "--port", "{port}", "--dtype", "float32")
_THEIRS = (
    *(sys.executable, "-m", "transformers.cli.transformers", "serve", "{model}"),
    *("--port", "{port}", "--device", "cpu", "--dtype", "float32"),
)
SYSTEMS = (
    System("transformers serve", _THEIRS),
    System("transformers serve --continuous-batching", (*_THEIRS, "--continuous-batching")),
    System("chordal serve", _OURS, is_chordal=True),
    System("chordal serve --decoder prompt_lookup", (*_OURS, "--decoder", "prompt_lookup"), is_chordal=True),
)


@contextlib.contextmanager
def running(system: System, model: Path, log: Path) -> Iterator[tuple[Server, str]]:
    """Start a server, wait until it answers, and give where it is and what the model is called there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [part.format(port=port, model=model) for part in system.command]
    # One thread: on models this small, handing work to a second costs more time than it saves.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        server = Server(base_url=f"http://localhost:{port}")
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{server.base_url}/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{system.name} does not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield server, MODEL if system.is_chordal else str(model)
    finally:
        process.terminate()
        process.wait(30)


def measure(
    system: System, server: Server, name: str, workloads: Sequence[Workload], levels: Sequence[Level]
) -> list[dict[str, Any]]:
    """Ask one server everything once, and give a row for each level."""
    rows: list[dict[str, Any]] = []
    fields = {"temperature": 0, **system.fields}
    run_load(
        server,
        name,
        workloads,
        levels,
        fields=fields,
        warmup=2,
        on_level=lambda row, _: rows.append({**row, "server": system.name}),
    )
    return rows


def table(rounds: Sequence[Sequence[list[dict[str, Any]]]], systems: Sequence[System]) -> str:
    """Tell each server at each concurrency: tokens/s, the ratio, times, and how many answers were right."""
    header = ["server", "at once", "tokens/s", "ratio", "TTFT p50 ms", "TPOT p50 ms", "E2EL p50 ms", "failed"]
    lines = []
    for number, system in enumerate(systems):
        for level, first in enumerate(rounds[0][number]):
            rows = [one[number][level] for one in rounds]
            base = [one[0][level] for one in rounds]
            speeds = [row["output_tokens_per_s"] for row in rows]
            ratios = [speed / other["output_tokens_per_s"] for speed, other in zip(speeds, base, strict=True)]
            low, middle, high = quartiles(ratios)
            times = (
                1000 * statistics.median(row[name]["p50"] for row in rows)
                for name in ("ttft_s", "tpot_s", "e2el_s")
            )
            lines.append(
                [
                    system.name,
                    str(first["concurrency"]),
                    f"{statistics.median(speeds):,.0f}",
                    f"{middle:.2f}x [{low:.2f}-{high:.2f}]",
                    *(f"{value:,.1f}" for value in times),
                    str(sum(row["num_requests"] - row["num_ok"] for row in rows)),
                ]
            )
    return markdown(header, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concurrency", default="1,8,32", help="requests at once (default 1,8,32)")
    parser.add_argument("--requests", default="40,120,320", help="of each concurrency (default 40,120,320)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--tasks", default="lists,puzzles,arithmetic,edits", help="tasks or groups")
    parser.add_argument("--max-tokens", type=int, help="most tokens of an answer, else what its task needs")
    parser.add_argument("--systems", help="numbers of the servers, else all", default="0,1,2,3")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args(arguments)

    systems = [SYSTEMS[int(number)] for number in args.systems.split(",")]
    levels = [
        Level(concurrency=int(at_once), num_requests=int(num))
        for at_once, num in zip(args.concurrency.split(","), args.requests.split(","), strict=True)
    ]
    workloads = load_tasks(args.tasks.split(","), num_prompts=100, seed=0, max_new_tokens=args.max_tokens)
    rounds: list[list[list[dict[str, Any]]]] = []
    with TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        copied = Path(folder) / MODEL
        shutil.copytree(zoo_dir() / MODEL, copied)  # transformers takes a folder
        servers = [
            stack.enter_context(running(system, copied, Path(folder) / f"{number}.log"))
            for number, system in enumerate(systems)
        ]
        with progress(args.repeats * len(systems), "runs") as advance:
            for round_ in range(args.repeats):
                found: list[list[dict[str, Any]]] = [[] for _ in systems]
                order = range(len(systems))
                for number in order if round_ % 2 == 0 else reversed(order):
                    found[number] = measure(systems[number], *servers[number], workloads, levels)
                    advance(round_ * len(systems) + number + 1, systems[number].name)
                rounds.append(found)
    print(table(rounds, systems))
    print(json.dumps(conditions()), file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions(), "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
