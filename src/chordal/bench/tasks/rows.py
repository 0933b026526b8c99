"""JSON-lines files: values with the line they come from, so that errors can name it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from chordal.errors import InputError


@dataclass(frozen=True)
class Row:
    """A line of a file.

    Attributes:
        path: Of the file.
        number: Of the line, from 1.
        value: The JSON object it holds.
    """

    path: str
    number: int
    value: Mapping[str, Any]

    def error(self, problem: str) -> InputError:
        """Make an error that names the line."""
        return InputError(f"{self.path}, line {self.number}: {problem}")

    def get(self, key: str, kind: type, *, within: str | None = None) -> Any:
        """Give a value, checked for its type.

        Raises:
            InputError: There is none, or it is of another type.
        """
        holder = self.value if within is None else self.value[within]
        if not isinstance(holder.get(key), kind) or isinstance(holder[key], bool):
            where = key if within is None else f"{within}.{key}"
            raise self.error(f'"{where}" must be {_KINDS[kind]}; got {json.dumps(holder.get(key))[:60]}.')
        return holder[key]


_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


def read_rows(path: str) -> Iterator[Row]:
    """Read the lines that are not blank, whatever JSON value they hold.

    Args:
        path: Of the file; one that ends with .gz is unpacked.

    Raises:
        InputError: It cannot be read, or a line is not JSON.
    """
    opener: Callable[..., Any] = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield Row(path, number, json.loads(line))
                    except (ValueError, RecursionError) as error:
                        raise InputError(f"{path}, line {number}: not JSON in UTF-8: {error}.") from None
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None


def read_objects(path: str) -> list[Row]:
    """Read the lines of a file whose first line is an object.

    Raises:
        InputError: It cannot be read, or another line is no object.
    """
    rows = [*read_rows(path)]
    for row in rows:
        if not isinstance(row.value, dict):
            raise row.error(f"must be an object like the first line; got {json.dumps(row.value)[:60]}.")
    return rows
