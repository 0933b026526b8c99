"""The report as Markdown: the same figures as tables, for terminals, reviews and version control."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from chordal.bench.report.content import Content, Record
from chordal.bench.results import ALL

_NONE = "-"

# What Markdown or HTML would read as more than text, in a cell of a table as well.
_MARKUP = re.compile(r"([\\`*_\[\]<>|#~&!])")


def to_markdown(content: Content) -> str:
    """Give the whole report as text."""
    parts = [
        [f"# Benchmark of {_plain(content.conditions['model'])}"],
        _setup(content),
        _highlights(content.highlights),
        *_task_tables(content),
        _aup(content.aup),
        _failures(content),
        _conditions(content.conditions),
    ]
    return "\n".join(line for part in parts if part for line in [*part, ""])


def _setup(content: Content) -> list[str]:
    conditions = content.conditions
    words = [
        conditions.get("hardware", {}).get("device"),
        conditions.get("dtype"),
        f"batch size: {conditions.get('batch_size')}",
        f"timed rounds: {conditions.get('repeats')}",
    ]
    lines = [_plain(", ".join(str(word) for word in words if word)) + "."]
    if failed := sum(failure["num_errors"] for failure in content.failures):
        lines.append(f"**{failed} samples failed; they count as wrong.**")
    if content.missing:
        lines.append(f"**Unfinished: {len(content.missing)} runs have no figures yet.**")
    return lines


def _highlights(highlights: Sequence[Record]) -> list[str]:
    lines = []
    for highlight in highlights:
        label = f"{_code(highlight['label'])}, " if highlight["label"] is not None else ""
        lines.append(f"- {highlight['heading']}: {label}{highlight['value']}. {highlight['text']}")
    return lines


def _task_tables(content: Content) -> Iterator[list[str]]:
    """Give the figures over all tasks in full, then accuracy, parallelism and speed by task."""
    rows = content.rows
    if overall := [row for row in rows if row["task"] == ALL]:
        yield ["## All tasks", "", *_figures(overall)]
    tasks = [task["name"] for task in content.conditions["tasks"]]
    for task in tasks:
        if mine := [row for row in rows if row["task"] == task]:
            yield [f"## {_plain(task)}", "", *_figures(mine)]


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = [
        "decoder",
        "promise",
        "accuracy (95%)",
        "same text",
        "tokens/forward",
        "acceptance length",
        "ratio (quartiles)",
        "tokens/s",
        "first token ms",
        "forwards",
        "of other models",
        "positions fed",
        "failed",
    ]
    return _table(columns, (_cells(row) for row in rows), num_text=2)


def _cells(row: Mapping[str, Any]) -> list[str]:
    quality, ratio = row["quality"], row["ratio"]
    accuracy = _NONE
    if quality is not None:
        spread = f"{100 * quality['low']:.1f} to {100 * quality['high']:.1f}"
        accuracy = f"{100 * quality['value']:.1f}% ({spread})"
    return [
        _code(row["label"]) + (" (plain)" if row["is_baseline"] else ""),
        row["promise"],
        accuracy,
        _number(row["same_text"], 1, scale=100, unit="%"),
        _number(row["tokens_per_forward"], 2),
        _number(row["acceptance_length"], 2),
        _NONE if ratio is None else f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})",
        _number(row["tokens_per_s"], 1),
        _number(row["ttft_s"], 1, scale=1000),
        f"{row['forwards']:,}",
        f"{row['draft_forwards']:,}",
        f"{row['positions_fed']:,}",
        str(row["num_errors"]),
    ]


def _aup(areas: Sequence[Mapping[str, Any]]) -> list[str]:
    if not areas:
        return []
    columns = ["decoder", "task", "AUP, fixed", "AUP, as published", "best accuracy", "settings"]
    lines = (
        [
            _code(area["decoder"]),
            _plain(area["task"]),
            _number(area["aup"], 1),
            _number(area["aup_published"], 1),
            _number(area["ymax"], 1, unit="%"),
            str(len(area["points"])),
        ]
        for area in areas
    )
    return ["## Accuracy under parallelism", "", *_table(columns, lines, num_text=2)]


def _failures(content: Content) -> list[str]:
    lines = ["## What failed", ""]
    for failure in content.failures:
        lines.append(
            f"- {_code(failure['label'])} on {_plain(failure['task'])}: "
            f"{failure['num_errors']} of {failure['num_prompts']} samples"
        )
        lines += [
            f"  - sample {message['index']}: {_plain(message['error'])}" for message in failure["messages"]
        ]
    lines += [f"- {_code(run['label'])} on {_plain(run['task'])}: not run yet" for run in content.missing]
    return lines if len(lines) > 2 else [*lines, "Nothing: every sample of every decoder was decoded."]


def _conditions(conditions: Mapping[str, Any]) -> list[str]:
    lines = ["## Conditions", ""]
    for name, value in conditions.items():
        if name not in ("tasks", "decoders"):
            text = _code(str(value)) if name in ("command", "commit") else _plain(_words(value))
            lines.append(f"- {name.replace('_', ' ')}: {text}")
    names = list(dict.fromkeys(name for task in conditions["tasks"] for name in task))
    tasks = ([_plain(_words(task.get(name))) for name in names] for task in conditions["tasks"])
    lines += ["", *_table([name.replace("_", " ") for name in names], tasks, num_text=len(names)), ""]
    decoders = (
        [_code(decoder["label"]), decoder["promise"], _plain(_words(decoder["settings"]))]
        for decoder in conditions["decoders"]
    )
    return [*lines, *_table(["decoder", "promise", "settings"], decoders, num_text=3)]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, num_text: int) -> list[str]:
    """Lay out a table; the first columns are text, the others align to the right."""
    rules = ["---" if index < num_text else "---:" for index in range(len(columns))]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rules, *rows)]


def _number(value: float | None, digits: int, *, scale: float = 1, unit: str = "") -> str:
    return f"{scale * value:.{digits}f}{unit}" if isinstance(value, (int, float)) else _NONE


def _words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_words(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(_words(entry) for entry in value)
    return str(value)


def _plain(text: str) -> str:
    """Write text so that it stays text and on its line."""
    return _MARKUP.sub(r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    """Write text as code; where a backquote or a pipe would end it, as plain text."""
    return _plain(text) if "`" in text or "|" in text else f"`{' '.join(text.split())}`"
