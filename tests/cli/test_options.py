from __future__ import annotations

import dataclasses
import inspect

import pytest

from chordal.cli.compare import compare
from chordal.cli.generate import generate
from chordal.cli.options import parse_settings
from chordal.errors import InputError
from chordal.generation import Request


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-3", -3),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("False", False),
        ("none", None),
        ("null", None),
        ("dual", "dual"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_values_are_read_as_yaml_scalars(text, value):
    [read] = parse_settings([f"key={text}"]).values()
    assert (read, type(read)) == (value, type(value))


def test_keys_may_have_dashes():
    assert parse_settings(["num-draft=5", "match=last"]) == {"num_draft": 5, "match": "last"}


@pytest.mark.parametrize("pair", ["num_draft", "=5", ""])
def test_setting_without_key_or_value_is_refused(pair):
    with pytest.raises(InputError, match="key=value"):
        parse_settings([pair])


@pytest.mark.parametrize("command", [generate, compare])
def test_defaults_are_those_of_the_library(command):
    parameters = inspect.signature(command).parameters
    # The command line's --trace names a file.
    fields = [field for field in dataclasses.fields(Request) if field.name in parameters.keys() - {"trace"}]
    assert len(fields) >= 8
    for field in fields:
        assert parameters[field.name].default == field.default
