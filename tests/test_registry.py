from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import pytest

from chordal.decoders.autoregressive import Autoregressive
from chordal.decoders.decoder import Decoder
from chordal.errors import InputError, UnknownNameError
from chordal.registry import (
    decoder_class,
    decoder_names,
    list_decoders,
    make_config,
    make_decoder,
)

# Each has a page; what has none is not there for users.
BUILT_IN = {path.stem for path in (Path(__file__).parents[1] / "docs/decoders").glob("*.md")}

PLUGIN = """
from dataclasses import dataclass
from chordal.decoders.autoregressive import Autoregressive

@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    width: int = 3

class Toy(Autoregressive):
    name = "{name}"
    Config = ToyConfig
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
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


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a plug-in as pip would: a module and its metadata on the path."""

    def install(name):
        (tmp_path / "toy_plugin.py").write_text(PLUGIN.format(name=name))
        info = tmp_path / "toy_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[chordal.decoders]\n{name} = toy_plugin:Toy\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    sys.modules.pop("toy_plugin", None)


def test_built_in_decoders_come_under_their_own_names_and_files():
    assert set(decoder_names()) == BUILT_IN
    for name in BUILT_IN:
        cls = decoder_class(name)
        assert cls.name == name
        assert cls.__module__ == f"chordal.decoders.{name}"


def test_the_list_describes_every_decoder():
    rows = list_decoders()
    assert [row["name"] for row in rows] == decoder_names()
    for row in rows:
        assert list(row) == ["name", "family", "promise", "exact_when", "needs", "paper"]
        assert row["family"] in ("autoregressive", "diffusion")
        needs = {need.split(" + ")[0].removesuffix(" MoE") for need in row["needs"]}
        assert needs <= {"causal", "masked", "block", "masked_causal", "uniform", "looped"}
        # Whoever does not promise exactness says at which setting there would be some.
        assert (row["promise"], bool(row["exact_when"])) in [("exact", False), ("approximate", True)]


def test_an_unknown_decoder_is_answered_with_near_matches_and_all_names():
    with pytest.raises(UnknownNameError) as error:
        decoder_class("promt_lookup")
    assert str(error.value) == (
        f"unknown decoder 'promt_lookup'. Did you mean prompt_lookup? Known: {', '.join(sorted(BUILT_IN))}."
    )
    with pytest.raises(UnknownNameError, match=r"unknown decoder 'zzz'\. Known: "):
        make_decoder("zzz")


def test_settings_make_the_config_and_the_rest_keeps_its_defaults():
    decoder = make_decoder("prompt_lookup", {"num_draft": 5})
    assert (decoder.config.num_draft, decoder.config.max_ngram) == (5, 3)
    assert make_decoder("prompt_lookup").config == decoder_class("prompt_lookup").Config()


def test_an_unknown_setting_names_the_decoder_and_the_near_match():
    with pytest.raises(
        UnknownNameError, match=r"unknown prompt_lookup setting 'num_drafts'\. Did you mean num_draft"
    ):
        make_decoder("prompt_lookup", {"num_drafts": 5})


def test_a_setting_out_of_range_is_refused():
    with pytest.raises(InputError, match=r"num_draft must be at least 0; got -1\."):
        make_decoder("prompt_lookup", {"num_draft": -1})


def test_a_ready_decoder_passes_through_but_takes_no_settings():
    decoder = Autoregressive()
    assert make_decoder(decoder) is decoder
    with pytest.raises(InputError, match="settings belong to a decoder given by name"):
        make_decoder(decoder, {"num_draft": 5})


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
    ],
)
def test_a_value_of_the_wrong_kind_says_what_must_be_given(name, value, must):
    with pytest.raises(InputError) as error:
        make_config(EveryKind, {name: value}, "toy setting")
    assert str(error.value) == f"toy setting {name} must be {must}; got {value!r}."


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_config_survives_a_round_trip_through_plain_values(name):
    config = decoder_class(name).Config()
    assert make_config(type(config), dataclasses.asdict(config)) == config


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_config_is_frozen_and_documented(name):
    cls = decoder_class(name).Config
    assert cls.__doc__
    assert cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))


def test_a_plug_in_is_found_by_its_entry_point(install):
    own = decoder_names()
    install("toy")
    assert decoder_names() == [*own, "toy"]
    decoder = make_decoder("toy", {"width": 4})
    assert isinstance(decoder, Decoder)
    assert (decoder.name, decoder.config.width) == ("toy", 4)
    assert list_decoders()[-1]["name"] == "toy"
    with pytest.raises(UnknownNameError, match="Did you mean toy"):
        decoder_class("toyy")


def test_a_plug_in_is_not_imported_before_it_is_asked_for(install):
    install("toy")
    decoder_names()
    decoder_class("autoregressive")
    assert "toy_plugin" not in sys.modules


def test_a_plug_in_cannot_take_the_place_of_a_built_in_decoder(install):
    own = decoder_names()
    install("autoregressive")
    assert decoder_names() == own
    assert decoder_class("autoregressive") is Autoregressive
