"""The benchmark's runner: every decoder on every task, timed alike, in a folder that can be continued.

A round takes the tasks in turn, and for each task all decoders, in the other direction every second
round, so that a machine that slows down slows all of them down. A ratio pairs two runs of one task,
one round and one process. Counts and texts are the same in every round and are taken from the first.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import chordal
from chordal.bench.compare import Contender, describe_setup, with_plain
from chordal.bench.memory import PeakMemory
from chordal.bench.results import VERSION, Folder, Record
from chordal.bench.tasks.task import Grade
from chordal.errors import InputError
from chordal.generation import make_request
from chordal.stats import TARGET, Stats

if TYPE_CHECKING:
    from chordal.bench.tasks.workload import Workload
    from chordal.decoders.decoder import Decoder
    from chordal.generation import Model, Request
    from chordal.sequence import Event, Sequence

Clock = Callable[[], float]

_FAILED = Grade(right=False, score=0.0, strict=False)

# Fields of a request that say how tokens are drawn and texts end; the rest is of the decoder or the task.
_SAMPLING = tuple(
    field.name
    for field in dataclasses.fields(chordal.Request)
    if field.name not in ("decoder", "config", "max_new_tokens", "trace")
)


def run_benchmark(
    model: Model,
    workloads: Seq[Workload],
    contenders: Iterable[Contender],
    folder: Folder,
    *,
    repeats: int = 5,
    command: str = "",
    clock: Clock = time.perf_counter,
    on_run: Callable[[int, int, str], None] = lambda done, total, words: None,
    **settings: Any,
) -> None:
    """Run what is not in the folder yet, then write its results.

    Args:
        model: The model; its engine says how many prompts share a forward pass.
        workloads: What to decode; each has a name of its own.
        contenders: With what; the plain decoder of the model's kind is added in front.
        folder: Where each finished run is noted at once; what is there under the same conditions is not
            run again.
        repeats: Rounds, at least 1.
        command: What the user typed, to be noted.
        clock: Gives the time in seconds.
        on_run: Called before each run with how many are done, of how many, and what comes next.
        **settings: Fields of `Request` for every prompt, e.g. the temperature.

    Raises:
        InputError: A decoder does not fit the model or no prompt of a task, or the folder is another run's.
    """
    if repeats < 1:
        raise InputError(f"repeats must be at least 1; got {repeats}.")
    names = [workload.name for workload in workloads]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"each task must have a name of its own; {', '.join(sorted(twice))} comes twice.")
    lineup = with_plain(model, contenders)
    conditions = describe_conditions(model, workloads, lineup, repeats=repeats, command=command, **settings)
    runs = folder.open(conditions)
    session = 1 + max((run["session"] for run in runs), default=-1)
    done = {(run["label"], run["task"], run["round"]) for run in runs}
    total = repeats * len(workloads) * len(lineup)
    blocks = _blocks(lineup, workloads, repeats, done)
    stopwatch = _Stopwatch(model, settings, clock)

    # What was there before is no run's garbage; so that looking for a run's own takes no time.
    gc.freeze()
    try:
        # One batch, untimed: what is slow the first time is over, and what cannot work fails here.
        for workload, contender in itertools.product(workloads, lineup):
            if any(contender in missing for _, other, missing in blocks if other is workload):
                on_run(len(done), total, f"warm-up: {contender.label}, {workload.name}")
                batch = stopwatch.prepare(contender, workload, model.engine.max_rows)
                stopwatch.run(contender, workload, batch)
                _refuse_misuse(contender, workload, batch)

        for round_, workload, missing in blocks:
            for contender in missing:
                on_run(len(done), total, f"{contender.label}, {workload.name}")
                seqs = stopwatch.prepare(contender, workload)
                timing = stopwatch.run(contender, workload, seqs)
                key = contender.label, workload.name, round_
                run: Record = {"label": key[0], "task": key[1], "round": round_, "session": session}
                run |= {"num_prompts": len(seqs), **timing}
                if round_ == 0 and key not in done:
                    run["samples"] = [_sample(workload, index, seq) for index, seq in enumerate(seqs)]
                folder.add(run)
                done.add(key)
    finally:
        gc.unfreeze()
    on_run(total, total, "done")
    folder.finish()


def describe_conditions(
    model: Model,
    workloads: Seq[Workload],
    lineup: Seq[Contender],
    *,
    repeats: int,
    command: str,
    **settings: Any,
) -> Record:
    """Give what the numbers of a benchmark depend on: conditions.json.

    Raises:
        InputError: A decoder or a setting does not fit the model.
    """
    setup = describe_setup(model, repeats=repeats)
    request = make_request(settings)
    decoders = [
        (one, model.decoder(make_request({**settings, "decoder": one.decoder, "config": one.settings})))
        for one in lineup
    ]
    others = {name: other.name for name, other in model.engine.models.items() if name != TARGET}
    return {
        "version": VERSION,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model.name,
        "weights": getattr(model.engine.target, "fingerprint", None),
        "draft": others.get("draft"),
        "middle": others.get("middle"),
        "hardware": {
            "cpu": _cpu(),
            "device": setup["device"],
            "memory_gib": _memory_gib(),
        },
        "dtype": setup["dtype"],
        "threads": setup["threads"],
        "batch_size": setup["batch_size"],
        "repeats": repeats,
        "seed": request.seed,
        "sampling": {name: getattr(request, name) for name in _SAMPLING},
        "versions": {**setup["versions"], "python": platform.python_version()},
        "commit": _commit(),
        "tasks": [
            {
                "name": workload.name,
                "group": workload.group,
                "num_prompts": len(workload.prompts),
                "hash": workload.hash,
                "max_new_tokens": workload.max_new_tokens,
                "grader": workload.grader,
            }
            for workload in workloads
        ],
        "decoders": [
            {
                "label": one.label,
                "decoder": decoder.name,
                "settings": dataclasses.asdict(decoder.config),
                "promise": decoder.promise,
                "models": list(decoder.needs_models),
            }
            for one, decoder in decoders
        ],
    }


def _blocks(
    lineup: Seq[Contender], workloads: Seq[Workload], repeats: int, done: Collection[tuple[str, str, int]]
) -> list[tuple[int, Workload, list[Contender]]]:
    """Give round, task, and who is missing there, in the order they run.

    Whoever is left of a block that was begun in another process has the plain decoder beside it again.
    """
    blocks = []
    for round_, workload in itertools.product(range(repeats), workloads):
        order = lineup if round_ % 2 == 0 else lineup[::-1]
        missing = [one for one in order if (one.label, workload.name, round_) not in done]
        if missing:
            blocks.append((round_, workload, [one for one in order if one is lineup[0] or one in missing]))
    return blocks


class _Stopwatch:
    """Decodes prompts and times it.

    Args:
        model: The model.
        settings: Fields of `Request` for every prompt.
        clock: Gives the time in seconds.
    """

    def __init__(self, model: Model, settings: Mapping[str, Any], clock: Clock) -> None:
        self._model, self._settings, self._clock = model, settings, clock
        self._memory = PeakMemory(model)

    def prepare(
        self, contender: Contender, workload: Workload, num: int | None = None
    ) -> list[Sequence | InputError]:
        """Make the sequences of the first so many prompts; what cannot be one is an error of its own."""
        request = self._request(contender, workload)
        return [_sequence(self._model, prompt, request) for prompt in workload.prompts[:num]]

    def run(self, contender: Contender, workload: Workload, seqs: Seq[Sequence | InputError]) -> Record:
        """Decode sequences; give what the clock and the memory said."""
        gc.collect()
        decoder = self._model.decoder(self._request(contender, workload))
        self._memory.reset()
        started = self._clock()
        waits = self._decode(decoder, [seq for seq in seqs if not isinstance(seq, InputError)])
        device = self._model.engine.target.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return {
            "seconds": self._clock() - started,
            "ttft_s": statistics.fmean(waits) if waits else None,
            "peak_memory_bytes": self._memory.read(),
        }

    def _decode(self, decoder: Decoder, seqs: Seq[Sequence]) -> list[float]:
        """Decode, each as soon as the engine has a row for it, so that none waits in a queue.

        Returns:
            Of each that got one, seconds from when it joined to its first committed token.
        """
        engine, clock = self._model.engine, self._clock
        waiting = deque(seqs)
        live: list[Sequence] = []
        joined: dict[int, float] = {}
        waits: dict[int, float] = {}

        def listen(seq: Sequence, event: Event) -> None:
            if event.kind == "commit" and id(seq) not in waits:
                waits[id(seq)] = clock() - joined[id(seq)]

        try:
            while waiting or live:
                while waiting and len(live) < engine.max_rows:
                    live.append(seq := waiting.popleft())
                    seq.listeners.append(listen)
                    joined[id(seq)] = clock()
                    try:
                        engine.submit(decoder, seq)
                    except InputError as error:  # the decoder fits the model, so it is this prompt
                        seq.finish("error", error)
                if engine.has_work:
                    engine.step()
                live = [seq for seq in live if not seq.done]
        finally:
            for seq in live:
                engine.cancel(seq)
        return list(waits.values())

    def _request(self, contender: Contender, workload: Workload) -> Request:
        more = {"config": contender.settings, "max_new_tokens": workload.max_new_tokens}
        return make_request({**self._settings, "decoder": contender.decoder, **more})


def _sequence(model: Model, prompt: Any, request: Request) -> Sequence | InputError:
    try:
        return model.sequence(prompt, request)
    except InputError as error:
        return error


def _refuse_misuse(contender: Contender, workload: Workload, batch: Seq[Sequence | InputError]) -> None:
    """Raise if no prompt of a batch can be used as it was asked: that is nobody's failing sample."""
    errors = [seq if isinstance(seq, InputError) else seq.error for seq in batch]
    if errors and all(isinstance(error, InputError) for error in errors):
        raise InputError(f"{contender.label} on {workload.name}: {errors[0]}") from errors[0]


def _sample(workload: Workload, index: int, seq: Sequence | InputError) -> Record:
    """Say how one prompt went; one that failed is wrong, and its text does not exist."""
    error: Exception | None
    reason: str | None
    if isinstance(seq, InputError):
        error, text, num_prompt, reason, stats = seq, None, 0, "error", Stats().to_dict()
    else:
        error, num_prompt, reason, stats = seq.error, seq.num_prompt, seq.finish_reason, seq.stats.to_dict()
        text = seq.text if error is None else None
    grade = None
    if workload.grade is not None:
        grade = _FAILED if text is None else workload.grade(index, text)
    return {
        "index": index,
        "right": None if grade is None else grade.right,
        "score": None if grade is None else grade.score,
        "strict": None if grade is None else grade.strict,
        "prompt_tokens": num_prompt,
        "tokens": stats["committed_tokens"],
        "forwards": stats["forwards"],
        "draft_forwards": sum(stats["draft_forwards"].values()),
        "rows": stats["rows"],
        "positions_fed": stats["positions_fed"],
        "draft_tokens": stats["draft_tokens"],
        "accepted_tokens": stats["accepted_tokens"],
        "finish_reason": reason,
        "error": None if error is None else f"{type(error).__name__}: {error}",
        "text_hash": None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def _cpu() -> str:
    """Give the processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError):  # not on this system
        return None


def _commit() -> str | None:
    """Give the commit of Chordal's source, marked if files under it differ; None if it was installed."""
    source = Path(chordal.__file__).parent
    if not (source.parent.parent / ".git").exists():
        return None

    def git(*args: str) -> str:
        command = ["git", "-C", str(source), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit} with changes" if git("status", "--porcelain", "--", ".") else commit
    except (OSError, subprocess.CalledProcessError):
        return None
