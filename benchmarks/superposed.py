"""Measure Superposed Decoding: what k drafts from one pass are worth beside k texts sampled one by one.

    python benchmarks/superposed.py [--num-prompts 50] [--num-drafts 3] [--tasks shuffle,...] [--json FILE]

Decodes held-out instances of tiny-ar's tasks. Perplexity is that of the texts under the model itself, without
cache or superposition: exp of the mean negative log-likelihood a token, of the best text of each prompt and
of all of them. Fewer forwards than k texts sampled alone need is by construction; what is measured is what
the texts are worth. N-grams, where not those of the prompt, are counted on training instances of all tasks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conditions, markdown

import chordal
from chordal.bench.tasks import CANVAS, TASKS
from chordal.drafters.ngram_model import NgramModel
from chordal.forward import Causal, Forward, Ints, Logits

TASKS_SHOWN = ("shuffle", "replace_random", "latin", "arithmetic", "rename")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"backoff": 0.0},
    {"alpha": 0.0},
    {"ngrams": "corpus"},
    {"ngrams": "corpus", "backoff": 0.0},
    {"rerank": False},
    {"alpha": 0.0, "rerank": False},
    {"restart_every": 10},
    {"temperature": 0.5},
]


@dataclass
class Tally:
    """What texts of one way to decode add up to."""

    forwards: int = 0
    positions: int = 0
    wall_s: float = 0.0
    model_s: float = 0.0
    distinct: list[int] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    any_right: list[bool] = field(default_factory=list)
    best: list[tuple[float, int]] = field(default_factory=list)
    every: list[tuple[float, int]] = field(default_factory=list)

    def row(self, name: str) -> list[str]:
        """Give the row of the table."""
        count = len(self.distinct)
        return [
            name,
            f"{perplexity(self.best):.2f}",
            f"{perplexity(self.every):.2f}",
            f"{statistics.mean(self.distinct):.1f}",
            f"{100 * statistics.mean(self.right):.0f}",
            f"{100 * statistics.mean(self.any_right):.0f}",
            f"{self.forwards / count:.1f}",
            f"{self.positions / count:.0f}",
            f"{1000 * self.wall_s / count:.0f}",
            f"{1000 * (self.wall_s - self.model_s) / count:.0f}",
        ]


def perplexity(scored: list[tuple[float, int]]) -> float:
    """Give exp(-sum of log-likelihoods / number of tokens)."""
    return float(np.exp(-sum(score for score, _ in scored) / sum(num for _, num in scored)))


def likelihood(model: chordal.Model, prompt: Ints, tokens: list[int]) -> tuple[float, int]:
    """Give the log-likelihood of a text under the model, and its length."""
    text = np.concatenate([prompt, tokens])
    positions = np.arange(len(text) - 1)
    read = Logits(np.arange(len(prompt) - 1, len(text) - 1))
    [reading] = model.engine.target.run([(0, Forward(text[:-1], positions, Causal(), read, slots=positions))])
    model.engine.target.free_row(0)
    logprobs = reading.logits.log_softmax(1)
    return float(logprobs.gather(1, torch.tensor(tokens)[:, None]).sum()), len(tokens)


def count_corpus(model: chordal.Model, num: int) -> NgramModel:
    """Count n-grams of training instances of every task, as the model was trained on them."""

    def texts() -> Iterator[Ints]:
        for task in TASKS.values():
            for instance in itertools.islice(task.instances(1, "train"), num):
                answer = model.tokenizer(instance.answer)["input_ids"]
                yield np.concatenate([model.encode(instance.prompt), answer, model.family.eos_ids[:1]])

    return NgramModel.count(texts())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-prompts", type=int, default=50, help="of each task")
    parser.add_argument("--num-drafts", type=int, default=3)
    parser.add_argument("--tasks", default=",".join(TASKS_SHOWN))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = chordal.load("tiny-ar", dtype="float32", prefix_cache_mib=0)
    k = args.num_drafts
    given = [
        (task, instance)
        for task in args.tasks.split(",")
        for instance in itertools.islice(TASKS[task].instances(0), args.num_prompts)
    ]
    sampled = {"decoder": "autoregressive", "temperature": 1.0, "top_p": 0.9}
    with tempfile.TemporaryDirectory() as folder:
        corpus = str(Path(folder) / "corpus.npz")
        count_corpus(model, 500).save(corpus)
        ways: dict[str, list[dict[str, Any]]] = {
            "greedy": [{"decoder": "autoregressive"}],
            f"{k} sampled, top_p=0.9": [sampled | {"seed": seed} for seed in range(k)],
            f"beam search, {k} beams": [
                {"decoder": "diverse_beam", "config": {"num_beams": k, "num_groups": 1}}
            ],
        }
        for settings in SETTINGS:
            name = ", ".join(["superposed", *(f"{key}={value}" for key, value in settings.items())])
            config = settings | {"num_drafts": k} | ({"ngrams": corpus} if "ngrams" in settings else {})
            ways[name] = [{"decoder": "superposed", "config": config}]
        tallies = {name: run(model, given, runs) for name, runs in ways.items()}
    print(
        markdown(
            [
                f"{len(given)} prompts",
                "perplexity, best",
                "all",
                "distinct",
                "right, %",
                "any right, %",
                "forwards",
                "positions fed",
                "ms",
                "ms outside the model",
            ],
            [tally.row(name) for name, tally in tallies.items()],
        )
    )
    print(", ".join(f"{key} {value}" for key, value in conditions().items()))
    if args.json:
        rows = [tally.row(name) for name, tally in tallies.items()]
        args.json.write_text(json.dumps({"conditions": conditions(), "rows": rows}, indent=1) + "\n")


def run(model: chordal.Model, given: list[tuple[str, Any]], runs: list[dict[str, Any]]) -> Tally:
    """Decode every prompt by itself, once for each text or once for all of them."""
    tally = Tally()
    for name, instance in given:
        task, prompt = TASKS[name], model.encode(instance.prompt)
        texts: list[tuple[list[int], str]] = []
        for settings in runs:
            [result] = model.generate(instance.prompt, max_new_tokens=CANVAS[task.group], **settings)
            if result.error is not None:
                raise result.error
            tally.forwards += result.stats["forwards"]
            tally.positions += result.stats["positions_fed"]
            tally.wall_s += result.stats["wall_s"]
            tally.model_s += result.stats["model_s"]
            found = [(other.tokens.tolist(), other.text) for other in result.alternatives]
            texts += found or [(result.tokens, result.text)]
        scored = [likelihood(model, prompt, tokens) for tokens, _ in texts]
        right = [task.grade(instance, text) for _, text in texts]
        tally.best.append(scored[0])
        tally.every += scored
        tally.distinct.append(len({text for _, text in texts}))
        tally.right.append(right[0])
        tally.any_right.append(any(right))
    return tally


if __name__ == "__main__":
    main()
