"""Measure what running rows of unlike widths in one pass saves, beside passes that are padded.

    python benchmarks/packing.py [--rows 8,32] [--num-prompts 160] [--repeats 5] [--target DIR] [--json FILE]

Greedy answers to the bundled tasks (lists, puzzles, arithmetic, code edits) of bundled models, float32 and
one thread; a prompt joins as soon as an answer is done. Both ways take turns in one process: medians, ratios
within a round with quartiles in brackets, and whether the texts are the same. `--target` adds a causal
checkpoint, in its own type, by itself and with tiny-draft as its draft model.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import conditions, interleave, markdown, quartiles

import chordal
from chordal.bench.tasks.workload import load_tasks
from chordal.models.language_model import LanguageModel

TASKS = ("lists", "puzzles", "arithmetic", "edits")
# Model, decoder, draft model.
SYSTEMS: list[tuple[str, str, str | None]] = [
    ("tiny-ar", "autoregressive", None),
    ("tiny-ar", "prompt_lookup", None),
    ("tiny-ar", "draft_model", "tiny-draft"),
    ("tiny-mdm", "threshold", None),
]


def decode(
    model: chordal.Model, prompts: Sequence[str], decoder: str, packs: bool, found: dict[str, Any]
) -> None:
    """Decode all prompts and note the texts and how many passes they took."""
    for one in model.engine.models.values():
        assert isinstance(one, LanguageModel)
        one.packs = packs
    before = sum(model.engine.passes.values())
    results = model.generate(prompts, decoder=decoder, group_prefixes=False)
    found["texts"] = [one.text for one in results]
    found["num_tokens"] = sum(len(one.tokens) for one in results)
    found["passes"] = sum(model.engine.passes.values()) - before


def measure(
    model: chordal.Model, prompts: Sequence[str], decoder: str, repeats: int
) -> tuple[list[str], dict[str, Any]]:
    """Run both ways in turns: a row of the table, and all there is."""
    padded: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    runs = [
        partial(decode, model, prompts, decoder, packs, found)
        for packs, found in ((False, padded), (True, packed))
    ]
    for run in runs:
        run()  # the first time grows caches
    seconds = interleave(runs, repeats)
    ratios = [before / after for before, after in zip(*seconds, strict=True)]
    low, middle, high = quartiles(ratios)
    speeds = [
        found["num_tokens"] / statistics.median(mine)
        for found, mine in zip((padded, packed), seconds, strict=True)
    ]
    row = [
        *(f"{found['passes']:,}" for found in (padded, packed)),
        *(f"{speed:,.0f}" for speed in speeds),
        f"{middle:.2f}x [{low:.2f}-{high:.2f}]",
        "yes" if padded["texts"] == packed["texts"] else "no",
    ]
    return row, {"padded": padded, "packed": packed, "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="8,32", help="sequences at once (default 8,32)")
    parser.add_argument("--num-prompts", type=int, default=160, help="prompts of a run (default 160)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--target", metavar="DIR", help="a causal checkpoint to measure as well")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # models this small lose more to handing work over than they gain

    workloads = load_tasks(TASKS, num_prompts=100, seed=0, max_new_tokens=None)
    prompts = [prompt for workload in workloads for prompt in workload.prompts]
    prompts = random.Random(0).sample(prompts, args.num_prompts)
    systems = list(SYSTEMS)
    if args.target:
        systems += [(args.target, "autoregressive", None), (args.target, "draft_model", "tiny-draft")]
    rows: list[list[str]] = []
    found: list[dict[str, Any]] = []
    for name, decoder, draft in systems:
        for num_rows in map(int, args.rows.split(",")):
            dtype = None if name == args.target else "float32"
            model = chordal.load(name, draft=draft, dtype=dtype, max_rows=num_rows)
            row, all_ = measure(model, prompts, decoder, args.repeats)
            rows.append([Path(name).name, decoder, str(num_rows), *row])
            found.append({"model": name, "decoder": decoder, "rows": num_rows, **all_})
    header = [
        "model",
        "decoder",
        "rows",
        "passes, padded",
        "packed",
        "tokens/s, padded",
        "packed",
        "ratio",
        "same",
    ]
    print(markdown(header, rows))
    print(json.dumps(conditions()), file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions(), "systems": found}) + "\n")


if __name__ == "__main__":
    main()
