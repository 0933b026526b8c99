"""Prompt files: one JSON value a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from chordal.errors import InputError, PromptError


@dataclass(frozen=True)
class PromptLine:
    """A line of a prompt file.

    Attributes:
        number: Of the line, from 1.
        prompt: Text, token ids or chat messages; None if the line has no prompt.
        extra: What else the line said, to be passed on to its result.
        error: What is wrong with the line, if something is.
    """

    number: int
    prompt: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    error: PromptError | None = None


def open_prompts(path: str) -> AbstractContextManager[BinaryIO]:
    """Open a prompt file, "-" for standard input.

    Raises:
        InputError: It cannot be read.
    """
    if path == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from None


def read_prompts(file: BinaryIO) -> Iterator[PromptLine]:
    """Read a prompt file line by line; blank lines are skipped, bad ones carry their error.

    A line is a JSON text, or an object with "prompt" (text or token ids) or "messages" (chat); what
    else the object holds is kept.
    """
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                prompt, extra = _parse(line)
            except PromptError as error:
                yield PromptLine(number, error=error)
            else:
                yield PromptLine(number, prompt, extra)


def read_all_prompts(path: str) -> list[Any]:
    """Read every prompt of a file, "-" for standard input.

    Raises:
        InputError: The file cannot be read.
        PromptError: A line holds no prompt, or none does.
    """
    prompts = []
    with open_prompts(path) as file:
        for line in read_prompts(file):
            if line.error is not None:
                raise PromptError(f"{path}, line {line.number}: {line.error}")
            prompts.append(line.prompt)
    if not prompts:
        raise PromptError(f"{path} holds no prompts.")
    return prompts


def count_prompts(file: BinaryIO) -> int | None:
    """Count the lines that are not blank and go back to the start; None where one cannot go back."""
    if not file.seekable():
        return None
    count = sum(1 for line in file if line.strip())
    file.seek(0)
    return count


def _parse(line: bytes) -> tuple[Any, dict[str, Any]]:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        # A lone surrogate is valid JSON but no text: it could not be written again.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise PromptError("not valid UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise PromptError(f"not JSON: {error.msg} at column {error.colno}.") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"not JSON: {error}.") from None
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, dict):
        raise PromptError('must be an object with "prompt" or "messages", or a text.')
    if ("prompt" in value) == ("messages" in value):
        raise PromptError('needs "prompt" or "messages", and not both.')
    if "messages" in value:
        return _messages(value.pop("messages")), value
    prompt = value.pop("prompt")
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not (isinstance(prompt, str) or is_ids):
        raise PromptError('"prompt" must be text or a list of token ids.')
    return prompt, value


def _messages(value: Any) -> list[dict[str, Any]]:
    is_chat = isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in value
    )
    if not is_chat or not value:
        raise PromptError('"messages" must be a list of objects with "role" and "content".')
    messages: list[dict[str, Any]] = value
    return messages


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")
