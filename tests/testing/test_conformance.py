"""Every registered decoder keeps to what `chordal.testing` asks, with every one of its options."""

from __future__ import annotations

import dataclasses

import pytest

from chordal.registry import decoder_class, decoder_names
from chordal.testing import CHECKS, subjects

CONFIGS = {
    "autoregressive": [{}],
    "prompt_lookup": [
        {},
        {"num_draft": 0},
        {"num_draft": 3, "max_ngram": 2, "match": "first"},
        {"max_ngram": 5, "min_ngram": 2},
    ],
    "low_confidence": [
        {},
        {"block_length": None, "num_steps": 5},
        {"block_length": 5, "num_steps": 20},
        {"block_length": 4, "num_steps": 6, "order": "random"},
        {"order": "origin", "num_steps": 7},
        {"order": "maskgit_plus", "num_steps": 7, "order_temperature": 0.5},
        {"order": "topk_margin", "num_steps": 7},
        {"order": "entropy", "num_steps": 7},
        {"cfg_scale": 1.5, "num_steps": 6},
        {"ban_eos": True},
        {"defer_eos": True},
    ],
    "threshold": [
        {},
        {"threshold": 0.1, "block_length": 5},
        {"threshold": 0.2, "block_length": None},
        {"factor": 1.0, "block_length": 4},
        {"threshold": 0.2, "feed": "prefix", "block_length": 5},
        {"threshold": 0.2, "feed": "dual", "block_length": 5},
    ],
    "block_diffusion": [
        {},
        {"num_steps": 2},
        {"num_steps": 2, "order": "left_to_right", "merge": False},
        {"num_steps": 3, "order": "random"},
        {"threshold": 0.1},
        {"threshold": 0.2, "num_steps": 2, "merge": False},
        {"entropy_bound": 2.0},
    ],
    "wedlm": [
        {},
        {"entropy_threshold": None, "window_length": 4},
        {"entropy_threshold": 1.5, "distance_penalty": 0.1, "window_length": 5},
        {"entropy_threshold": 9.0, "distance_penalty": 0.0, "window_length": 3},
    ],
}


def _cases():
    """The default settings run on every kind of model, the others on one kind in turn."""
    for name in decoder_names():
        for at, settings in enumerate(CONFIGS.get(name, [{}])):
            every = subjects(name, settings)
            for subject in every if not settings else [every[at % len(every)]]:
                given = [f"{key}={value}" for key, value in settings.items()]
                yield pytest.param(subject, id="-".join([name, *given, str(subject)]))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", [*_cases()])
def test_decoder(subject, check):
    check(subject)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_is_used_at_least_once(name):
    options = {field.name for field in dataclasses.fields(decoder_class(name).Config)}
    assert options == {key for settings in CONFIGS[name] for key in settings}
