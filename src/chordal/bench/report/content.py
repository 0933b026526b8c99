"""What a report says: the rows of a benchmark, what stands out, what failed and what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from chordal.bench.results import ALL, Folder
from chordal.errors import InputError

Record: TypeAlias = dict[str, Any]

# Of each decoder and task; one broken setting fails every prompt in the same way.
_MESSAGES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Content:
    """All that a report shows.

    Attributes:
        conditions: As in conditions.json.
        rows: As in results.jsonl, in its order.
        aup: As in summary.json: accuracy under parallelism of each decoder over its settings.
        bounds: As in summary.json: of a task the best accuracy (0 to 1) at so many tokens per forward
            that are committed independently.
        highlights: Heading, label of the decoder, figure and a sentence: the short answer.
        failures: Label, task, how many samples failed, and the first messages with their sample's index.
        missing: Label and task of rows that the conditions name and the results lack.
    """

    conditions: Record
    rows: list[Record]
    aup: list[Record]
    bounds: list[Record]
    highlights: list[Record]
    failures: list[Record]
    missing: list[Record]


def read(directory: str | os.PathLike[str]) -> Content:
    """Read the folder of a benchmark.

    Raises:
        InputError: It is not one, or a file is damaged.
    """
    folder = Folder(directory)
    conditions = folder.conditions()
    path = folder.path / "results.jsonl"
    # Not splitlines, which also splits at separators that JSON allows inside a string.
    rows = [_parse(line, path) for line in _text(path).split("\n") if line]
    summary_path = folder.path / "summary.json"
    summary = _parse(_text(summary_path), summary_path) if summary_path.exists() else {}
    there = {(row["label"], row["task"]) for row in rows}
    return Content(
        conditions=conditions,
        rows=rows,
        aup=summary.get("aup", []),
        bounds=summary.get("bounds", []),
        highlights=list(_highlights(rows)),
        failures=list(_failures(rows, folder.runs())),
        missing=[
            {"label": decoder["label"], "task": task["name"]}
            for decoder in conditions["decoders"]
            for task in conditions["tasks"]
            if (decoder["label"], task["name"]) not in there
        ],
    )


def loses_nothing(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> bool:
    """Tell whether nothing measured speaks for a loss of quality.

    No prompt failed, and the interval of the accuracy reaches the baseline's accuracy; where nothing is
    graded, every text is the baseline's. Few prompts give wide intervals: it is no proof of equality.
    """
    if row["num_errors"]:
        return False
    if row["quality"] is None or baseline["quality"] is None:
        return bool(row["same_text"] == 1)
    return bool(row["quality"]["high"] >= baseline["quality"]["value"])


def _highlights(rows: Sequence[Record]) -> Iterator[Record]:
    """Name the fastest decoder of each promise over all tasks."""
    overall = [row for row in rows if row["task"] == ALL]
    baseline = next((row for row in overall if row["is_baseline"]), None)
    if baseline is None:
        return
    rivals = [row for row in overall if not row["is_baseline"] and row["ratio"] is not None]
    for heading, promise in (
        ("Fastest with exact output", "exact"),
        ("Fastest approximate, no loss measured", "approximate"),
    ):
        kin = [row for row in rivals if row["promise"] == promise]
        able = [
            row
            for row in kin
            if (not row["num_errors"] if promise == "exact" else loses_nothing(row, baseline))
        ]
        if not kin:
            continue
        best = max(able, key=lambda row: row["ratio"]["median"], default=None)
        if best is None:
            text = f"Each of the {len(kin)} {promise} decoders lost accuracy or failed on some prompt."
            yield {"heading": heading, "label": None, "value": "none", "text": text}
            continue
        ratio = best["ratio"]
        figures = (
            f"Quartiles {ratio['low']:.2f} to {ratio['high']:.2f}, "
            f"{best['tokens_per_forward']:.2f} tokens per forward, {_quality_words(best, baseline)}"
        )
        # Where the quartiles of the ratio reach 1, the rounds do not agree on which of the two is faster.
        if ratio["low"] <= 1:
            figures = f"Not reliably faster than plain decoding. {figures}"
        value = f"{ratio['median']:.2f}x"
        yield {"heading": heading, "label": best["label"], "value": value, "text": figures}


def _quality_words(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    if row["quality"] is None or baseline["quality"] is None:
        share = row["same_text"]
        return "quality not measured." if share is None else f"{100 * share:.1f}% of texts the same."
    quality, plain = row["quality"], baseline["quality"]
    return (
        f"accuracy {100 * quality['value']:.1f}% ({100 * quality['low']:.1f} to {100 * quality['high']:.1f}; "
        f"plain {100 * plain['value']:.1f}%)."
    )


def _failures(rows: Sequence[Record], runs: Sequence[Record]) -> Iterator[Record]:
    samples = {(run["label"], run["task"]): run.get("samples") or [] for run in runs if run["round"] == 0}
    for row in rows:
        if row["num_errors"] and row["task"] != ALL:
            failed = [
                {"index": sample["index"], "error": sample["error"]}
                for sample in samples.get((row["label"], row["task"]), [])
                if sample["error"] is not None
            ]
            yield {
                "label": row["label"],
                "task": row["task"],
                "num_errors": row["num_errors"],
                "num_prompts": row["num_prompts"],
                "messages": failed[:_MESSAGES_SHOWN],
            }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Run chordal bench first.") from None


def _parse(text: str, path: Path) -> Record:
    try:
        found: Record = json.loads(text)
    except ValueError:
        raise InputError(f"{path} is damaged; the same chordal bench command writes it anew.") from None
    return found
