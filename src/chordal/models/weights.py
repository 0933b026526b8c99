"""Weight maps: how a published checkpoint names what a transformers backbone names otherwise.

A map is data and works in both directions. Names are templates: `{n}` stands for a number, the same on
both sides; a name that no rule matches is the same on both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


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
        rows: Rows of each part.
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
        """
        found: dict[str, Any] = {}
        for name, weight in weights.items():
            for rule in self.rules:
                fields = _match(rule.published, name)
                if fields is None:
                    continue
                if isinstance(rule, Rename):
                    found[_fill(rule.ours, fields)] = weight
                else:
                    start = 0
                    for part, rows in zip(rule.ours, rule.rows, strict=True):
                        found[_fill(part, fields)] = _Rows(weight, start, start + rows)
                        start += rows
                break
            else:
                found[name] = weight
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


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a weight that is not read yet."""

    weight: Any
    start: int
    end: int

    def __getitem__(self, index: Any) -> Any:
        return self.weight[self.start : self.end][index]


def _match(template: str, name: str) -> dict[str, str] | None:
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(template))
    found = re.fullmatch(pattern, name)
    return found.groupdict() if found else None


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return template.format_map(fields)
