"""Weight maps: how a published checkpoint names what a transformers backbone names otherwise.

A map is data and works in both directions. Names are templates: `{n}` stands for a number, the same on
both sides; a name that no rule matches is the same on both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from chordal.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Rename:
    """One weight under two names."""

    published: str
    ours: str


@dataclass(frozen=True, slots=True)
class Split:
    """One published weight whose rows are several of ours, one below the other.

    Attributes:
        published: Its template.
        ours: Templates of its parts, from the first row down.
        rows: Rows of each part; the last takes what there is, so that a wrong shape shows.
    """

    published: str
    ours: tuple[str, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class WeightMap:
    """The rules of a published layout; the first that matches a name applies."""

    rules: tuple[Rename | Split, ...] = ()

    def to_ours(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Rename published weights, and cut those that are several of ours.

        Args:
            weights: Tensors, or anything that gives rows when it is sliced.

        Raises:
            CheckpointError: Two of them are the same weight of ours.
        """
        found: dict[str, Any] = {}
        source: dict[str, str] = {}
        for name, weight in weights.items():
            for ours, value in self._parts(name, weight):
                if ours in found:
                    raise CheckpointError(
                        f"the weights hold {name} and {source[ours]}, which are the same one under two names."
                    )
                found[ours], source[ours] = value, name
        return found

    def to_published(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Give for each published weight our weights that it consists of, from the first row down."""
        found: dict[str, tuple[str, ...]] = {}
        for name in names:
            for rule in self.rules:
                parts = (rule.ours,) if isinstance(rule, Rename) else rule.ours
                fields = next((f for part in parts if (f := _match(part, name)) is not None), None)
                if fields is not None:
                    found[_fill(rule.published, fields)] = tuple(_fill(part, fields) for part in parts)
                    break
            else:
                found[name] = (name,)
        return found

    def _parts(self, name: str, weight: Any) -> list[tuple[str, Any]]:
        for rule in self.rules:
            fields = _match(rule.published, name)
            if fields is None:
                continue
            if isinstance(rule, Rename):
                return [(_fill(rule.ours, fields), weight)]
            starts = [sum(rule.rows[:part]) for part in range(len(rule.rows))]
            return [
                (_fill(part, fields), _Rows(weight, start, end))
                for part, start, end in zip(rule.ours, starts, [*starts[1:], None], strict=True)
            ]
        return [(name, weight)]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a weight that is not read yet."""

    weight: Any
    start: int
    end: int | None

    def __getitem__(self, index: Any) -> Any:
        return self.weight[self.start : self.end][index]


def _match(template: str, name: str) -> dict[str, str] | None:
    found = _pattern(template).fullmatch(name)
    return found.groupdict() if found else None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]+)", re.escape(template)))


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return template.format_map(fields)
