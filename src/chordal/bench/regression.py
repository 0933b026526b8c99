"""Which rows of a benchmark got faster, slower, better or worse than in an earlier one, beyond noise.

Speed: the logarithms of a decoder's ratios to plain decoding, one for each round, before and after,
by Welch's test that they differ by more than a tolerance: a ratio is paired within a process, and two
processes of one program may still differ by a few percent. Quality: the same prompts before and after, by
McNemar's exact test. Of all rows together, any is wrongly called changed in speed with the probability
`LEVEL` at most, and the same for quality (Holm).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from chordal.bench import metrics
from chordal.bench.results import ALL, Folder, Record
from chordal.errors import InputError

LEVEL = 0.05


@dataclass(frozen=True)
class Change:
    """How one row compares with the same row before.

    Attributes:
        label: Of the decoder.
        task: Or "all".
        speed: "faster", "slower" or "same"; None if it cannot be judged.
        quality: "better", "worse" or "same", likewise.
        ratio: Speed relative to plain decoding before and after, None where there is none.
        ratio_p: p-value of the test of speed.
        accuracy: Before and after, None where nothing is graded.
        accuracy_p: p-value of the test of quality.
        tokens_per_forward: Before and after.
        num_texts_changed: Prompts whose text is another one now.
    """

    label: str
    task: str
    speed: str | None
    quality: str | None
    ratio: tuple[float, float] | None
    ratio_p: float | None
    accuracy: tuple[float, float] | None
    accuracy_p: float | None
    tokens_per_forward: tuple[float, float]
    num_texts_changed: int


@dataclass(frozen=True)
class Regression:
    """What changed between two benchmarks.

    Attributes:
        changes: Of every row that both have.
        notes: What could not be compared, and why, one sentence each.
    """

    changes: list[Change]
    notes: list[str] = field(default_factory=list)

    @property
    def is_worse(self) -> bool:
        """Whether some row is slower or worse beyond noise."""
        return any(change.speed == "slower" or change.quality == "worse" for change in self.changes)


def compare_folders(before: Folder, after: Folder, *, tolerance: float = 0.03) -> Regression:
    """Compare two benchmarks row by row.

    Args:
        before: The earlier one.
        after: The later one.
        tolerance: Change in speed that does not count, at least 0; 0.03 is 3%.

    Raises:
        InputError: A folder is not that of a benchmark, or they have nothing in common.
    """
    sides = [_Side(folder) for folder in (before, after)]
    old, new = sides
    notes = _notes(old, new)
    shared = [key for key in old.rows if key in new.rows and old.hashes[key[1]] == new.hashes[key[1]]]
    speeds = {
        key: p for key in shared if (p := _test_speed(old.rows[key], new.rows[key], tolerance)) is not None
    }
    grades = {key: p for key in shared if (p := _test_quality(old.right[key], new.right[key])) is not None}
    is_faster = dict(zip(speeds, metrics.holm([*speeds.values()], LEVEL), strict=True))
    is_better = dict(zip(grades, metrics.holm([*grades.values()], LEVEL), strict=True))
    if not shared:
        raise InputError(
            f"{before.path} and {after.path} have no decoder and task with the same prompts in common."
        )
    changes = []
    for key in shared:
        rows = old.rows[key], new.rows[key]
        ratio, accuracy = _both(rows, "ratio", "median"), _both(rows, "quality", "value")
        changes.append(
            Change(
                label=rows[1]["label"],
                task=key[1],
                speed=_verdict(is_faster.get(key), _log_ratio_change(*rows), "faster", "slower"),
                quality=_verdict(
                    is_better.get(key), accuracy[1] - accuracy[0] if accuracy else 0, "better", "worse"
                ),
                ratio=ratio,
                ratio_p=speeds.get(key),
                accuracy=accuracy,
                accuracy_p=grades.get(key),
                tokens_per_forward=(rows[0]["tokens_per_forward"], rows[1]["tokens_per_forward"]),
                num_texts_changed=sum(
                    one != other for one, other in zip(old.texts[key], new.texts[key], strict=True)
                ),
            )
        )
    return Regression(changes, notes)


_Key = tuple[str, str]


class _Side:
    """One of the two benchmarks, by decoder with its settings and by task."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.conditions = folder, folder.conditions()
        self.hashes: dict[str, Any] = {task["name"]: task["hash"] for task in self.conditions["tasks"]}
        self.hashes[ALL] = sorted(self.hashes.items())
        samples: dict[tuple[str, str], list[Record]] = {}
        for run in folder.runs():
            if "samples" in run:
                samples[run["label"], run["task"]] = run["samples"]
        self.rows: dict[_Key, Record] = {}
        self.right: dict[_Key, list[bool | None]] = {}
        self.texts: dict[_Key, list[str | None]] = {}
        for row in folder.results():
            key = row["label"], row["task"]
            tasks = sorted(self.hashes.keys() - {ALL}) if row["task"] == ALL else [row["task"]]
            mine = [sample for task in tasks for sample in samples[row["label"], task]]
            self.rows[key] = row
            self.right[key] = [sample["right"] for sample in mine]
            self.texts[key] = [sample["text_hash"] for sample in mine]


def _test_speed(before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float) -> float | None:
    """Give the p-value of "as fast as before, up to the tolerance", None with too few rounds to tell."""
    old, new = _log_ratios(before), _log_ratios(after)
    if before["is_baseline"] or after["is_baseline"] or min(len(old), len(new)) < 2:
        return None
    return metrics.welch(old, new, margin=math.log1p(tolerance))


def _test_quality(before: Seq[bool | None], after: Seq[bool | None]) -> float | None:
    pairs = [
        (one, other)
        for one, other in zip(before, after, strict=True)
        if one is not None and other is not None
    ]
    lost = sum(one and not other for one, other in pairs)
    won = sum(other and not one for one, other in pairs)
    return metrics.mcnemar(lost, won) if pairs else None


def _log_ratios(row: Mapping[str, Any]) -> list[float]:
    return [math.log(ratio) for ratio in row["ratio"]["rounds"]] if row["ratio"] else []


def _log_ratio_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    old, new = _log_ratios(before), _log_ratios(after)
    return statistics.fmean(new) - statistics.fmean(old) if old and new else 0.0


def _verdict(has_changed: bool | None, difference: float, up: str, down: str) -> str | None:
    if has_changed is None:
        return None
    if not has_changed:
        return "same"
    return up if difference > 0 else down


def _both(rows: tuple[Record, Record], name: str, figure: str) -> tuple[float, float] | None:
    one, other = (row[name] for row in rows)
    return None if one is None or other is None else (one[figure], other[figure])


def _notes(old: _Side, new: _Side) -> list[str]:
    notes = []
    for name in ("model", "weights", "hardware", "dtype", "threads", "batch_size", "sampling", "versions"):
        if old.conditions[name] != new.conditions[name]:
            notes.append(f"{name} differs: {old.conditions[name]} before, {new.conditions[name]} after.")
    for task, digest in old.hashes.items():
        if task != ALL and new.hashes.get(task, digest) != digest:
            notes.append(f"{task} has other prompts now and is not compared.")
    for one, other, when in ((old, new, "before"), (new, old, "after")):
        only = sorted({f"{label} on {task}" for label, task in one.rows if (label, task) not in other.rows})
        if only:
            notes.append(f"only {when}: {'; '.join(only)}.")
    rounds = min(side.conditions["repeats"] for side in (old, new))
    if rounds < 2:
        notes.append("speed is not judged with a single round; use --repeats 5.")
    plain = old.conditions["decoders"][0]["label"]
    rows = old.rows.get((plain, ALL)), new.rows.get((plain, ALL))
    if rows[0] and rows[1] and old.hashes[ALL] == new.hashes[ALL]:
        change = rows[1]["seconds"]["median"] / rows[0]["seconds"]["median"] - 1
        notes.append(
            f"plain decoding took {change:+.1%} time, which is not judged: the machine may have been busier."
        )
    return notes
