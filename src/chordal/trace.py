"""Traces: what happened to one request, event by event, as a file of JSON lines.

    {"type": "header", "version", "model", "decoder", "config", "prompt", "prompt_tokens"}
    {"type": "draft", "forward", "positions", "tokens", "texts", "num_accepted", "parents" of a tree}
    {"type": "commit", "forward", "positions", "tokens", "texts"}
    {"type": "end", "finish_reason", "text", "stats"}

Drafts and commits stand in the order they happened. A trace without an end was cut short.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import chordal
from chordal import strict_json
from chordal.errors import InputError

if TYPE_CHECKING:
    from chordal.generation import Generation, Model, Prompt, Request
    from chordal.sequence import Event, Sequence


class TraceWriter:
    """Writes the trace of one request; a listener of `Model.stream`.

    Args:
        file: Where to; each line is flushed, so a run that is killed leaves what it did.
        model: The model.
        prompt: As it is given to the model.
        request: How it is decoded.
    """

    def __init__(self, file: TextIO, model: Model, prompt: Prompt, request: Request) -> None:
        self._file, self._tokenizer = file, model.tokenizer
        decoder = model.decoder(request)
        self._write(
            type="header",
            version=chordal.__version__,
            model=model.name,
            decoder=decoder.name,
            config=dataclasses.asdict(decoder.config),
            prompt=prompt,
            prompt_tokens=model.encode(prompt, chat=request.chat).tolist(),
        )

    def __call__(self, seq: Sequence, event: Event) -> None:
        """Write an event."""
        tokens = event.tokens.tolist()
        more: dict[str, Any] = {"num_accepted": event.num_accepted} if event.kind == "draft" else {}
        if event.parents is not None:
            more["parents"] = event.parents.tolist()
        self._write(
            type=event.kind,
            forward=event.forward,
            positions=event.positions.tolist(),
            tokens=tokens,
            texts=token_texts(self._tokenizer, tokens),
            **more,
        )

    def end(self, result: Generation) -> None:
        """Write how it ended."""
        self._write(type="end", finish_reason=result.finish_reason, text=result.text, stats=result.stats)

    def _write(self, **record: Any) -> None:
        self._file.write(strict_json.dumps(record) + "\n")
        self._file.flush()


@dataclass(frozen=True)
class Trace:
    """A trace as it was written.

    Attributes:
        header: Model, decoder, config, prompt.
        events: Drafts and commits in order.
        end: Finish reason, text and counters; None if the run was cut short.
    """

    header: dict[str, Any]
    events: list[dict[str, Any]]
    end: dict[str, Any] | None


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace file.

    Raises:
        InputError: It cannot be read or is not a trace.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}.") from None
    records = []
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
        records.append(record)
    if not records:
        raise InputError(f"{path} is empty; a trace starts with a header.")
    end = records.pop() if records[-1]["type"] == "end" else None
    return Trace(header=records[0], events=records[1:], end=end)


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
