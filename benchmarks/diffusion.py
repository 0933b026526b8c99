"""Measure every diffusion decoder on the graded tasks: quality beside parallelism, in one process.

    python benchmarks/diffusion.py tasks [--num-prompts 100] [--json FILE] [--plot FILE.png]
    python benchmarks/diffusion.py long [--repeats 3]

`tasks` decodes held-out prompts of each task, 16 at once, with the one-token loop of each model first.
`long` compares wall-clock with and without caches on wide canvases: code edits on 128 tokens, graded, and
256 tokens filled to the end. Those are not graded: on a canvas so much wider than what it learned, even
the one-token loop of the bundled model is wrong. The plot needs matplotlib (pip install 'chordal[plots]').
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import chordal
from chordal.bench.compare import Contender, Row, compare, describe_setup
from chordal.bench.tasks.workload import load_tasks

TASKS = ("copy", "reverse", "sort", "arithmetic", "sudoku", "rename", "shuffle", "replace_random", "latin")

MASKED = [
    Contender("threshold"),
    Contender("threshold", {"threshold": 0.7}),
    Contender("threshold", {"feed": "dual"}),
    Contender("threshold", {"factor": 1.0}),
    Contender("localleap"),
    Contender("credit_decoding"),
    Contender("prophet", {"answer_start": 0}),
    Contender("ccd"),
    Contender("ccd", {"variant": "paper"}),
    Contender("ete"),
    Contender("freedave", {"feed": "dual"}),
    Contender("freedave", {"feed": "dual", "num_drafts": 8}),
    Contender("freedave", {"feed": "dual", "threshold": 0.9}),
    Contender("window_diffusion"),
    Contender("window_diffusion", {"threshold": 0.9}),
    Contender("denoise", {"commit": "near_independent", "entropy_bound": 0.1}),
    Contender("denoise", {"commit": "local_leap", "refine": "credit", "feed": "dual"}),
]
BLOCK = [
    Contender("block_diffusion", {"threshold": 0.9}),
    Contender("fast_dllm_v2"),
    Contender("fast_dllm_v2", {"sub_block_length": 4, "sub_block_cache": True}),
    Contender("s2d2"),
    Contender("s2d2", {"route": "always"}),
    Contender("freedave"),
    Contender("freedave", {"threshold": 0.9}),
]
EXPERTS = [Contender("threshold", {"feed": "dual"}), Contender("des"), Contender("des", {"experts": "seq"})]
LINEUP = {"tiny-mdm": MASKED, "tiny-block": BLOCK, "tiny-moe": EXPERTS}

LONG = [
    Contender("threshold", {"threshold": 2.0, "feed": "dual"}),
    Contender("threshold"),
    Contender("threshold", {"feed": "prefix"}),
    Contender("threshold", {"feed": "dual"}),
    Contender("localleap", {"feed": "dual"}),
    Contender("window_diffusion", {"threshold": 0.9}),
]
BATCH_SIZE = 16


def tasks(num_prompts: int, json_path: Path | None, plot_path: Path | None) -> None:
    """Print accuracy and tokens per forward of every decoder on every task."""
    found: dict[str, dict[str, list[Row]]] = {}
    for name, contenders in LINEUP.items():
        model = chordal.load(name, dtype="float32", max_rows=BATCH_SIZE, prefix_cache_mib=0)
        found[name] = {}
        for workload in load_tasks(TASKS, num_prompts):
            found[name][workload.name] = compare(model, [workload], contenders, repeats=1)
            print(f"{name} {workload.name}", file=sys.stderr, flush=True)
        print(_table(name, found[name]), flush=True)
    setup = {key: value for key, value in describe_setup(model, repeats=1).items() if key != "model"}
    print(", ".join(f"{key}: {value}" for key, value in setup.items()), f"prompts a task: {num_prompts}")
    if json_path is not None:
        plain = {
            name: {task: [dataclasses.asdict(row) for row in rows] for task, rows in by_task.items()}
            for name, by_task in found.items()
        }
        json_path.write_text(json.dumps({"setup": setup, "rows": plain}, indent=1) + "\n", encoding="utf-8")
    if plot_path is not None:
        plot(found, plot_path)


def _table(name: str, by_task: dict[str, list[Row]]) -> str:
    """Format one model: a decoder a row, a task a column, totals behind."""
    header = [name, *by_task, "tokens/forward", "forwards", "positions fed", "tokens/s", "ratio"]
    lines = [header, ["---"] * len(header)]
    for index in range(len(next(iter(by_task.values())))):
        rows = [rows[index] for rows in by_task.values()]
        tokens, forwards = (
            sum(getattr(row, key) for row in rows) for key in ("committed_tokens", "forwards")
        )
        cells = [f"{100 * (row.accuracy or 0):.0f} ({row.tokens_per_forward:.1f})" for row in rows]
        seconds = sum(row.seconds[0] for row in rows)
        plain_seconds = sum(task_rows[0].seconds[0] for task_rows in by_task.values())
        totals = (
            f"{tokens / forwards:.2f}",
            f"{forwards:,}",
            f"{sum(row.positions_fed for row in rows):,}",
            f"{tokens / seconds:,.0f}",
            f"{plain_seconds / seconds:.2f}x",
        )
        lines.append([rows[0].label, *cells, *totals])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plot(found: dict[str, dict[str, list[Row]]], path: Path) -> None:
    """Draw accuracy against tokens per forward, a panel for each task, a mark for each decoder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(found.values())))
    figure, axes = pyplot.subplots(3, -(-len(names) // 3), figsize=(14, 11), sharey=True, squeeze=False)
    marks = ["o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p", "d"]
    decoders = sorted({row.decoder for rows in found.values() for task in rows.values() for row in task})
    colors = pyplot.get_cmap("tab20")
    for panel, task in zip(axes.flat, names, strict=False):
        for decoder_index, decoder in enumerate(decoders):
            points = sorted(
                (row.tokens_per_forward, 100 * (row.accuracy or 0))
                for by_task in found.values()
                for row in by_task[task]
                if row.decoder == decoder
            )
            panel.plot(
                *zip(*points, strict=True),
                linestyle="none",
                marker=marks[decoder_index % len(marks)],
                color=colors(decoder_index % 20),
                alpha=0.8,
                label=decoder,
            )
        panel.set_title(task)
        panel.set_xscale("log", base=2)
        panel.set_ylim(-4, 104)
        panel.grid(alpha=0.3)
    for panel in axes[-1]:
        panel.set_xlabel("tokens per forward pass")
    for panel in axes[:, 0]:
        panel.set_ylabel("accuracy, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=7, frameon=False)
    figure.suptitle(f"Quality against parallelism: {', '.join(found)}")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def long(num_prompts: int, repeats: int) -> None:
    """Print wall-clock on wide canvases, one prompt at a time."""
    model = chordal.load("tiny-mdm", dtype="float32", max_rows=1, prefix_cache_mib=0)
    for names, length, is_filled in ((("rename",), 128, False), (("copy", "arithmetic"), 256, True)):
        workloads = [
            dataclasses.replace(workload, max_new_tokens=length, grade=None if is_filled else workload.grade)
            for workload in load_tasks(names, num_prompts)
        ]
        rows = compare(model, workloads, LONG, repeats=repeats, ignore_eos=is_filled)
        print(
            f"| {length} tokens: {', '.join(names)} | accuracy | tokens/forward | forwards | positions fed ",
            end="",
        )
        print("| seconds (min-max) | ratio |")
        print("| --- " * 7 + "|")
        for row in rows:
            median, low, high = row.seconds
            right = "-" if row.accuracy is None else f"{100 * row.accuracy:.0f}"
            print(
                f"| {row.label} | {right} | {row.tokens_per_forward:.2f} | {row.forwards:,} "
                f"| {row.positions_fed:,} | {median:.2f} ({low:.2f}-{high:.2f}) | {row.ratio:.2f}x |"
            )
        print(flush=True)
    print(describe_setup(model, repeats=repeats))


def main(args: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tasks", "long"])
    parser.add_argument("--num-prompts", type=int, default=None, help="of each task; 100, or 4 for long")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args(args)
    if given.what == "tasks":
        tasks(given.num_prompts or 100, given.json, given.plot)
    else:
        long(given.num_prompts or 4, given.repeats)


if __name__ == "__main__":
    main()
