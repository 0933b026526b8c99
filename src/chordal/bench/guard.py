"""Approximate decoders and the quality they have: a floor to hold, and a word where nobody measured.

What `chordal bench` measures is remembered in `quality.jsonl` in a folder of the user's:
`$CHORDAL_STATE`, else `$XDG_STATE_HOME/chordal`, else `~/.local/state/chordal`. A line says of one
decoder with all its settings, on a model with these weights, what share of prompts was right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chordal import strict_json
from chordal.bench.results import ALL
from chordal.stats import TARGET

if TYPE_CHECKING:
    from chordal.decoders.decoder import Decoder
    from chordal.generation import Model

MIN_GRADED = 20
"""Graded prompts that make a measurement."""

_told: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a decoder holds the floor.

    Attributes:
        label: Of the decoder.
        quality: Its share of right answers over all tasks.
        needed: What it must be at least.
    """

    label: str
    quality: float
    needed: float

    @property
    def is_held(self) -> bool:
        """Whether it is good enough."""
        return self.quality >= self.needed


def judge(rows: Seq[Mapping[str, Any]], floor: float) -> list[Verdict]:
    """Compare each decoder's quality over all tasks with that of plain decoding.

    Args:
        rows: Of a benchmark, as `results` gives them; its tasks must be graded.
        floor: Share of the plain decoder's quality that is needed, from 0 to 1.
    """
    overall = [row for row in rows if row["task"] == ALL and row["quality"] is not None]
    plain = next(row["quality"]["value"] for row in overall if row["is_baseline"])
    return [
        Verdict(row["label"], row["quality"]["value"], floor * plain)
        for row in overall
        if not row["is_baseline"]
    ]


def remember(model: Model, conditions: Mapping[str, Any], rows: Seq[Mapping[str, Any]]) -> None:
    """Note the measured quality of every decoder, for `notice`; where nothing can be written, nothing is.

    Fewer than `MIN_GRADED` prompts do not count as measured.
    """
    asked = {decoder["label"]: decoder["models"] for decoder in conditions["decoders"]}
    measured = [
        {
            "of": _key(model, row["decoder"], row["settings"], asked[row["label"]]),
            "quality": row["quality"],
            "tasks": [task["name"] for task in conditions["tasks"] if task["grader"] is not None],
            "created": conditions["created"],
        }
        for row in rows
        if row["task"] == ALL and row["quality"] is not None and row["quality"]["num_graded"] >= MIN_GRADED
    ]
    again = [line["of"] for line in measured]
    path = _path()
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(path) if line.get("of") not in again]
        draft.write_text(
            "".join(strict_json.dumps(line) + "\n" for line in [*kept, *measured]), encoding="utf-8"
        )
        draft.replace(path)


def notice(model: Model, decoder: Decoder) -> str | None:
    """Say that nobody measured how good a decoder is on a model; once for each in a process.

    Returns:
        One sentence; None for exact decoders, for the model's own plain one, for what was measured, and for
        what this was said of before.
    """
    if decoder.promise == "exact" or _is_plain(model, decoder):
        return None
    key = _key(model, decoder.name, dataclasses.asdict(decoder.config), decoder.needs_models)
    text = strict_json.dumps(key)
    if text in _told or any(line.get("of") == json.loads(text) for line in _lines(_path())):
        return None
    _told.add(text)
    return (
        f"Note: {decoder.name} with these settings is approximate, and its quality on {model.name} was never "
        f"measured here; chordal bench measures it."
    )


def _is_plain(model: Model, decoder: Decoder) -> bool:
    """Whether it is the default of the model's kind, with its own, the plain or the published settings."""
    family = model.family
    if decoder.name != family.default_decoder:
        return False
    from chordal.registry import make_decoder

    return any(
        decoder.config == make_decoder(decoder.name, settings).config
        for settings in ({}, family.plain_settings, family.settings)
    )


def _key(model: Model, decoder: str, settings: Mapping[str, Any], asked: Seq[str]) -> dict[str, Any]:
    engine = model.engine
    return {
        "model": model.name,
        "weights": getattr(engine.models[TARGET], "fingerprint", None),
        "others": {name: engine.models[name].name for name in asked},
        "decoder": decoder,
        "settings": dict(settings),
    }


def _path() -> Path:
    """Give the file of what was measured."""
    if state := os.environ.get("CHORDAL_STATE"):
        return Path(state) / "quality.jsonl"
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "chordal" / "quality.jsonl"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Give what was measured; a line that is no object, of a process that was killed, is skipped."""
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict):
                    yield line
