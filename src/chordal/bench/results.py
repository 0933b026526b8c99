"""What a benchmark leaves in its folder, and the figures that follow from it.

    conditions.json  everything the numbers depend on, written first; another run is refused
    runs.jsonl       one line for each finished run of (decoder, task, round), in the order they ran
    results.jsonl    one line for each decoder and task, and one for each decoder over all tasks ("all")
    summary.json     accuracy under parallelism of each decoder over its settings, and bounds from theory

The last two follow from the first two and are written anew each time. A line that is in runs.jsonl
is never run again; half a last line, of a process that was killed, is dropped.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, TypeAlias

from chordal import strict_json
from chordal.bench import metrics
from chordal.errors import InputError

Record: TypeAlias = dict[str, Any]

VERSION = 1
ALL = "all"
"""The task of rows that are over all tasks."""

# What may differ between two calls that continue one run.
_OF_A_CALL = ("command", "created")

_DIFFERENCES_SHOWN = 3
_SUMMED = ("tokens", "forwards", "draft_forwards", "rows", "positions_fed", "draft_tokens", "accepted_tokens")


class Folder:
    """The folder of one benchmark.

    Args:
        path: Where it is, or will be.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def open(self, conditions: Mapping[str, Any]) -> list[Record]:
        """Begin a run, or continue the one that is there.

        Returns:
            The runs that are done.

        Raises:
            InputError: The folder holds something else, or a run under other conditions.
        """
        given = json.loads(strict_json.dumps(conditions))
        if (self.path / "conditions.json").exists():
            differences = list(_differences(_kept(self.conditions()), _kept(given)))
            if differences:
                more = len(differences) - _DIFFERENCES_SHOWN
                raise InputError(
                    f"{self.path} holds a run under other conditions: "
                    + "; ".join(differences[:_DIFFERENCES_SHOWN])
                    + (f"; and {more} more" if more > 0 else "")
                    + ". Give another --out, or the same command to continue it."
                )
            return self._repaired_runs()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise InputError(f"{self.path} holds other files; give an empty or a new folder to --out.")
            self._write("conditions.json", strict_json.dumps(given, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror}.") from None
        return []

    def add(self, run: Mapping[str, Any]) -> None:
        """Append a finished run; it is on the disk when this returns."""
        with (self.path / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(strict_json.dumps(run) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write results.jsonl and summary.json from what was run."""
        conditions = self.conditions()
        rows = results(conditions, self.runs())
        self._write("results.jsonl", "".join(strict_json.dumps(row) + "\n" for row in rows))
        self._write("summary.json", strict_json.dumps(summary(rows), indent=2) + "\n")

    def conditions(self) -> Record:
        """Read conditions.json.

        Raises:
            InputError: There is none, or it is of another version.
        """
        try:
            found: Record = json.loads((self.path / "conditions.json").read_text(encoding="utf-8"))
            version = found["version"]
        except OSError as error:
            raise InputError(f"{self.path} is not the folder of a benchmark: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.path / 'conditions.json'} is damaged; give another folder.") from None
        if version != VERSION:
            raise InputError(
                f"{self.path} must be of version {VERSION}; it is of {version}. Run the benchmark again."
            )
        return found

    def runs(self) -> list[Record]:
        """Read the runs that are done.

        Raises:
            InputError: A line other than the last is damaged.
        """
        return [run for run, _ in self._read_runs()]

    def results(self) -> list[Record]:
        """Read the rows, computed from the runs, so that they are those of this version of Chordal.

        Raises:
            InputError: The run never finished its first round.
        """
        return results(self.conditions(), self.runs())

    def _read_runs(self) -> Iterator[tuple[Record, int]]:
        """Give each run and where its line ends, in bytes."""
        path = self.path / "runs.jsonl"
        end = 0
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, 1):
            end += len(line)
            try:
                run = json.loads(line)
                if not line.endswith(b"\n"):
                    return
            except ValueError:
                if number == len(lines):
                    return
                raise InputError(
                    f"{path}, line {number}: not JSON. Remove the line; its run is then done again."
                ) from None
            yield run, end

    def _repaired_runs(self) -> list[Record]:
        found = list(self._read_runs())
        path = self.path / "runs.jsonl"
        if path.exists():
            os.truncate(path, found[-1][1] if found else 0)
        return [run for run, _ in found]

    def _write(self, name: str, text: str) -> None:
        """Replace a file as a whole, so that there is never half of one."""
        draft = self.path / f"{name}.tmp"
        draft.write_text(text, encoding="utf-8")
        draft.replace(self.path / name)


def results(conditions: Mapping[str, Any], runs: Seq[Mapping[str, Any]]) -> list[Record]:
    """Compute the rows of a benchmark: of each decoder, first over all tasks and then of each task.

    Args:
        conditions: Of the run; the first decoder is the plain one.
        runs: Finished ones, in the order they ran. Decoders and tasks whose first round is not done, and
            rounds not done, are left out.
    """
    by_key: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    plain_by_key: dict[tuple[str, int, int], Mapping[str, Any]] = {}
    plain = conditions["decoders"][0]["label"]
    for run in runs:
        # The plain decoder runs once more in a round that is continued in another session, to be paired with.
        by_key.setdefault((run["label"], run["task"], run["round"]), run)
        if run["label"] == plain:
            plain_by_key.setdefault((run["task"], run["round"], run["session"]), run)

    def rounds_of(label: str, task: str) -> list[Mapping[str, Any]]:
        found = (by_key.get((label, task, round_)) for round_ in range(conditions["repeats"]))
        return list(itertools.takewhile(lambda run: run is not None, found))  # type: ignore[arg-type]

    tasks = {task["name"]: task for task in conditions["tasks"]}
    rows = []
    for decoder in conditions["decoders"]:
        label = decoder["label"]
        done = {task: mine for task in tasks if (mine := rounds_of(label, task))}
        # Over all tasks only if every task is there: else the rows would be of different prompts.
        overall = [ALL] if len(done) == len(tasks) else []
        for name in [*overall, *done]:
            parts = list(done) if name == ALL else [name]
            num_rounds = min(len(done[task]) for task in parts)
            paired = [
                [
                    (done[task][round_], plain_by_key.get((task, round_, done[task][round_]["session"])))
                    for task in parts
                ]
                for round_ in range(num_rounds)
            ]
            samples = [sample for task in parts for sample in done[task][0]["samples"]]
            references = [sample for task in parts for sample in _samples(by_key, plain, task)]
            rows.append(
                {
                    "label": label,
                    "decoder": decoder["decoder"],
                    "settings": decoder["settings"],
                    "promise": decoder["promise"],
                    "task": name,
                    "group": ALL if name == ALL else tasks[name]["group"],
                    **_counted(samples, references),
                    **_timed(paired, samples),
                    "is_baseline": label == plain,
                }
            )
    return rows


def summary(rows: Seq[Mapping[str, Any]]) -> Record:
    """Compute what is over several rows: accuracy under parallelism, and bounds from theory.

    Args:
        rows: As `results` gives them.
    """
    graded: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["quality"] is not None:
            point = row["tokens_per_forward"], 100 * row["quality"]["value"]
            graded.setdefault(row["task"], {}).setdefault(row["decoder"], []).append(point)
    areas = []
    for task, decoders in graded.items():
        ymax = max(accuracy for points in decoders.values() for _, accuracy in points)
        areas += [
            {
                "decoder": decoder,
                "task": task,
                "aup": metrics.aup(points, ymax=100.0),
                "aup_published": metrics.aup(points, ymax=ymax),
                "ymax": ymax,
                "points": sorted(points),
            }
            for decoder, points in decoders.items()
        ]
    return {"aup": areas, "bounds": list(_bounds(rows))}


def _samples(by_key: Mapping[tuple[str, str, int], Mapping[str, Any]], label: str, task: str) -> list[Record]:
    run = by_key.get((label, task, 0))
    return run["samples"] if run is not None else []


def _counted(samples: Seq[Mapping[str, Any]], references: Seq[Mapping[str, Any]]) -> Record:
    """Compute what follows from the counts; prompts that failed give work to the clock, and no tokens."""
    done = [sample for sample in samples if sample["error"] is None]
    sums = {name: sum(sample[name] for sample in done) for name in _SUMMED}
    texts = [reference["text_hash"] for reference in references]
    same = [
        sample["text_hash"] is not None and sample["text_hash"] == text
        for sample, text in zip(samples, texts, strict=False)
    ]
    drafts = sums.pop("draft_tokens"), sums.pop("accepted_tokens")
    return {
        "num_prompts": len(samples),
        "num_errors": len(samples) - len(done),
        "quality": _quality([sample for sample in samples if sample["right"] is not None]),
        "same_text": statistics.fmean(same) if same else None,
        **sums,
        "tokens_per_forward": metrics.tokens_per_forward(sums["tokens"], sums["forwards"]),
        "acceptance_length": metrics.acceptance_length(*drafts, sums["forwards"]),
        "acceptance_rate": metrics.acceptance_rate(*drafts),
        "prompt_tokens": sum(sample["prompt_tokens"] for sample in samples),
    }


def _quality(graded: Seq[Mapping[str, Any]]) -> Record | None:
    if not graded:
        return None
    num_right = sum(sample["right"] for sample in graded)
    interval = metrics.wilson(num_right, len(graded))
    return {
        "metric": "accuracy",
        "value": num_right / len(graded),
        "low": interval.low,
        "high": interval.high,
        "num_right": num_right,
        "num_graded": len(graded),
        "strict": statistics.fmean(sample["strict"] for sample in graded),
        "score": statistics.fmean(sample["score"] for sample in graded),
    }


_Paired: TypeAlias = Seq[Seq[tuple[Mapping[str, Any], Mapping[str, Any] | None]]]


def _timed(paired: _Paired, samples: Seq[Mapping[str, Any]]) -> Record:
    """Compute what follows from the clock.

    Args:
        paired: Of each round and task the run, and the plain decoder's beside it.
        samples: Of the first round.
    """
    seconds = [sum(run["seconds"] for run, _ in round_) for round_ in paired]
    ratios = []
    for spent, round_ in zip(seconds, paired, strict=True):
        plains = [plain["seconds"] for _, plain in round_ if plain is not None]
        if len(plains) == len(round_):
            ratios.append(sum(plains) / spent if spent else 1.0)
    waits = [_mean_wait(round_) for round_ in paired]
    peaks = [
        run["peak_memory_bytes"]
        for round_ in paired
        for run, _ in round_
        if run["peak_memory_bytes"] is not None
    ]
    tokens = sum(sample["tokens"] for sample in samples if sample["error"] is None)
    typical = metrics.spread(seconds)
    return {
        "seconds": {**typical._asdict(), "rounds": seconds},
        "tokens_per_s": tokens / typical.median if typical.median else 0.0,
        "ttft_s": statistics.median(known)
        if (known := [wait for wait in waits if wait is not None])
        else None,
        "ratio": {**metrics.spread(ratios)._asdict(), "rounds": ratios} if ratios else None,
        "peak_memory_bytes": max(peaks) if peaks else None,
    }


def _mean_wait(round_: Seq[tuple[Mapping[str, Any], Any]]) -> float | None:
    """Give the mean time to the first token over the prompts of a round."""
    waits = [(run["ttft_s"], run["num_prompts"]) for run, _ in round_ if run["ttft_s"] is not None]
    total = sum(num for _, num in waits)
    return sum(wait * num for wait, num in waits) / total if total else None


def _bounds(rows: Seq[Mapping[str, Any]]) -> Iterator[Record]:
    """Give the limits that theory sets to graded tasks, for answers as long as the plain decoder's."""
    from chordal.bench.theory import bound

    for row in rows:
        if row["is_baseline"] and row["quality"] is not None and row["tokens"]:
            limit = bound(row["task"], row["tokens"] / (row["num_prompts"] - row["num_errors"]))
            if limit is not None:
                yield {"task": row["task"], "points": list(limit.points), "form": limit.form}


def _kept(conditions: Mapping[str, Any]) -> Record:
    return {name: value for name, value in conditions.items() if name not in _OF_A_CALL}


def _differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Name each value that differs, by its path."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _differences(one, other, f"{path}[{index}]")
    elif before != now:
        yield f"{path} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        names = [
            str(entry.get("label") or entry.get("name")) if isinstance(entry, dict) else str(entry)
            for entry in value
        ]
        return f"[{', '.join(names)}]"
    return repr(value)
