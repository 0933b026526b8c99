"""Fields of dataclasses given as plain values: what must hold of names and types is checked, and said."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import reprlib
import types
import typing
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, cast

from chordal.errors import InputError, UnknownNameError


def make_config(cls: type[Any], settings: Mapping[str, Any], kind: str = "setting") -> Any:
    """Make a config dataclass from plain values.

    Args:
        cls: The dataclass.
        settings: Values by field name; the others keep their defaults.
        kind: What a field is called in messages.

    Raises:
        UnknownNameError: There is no field of a name.
        InputError: A value is of the wrong type.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    for name in settings:
        if name not in names:
            raise UnknownNameError(kind, name, names)
    return cls(**{name: take_field(cls, name, value, f"{kind} {name}") for name, value in settings.items()})


def take_field(cls: type[Any], name: str, value: Any, called: str) -> Any:
    """Give the value of a field as it is declared: a float for a whole number, Python's numbers for numpy's.

    Args:
        cls: The dataclass.
        name: Of the field.
        value: What was given for it.
        called: What the field is called in messages.

    Raises:
        InputError: The value is of the wrong type.
    """
    # A class can be hashed, whatever mypy makes of the __hash__ its instances have.
    hint = _hints(cast(Hashable, cls))[name]
    if not _fits(value, hint):
        raise InputError(f"{called} must be {_describe(hint)}; got {reprlib.repr(value)}.")
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return float(value) if float in _options(hint) and int not in _options(hint) else int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else value


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _options(hint: Any) -> tuple[Any, ...]:
    # Which of the two `X | None` is depends on X.
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_one(value, option) for option in _options(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if kind is typing.Literal:
        return value in inner
    if kind is Mapping:
        key, item = inner
        return isinstance(value, Mapping) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    if kind is Sequence:  # sets and arrays do as well, text does not
        is_many = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
        return is_many and all(_fits(item, inner[0]) for item in value)
    if hint in (int, float):
        number = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    parts: list[str] = []
    for option in _options(hint):
        parts += _describe_one(option)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _describe_one(hint: Any) -> list[str]:
    words = {int: "a whole number", float: "a number", str: "text", type(None): "none"}
    many = {int: "whole numbers", float: "numbers", str: "texts", Any: "values"}
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return ["true", "false"]
    if kind is typing.Literal:
        return [str(value) for value in inner]
    if kind is Mapping:
        return [f"a mapping from {many[inner[0]]} to {many[inner[1]]}"]
    if kind is Sequence:
        return [f"a list of {many[inner[0]]}"]
    return [words.get(hint, f"a {hint.__name__}")]
