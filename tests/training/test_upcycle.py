from __future__ import annotations

import pytest
import torch

from chordal.testing import random_prompt, tiny_backbone
from chordal.training.upcycle import upcycle

TOKENS = torch.from_numpy(random_prompt(12))[None]
WIDTH = 48  # neurons of a layer of the fixture


@pytest.fixture(scope="module")
def dense():
    return tiny_backbone(dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def indifferent(model):
    """Make every router give all experts the same."""
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    return model


def test_experts_that_share_the_neurons_and_all_work_are_the_dense_model(dense):
    mixture = upcycle(dense, num_experts=4, num_active=4, expert_size=WIDTH // 4)
    torch.testing.assert_close(logits(indifferent(mixture)), logits(dense), rtol=1e-4, atol=1e-4)


def test_a_neuron_at_work_counts_as_it_did(dense):
    """Two experts that are both all of the layer, of which a token has one: whichever, it is the layer."""
    mixture = upcycle(dense, num_experts=2, num_active=1, expert_size=WIDTH)
    torch.testing.assert_close(logits(mixture), logits(dense), rtol=1e-4, atol=1e-4)


def test_every_neuron_is_in_some_expert_and_those_left_over_begin_again(dense):
    mixture = upcycle(dense, num_experts=5, num_active=2, expert_size=12)
    up = dense.model.layers[0].mlp.up_proj.weight
    stored = mixture.model.layers[0].mlp.experts.gate_up_proj[:, 12:].reshape(60, -1)
    assert torch.equal(stored, torch.cat([up, up[:12]]))


def test_everything_but_the_feed_forward_layers_is_kept(dense):
    mixture = upcycle(dense, num_experts=4, num_active=2, expert_size=16)
    weights = mixture.state_dict()
    kept = {name: weight for name, weight in dense.state_dict().items() if ".mlp." not in name}
    assert set(weights) - set(kept) == {name for name in weights if ".mlp." in name}
    for name, weight in kept.items():
        assert torch.equal(weights[name], weight), name


def test_experts_that_cannot_hold_all_neurons_are_refused(dense):
    with pytest.raises(ValueError, match="4 experts of 11 cannot hold 48 neurons"):
        upcycle(dense, num_experts=4, num_active=2, expert_size=11)
