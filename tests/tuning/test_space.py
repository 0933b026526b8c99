from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace
from typing import Literal

import pytest

from chordal.fields import make_config
from chordal.registry import decoder_class, decoder_names
from chordal.tuning import space
from chordal.tuning.space import OneOf, Real, Whole, defaults_of, space_of


def values_of(given):
    if isinstance(given, OneOf):
        return given.values
    return given.low, given.high


@pytest.mark.parametrize("name", decoder_names())
def test_every_default_is_in_its_range(name):
    defaults = defaults_of(name)
    assert {setting for setting, given in space_of(name).items() if defaults[setting] not in given} == set()


@pytest.mark.parametrize("name", decoder_names())
def test_a_decoder_takes_every_value_of_its_ranges(name):
    """Alone or, as one setting may bound another or belong to it, among some draw of all the others."""
    config, space, rng = decoder_class(name).Config, space_of(name), random.Random(0)

    def fits(settings):
        try:
            make_config(config, settings)
        except ValueError:
            return False
        return True

    for setting, given in space.items():
        for value in values_of(given):
            draws = [{other: rng.choice(values_of(its)) for other, its in space.items()} for _ in range(100)]
            assert any(fits(draw | {setting: value}) for draw in [{}, *draws]), f"{setting}={value}"


@pytest.mark.parametrize("name", decoder_names())
def test_steps_divide_their_range(name):
    for setting, given in space_of(name).items():
        if isinstance(given, Real):
            steps = (given.high - given.low) / given.step
            assert steps == pytest.approx(round(steps)), setting


def test_choices_are_read_from_the_config():
    assert space_of("prompt_lookup")["match"] == OneOf(("first", "last"))
    assert space_of("copyspec")["adaptive"] == OneOf((False, True))


def test_a_plug_in_is_searched_over_its_choices_and_usual_settings(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        num_draft: int = 4
        threshold: float = 7.5
        rule: Literal["a", "b"] = "a"
        fast: bool = True
        other: int = 3

    monkeypatch.setattr(space, "decoder_class", lambda name: SimpleNamespace(Config=Config))
    # A threshold of 7.5 is no probability, so the usual range is not for it.
    assert space_of("mine") == {
        "num_draft": Whole(1, 32, log=True),
        "rule": OneOf(("a", "b")),
        "fast": OneOf((False, True)),
    }
