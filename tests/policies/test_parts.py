from __future__ import annotations

import dataclasses
import re
from inspect import Parameter
from pathlib import Path

import pytest

from chordal.cli.options import parse_settings
from chordal.decoders.denoise import DenoiseConfig
from chordal.policies.parts import PARTS
from chordal.registry import decoder_class

PAGE = Path(__file__).parents[2] / "docs/decoders/denoise.md"
ALL = [(slot, name) for slot, parts in PARTS.items() for name in parts]


@pytest.mark.parametrize(("slot", "name"), ALL)
def test_every_setting_of_a_part_is_a_setting_of_denoise(slot, name):
    fields = {field.name for field in dataclasses.fields(DenoiseConfig)}
    assert set(PARTS[slot][name].settings) <= fields


@pytest.mark.parametrize(
    ("decoder", "parts"),
    [
        ("low_confidence", [("feed", "whole")]),
        ("threshold", [("feed", "whole"), ("commit", "threshold")]),
        ("localleap", [("feed", "dual"), ("commit", "local_leap")]),
        ("credit_decoding", [("feed", "prefix"), ("commit", "threshold"), ("refine", "credit")]),
        ("prophet", [("feed", "whole"), ("stop", "prophet")]),
        ("fast_dllm_v2", [("feed", "sub_block"), ("commit", "threshold")]),
    ],
)
def test_a_part_has_the_defaults_of_its_decoder(decoder, parts):
    config = decoder_class(decoder).Config()
    for slot, name in parts:
        for setting, default in PARTS[slot][name].settings.items():
            if hasattr(config, setting) and default is not Parameter.empty:
                assert getattr(config, setting) == default


def test_the_page_gives_every_part_with_its_settings_and_defaults():
    rows = re.findall(r"^\| (\w+)=(\w+) \|.*\| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [(slot, name) for slot, name, _ in rows] == ALL
    for slot, name, told in rows:
        settings = dict(re.findall(r"(\w+) ((?:\(must be given\)|one a token|[\w.]+))", told))
        part = PARTS[slot][name]
        assert settings.keys() == part.settings.keys()
        for setting, default in part.settings.items():
            if default is Parameter.empty:
                assert settings[setting] in ("(must be given)", "one a token")
            else:
                assert parse_settings([f"{setting}={settings[setting]}"])[setting] == default
