"""Traces: what happened to one request, event by event, as a file of JSON lines.

docs/trace.md describes the format. A trace without an end was cut short.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, get_args

import numpy as np

import chordal
from chordal import strict_json
from chordal.errors import InputError
from chordal.ops import tree
from chordal.sequence import EventKind
from chordal.stats import TARGET

if TYPE_CHECKING:
    from chordal.generation import Generation, Model, Prompt, Request
    from chordal.sequence import Event, Sequence

# Version of the format. The first had no such number, no guesses, confidences, canvas ends or pieces.
FORMAT = 2

_REPLACEMENT = "\ufffd"  # stands for bytes that are no whole character


@dataclass(frozen=True, kw_only=True)
class TracedEvent:
    """An event as a trace tells it.

    Attributes:
        kind: "draft", "commit" or "guess"; see `sequence.Event`.
        forward: The target's forward pass, counted from 1; 0 before the first.
        forwards: Forward passes of the other models so far.
        canvas_end: One past the last position in use; None in old traces, which do not say it.
        positions: Absolute position of each token.
        tokens: Token ids.
        texts: Text of each token.
        confidence: Its probability, None where it is not known; None if none is.
        kept: Of a draft, indices of the tokens that were kept, along the path.
        parents: Of a draft with branches, index of each token's parent, -1 for the last committed token.
        revised: Of a guess or commit, indices of the tokens that stand where another one was guessed.
    """

    kind: EventKind
    forward: int
    positions: list[int]
    tokens: list[int]
    texts: list[str]
    forwards: dict[str, int] = field(default_factory=dict)
    canvas_end: int | None = None
    confidence: list[float | None] | None = None
    kept: list[int] = field(default_factory=list)
    parents: list[int] | None = None
    revised: list[int] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Give it as a line of the file; what is empty is left out."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        record = {"type": values.pop("kind"), **values}
        always = {"type", "forward", "positions", "tokens", "texts"}
        if self.kind == "draft":
            record["num_accepted"] = len(self.kept)
            always |= {"kept", "num_accepted"}
        return {
            name: value for name, value in record.items() if name in always or value not in (None, [], {})
        }


class Tracer:
    """Tells what the events of one sequence mean, in their order.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._guesses: dict[int, int] = {}

    def __call__(self, seq: Sequence, event: Event) -> TracedEvent:
        """Describe an event."""
        positions, tokens = event.positions.tolist(), event.tokens.tolist()
        placed = list(zip(positions, tokens, strict=True))
        revised: list[int] = []
        if event.kind != "draft":
            revised = [
                index
                for index, (position, token) in enumerate(placed)
                if self._guesses.get(position, token) != token
            ]
            if event.kind == "guess":
                self._guesses = dict(placed)
        confidence = None
        if event.confidence is not None:
            # Five digits tell apart all that a reader could see.
            confidence = [None if math.isnan(one) else round(one, 5) for one in event.confidence.tolist()]
        return TracedEvent(
            kind=event.kind,
            forward=event.forward,
            forwards={name: count for name, count in seq.stats.forwards.items() if name != TARGET},
            canvas_end=seq.canvas_end,
            positions=positions,
            tokens=tokens,
            texts=token_texts(self._tokenizer, tokens),
            confidence=confidence,
            kept=[] if event.kept is None else event.kept.tolist(),
            parents=None if event.parents is None else event.parents.tolist(),
            revised=revised,
        )


class TraceWriter:
    """Writes the trace of one request; a listener of `Model.stream`.

    Args:
        file: Where to; each line is flushed, so a run that is killed leaves what it did.
        model: The model.
        prompt: As it is given to the model.
        request: How it is decoded.
    """

    wants_confidence = True

    def __init__(self, file: TextIO, model: Model, prompt: Prompt, request: Request) -> None:
        self._file, self._tokenizer, self._tracer = file, model.tokenizer, Tracer(model.tokenizer)
        decoder = model.decoder(request)
        prompt_tokens = model.encode(prompt, chat=request.chat).tolist()
        self._write(
            type="header",
            format=FORMAT,
            version=chordal.__version__,
            model=model.name,
            models={name: one.name for name, one in model.engine.models.items()},
            decoder=decoder.name,
            promise=decoder.promise,
            config=dataclasses.asdict(decoder.config),
            prompt=prompt,
            prompt_tokens=prompt_tokens,
            prompt_text=self._tokenizer.decode(prompt_tokens),
            special_tokens=sorted(self._tokenizer.all_special_ids),
        )

    def __call__(self, seq: Sequence, event: Event) -> None:
        """Write an event."""
        self._write(**self._tracer(seq, event).record())

    def end(self, result: Generation) -> None:
        """Write how it ended."""
        self._write(
            type="end",
            finish_reason=result.finish_reason,
            text=result.text,
            pieces=pieces(self._tokenizer, result.tokens, result.text),
            stats=result.stats,
        )

    def _write(self, **record: Any) -> None:
        self._file.write(strict_json.dumps(record) + "\n")
        self._file.flush()


@dataclass(frozen=True)
class Trace:
    """A trace as it was written.

    Attributes:
        header: Model, decoder, config, prompt.
        events: Drafts, commits and guesses in order.
        end: Finish reason, text and counters; None if the run was cut short.
    """

    header: dict[str, Any]
    events: list[TracedEvent]
    end: dict[str, Any] | None

    @property
    def num_prompt(self) -> int:
        """Length of the prompt."""
        return len(self.header["prompt_tokens"])

    def passes(self) -> list[list[TracedEvent]]:
        """Group the events by the forward pass that they came from, of whichever model."""
        by_pass = itertools.groupby(self.events, lambda event: (event.forward, event.forwards))
        return [list(events) for _, events in by_pass]


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace file, of this version or an older one.

    Raises:
        InputError: It cannot be read or is not a trace.
    """
    try:
        # Not splitlines: texts may hold separators that JSON leaves as they are.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}.") from None
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise InputError(f"{path} is empty; a trace starts with a header.")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            kind = record["type"]
        except (ValueError, TypeError, KeyError):
            # The last line of a run that was killed may be half a line.
            if number == len(lines) > 1:
                break
            raise InputError(f"{path}, line {number}: must be an object with a type.") from None
        if (kind == "header") != (number == 1):
            raise InputError(f"{path}, line {number}: a trace has one header, on its first line.")
        if records and records[-1]["type"] == "end":
            raise InputError(f"{path}, line {number}: nothing may follow the end of a trace.")
        records.append(record)

    end = records.pop() if records[-1]["type"] == "end" else None
    events: list[TracedEvent] = []
    number = 1
    try:
        _check_header(records[0])
        number = len(lines)
        if end is not None:
            _check_end(end)
        for number, record in enumerate(records[1:], 2):
            events.append(_read_event(record, records[number] if number < len(records) else {}))
    except (KeyError, TypeError, ValueError) as error:
        what = f"needs {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}, line {number}: is not of a trace: {what}.") from None
    return Trace(records[0], events, end)


def token_texts(tokenizer: Any, tokens: Iterable[int]) -> list[str]:
    """Give the text of each token as it reads inside a text, special tokens by their names.

    Tokenizers drop a blank at the start of what they decode, so each token is decoded behind
    another. A token that is part of a character reads as U+FFFD.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]

    def decode(*ids: int) -> str:
        text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    skipped = len(decode(anchor))
    return [decode(anchor, token)[skipped:] for token in tokens]


def visible(text: str) -> str:
    """Write line breaks and tabs as escapes, so that a text stays on its line."""
    return text.replace("\n", "\\n").replace("\t", "\\t")


def pieces(tokenizer: Any, tokens: list[int], text: str) -> list[str] | None:
    """Split a text over its tokens, so that the pieces together are the text.

    A character that is spread over tokens stands with the last of them, special tokens have no text, and
    what a stop string cut off is empty. None for a tokenizer whose texts do not go on from each other.
    """
    parts: list[str] = []
    # Decoding starts at a token whose text was complete, so that a long text does not cost its square.
    start, given = 0, 0
    for end in range(1, len(tokens) + 1):
        seen: str = tokenizer.decode(tokens[start:end], skip_special_tokens=True)
        is_whole = not seen.endswith(_REPLACEMENT) or end == len(tokens)
        parts.append(seen[given:] if is_whole else "")
        if is_whole:
            start = end - 1
            given = len(tokenizer.decode(tokens[start:end], skip_special_tokens=True))
    cut, num_left = list[str](), len(text)
    for part in parts:
        cut.append(part[:num_left])
        num_left -= len(cut[-1])
    return cut if "".join(cut) == text else None


def _check_header(record: dict[str, Any]) -> None:
    if (given := record.get("format", 1)) > FORMAT:
        raise ValueError(f"it has format {given}, and this Chordal reads up to {FORMAT}")
    _ints(record, "prompt_tokens")


def _check_end(record: dict[str, Any]) -> None:
    if not isinstance(record["text"], str):
        raise ValueError("text must be a string")
    for name in ("forwards", "committed_tokens", "draft_tokens", "accepted_tokens"):
        if type(record["stats"][name]) is not int:
            raise ValueError(f"{name} must be an integer")


def _read_event(record: dict[str, Any], following: dict[str, Any]) -> TracedEvent:
    """Read an event; the one behind it tells what of a tree was kept where the trace is too old to say."""
    if record["type"] not in get_args(EventKind):
        raise ValueError(f"its types are header, {', '.join(get_args(EventKind))} and end")
    tokens, parents = _ints(record, "tokens"), _ints(record, "parents") if "parents" in record else None
    if "kept" in record:
        kept = _ints(record, "kept")
    else:
        drafted = np.array(tokens, np.int64)
        above = tree.chain(len(drafted)) if parents is None else np.array(parents, np.int64)
        came = _ints(following, "tokens") if following.get("type") == "commit" else []
        path = tree.follow(drafted, above, np.array(came, np.int64)).tolist()
        kept = path[: record.get("num_accepted", 0)]
    event = TracedEvent(
        kind=record["type"],
        forward=int(record["forward"]),
        forwards=dict(record.get("forwards", {})),
        canvas_end=record.get("canvas_end"),
        positions=_ints(record, "positions"),
        tokens=tokens,
        texts=[str(text) for text in record["texts"]],
        confidence=record.get("confidence"),
        kept=kept,
        parents=parents,
        revised=_ints(record, "revised") if "revised" in record else [],
    )
    known = [one for one in event.confidence or [] if one is not None]
    if not all(isinstance(one, int | float) and math.isfinite(one) for one in known):
        raise ValueError("confidence must be a list of numbers, null where it is not known")
    columns = (event.positions, event.texts, event.confidence, event.parents)
    if any(column is not None and len(column) != len(tokens) for column in columns):
        raise ValueError("positions, tokens, texts, confidence and parents must be of one length")
    if any(not 0 <= index < len(tokens) for index in [*kept, *event.revised]):
        raise ValueError("kept and revised must be indices of its tokens")
    if any(not -1 <= parent < index for index, parent in enumerate(parents or [])):
        raise ValueError("a parent must stand before its child")
    return event


def _ints(record: dict[str, Any], name: str) -> list[int]:
    values = record[name]
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{name} must be a list of integers")
    return values
