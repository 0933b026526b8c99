"""Measure every draft-and-verify decoder beside transformers' own generation: paired, in one process.

    python benchmarks/speculative.py [--decoders prompt_lookup,draft_model] [--batch-sizes 1,8]
        [--tasks rename,copy | --data FILE] [--target MODEL] [--draft MODEL] [--json FILE]

The target is tiny-ar grown to 105 million parameters (`chordal.training.grow`): it answers what tiny-ar
answers and costs what its size costs. How much of a pass is reading weights, and so how many positions
are nearly free, the table of latencies shows first.

A round runs every system on every task, prompts in batches of one size; systems take turns. Ratios are
taken within a round to transformers' plain `generate`: median, and quartiles in brackets; their mean is
geometric, each task counts the same. Time includes prefill, and texts end at the stop token. "Same" is
the share of prompts whose tokens equal those of the first row, "acceptance" the acceptance length,
1 + accepted tokens / passes. transformers drafts for one prompt at a time: "-".
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from common import conditions, generate, interleave, markdown, quartiles

import chordal
from chordal.bench.compare import Contender, describe_setup
from chordal.bench.tasks.workload import Workload, load_tasks
from chordal.bridges.transformers import with_drafter
from chordal.cli.console import progress
from chordal.cli.prompts import read_all_prompts
from chordal.drafters.ngram import NgramDrafter
from chordal.models.checkpoint import Checkpoint, zoo_dir
from chordal.planning.latency import measure_latency
from chordal.registry import decoder_names, make_decoder
from chordal.training.grow import grow_checkpoint

# What a decoder is measured with, one row of the tables each; those not named here run with their defaults.
SETTINGS: dict[str, Sequence[Mapping[str, Any]]] = {
    "prompt_lookup": ({}, {"match": "last"}),
    "copyspec": ({}, {"draft_model": True}),
    "jacobi": ({}, {"ngram": 2, "num_branches": 0}),  # the second is plain Jacobi iteration
    "token_recycling": ({}, {"tree": "3/2,1,0/1,0,0"}),
    "draft_model": ({}, {"num_draft": 20}),  # as many as transformers' assisted generation drafts
    "rsd": ({}, {"tree": "constant", "widths": "2,1,1,1,1,1"}),
    "pearl": ({"num_draft": 8},),
    "first_finish": (),  # at temperature 0 it is plain decoding
}
NUM_DRAFT, MAX_NGRAM = 10, 3  # of transformers' prompt lookup, as the defaults of ours

TASKS = ("rename", "insert_line", "copy", "reverse", "sort", "arithmetic")
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 64  # tokens cached before a pass whose latency is measured


@dataclass(frozen=True)
class Output:
    """What a system made of some prompts; counts are sums over the prompts.

    Attributes:
        tokens: New tokens of each prompt.
        forwards: Passes of the target that each prompt took part in.
        draft_forwards: Passes of other models, likewise.
        accepted: Draft tokens that were kept.
    """

    tokens: list[list[int]]
    forwards: int
    draft_forwards: int
    accepted: int


@dataclass(frozen=True)
class System:
    """Something that decodes a batch of prompts, given as token ids, up to a number of new tokens."""

    label: str
    promise: str
    run: Callable[[Sequence[Sequence[Sequence[int]]], int], Output]
    max_batch: int | None = None


class Theirs:
    """transformers' `generate` of a model, its passes counted.

    Args:
        model: The model, or a view of it.
        eos_ids: Where texts end.
        draft: Its assistant, if it has one.
        **arguments: Of `generate`.
    """

    def __init__(self, model: Any, eos_ids: Sequence[int], draft: Any = None, **arguments: Any) -> None:
        self.model, self.eos_ids, self.arguments = model, eos_ids, arguments
        self.passes, self.draft_passes = [0], [0]
        _count_passes(model, self.passes)
        if draft is not None:
            _count_passes(draft, self.draft_passes)
            self.arguments["assistant_model"] = draft

    def __call__(self, batches: Sequence[Sequence[Sequence[int]]], max_new_tokens: int) -> Output:
        """Decode batches of prompts, one after the other."""
        before, draft_before = self.passes[0], self.draft_passes[0]
        tokens = [
            answer
            for prompts in batches
            for answer in generate(
                self.model, prompts, self.eos_ids, max_new_tokens=max_new_tokens, **self.arguments
            )
        ]
        num_tokens = sum(map(len, tokens))
        is_alone = all(len(prompts) == 1 for prompts in batches)
        # Only plain decoding has batches, and there a prompt needs a pass for each of its tokens.
        forwards = self.passes[0] - before if is_alone else num_tokens
        return Output(tokens, forwards, self.draft_passes[0] - draft_before, num_tokens - forwards)


def ours(
    model: chordal.Model,
    contender: Contender,
    batches: Sequence[Sequence[Sequence[int]]],
    max_new_tokens: int,
) -> Output:
    """Decode with a decoder of Chordal, a new one for each task."""
    decoder = make_decoder(contender.decoder, contender.settings)
    results = [
        result
        for prompts in batches
        for result in model.generate(prompts, decoder=decoder, max_new_tokens=max_new_tokens)
    ]
    for result in results:
        if result.error is not None:
            raise result.error
    return Output(
        [result.tokens for result in results],
        sum(result.stats["forwards"] for result in results),
        sum(sum(result.stats["draft_forwards"].values()) for result in results),
        sum(result.stats["accepted_tokens"] for result in results),
    )


def systems(
    model: chordal.Model, reference: Any, draft: Any, decoders: Sequence[str] | None
) -> Iterator[System]:
    """Give the baseline, transformers' drafters, then our decoders, exact ones first.

    Args:
        model: Target and draft model in Chordal.
        reference: The target in transformers.
        draft: The draft model in transformers.
        decoders: Names of those of ours; None takes all that fit.
    """
    eos_ids = model.family.eos_ids
    lookup = {"prompt_lookup_num_tokens": NUM_DRAFT, "max_matching_ngram_size": MAX_NGRAM}
    bridged = with_drafter(reference, lambda: NgramDrafter(MAX_NGRAM), num_draft=NUM_DRAFT)
    yield System("transformers: plain", "", Theirs(reference, eos_ids))
    yield System("transformers: prompt lookup", "", Theirs(reference, eos_ids, **lookup), max_batch=1)
    yield System("transformers: assisted", "", Theirs(reference, eos_ids, draft), max_batch=1)
    yield System("transformers: our n-gram drafter", "", Theirs(bridged, eos_ids), max_batch=1)

    names = decoders if decoders is not None else decoder_names()
    chosen = []
    for contender in (Contender(name, settings) for name in names for settings in SETTINGS.get(name, ({},))):
        decoder = make_decoder(contender.decoder, contender.settings)
        missing = set(decoder.needs_models) - set(model.engine.models)
        if decoders is None and (decoder.family != "autoregressive" or not decoder.fits(model.family)):
            continue
        if missing:
            print(f"{contender.label} left out: no {' or '.join(missing)} model", file=sys.stderr)
            continue
        chosen.append(System(contender.label, decoder.promise, partial(ours, model, contender)))
        if contender.decoder == "pearl":
            both = chordal.Model(chordal.Engine(model.engine.models, concurrent=True))
            label = f"{contender.label}, concurrent"
            chosen.append(System(label, decoder.promise, partial(ours, both, contender)))
    plain = model.family.default_decoder
    yield from sorted(chosen, key=lambda system: (system.label != plain, system.promise != "exact"))


def measure(
    lineup: Sequence[System], workloads: Sequence[Workload], model: chordal.Model, batch: int, repeats: int
) -> list[dict[str, Any]]:
    """Run systems on workloads in turns and give a row for each.

    Args:
        lineup: The first one is what the others are compared with.
        workloads: What to decode; prompts are token ids.
        model: Tells what text the tokens are.
        batch: Prompts decoded at once.
        repeats: Rounds.
    """
    batches = {
        workload.name: [workload.prompts[at : at + batch] for at in range(0, len(workload.prompts), batch)]
        for workload in workloads
    }
    runs = [
        partial(system.run, batches[workload.name], workload.max_new_tokens)
        for system in lineup
        for workload in workloads
    ]
    done = itertools.count(1)
    with progress(len(runs) * (1 + repeats), f"runs, batch {batch}") as advance:
        outputs = []
        for run in runs:  # warms up, too
            outputs.append(run())
            advance(next(done))
        seconds = interleave(runs, repeats, lambda: advance(next(done)))
    num = len(workloads)
    return [
        _row(system, workloads, model, outputs[at : at + num], outputs, seconds[at : at + num], seconds)
        for system, at in zip(lineup, range(0, len(runs), num), strict=True)
    ]


def _row(
    system: System,
    workloads: Sequence[Workload],
    model: chordal.Model,
    outputs: Sequence[Output],
    plain_outputs: Sequence[Output],
    seconds: Sequence[Sequence[float]],
    plain_seconds: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """Sum up one system; of what is plain's, as many entries count as there are workloads."""
    cells, right, same, ratios = {}, [], [], []
    for workload, output, plain, spent, plain_spent in zip(
        workloads, outputs, plain_outputs, seconds, plain_seconds, strict=False
    ):
        texts = [model.decode(np.array(tokens, np.int64)) for tokens in output.tokens]
        grade = workload.grade
        graded = [bool(grade(index, text)) for index, text in enumerate(texts)] if grade else []
        right += graded
        same += [own == other for own, other in zip(output.tokens, plain.tokens, strict=True)]
        ratios.append([other / own for own, other in zip(spent, plain_spent, strict=True)])
        cells[workload.name] = {
            "accuracy": statistics.fmean(graded) if graded else None,
            "tokens": sum(map(len, output.tokens)),
            "tokens_per_forward": _per(sum(map(len, output.tokens)), output.forwards),
            "seconds": list(spent),
            "ratio": quartiles(ratios[-1]),
        }
    tokens, forwards = (sum(values) for values in zip(*map(_size, outputs), strict=True))
    return {
        "system": system.label,
        "promise": system.promise,
        "same": statistics.fmean(same),
        "accuracy": statistics.fmean(right) if right else None,
        "tokens": tokens,
        "forwards": forwards,
        "draft_forwards_per_forward": _per(sum(output.draft_forwards for output in outputs), forwards),
        "acceptance_length": _per(forwards + sum(output.accepted for output in outputs), forwards),
        "tokens_per_forward": _per(tokens, forwards),
        "tokens_per_s": tokens / sum(statistics.median(spent) for spent in seconds),
        "ratio": quartiles([math.prod(round_) ** (1 / len(round_)) for round_ in zip(*ratios, strict=True)]),
        "workloads": cells,
    }


def _per(count: float, forwards: int) -> float | None:
    """Divide; a decoder that switches models may need no pass of the target at all."""
    return count / forwards if forwards else None


def _show(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _size(output: Output) -> tuple[int, int]:
    return sum(map(len, output.tokens)), output.forwards


def table(batch: int, lineup: Sequence[System], rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows of a batch size; systems without one have dashes."""
    by_label = {row["system"]: row for row in rows}
    names = list(rows[0]["workloads"])
    header = [
        f"batch {batch}: ratio (tokens/pass)", "promise", *names, "same", "accuracy", "acceptance",
        "tokens/pass", "draft passes/pass", "tokens/s", "mean ratio",
    ]  # fmt: skip
    lines = []
    for system in lineup:
        row = by_label.get(system.label)
        if row is None:
            lines.append([system.label, *["-"] * (len(header) - 1)])
            continue
        low, middle, high = row["ratio"]
        cells = (row["workloads"][name] for name in names)
        lines.append(
            [
                system.label,
                row["promise"] or "-",
                *(f"{cell['ratio'][1]:.2f}x ({_show(cell['tokens_per_forward'], 1)})" for cell in cells),
                f"{100 * row['same']:.0f}%",
                "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.0f}%",
                _show(row["acceptance_length"], 2),
                _show(row["tokens_per_forward"], 2),
                _show(row["draft_forwards_per_forward"], 1),
                _show(row["tokens_per_s"], 0),
                f"{middle:.2f}x [{low:.2f}-{high:.2f}]",
            ]
        )
    return markdown(header, lines)


def latency(model: chordal.Model, batches: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """Time passes of target and draft by the positions they feed to each prompt."""
    lines, found = [], {}
    for name, runner in model.engine.models.items():
        measured = measure_latency(runner, WIDTHS, batches, contexts=[CONTEXT] * len(batches))
        found[name] = measured.to_dict()
        for batch, seconds in zip(measured.batches, measured.table, strict=True):
            cells = (f"{1000 * value:.1f} ({value / seconds[0]:.2f}x)" for value in seconds)
            lines.append([f"{name}, batch {batch}", *cells])
    return markdown(["ms a pass, by positions of a prompt", *map(str, WIDTHS)], lines), found


@contextmanager
def target_folder(target: str | None, kept: Path | None) -> Iterator[str]:
    """Give the model that was asked for, or grow one, in a temporary folder unless it is to be kept."""
    if target is not None:
        yield target
        return
    with TemporaryDirectory(prefix="chordal-") as folder:
        path = kept or Path(folder) / "tiny-ar-grown"
        num_parameters = grow_checkpoint(zoo_dir() / "tiny-ar", path)
        print(f"target: tiny-ar grown to {num_parameters:,} parameters", file=sys.stderr)
        yield str(path)


def load_reference(name: str, model: chordal.Model) -> Any:
    """Load a model into transformers, of the same type and on the same device, to decode greedily."""
    target = model.engine.target
    loaded = transformers.AutoModelForCausalLM.from_pretrained(Checkpoint.open(name).path, dtype=target.dtype)
    loaded.generation_config = transformers.GenerationConfig()  # published ones may sample, or penalise
    return loaded.to(target.device).eval()


def _count_passes(model: Any, count: list[int]) -> None:
    def note(*_: Any) -> None:
        count[0] += 1

    model.register_forward_hook(note)


def _workloads(
    model: chordal.Model, names: Sequence[str], num_prompts: int, data: str | None, max_new_tokens: int | None
) -> list[Workload]:
    """Take graded tasks, or the prompts of a file, as token ids."""
    if data is None:
        found = load_tasks(names, num_prompts, max_new_tokens=max_new_tokens)
    else:
        found = [Workload(Path(data).name, read_all_prompts(data), max_new_tokens or 64)]
    return [
        Workload(w.name, [model.encode(prompt).tolist() for prompt in w.prompts], w.max_new_tokens, w.grade)
        for w in found
    ]


def main(args: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", help="model name or folder; else tiny-ar grown")
    parser.add_argument("--keep-target", type=Path, metavar="DIR", help="where to leave the grown target")
    parser.add_argument("--draft", default="tiny-draft", help="model of the same vocabulary (tiny-draft)")
    parser.add_argument("--middle", help="model of the same vocabulary, of hierarchies; else the draft model")
    parser.add_argument("--dtype", default="bfloat16", help="of all models (bfloat16)")
    parser.add_argument("--device", help="of all models; a GPU if there is one")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--decoders", help="names by commas; else all autoregressive ones that fit")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"by commas ({', '.join(TASKS)})")
    parser.add_argument("--data", help="prompts of a file instead, as for chordal generate --file")
    parser.add_argument("--num-prompts", type=int, default=8, help="of each task (8)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="else what holds the task's answers, 64 for --data"
    )
    parser.add_argument("--batch-sizes", default="1,8", help="by commas (1,8)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    given = parser.parse_args(args)
    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    batches = [int(size) for size in given.batch_sizes.split(",")]
    decoders = given.decoders.split(",") if given.decoders else None

    with target_folder(given.target, given.keep_target) as target:
        model = chordal.load(
            target,
            draft=given.draft,
            middle=given.middle or given.draft,
            dtype=given.dtype,
            device=given.device,
            max_rows=max(batches),
            prefix_cache_mib=0,
        )
        reference, draft = load_reference(target, model), load_reference(given.draft, model)
        workloads = _workloads(
            model, given.tasks.split(","), given.num_prompts, given.data, given.max_new_tokens
        )
        text, latencies = latency(model, batches)
        print(text, flush=True)
        report: dict[str, Any] = {
            "conditions": _conditions(model, reference, workloads, given),
            "latency": latencies,
            "batches": {},
        }
        lineup = list(systems(model, reference, draft, decoders))
        for batch in batches:
            able = [system for system in lineup if system.max_batch is None or batch <= system.max_batch]
            rows = measure(able, workloads, model, batch, given.repeats)
            report["batches"][batch] = rows
            print(f"\n{table(batch, lineup, rows)}", flush=True)
    print("\n" + ", ".join(f"{key}: {value}" for key, value in report["conditions"].items()))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _conditions(
    model: chordal.Model, reference: Any, workloads: Sequence[Workload], given: argparse.Namespace
) -> dict[str, Any]:
    setup = describe_setup(model, repeats=given.repeats)
    prompts = [list(prompt) for workload in workloads for prompt in workload.prompts]
    lengths = sorted(map(len, prompts))
    return {
        **{key: setup[key] for key in ("model", "device", "dtype", "repeats")},
        **conditions(),
        "draft": given.draft,
        "middle": given.middle or given.draft,
        "parameters": sum(weight.numel() for weight in reference.parameters()),
        "prompts": {workload.name: len(workload.prompts) for workload in workloads},
        "prompt_tokens": f"{lengths[0]}-{lengths[-1]}",
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        "max_new_tokens": {workload.name: workload.max_new_tokens for workload in workloads},
        "decoding": "greedy, to the stop token",
    }


if __name__ == "__main__":
    main()
