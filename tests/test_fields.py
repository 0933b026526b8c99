"""Plain values for the fields of dataclasses: names, types, and what the errors say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from chordal.errors import InputError, UnknownNameError
from chordal.fields import make_config


@dataclass(frozen=True, kw_only=True)
class EveryKind:
    whole: int = 1
    maybe_whole: int | None = None
    number: float = 0.5
    maybe_number: float | None = None
    is_on: bool = False
    text: str = "a"
    choice: Literal["first", "last", 3] = "first"
    maybe_choice: Literal["first", "last"] | None = None
    mixed: int | float | str = 1
    many: str | Sequence[int] = ()
    table: Mapping[int, float] | None = None
    anything: Mapping[str, Any] | None = None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("whole", 7),
        ("maybe_whole", None),
        ("maybe_whole", 7),
        ("number", 0.25),
        ("number", 2),
        ("maybe_number", None),
        ("maybe_number", 3),
        ("is_on", True),
        ("text", "b"),
        ("choice", "last"),
        ("choice", 3),
        ("maybe_choice", None),
        ("maybe_choice", "last"),
        ("mixed", 2),
        ("mixed", 2.5),
        ("mixed", "x"),
        ("many", "x"),
        ("many", [1, 2]),
        ("many", {1, 2}),
        ("table", {1: 0.5, 2: 3}),
        ("table", {}),
        ("anything", {"x": object}),
    ],
)
def test_a_value_of_the_right_kind_is_taken(name, value):
    assert getattr(make_config(EveryKind, {name: value}), name) == value


@pytest.mark.parametrize("name", ["number", "maybe_number"])
def test_a_whole_number_given_for_a_number_becomes_one(name):
    assert type(getattr(make_config(EveryKind, {name: 2}), name)) is float
    assert type(make_config(EveryKind, {"mixed": 2}).mixed) is int


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("whole", 2.0, "a whole number"),
        ("whole", "2", "a whole number"),
        ("whole", True, "a whole number"),
        ("whole", None, "a whole number"),
        ("maybe_whole", 1.5, "a whole number or none"),
        ("number", "1", "a number"),
        ("number", False, "a number"),
        ("number", None, "a number"),
        ("maybe_number", "1", "a number or none"),
        ("is_on", 1, "true or false"),
        ("is_on", "true", "true or false"),
        ("text", 5, "text"),
        ("choice", "middle", "first, last or 3"),
        ("choice", None, "first, last or 3"),
        ("maybe_choice", "middle", "first, last or none"),
        ("mixed", None, "a whole number, a number or text"),
        ("many", 5, "text or a list of whole numbers"),
        ("many", [1, "2"], "text or a list of whole numbers"),
        ("many", b"12", "text or a list of whole numbers"),
        ("many", {1: 2}, "text or a list of whole numbers"),
        ("table", [1], "a mapping from whole numbers to numbers or none"),
        ("table", {"1": 2.0}, "a mapping from whole numbers to numbers or none"),
        ("table", {1: None}, "a mapping from whole numbers to numbers or none"),
        ("anything", "x", "a mapping from texts to values or none"),
        ("anything", {1: 2}, "a mapping from texts to values or none"),
    ],
)
def test_a_value_of_the_wrong_kind_says_what_must_be_given(name, value, must):
    with pytest.raises(InputError) as error:
        make_config(EveryKind, {name: value}, "toy setting")
    assert str(error.value) == f"toy setting {name} must be {must}; got {value!r}."


def test_numbers_of_numpy_become_those_of_python():
    config = make_config(
        EveryKind,
        {"whole": np.int64(3), "number": np.float32(0.5), "many": np.arange(2), "mixed": np.int8(4)},
    )
    assert (config.whole, config.number, config.mixed, list(config.many)) == (3, 0.5, 4, [0, 1])
    assert {type(config.whole), type(config.mixed), type(config.number)} == {int, float}


def test_unknown_name_is_told_with_the_near_match():
    with pytest.raises(UnknownNameError, match=r"unknown toy setting 'hole'\. Did you mean whole"):
        make_config(EveryKind, {"hole": 1}, "toy setting")


def test_a_value_in_a_message_is_cut():
    with pytest.raises(InputError) as error:
        make_config(EveryKind, {"whole": "9" * 100_000})
    assert len(str(error.value)) < 200
