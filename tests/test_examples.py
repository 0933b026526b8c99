"""The example decoder, installed as CONTRIBUTING says, is a decoder like any other."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from chordal.engine import Engine
from chordal.models.family import Family
from chordal.registry import ENTRY_POINT_GROUP, decoder_names, make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import CHECKS, ToyModel, subjects

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def stutter(monkeypatch):
    """Make the registry find the entry point that CONTRIBUTING shows, and the example behind it."""
    [shown] = re.findall(
        r"^```toml\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
    )
    declared = tomllib.loads(shown)["project"]["entry-points"][ENTRY_POINT_GROUP]
    entries = [metadata.EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in declared.items()]
    monkeypatch.setattr(
        metadata, "entry_points", lambda group: metadata.EntryPoints(entries).select(group=group)
    )
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield
    sys.modules.pop("stutter", None)


class Stuttering(ToyModel):
    """Gives every token four times: position p holds p // 4."""

    def logits(self, position, view):
        logits = np.zeros(self.vocab_size)
        logits[(position + 1) // 4] = 9
        return logits


def test_the_example_is_found_by_name():
    assert decoder_names()[-1] == "stutter"
    assert make_decoder("stutter", {"num_draft": 3}).config.num_draft == 3


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_example_conforms(check):
    [subject] = subjects("stutter", {"num_draft": 3})
    check(subject)


def test_the_example_drafts_what_a_stuttering_model_says():
    seq = Sequence(prompt=np.array([0]), family=Family(), stop=StopRules(max_new_tokens=12))
    engine = Engine(Stuttering(Family(), vocab_size=8))
    engine.submit(make_decoder("stutter"), seq)
    engine.run()
    assert seq.tokens.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    # In turn a pass keeps both drafts and adds a token, and one finds a new token instead. The last
    # pass is for one token and needs no draft.
    stats = seq.stats.to_dict()
    assert (stats["forwards"], stats["draft_tokens"], stats["accepted_tokens"]) == (6, 10, 6)
