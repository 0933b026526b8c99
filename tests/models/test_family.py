from __future__ import annotations

import pytest
from transformers import LlamaConfig

from chordal.errors import CheckpointError
from chordal.models.family import Family, family_of


def read(facts=None, eos_ids=(2,)):
    return family_of(LlamaConfig(vocab_size=100, **({} if facts is None else {"chordal": facts})), eos_ids)


def test_a_checkpoint_that_says_nothing_is_causal():
    assert read() == Family(kind="causal", mask_id=None, shift=1, block_length=None, eos_ids=(2,))
    assert read({"family": "causal"}) == read()


def test_masked_and_block_models_predict_the_token_at_a_position_unless_they_say_otherwise():
    masked = read({"family": "masked", "mask_token_id": 99})
    assert masked == Family(kind="masked", mask_id=99, shift=0, eos_ids=(2,))
    block = read({"family": "block", "mask_token_id": 0, "block_length": 4, "shift": 1})
    assert block == Family(kind="block", mask_id=0, shift=1, block_length=4, eos_ids=(2,))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("masked", "chordal must be an object"),
        ({}, "chordal.family must be one of .*'causal', 'masked', 'block'.*; got None"),
        ({"family": "diffusion"}, "chordal.family must be one of .*; got 'diffusion'"),
        ({"family": "masked"}, "a masked model needs chordal.mask_token_id"),
        ({"family": "block", "block_length": 4}, "a block model needs chordal.mask_token_id"),
        ({"family": "masked", "mask_token_id": 100}, "chordal.mask_token_id must be from 0 to 99; got 100"),
        ({"family": "masked", "mask_token_id": -1}, "chordal.mask_token_id must be from 0 to 99; got -1"),
        (
            {"family": "masked", "mask_token_id": "<m>"},
            "chordal.mask_token_id must be from 0 to 99; got '<m>'",
        ),
        ({"family": "block", "mask_token_id": 1}, "a block model needs chordal.block_length"),
        (
            {"family": "block", "mask_token_id": 1, "block_length": 0},
            "a block model needs chordal.block_length",
        ),
        (
            {"family": "block", "mask_token_id": 1, "block_length": "4"},
            "a block model needs chordal.block_length",
        ),
        ({"family": "masked", "mask_token_id": 1, "shift": 2}, "chordal.shift must be 0 or 1; got 2"),
    ],
)
def test_facts_that_cannot_be_are_refused(facts, message):
    with pytest.raises(CheckpointError, match=f"^config.json: {message}"):
        read(facts)


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [("causal", "autoregressive"), ("masked", "low_confidence"), ("block", "block_diffusion")],
)
def test_every_kind_has_a_plain_decoder_that_runs_on_it(kind, decoder):
    from chordal.registry import decoder_class

    assert Family(kind=kind).default_decoder == decoder
    assert kind in decoder_class(decoder).needs
