from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import chordal
from chordal.models.checkpoint import zoo_dir
from chordal.testing import random_prompt, tiny_backbone
from chordal.training.grow import grow, grow_checkpoint

TOKENS = torch.from_numpy(random_prompt(12))[None]
SIZE = {"factor": 4, "num_layers": 5, "intermediate_size": 80}


@pytest.fixture
def float64_norms(monkeypatch):
    """transformers computes its norms in float32, whatever the weights are."""
    norm = type(tiny_backbone().model.norm)

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(norm, "forward", forward)


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


def tied(model):
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("num_layers", [2, 3, 5])
def test_the_logits_are_those_of_the_small_model(float64_norms, factor, num_layers):
    plain = tiny_backbone()
    large = grow(plain, factor=factor, num_layers=num_layers, intermediate_size=80)
    assert large.config.hidden_size == 32 * factor
    assert torch.allclose(logits(large), logits(plain), rtol=0, atol=1e-9)


def test_tied_embeddings_stay_tied(float64_norms):
    plain = tied(tiny_backbone())
    large = grow(plain, **SIZE)
    assert large.lm_head.weight is large.model.embed_tokens.weight
    assert torch.allclose(logits(large), logits(plain), rtol=0, atol=1e-9)


def test_a_token_of_small_activations_is_normalised_as_it_was(float64_norms):
    """Where eps counts, which the zeros must not make count for more."""
    plain = tiny_backbone()
    with torch.no_grad():
        plain.model.embed_tokens.weight.mul_(1e-3)
    assert torch.allclose(logits(grow(plain, **SIZE)), logits(plain), rtol=0, atol=1e-9)


def test_every_layer_works_on_numbers_that_are_not_zero():
    """Else a kernel might know that it has nothing to do."""
    large = grow(tiny_backbone(), **SIZE)
    inputs = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    weights = {n: w for n, w in large.named_parameters() if n.split(".")[-2] in inputs}
    assert len(weights) == 5 * 5
    for name, weight in weights.items():
        assert (weight != 0).any(1).all(), name
    idle = [not layer.mlp.down_proj.weight.any() for layer in large.model.layers]
    assert idle == [True, False, True, True, False]


def test_the_same_model_is_made_each_time_and_no_random_number_is_used_up():
    state = torch.get_rng_state()
    one, other = (grow(tiny_backbone(), **SIZE).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("smaller", [{"factor": 0}, {"num_layers": 1}, {"intermediate_size": 47}])
def test_nothing_shrinks(smaller):
    with pytest.raises(ValueError, match="must not shrink"):
        grow(tiny_backbone(), **SIZE | smaller)


def test_what_would_not_be_exact_is_refused():
    plain = tiny_backbone()
    plain.config.attention_bias = True
    with pytest.raises(ValueError, match="without biases"):
        grow(plain, **SIZE)


def test_a_grown_checkpoint_answers_as_the_one_it_was_made_of(tmp_path):
    source = zoo_dir() / "tiny-ar"
    count = grow_checkpoint(source, tmp_path / "large", factor=4, num_layers=7, intermediate_size=600)
    plain, large = (chordal.load(path, dtype="float32") for path in (source, tmp_path / "large"))
    assert large.family == plain.family
    assert count == sum(weight.numel() for weight in grown_weights(tmp_path / "large"))
    prompts = ["reverse: Ana Ben Cleo Dan", "sort: Mia Leo Ana"]
    mine, theirs = (model.generate(prompts, max_new_tokens=12) for model in (large, plain))
    assert [result.tokens for result in mine] == [result.tokens for result in theirs]


def grown_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors").values()
