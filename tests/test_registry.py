from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from chordal.decoders.autoregressive import Autoregressive
from chordal.decoders.decoder import Decoder
from chordal.errors import InputError, UnknownNameError
from chordal.fields import make_config
from chordal.registry import (
    decoder_class,
    decoder_names,
    list_decoders,
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
