from __future__ import annotations

from typing import get_args

import pytest

from chordal.errors import CheckpointError
from chordal.models.family import Family, Kind, make_family
from chordal.registry import decoder_class


def make(facts, *, name="chordal", eos_ids=(2,)):
    return make_family(facts, name=name, vocab_size=100, eos_ids=eos_ids)


def test_a_causal_model_needs_no_more_than_its_kind():
    assert make({"family": "causal"}) == Family(
        name="chordal", kind="causal", mask_id=None, shift=1, block_length=None, eos_ids=(2,)
    )


def test_models_that_fill_in_masks_predict_the_token_at_a_position_unless_they_say_otherwise():
    masked = make({"family": "masked", "mask_token_id": 99})
    assert masked == Family(name="chordal", kind="masked", mask_id=99, shift=0, eos_ids=(2,))
    block = make({"family": "block", "mask_token_id": 0, "block_length": 4, "shift": 1}, name="sdar")
    assert block == Family(name="sdar", kind="block", mask_id=0, shift=1, block_length=4, eos_ids=(2,))
    reordered = make({"family": "masked_causal", "mask_token_id": 1, "settings": {"entropy_threshold": 0.4}})
    assert (reordered.kind, reordered.shift) == ("masked_causal", 0)
    assert reordered.settings == {"entropy_threshold": 0.4}


def test_a_model_of_random_canvases_has_no_mask_token_but_a_vocabulary():
    uniform = make({"family": "uniform", "block_length": 8})
    assert uniform == Family(
        name="chordal", kind="uniform", shift=0, block_length=8, vocab_size=100, eos_ids=(2,)
    )


MASKED = {"family": "masked", "mask_token_id": 1}
BLOCK = {"family": "block", "mask_token_id": 1, "block_length": 4}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, f"family must be one of {get_args(Kind)}; got None."),
        ({"family": "diffusion"}, f"family must be one of {get_args(Kind)}; got 'diffusion'."),
        ({"family": ["masked"]}, f"family must be one of {get_args(Kind)}; got ['masked']."),
        ({"family": "masked"}, "mask_token_id is missing, and a masked model needs it."),
        ({"family": "block", "block_length": 4}, "mask_token_id is missing, and a block model needs it."),
        ({"family": "masked_causal"}, "mask_token_id is missing, and a masked_causal model needs it."),
        (MASKED | {"mask_token_id": 100}, "mask_token_id must be from 0 to 99; got 100."),
        (MASKED | {"mask_token_id": -1}, "mask_token_id must be from 0 to 99; got -1."),
        (MASKED | {"mask_token_id": "<m>"}, "mask_token_id must be from 0 to 99; got '<m>'."),
        (MASKED | {"mask_token_id": 5.0}, "mask_token_id must be from 0 to 99; got 5.0."),
        (MASKED | {"mask_token_id": True}, "mask_token_id must be from 0 to 99; got True."),
        (MASKED | {"mask_token_id": [5]}, "mask_token_id must be from 0 to 99; got [5]."),
        (MASKED | {"mask_token_id": 2}, "mask_token_id must not be a stop token; got 2 for both."),
        (BLOCK | {"block_length": None}, "block_length of a block model must be at least 1; got None."),
        (BLOCK | {"block_length": 0}, "block_length of a block model must be at least 1; got 0."),
        (BLOCK | {"block_length": "4"}, "block_length of a block model must be at least 1; got '4'."),
        (BLOCK | {"block_length": 4.0}, "block_length of a block model must be at least 1; got 4.0."),
        ({"family": "uniform"}, "block_length of a uniform model must be at least 1; got None."),
        (MASKED | {"shift": 2}, "shift of a masked model must be 0 or 1; got 2."),
        (MASKED | {"shift": True}, "shift of a masked model must be 0 or 1; got True."),
        ({"family": "causal", "shift": 0}, "shift of a causal model must be 1; got 0."),
        (
            {"family": "masked_causal", "mask_token_id": 1, "shift": 1},
            "shift of a masked_causal model must be 0; got 1.",
        ),
        (MASKED | {"settings": [0.9]}, "settings must be an object; got [0.9]."),
    ],
)
def test_facts_that_cannot_be_are_refused_under_the_key_they_stand(facts, message):
    for name, where in {"chordal": "config.json: chordal.", "llada": "config.json: "}.items():
        with pytest.raises(CheckpointError) as error:
            make(facts, name=name)
        assert str(error.value) == where + message


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_has_a_plain_decoder_that_runs_on_it(kind):
    family = Family(kind=kind)
    assert kind in decoder_class(family.default_decoder).needs
    assert kind in family.offers
    assert family.attention
