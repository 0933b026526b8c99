"""Measure what prompts that begin alike save, and what sharing costs a prompt that shares nothing.

    python benchmarks/prefix.py [--model tiny-ar] [--repeats 7] [--json FILE]

Prompts are random token ids. Runs take turns in one process and start from an empty store; times are medians,
ratios are taken within a round: median, and quartiles in brackets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conditions, interleave, markdown, quartiles

import chordal

NUM_PROMPTS, NUM_SHARED, NUM_OWN, NUM_NEW, BATCH = 32, 200, 12, 8, 16
WAYS: dict[str, dict[str, Any]] = {
    "`prefix_cache_mib=0`": {"mib": 0},
    "in groups": {"mib": 256},
    "as they come": {"mib": 256, "group_prefixes": False},
}
LONE = ((200, 32), (16, 64), (400, 1))  # tokens of the prompt, new tokens


def decode_all(model: str, prompts: Sequence[list[int]], mib: int, **more: Any) -> dict[str, Any]:
    """Decode all prompts with a model that has shared nothing yet; its loading is not timed."""
    loaded = chordal.load(model, dtype="float32", max_rows=BATCH, prefix_cache_mib=mib)
    started = time.perf_counter()
    results = loaded.generate(prompts, max_new_tokens=NUM_NEW, ignore_eos=True, **more)
    return {
        "seconds": time.perf_counter() - started,
        "positions_fed": sum(one.stats["positions_fed"] for one in results),
        "texts": [one.tokens for one in results],
    }


def decode_one(model: chordal.Model, rng: np.random.Generator, num_prompt: int, num_new: int) -> None:
    """Decode a prompt that was never seen."""
    model.generate([rng.integers(10, 800, num_prompt).tolist()], max_new_tokens=num_new, ignore_eos=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything and print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-ar", help="causal model (default tiny-ar)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # models this small lose more to handing work over than they gain

    rng = np.random.default_rng(0)
    header = rng.integers(10, 800, NUM_SHARED).tolist()
    prompts = [header + rng.integers(10, 800, NUM_OWN).tolist() for _ in range(NUM_PROMPTS)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for round_ in range(args.repeats):
        for name in list(WAYS)[:: 1 if round_ % 2 == 0 else -1]:
            runs[name].append(decode_all(args.model, prompts, **WAYS[name]))
    texts = [run.pop("texts") for mine in runs.values() for run in mine]
    assert all(one == texts[0] for one in texts), "sharing changed a text"
    rows = [
        [name, f"{mine[0]['positions_fed']:,}", f"{statistics.median(run['seconds'] for run in mine):.2f}"]
        for name, mine in runs.items()
    ]
    print(markdown(["", "positions fed", "seconds"], rows), end="\n\n")

    lone = []
    models = [chordal.load(args.model, dtype="float32", max_rows=1, prefix_cache_mib=mib) for mib in (0, 256)]
    for num_prompt, num_new in LONE:
        pair = [partial(decode_one, model, rng, num_prompt, num_new) for model in models]
        plain, stored = interleave(pair, 7 * args.repeats)
        low, middle, high = quartiles([after / before for before, after in zip(plain, stored, strict=True)])
        lone.append([f"{num_prompt} + {num_new}", f"{middle:.2f} [{low:.2f}-{high:.2f}]"])
    print(markdown(["prompt + new tokens", "time with the store / without"], lone))
    print(json.dumps(conditions()), file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions(), "shared": runs, "lone": lone}) + "\n")


if __name__ == "__main__":
    main()
