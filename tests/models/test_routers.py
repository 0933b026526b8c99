from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from chordal.errors import InputError
from chordal.forward import Forward, Full, Logits, Together
from chordal.models.routers import Fed, Routers
from chordal.ops.experts import Routing
from chordal.testing import TINY_EXPERTS, random_prompt, tiny_model

MIXTURES = ["qwen3_moe", "olmoe", "glm4_moe"]
HALF = Routing(share=0.5)
CPU = torch.device("cpu")

every_mixture = pytest.mark.parametrize("arch", MIXTURES)


@pytest.fixture(scope="module")
def models():
    return {arch: tiny_model("masked", arch=arch) for arch in MIXTURES}


def ask(tokens, routing=None, **more):
    at = np.arange(len(tokens))
    return Forward(tokens, at, Full(len(tokens)), Logits(at), slots=at, routing=routing, **more)


def spy(model, monkeypatch):
    """List what the experts of each layer are given: experts and weights of every row."""
    given = []
    for module in model.model.modules():
        if type(module).__name__.endswith("Experts"):

            def forward(states, chosen, weights, inner=module.forward):
                given.append((chosen.clone(), weights.clone()))
                return inner(states, chosen, weights)

            monkeypatch.setattr(module, "forward", forward)
    return given


def whole(num, routing=None):
    """A pass of one request."""
    return [Fed(slice(0, num), routing)]


def small(name, **settings):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        **settings,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


# --- what is a router -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "formula"),
    [
        ("Qwen3Moe", {"num_experts": 8, "norm_topk_prob": True}, ("softmax", True, 1.0)),
        ("Qwen3Moe", {"num_experts": 8, "norm_topk_prob": False}, ("softmax", False, 1.0)),
        ("Mixtral", {"num_local_experts": 8}, ("softmax", True, 1.0)),
        ("GptOss", {"num_local_experts": 8}, ("softmax", True, 1.0)),
        ("Glm4Moe", {"n_routed_experts": 8, "first_k_dense_replace": 0, "n_group": 4, "topk_group": 2},
         ("sigmoid", True, 1.0)),
        ("DeepseekV3", {"n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
                        "routed_scaling_factor": 2.5}, ("sigmoid", True, 2.5)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_formulas_are_found_by_what_the_routers_of_transformers_give(name, settings, formula):
    model = small(name, num_experts_per_tok=2, **settings)
    gates = Routers(model.base_model, CPU).gates
    assert len(gates) == 2 - settings.get("first_k_dense_replace", 0)
    assert {(gate.activation, gate.normalizes, gate.scale) for gate in gates} == {formula}


def test_a_router_of_another_formula_is_watched_but_not_steered():
    class OddTopKRouter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.top_k = torch.nn.Parameter(torch.randn(6, 4)), 2

        def forward(self, states):
            logits = states @ self.weight.T
            chosen = logits.topk(2, largest=False).indices
            return logits, logits.softmax(1).gather(1, chosen), chosen

    router = OddTopKRouter()
    routers = Routers(router, CPU)
    assert routers.gates == [None]
    fed = whole(3)
    with routers.watch(fed, 3) as chosen:
        _, _, want = router(torch.randn(3, 4))
    [used] = routers.used(chosen, fed)
    assert set(np.flatnonzero(used[0])) == set(want.flatten().tolist())
    with pytest.raises(InputError, match="share experts"), routers.watch(whole(3, HALF), 3):
        pass


def test_dense_models_have_none_and_refuse_to_share_experts():
    model = tiny_model("masked")
    tokens = random_prompt(5)
    assert len(model.routers) == 0
    assert model.run([(0, ask(tokens))])[0].experts is None
    with pytest.raises(InputError, match="mixture of experts"):
        model.run([(0, ask(tokens, HALF))])


# --- what the tokens use --------------------------------------------------------------------------


@every_mixture
def test_a_reading_tells_the_experts_its_rows_were_given_to(models, arch, monkeypatch):
    model = models[arch]
    given = spy(model, monkeypatch)
    lengths = (7, 3)
    readings = model.run([(row, ask(random_prompt(length))) for row, length in enumerate(lengths)])
    for row, (reading, length) in enumerate(zip(readings, lengths, strict=True)):
        assert reading.experts.shape == (2, TINY_EXPERTS)
        for layer, (chosen, _) in enumerate(given):
            mine = chosen.view(2, max(lengths), -1)[row, :length]
            assert set(np.flatnonzero(reading.experts[layer])) == set(mine.flatten().tolist())


@every_mixture
@pytest.mark.parametrize("routing", [HALF, Routing("max", 0.5), Routing("seq", num_choices=1)], ids=str)
def test_no_row_goes_to_an_expert_outside_the_coreset(models, arch, routing):
    model, tokens = models[arch], random_prompt(20)
    [plain] = model.run([(0, ask(tokens))])
    [shared] = model.run([(0, ask(tokens, routing))])
    limit = 4 if routing.rule != "seq" else TINY_EXPERTS - 1
    assert (shared.experts.sum(1) <= limit).all()
    assert shared.experts.sum() < plain.experts.sum()
    assert not torch.equal(shared.logits, plain.logits)


@every_mixture
def test_weights_add_up_to_what_the_router_makes_them_add_up_to(models, arch, monkeypatch):
    model = models[arch]
    given = spy(model, monkeypatch)
    model.run([(0, ask(random_prompt(20), HALF))])
    for chosen, weights in given:
        assert len(chosen.unique()) == 4
        if arch == "olmoe":  # the probabilities of the chosen among all experts
            assert (weights.sum(1) < 1).all()
        else:
            want = 2.5 if arch == "glm4_moe" else 1.0
            torch.testing.assert_close(weights.sum(1), torch.full_like(weights[:, 0], want))


@every_mixture
@pytest.mark.parametrize(
    "routing", [Routing(), Routing("max"), Routing("seq", num_choices=2)], ids=lambda one: one.rule
)
def test_with_all_experts_or_all_choices_logits_are_the_same_to_the_last_bit(models, arch, routing):
    model, tokens = models[arch], random_prompt(20)
    [plain] = model.run([(0, ask(tokens))])
    [shared] = model.run([(0, ask(tokens, routing))])
    assert torch.equal(shared.logits, plain.logits)
    assert np.array_equal(shared.experts, plain.experts)


@every_mixture
def test_one_row_is_routed_as_ever_while_the_coreset_has_room(models, arch):
    model, tokens = models[arch], random_prompt(1)
    [plain] = model.run([(0, ask(tokens))])
    [shared] = model.run([(0, ask(tokens, Routing(share=0.25)))])
    [less] = model.run([(0, ask(tokens, Routing(share=0.125)))])
    assert torch.equal(shared.logits, plain.logits)
    assert less.experts.sum(1).tolist() == [1, 1]


@every_mixture
def test_neither_padding_nor_other_requests_have_a_part_in_a_coreset(models, arch):
    """Rows of unlike length and routing, and two requests of one row, in one pass and each alone."""
    model = models[arch]
    requests = [
        (0, ask(random_prompt(9), HALF)),
        (1, ask(random_prompt(4))),
        (2, ask(random_prompt(6), Routing("seq", num_choices=1))),
        # Beside the one before, without seeing it.
        (2, Forward(random_prompt(3), np.arange(3), Together(), Logits(np.arange(3)), routing=HALF)),
        (3, ask(random_prompt(5), HALF)),
    ]
    for (row, forward), reading in zip(requests, model.run(requests), strict=True):
        [alone] = model.run([(row, forward)])
        assert np.array_equal(reading.experts, alone.experts)
        torch.testing.assert_close(reading.logits, alone.logits, rtol=0, atol=1e-5)


def test_only_a_pass_of_requests_is_routed(models):
    """Not what is computed beside it: by the model called directly, or on other rows than those fed."""
    model, tokens = models["qwen3_moe"], random_prompt(6)
    ids = torch.from_numpy(tokens)[None]
    want = model.model(ids, use_cache=False).logits
    model.run([(0, ask(tokens, HALF))])
    assert torch.equal(model.model(ids, use_cache=False).logits, want)
    with model.routers.watch(whole(5, HALF), 5) as chosen:
        assert torch.equal(model.model(ids, use_cache=False).logits, want)
    assert chosen == []


def test_a_pass_that_fails_leaves_nothing_behind(models, monkeypatch):
    model, tokens = models["qwen3_moe"], random_prompt(6)
    [want] = model.run([(0, ask(tokens))])
    with monkeypatch.context() as patch:
        patch.setattr(model.architecture.backbone.layers[1].mlp.experts, "forward", None)
        with pytest.raises(TypeError):
            model.run([(0, ask(tokens, HALF))])
    [again] = model.run([(0, ask(tokens))])
    assert torch.equal(again.logits, want.logits)
