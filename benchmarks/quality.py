"""Measure what the bundled models reach, and what parallel decoding costs them.

    python benchmarks/quality.py floors [--models tiny-ar,...] [--num-prompts 500] [--cards]
    python benchmarks/quality.py tradeoff [--num-prompts 200] [--json FILE]

`floors` decodes held-out instances of every task with the plain decoder, greedy, one token a forward
pass; --cards writes the table into each model's card. `tradeoff` decodes some tasks of tiny-mdm and
tiny-block with more and more tokens a pass. Both print markdown tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import chordal
from chordal.bench.tasks import CANVAS, TASKS
from chordal.models.load import zoo_dir

TRADEOFF_TASKS = ("copy", "reverse", "sudoku", "shuffle", "replace_random", "insert_random", "latin")
MASKED: list[tuple[str, dict[str, Any]]] = [
    ("low_confidence", {"tokens_per_step": 1}),
    ("low_confidence", {"tokens_per_step": 2}),
    ("low_confidence", {"tokens_per_step": 4}),
    ("threshold", {"threshold": 0.9}),
    ("threshold", {"threshold": 0.7}),
    ("threshold", {"threshold": 0.5}),
    ("threshold", {"factor": 1.0}),
    ("threshold", {"threshold": 0.9, "feed": "dual"}),
]
BLOCK: list[tuple[str, dict[str, Any]]] = [
    ("block_diffusion", {}),
    ("block_diffusion", {"num_steps": 4}),
    ("block_diffusion", {"num_steps": 2}),
    ("block_diffusion", {"threshold": 0.9}),
    ("block_diffusion", {"threshold": 0.5}),
]
# What a model was started from. tiny-block and tiny-ar were trained on after others had started from them.
STARTS = {
    "tiny-block": " from tiny-ar at 2,600 steps",
    "tiny-mdm": " from tiny-block at 2,000 steps",
}


def measure(
    model: chordal.Model, task: str, count: int, decoder: str | None, settings: dict[str, Any]
) -> tuple[float, float]:
    """Decode held-out instances of a task: accuracy in percent and tokens per forward."""
    given = list(itertools.islice(TASKS[task].instances(0), count))
    canvas = CANVAS[TASKS[task].group]
    config = dict(settings)
    if "tokens_per_step" in config:  # a number of steps that depends on the canvas
        config["num_steps"] = -(-canvas // config.pop("tokens_per_step"))
    results = model.generate([x.prompt for x in given], decoder=decoder, config=config, max_new_tokens=canvas)
    for result in results:
        if result.error is not None:
            raise result.error
    right = [TASKS[task].grade(x, result.text) for x, result in zip(given, results, strict=True)]
    committed = sum(result.stats["committed_tokens"] for result in results)
    return 100 * statistics.mean(right), committed / sum(result.stats["forwards"] for result in results)


def floors(names: list[str], count: int, write_cards: bool) -> None:
    """Print accuracy by task and model; optionally write it into the model cards."""
    table: dict[str, dict[str, float]] = {}
    for name in names:
        model = chordal.load(name, dtype="float32")
        started = time.perf_counter()
        table[name] = {}
        for task in TASKS:
            table[name][task], _ = measure(model, task, count, None, {})
            print(f"{name:10} {task:16} {table[name][task]:5.1f}", file=sys.stderr, flush=True)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        if write_cards:
            card(name, table[name], count)
    print(markdown(["task", *names], [[task, *(f"{table[n][task]:.1f}" for n in names)] for task in TASKS]))


def card(name: str, accuracy: dict[str, float], count: int) -> None:
    """Write the model card: what it is, how it was trained, what it reaches."""
    folder = zoo_dir() / name
    facts = json.loads((folder / "training.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    rows = [[TASKS[task].group, task, f"{value:.1f}"] for task, value in accuracy.items()]
    family = {"causal": "causal", "masked": "masked diffusion, full attention", "block": "block diffusion"}
    (folder / "README.md").write_text(
        f"""# {name}

A {family[config["chordal"]["family"]]} model for trying and testing decoders, not a general language model.

- Backbone: Qwen3, {config["num_hidden_layers"]} layers of {config["hidden_size"]}, \
{facts["parameters"]:,} parameters, bfloat16.
- Data: list operations, 4x4 puzzles, arithmetic word problems and code edits made by
  `chordal.bench.tasks`; byte-level BPE of {config["vocab_size"]} tokens trained on them. One prompt in
  16, by hash, was kept out of training.
- Training: `chordal train {name}`{STARTS.get(name, "")}, {facts["steps"]:,} steps,
  {facts["seconds"] / 60:.0f} minutes on one core of a busy two-core machine, seed {facts["seed"]}.
- Accuracy on {count} held-out instances of each task, plain decoder, greedy, one token a forward pass,
  float32 (`python benchmarks/quality.py floors`):

{markdown(["group", "task", "accuracy %"], rows)}
"""
    )


def tradeoff(count: int, file: Path | None) -> None:
    """Print accuracy and tokens per forward of growing parallelism."""
    rows, records = [], []
    for name, settings in (("tiny-mdm", MASKED), ("tiny-block", BLOCK)):
        model = chordal.load(name, dtype="float32")
        for decoder, config in settings:
            text = ", ".join(f"{key}={value}" for key, value in config.items())
            text = text.replace("tokens_per_step=", "num_steps=canvas/")
            cells = []
            for task in TRADEOFF_TASKS:
                accuracy, per_forward = measure(model, task, count, decoder, config)
                cells.append(f"{accuracy:.0f} ({per_forward:.1f})")
                records.append(
                    {
                        "model": name,
                        "decoder": decoder,
                        "config": config,
                        "task": task,
                        "accuracy": accuracy,
                        "tokens_per_forward": per_forward,
                        "num_prompts": count,
                    }
                )
            rows.append([name, f"{decoder}({text})", *cells])
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    print(markdown(["model", "decoder", *TRADEOFF_TASKS], rows))
    if file is not None:
        file.write_text(json.dumps(records, indent=1) + "\n")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Format a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run one of the two measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("floors", "tradeoff"))
    parser.add_argument("--models", default=",".join(chordal.bundled_models()), help="of floors")
    parser.add_argument("--num-prompts", type=int, help="for each task (500 for floors, 200 for tradeoff)")
    parser.add_argument("--cards", action="store_true", help="write the floors into the model cards")
    parser.add_argument("--json", type=Path, help="also write the trade-off to this file")
    parser.add_argument("--threads", type=int, default=1, help="of torch; nothing measured here is a time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "floors":
        floors(args.models.split(","), args.num_prompts or 500, args.cards)
    else:
        tradeoff(args.num_prompts or 200, args.json)


if __name__ == "__main__":
    main()
