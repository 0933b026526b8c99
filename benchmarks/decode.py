"""Measure the decoders on the bundled models: paired, in one process, medians.

    python benchmarks/decode.py [--repeats 15] [--json FILE]

Each comparison alternates its two sides round by round on the same prompts, weights and dtype, after
a warm-up, and reports the median time of each and the median of the round-by-round ratios. Quality
stands in the same row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import conditions, generate, interleave

import chordal
from chordal.bench.tasks import TASKS, Instance
from chordal.models.checkpoint import zoo_dir

Run = Callable[[], Any]


def paired(first: Run, second: Run, repeats: int) -> tuple[float, float, float]:
    """Give the median seconds of two runs in turns, and the median of first / second."""
    first(), second()
    ours, theirs = interleave([first, second], repeats)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return statistics.median(ours), statistics.median(theirs), ratio


def instances(tasks: list[str], count: int) -> list[Instance]:
    """Take held-out instances of some tasks, the same number of each."""
    return [x for name in tasks for x in itertools.islice(TASKS[name].instances(0), count)]


def accuracy(given: list[Instance], results: list[chordal.Generation]) -> float:
    """Share of right answers."""
    pairs = zip(given, results, strict=True)
    return statistics.mean(TASKS[x.task].grade(x, result.text) for x, result in pairs)


def tokens_per_forward(results: list[chordal.Generation]) -> float:
    """Total committed tokens by total forward passes."""
    committed = sum(result.stats["committed_tokens"] for result in results)
    return committed / sum(result.stats["forwards"] for result in results)


def against_transformers(model: chordal.Model, batch: int, repeats: int) -> dict[str, Any]:
    """Time plain greedy decoding against transformers' `generate`, 64 tokens for each prompt."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        zoo_dir() / model.name, dtype=torch.float32
    ).eval()
    prompts = [model.encode(x.prompt).tolist() for x in instances(["rename", "insert_line"], batch)][:batch]

    def theirs() -> list[list[int]]:
        return generate(reference, prompts, (), max_new_tokens=64)

    def ours() -> list[list[int]]:
        return [r.tokens for r in model.generate(prompts, max_new_tokens=64, ignore_eos=True)]

    ours_s, theirs_s, ratio = paired(ours, theirs, repeats)
    return {
        "what": f"autoregressive / transformers generate, {batch} prompts",
        "time_s": ours_s,
        "baseline_s": theirs_s,
        "time_ratio": ratio,
        "identical": ours() == theirs(),
    }


def against_plain(
    model: chordal.Model,
    tasks: list[str],
    count: int,
    canvas: int,
    repeats: int,
    decoder: str,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Time a decoder against the plain one of the model's kind, one prompt at a time."""
    given = instances(tasks, count)

    def run(name: str | None, settings: dict[str, Any] | None) -> list[chordal.Generation]:
        return [
            model.generate(x.prompt, decoder=name, config=settings, max_new_tokens=canvas)[0] for x in given
        ]

    time_s, baseline_s, ratio = paired(lambda: run(decoder, config), lambda: run(None, None), repeats)
    results, plain = run(decoder, config), run(None, None)
    settings = ", ".join(f"{key}={value}" for key, value in (config or {}).items())
    return {
        "what": f"{model.name}: {decoder}({settings}) / plain, {' and '.join(tasks)}",
        "time_s": time_s,
        "baseline_s": baseline_s,
        "time_ratio": ratio,
        "speed_up": 1 / ratio,
        "identical": [r.text for r in results] == [r.text for r in plain],
        "tokens_per_forward": tokens_per_forward(results),
        "baseline_tokens_per_forward": tokens_per_forward(plain),
        "accuracy": accuracy(given, results),
        "baseline_accuracy": accuracy(given, plain),
    }


def outside_model(
    model: chordal.Model, batch: int, decoder: str | None, canvas: int, repeats: int
) -> dict[str, Any]:
    """Measure the share of wall time that is not spent inside forward passes."""
    prompts = [x.prompt for x in instances(["rename", "insert_line"], batch)][:batch]
    shares, times = [], []
    for _ in range(repeats + 1):
        before, started = model.engine.model_s, time.perf_counter()
        model.generate(prompts, decoder=decoder, max_new_tokens=canvas)
        times.append(time.perf_counter() - started)
        shares.append(1 - (model.engine.model_s - before) / times[-1])
    name = decoder or model.family.default_decoder
    return {
        "what": f"{model.name}: {name}, share outside forward passes, {batch} prompts",
        "time_s": statistics.median(times[1:]),
        "share_outside": statistics.median(shares[1:]),
    }


def main() -> None:
    """Run everything and print one line a measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="rounds of each comparison (default 15)")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)  # models this small lose more to handing work over than they gain

    causal, masked, block = (
        chordal.load(name, dtype="float32", prefix_cache_mib=0)
        for name in ("tiny-ar", "tiny-mdm", "tiny-block")
    )
    few = max(3, args.repeats // 3)
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        parts = [
            f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key != "what"
        ]
        print(f"{row['what']}\n    {' | '.join(parts)}", flush=True)

    for batch in (1, 8):
        report(against_transformers(causal, batch, args.repeats))
    for model, decoder, canvas in (
        (causal, None, 64),
        (causal, "prompt_lookup", 64),
        (masked, "threshold", 64),
        (block, "block_diffusion", 64),
    ):
        for batch in (1, 8):
            report(outside_model(model, batch, decoder, canvas, few))
    report(against_plain(causal, ["rename", "insert_line"], 10, 64, args.repeats, "prompt_lookup"))
    report(against_plain(masked, ["copy"], 20, 12, few, "threshold", {"threshold": 0.9}))
    report(against_plain(masked, ["sudoku"], 20, 20, few, "threshold", {"threshold": 0.9}))
    report(
        against_plain(
            masked, ["rename", "insert_line"], 4, 64, few, "threshold", {"threshold": 0.9, "feed": "dual"}
        )
    )
    report(
        against_plain(block, ["rename", "insert_line"], 10, 64, few, "block_diffusion", {"threshold": 0.9})
    )

    setup = {**conditions(), "dtype": "float32"}
    print(json.dumps(setup), file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps({"conditions": setup, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
