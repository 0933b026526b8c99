"""Compare decoders: the same prompts, one process, paired rounds, quality beside speed.

A round runs every decoder over every prompt. Decoders alternate inside a round, in the other
direction every second one, so that a machine that slows down slows all of them down; a ratio is the
median over the rounds of (seconds of the plain decoder / seconds of this one) in the same round.
Counts and texts are the same in every round and are taken from the first.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chordal.bench.tasks.workload import Workload
from chordal.errors import InputError

if TYPE_CHECKING:
    from chordal.generation import Generation, Model, Prompt


@dataclass(frozen=True)
class Contender:
    """A decoder with the settings that differ from its defaults."""

    decoder: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in tables, in the form the command line reads."""
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.decoder}: {settings}" if settings else self.decoder


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one decoder did with all prompts.

    Attributes:
        decoder: Its name.
        settings: Those that differ from its defaults.
        promise: "exact" or "approximate".
        accuracy: Share of right answers of all graded prompts, None if none can be graded.
        accuracies: The same for each graded workload.
        same_text: Share of prompts whose text equals the plain decoder's.
        committed_tokens: Sum over the prompts.
        forwards: Forward passes of the target after prefill, summed over the prompts.
        draft_forwards: Forward passes of all other models, likewise.
        rows: Requests fed to the target: more than `forwards` where several canvases went into one.
        positions_fed: Token positions fed to the target, prefill included.
        tokens_per_forward: `committed_tokens / forwards`.
        seconds: Wall-clock of a round: median, minimum and maximum.
        tokens_per_s: `committed_tokens` by the median of the seconds.
        ratio: How many times as fast as the plain decoder, median of the paired rounds.
    """

    decoder: str
    settings: dict[str, Any]
    promise: str
    accuracy: float | None
    accuracies: dict[str, float]
    same_text: float
    committed_tokens: int
    forwards: int
    draft_forwards: int
    rows: int
    positions_fed: int
    tokens_per_forward: float
    seconds: tuple[float, float, float]
    tokens_per_s: float
    ratio: float

    @property
    def label(self) -> str:
        """Name and settings in the form the command line reads."""
        return Contender(self.decoder, self.settings).label


def compare(
    model: Model,
    workloads: Seq[Workload],
    contenders: Iterable[Contender],
    *,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    on_run: Callable[[int, int, Contender], None] | None = None,
    **settings: Any,
) -> list[Row]:
    """Run decoders over the same prompts and measure them.

    Args:
        model: The model; its engine says how many prompts share a forward pass.
        workloads: What to decode.
        contenders: With what; the plain decoder of the model's kind is added in front.
        repeats: Rounds, at least 1.
        clock: Gives the time in seconds.
        on_run: Called after each decoder of each round with how many runs are done, of how many, and
            the decoder.
        **settings: Fields of `Request` for every prompt, e.g. the temperature.

    Returns:
        One row for each decoder, the plain one first.

    Raises:
        InputError: A decoder does not fit the model, or a prompt or a setting cannot be used.
        DecodingError: Decoding some prompt failed; there is no honest row then.
    """
    if repeats < 1:
        raise InputError(f"repeats must be at least 1; got {repeats}.")
    lineup = with_plain(model, contenders)

    def run(contender: Contender, workload: Workload, prompts: Seq[Prompt]) -> list[Generation]:
        results = model.generate(
            prompts,
            decoder=contender.decoder,
            config=contender.settings,
            max_new_tokens=workload.max_new_tokens,
            **settings,
        )
        for result in results:
            if result.error is not None:
                raise result.error
        return results

    # Warm up; what does not fit the model or its window fails here, before anything long has run.
    for contender, workload in itertools.product(lineup, workloads):
        run(contender, workload, workload.prompts[:1])

    seconds: list[list[float]] = [[] for _ in lineup]
    results: list[list[list[Generation]]] = [[] for _ in lineup]
    done = itertools.count(1)
    for round_ in range(repeats):
        order = list(enumerate(lineup))
        for index, contender in order if round_ % 2 == 0 else reversed(order):
            spent, outcome = 0.0, []
            for workload in workloads:
                started = clock()
                outcome.append(run(contender, workload, workload.prompts))
                spent += clock() - started
            seconds[index].append(spent)
            if round_ == 0:
                results[index] = outcome
            if on_run is not None:
                on_run(next(done), repeats * len(lineup), contender)
    return [
        _row(contender, workloads, results[index], results[0], seconds[index], seconds[0])
        for index, contender in enumerate(lineup)
    ]


def with_plain(model: Model, contenders: Iterable[Contender]) -> list[Contender]:
    """Put the plain decoder of the model's kind in front; nobody comes twice."""
    plain = Contender(model.family.default_decoder, dict(model.family.plain_settings))
    return list({contender.label: contender for contender in [plain, *contenders]}.values())


def describe_setup(model: Model, *, repeats: int) -> dict[str, Any]:
    """Give what a measured number depends on besides decoder and prompts."""
    import torch
    import transformers

    import chordal

    target = model.engine.target
    device = target.device.type
    return {
        "model": model.name,
        "device": torch.cuda.get_device_name(target.device) if device == "cuda" else device,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "batch_size": model.engine.max_rows,
        "repeats": repeats,
        "versions": {
            "chordal": chordal.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _row(
    contender: Contender,
    workloads: Seq[Workload],
    results: Seq[Seq[Generation]],
    plain_results: Seq[Seq[Generation]],
    seconds: Seq[float],
    plain_seconds: Seq[float],
) -> Row:
    right = {
        workload.name: [bool(workload.grade(index, result.text)) for index, result in enumerate(mine)]
        for workload, mine in zip(workloads, results, strict=True)
        if workload.grade is not None
    }
    mine, plain = list(itertools.chain(*results)), list(itertools.chain(*plain_results))
    tokens = sum(result.stats["committed_tokens"] for result in mine)
    forwards = sum(result.stats["forwards"] for result in mine)
    median = statistics.median(seconds)
    return Row(
        decoder=contender.decoder,
        settings=dict(contender.settings),
        promise=mine[0].promise,
        accuracy=statistics.fmean(itertools.chain(*right.values())) if right else None,
        accuracies={name: statistics.fmean(graded) for name, graded in right.items()},
        same_text=statistics.fmean(own.text == other.text for own, other in zip(mine, plain, strict=True)),
        committed_tokens=tokens,
        forwards=forwards,
        draft_forwards=sum(sum(result.stats["draft_forwards"].values()) for result in mine),
        rows=sum(result.stats["rows"] for result in mine),
        positions_fed=sum(result.stats["positions_fed"] for result in mine),
        tokens_per_forward=tokens / forwards if forwards else 0.0,
        seconds=(median, min(seconds), max(seconds)),
        tokens_per_s=tokens / median if median else 0.0,
        ratio=statistics.median(
            other / own if own else 1.0 for own, other in zip(seconds, plain_seconds, strict=True)
        ),
    )
