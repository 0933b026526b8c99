from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.testing import TINY_VOCAB, tiny_backbone
from chordal.training.data import Batch
from chordal.training.looping import loop_layers, looped_loss
from chordal.training.objectives import causal_loss

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, TINY_VOCAB, (3, 10)))
BATCH = Batch(TOKENS, torch.tensor([4, 2, 6]), torch.tensor([10, 7, 9]), 1.0)


@pytest.fixture(scope="module")
def plain():
    model = tiny_backbone(num_layers=5, dtype=torch.float32)
    model.config._attn_implementation = "eager"
    return model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_one_loop_that_ignores_its_state_is_the_model_it_was_made_of(plain):
    looped = loop_layers(plain, prelude=[0], core=[1, 2], coda=[3, 4], num_loops=3)
    # The fixture's output embedding is not tied; a looped model starts with its own.
    looped.lm_head.load_state_dict(plain.lm_head.state_dict())
    with torch.no_grad():
        looped.model.adapter.weight[:, :32] = 0
        assert torch.allclose(looped(TOKENS, num_loops=1).logits, plain(TOKENS).logits, atol=1e-5)


def test_at_first_a_loop_adds_the_normalised_state_to_its_input(plain):
    looped = loop_layers(plain, prelude=[], core=[2], coda=[], num_loops=3)
    state, embed = torch.randn(2, 4, 32)
    assert torch.allclose(looped.model.adapter(torch.cat([state, embed], 1)), state + embed)
    assert (looped.config.num_loops, looped.config.num_hidden_layers) == (3, 3)


def test_the_loss_is_the_causal_one_at_the_number_of_loops_drawn(plain, monkeypatch):
    looped = loop_layers(plain, prelude=[0], core=[1], coda=[2], num_loops=3)
    drawn = []
    forward = looped.model.forward

    def spy(*args, **kwargs):
        drawn.append(kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(looped.model, "forward", spy)
    loss = looped_loss(looped, BATCH, generator(1), mean_loops=4.0, max_loops=8)
    given = {key: drawn[0][key] for key in ("num_loops", "states")}
    assert torch.equal(loss, causal_loss(looped, BATCH, generator(), **given))
    assert not torch.equal(loss, causal_loss(looped, BATCH, generator(), **given | {"num_loops": 9}))


def test_the_number_of_loops_has_the_mean_asked_for_and_a_tail():
    counts = []

    class Spy:
        config = type("Config", (), {"hidden_size": 2})

        def model(self, *, num_loops, states, **_):
            counts.append(num_loops)
            assert states.shape == (3, 10, 2)
            return type("Output", (), {"last_hidden_state": torch.zeros(3, 10, 2)})

        def lm_head(self, hidden):
            return torch.zeros(len(hidden), TINY_VOCAB)

    draws = generator()
    for _ in range(2000):
        looped_loss(Spy(), BATCH, draws, mean_loops=5.0, max_loops=100)
    assert np.mean(counts) == pytest.approx(5, abs=0.3)
    assert min(counts) == 1
    assert max(counts) > 14  # a Poisson law of that mean does not get there
    counts.clear()
    for _ in range(200):
        looped_loss(Spy(), BATCH, draws, mean_loops=5.0, max_loops=6)
    assert max(counts) == 6


def test_training_reaches_every_weight(plain):
    looped = loop_layers(plain, prelude=[0], core=[1], coda=[2], num_loops=3)
    looped_loss(looped, BATCH, generator(2), mean_loops=4.0, max_loops=8).backward()
    assert [name for name, weight in looped.named_parameters() if weight.grad is None] == []
