"""Measure what the bundled models reach, and what parallel decoding costs them.

    python benchmarks/quality.py floors [--models tiny-ar,...] [--num-prompts 500] [--cards]
    python benchmarks/quality.py tradeoff [--num-prompts 200] [--json FILE]
    python benchmarks/quality.py loops [--num-prompts 100]
    python benchmarks/quality.py experts [--num-prompts 100]

`floors` decodes held-out instances of every task with the plain decoder, greedy, one token a forward
pass; --cards writes the table into each model's card. `tradeoff` decodes some tasks of tiny-mdm and
tiny-block with more and more tokens a pass. `loops` decodes some tasks of tiny-recurrent with one loop
and more, and with what saves loops; speed is in tokens a second of one prompt at a time, beside plain
decoding in the same round, the median of five. `experts` decodes some tasks of tiny-moe with
experts shared in several ways; speed likewise, beside the routing of the model. All print markdown tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import markdown

import chordal
from chordal.bench.tasks import CANVAS, TASKS
from chordal.models.checkpoint import zoo_dir

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
LOOP_TASKS = ("copy", "reverse", "sort", "arithmetic", "shuffle", "latin")
# Plain decoding with some loops: a wave of one.
LOOPED: list[tuple[str, dict[str, Any]]] = [
    *(("recurrent_depth", {"max_wavefront": 1, "inner_recurrence": r, "num_loops": r}) for r in (1, 2, 3, 4)),
    ("autoregressive", {}),
    ("recurrent_depth", {}),
    ("recurrent_depth", {"freeze": "prefix"}),
    ("recurrent_depth", {"freeze": "fixed"}),
    ("recurrent_depth", {"freeze": "stability"}),
    ("recurrent_depth", {"inner_recurrence": 2}),
    ("recurrent_depth", {"inner_recurrence": 2, "freeze": "prefix"}),
    ("recurrent_depth", {"inner_recurrence": 1}),
    ("recurrent_depth", {"inner_recurrence": 1, "exit_threshold": 0.1}),
    ("recurrent_depth", {"inner_recurrence": 1, "freeze": "prefix"}),
    ("recurrent_depth", {"noise": 0.5}),
    ("loop_speculative", {"draft_loops": 1}),
    ("loop_speculative", {"draft_loops": 2}),
    ("loop_speculative", {"draft_loops": 3}),
]
EXPERT_TASKS = ("copy", "sort", "arithmetic", "shuffle")
# Every pass over the whole canvas, then short blocks, in which the first pass routes as ever.
EXPERT_FEEDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"feed": "whole"}, {"expert_refresh": True}),
    ({"feed": "dual", "block_length": 4}, {}),
]
ROUTINGS: list[dict[str, Any]] = [
    *({"expert_share": share} for share in (0.75, 0.6, 0.5, 0.375, 0.25)),
    *({"experts": "max", "expert_share": share} for share in (0.6, 0.375)),
    *({"experts": "seq", "expert_choices": k} for k in (3, 2, 1)),
]
# What a model was started from. tiny-block and tiny-ar were trained on after others had started from them.
STARTS = {
    "tiny-block": " from tiny-ar at 2,600 steps",
    "tiny-mdm": " from tiny-block at 2,000 steps",
    "tiny-moe": " from tiny-mdm",
    "tiny-recurrent": " from the embeddings and first layer of tiny-ar",
}


def measure(
    model: chordal.Model, task: str, count: int, decoder: str | None, settings: dict[str, Any]
) -> tuple[float, float]:
    """Decode held-out instances of a task: accuracy in percent and tokens per forward."""
    results, right = decode(model, task, count, decoder, settings)
    committed = sum(result.stats["committed_tokens"] for result in results)
    return 100 * statistics.mean(right), committed / sum(result.stats["forwards"] for result in results)


def decode(
    model: chordal.Model, task: str, count: int, decoder: str | None, settings: dict[str, Any]
) -> tuple[list[Any], list[bool]]:
    """Decode held-out instances of a task: results, and which are right."""
    given = list(itertools.islice(TASKS[task].instances(0), count))
    canvas = CANVAS[TASKS[task].group]
    config = dict(settings)
    if "tokens_per_step" in config:  # a number of steps that depends on the canvas
        config["num_steps"] = -(-canvas // config.pop("tokens_per_step"))
    results = model.generate([x.prompt for x in given], decoder=decoder, config=config, max_new_tokens=canvas)
    for result in results:
        if result.error is not None:
            raise result.error
    return results, [TASKS[task].grade(x, result.text) for x, result in zip(given, results, strict=True)]


def floors(names: list[str], count: int, write_cards: bool) -> None:
    """Print accuracy by task and model; optionally write it into the model cards."""
    table: dict[str, dict[str, float]] = {}
    for name in names:
        model = chordal.load(name, dtype="float32", prefix_cache_mib=0)
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

- Backbone: {backbone(config)}, {layers(config)} of {config["hidden_size"]}, \
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


def backbone(config: dict[str, Any]) -> str:
    """Say what a model is made of."""
    if "num_experts_per_tok" not in config:
        return "Qwen3"
    experts, active = config["num_local_experts"], config["num_experts_per_tok"]
    return f"Qwen3-MoE, {active} of {experts} experts of {config['moe_intermediate_size']} a token"


def layers(config: dict[str, Any]) -> str:
    """Say how deep a model is."""
    if "num_loops" not in config:
        return f"{config['num_hidden_layers']} layers"
    before, core, behind = (config[f"num_{part}_layers"] for part in ("prelude", "core", "coda"))
    return f"{before} + {config['num_loops']} x {core} + {behind} layers"


def tradeoff(count: int, file: Path | None) -> None:
    """Print accuracy and tokens per forward of growing parallelism."""
    rows, records = [], []
    for name, settings in (("tiny-mdm", MASKED), ("tiny-block", BLOCK)):
        model = chordal.load(name, dtype="float32", prefix_cache_mib=0)
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


def loops(count: int, rounds: int = 5) -> None:
    """Print accuracy, core loops and time of plain decoding with few loops and of what saves loops."""
    model = chordal.load("tiny-recurrent", dtype="float32", prefix_cache_mib=0)
    rows = []
    for decoder, config in LOOPED:
        text = ", ".join(f"{key}={value}" for key, value in config.items())
        cells, totals = [], Counter[str]()
        for task in LOOP_TASKS:
            results, right = decode(model, task, count, decoder, config)
            cells.append(f"{100 * statistics.mean(right):.0f}")
            for result in results:
                for name in ("committed_tokens", "loops", "forwards", "positions_fed"):
                    totals[name] += result.stats[name]
        per_token = (
            totals[name] / totals["committed_tokens"] for name in ("loops", "forwards", "positions_fed")
        )
        rows.append([f"{decoder}({text})", *cells, *(f"{value:.2f}" for value in per_token)])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)

    alone = chordal.load("tiny-recurrent", dtype="float32", max_rows=1, prefix_cache_mib=0)
    measure(alone, "copy", 5, None, {})  # the first passes set up the cache
    plain = LOOPED.index(("autoregressive", {}))
    ratios: list[list[float]] = [[] for _ in LOOPED]
    for _ in range(rounds):
        seconds = []
        for decoder, config in LOOPED:
            started, tokens = time.perf_counter(), 0
            for task in LOOP_TASKS:
                results, _ = decode(alone, task, max(1, count // 20), decoder, config)
                tokens += sum(result.stats["committed_tokens"] for result in results)
            seconds.append((time.perf_counter() - started) / tokens)
        for taken, mine in zip(seconds, ratios, strict=True):
            mine.append(seconds[plain] / taken)
    for row, mine in zip(rows, ratios, strict=True):
        row.append(f"{statistics.median(mine):.2f}x")
    per = [f"{name} a token" for name in ("loops", "passes", "positions")]
    print(markdown(["decoder", *LOOP_TASKS, *per, "speed"], rows))


def experts(count: int, rounds: int = 5) -> None:
    """Print accuracy, tokens and distinct experts a pass, and speed, of experts shared in several ways."""
    model = chordal.load("tiny-moe", dtype="float32", max_rows=16, prefix_cache_mib=0)
    alone = chordal.load("tiny-moe", dtype="float32", max_rows=1, prefix_cache_mib=0)
    together = note_experts(model)
    measure(alone, "copy", 5, None, {})  # the first passes set up the cache
    for feed, refresh in EXPERT_FEEDS:
        ways = [("threshold", num_active, feed) for num_active in (4, 3, 2)]
        ways += [("des", 4, {**feed, **refresh, **routing}) for routing in ROUTINGS]
        rows = []
        for decoder, num_active, config in ways:
            set_active(model, num_active)
            text = ", ".join(f"{key}={value}" for key, value in config.items())
            cells, totals = [], Counter[str]()
            together.clear()
            for task in EXPERT_TASKS:
                results, right = decode(model, task, count, decoder, config)
                cells.append(f"{100 * statistics.mean(right):.0f}")
                for result in results:
                    for name in ("committed_tokens", "forwards", "experts"):
                        totals[name] += result.stats[name]
            for name in ("committed_tokens", "experts"):
                cells.append(f"{totals[name] / totals['forwards']:.2f}")
            cells.append(f"{statistics.mean(together):.2f}")
            rows.append([f"{decoder}({text})", str(num_active), *cells])
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)

        ratios: list[list[float]] = [[] for _ in ways]
        for _ in range(rounds):
            seconds = []
            for decoder, num_active, config in ways:
                set_active(alone, num_active)
                started, passes = time.perf_counter(), 0
                for task in EXPERT_TASKS:
                    results, _ = decode(alone, task, max(1, count // 20), decoder, config)
                    passes += sum(result.stats["forwards"] for result in results)
                seconds.append((time.perf_counter() - started) / passes)
            for taken, mine in zip(seconds, ratios, strict=True):
                mine.append(seconds[0] / taken)
        for row, mine in zip(rows, ratios, strict=True):
            row.append(f"{statistics.median(mine):.2f}x")
        columns = ("decoder", "experts a token", *EXPERT_TASKS, "tokens a pass", "experts a pass")
        print(markdown([*columns, "experts a batch", "speed of a pass"], rows))


def note_experts(model: chordal.Model) -> list[float]:
    """List, from now on, how many experts of a layer the requests of each pass use together."""
    runner, counts = model.engine.target, list[float]()
    inner = runner.run

    def run(requests: Any) -> Any:
        readings = inner(requests)
        counts.append(float(np.logical_or.reduce([one.experts for one in readings]).sum(1).mean()))
        return readings

    runner.run = run  # type: ignore[method-assign]
    return counts


def set_active(model: chordal.Model, num_active: int) -> None:
    """Let every token have so many experts."""
    for module in model.engine.target.model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.top_k = num_active


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("floors", "tradeoff", "loops", "experts"))
    parser.add_argument("--models", default=",".join(chordal.bundled_models()), help="of floors")
    parser.add_argument(
        "--num-prompts", type=int, help="for each task (500 for floors, 200 for tradeoff, else 100)"
    )
    parser.add_argument("--cards", action="store_true", help="write the floors into the model cards")
    parser.add_argument("--json", type=Path, help="also write the trade-off to this file")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "floors":
        floors(args.models.split(","), args.num_prompts or 500, args.cards)
    elif args.what == "loops":
        loops(args.num_prompts or 100)
    elif args.what == "experts":
        experts(args.num_prompts or 100)
    else:
        tradeoff(args.num_prompts or 200, args.json)


if __name__ == "__main__":
    main()
