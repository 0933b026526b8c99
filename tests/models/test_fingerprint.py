from __future__ import annotations

import copy

import pytest
import torch

from chordal.models.fingerprint import fingerprint


@pytest.fixture(scope="module")
def backbone(make_backbone):
    return make_backbone("qwen3", torch.float32)


def test_same_weights_have_the_same_fingerprint_in_any_type(backbone):
    assert fingerprint(backbone) == fingerprint(copy.deepcopy(backbone).to(torch.bfloat16))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_weights_that_were_trained_further_have_another(backbone, name):
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        other.get_parameter(name).mul_(1.1)
    assert fingerprint(other) != fingerprint(backbone)


def test_weights_of_another_shape_have_another(make_backbone, backbone):
    assert fingerprint(make_backbone("qwen3", torch.float32, vocab_size=65)) != fingerprint(backbone)


def test_weights_that_are_elsewhere_are_told_by_their_shapes(backbone):
    assert len(fingerprint(copy.deepcopy(backbone).to("meta"))) == 16
