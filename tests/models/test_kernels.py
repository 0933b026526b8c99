from __future__ import annotations

import copy

import pytest
import torch
import transformers

from chordal.models.kernels import speed_up

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
needs_packing = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="weights are packed by oneDNN"
)


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 2)
    return model


def replaced(model):
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


def logits(model, num_tokens=40):
    tokens = torch.arange(num_tokens)[None] * 7 % 64
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits.float()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str
)
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Olmo2", "Gemma2"])
def test_formulas_stay_the_same(kind, dtype, tolerance):
    model = make(kind, dtype)
    want = logits(model)
    speed_up(model)
    assert (logits(model) - want).abs().max() < tolerance * want.abs().max()


def test_plain_norms_are_replaced_and_others_are_not():
    llama, gemma = make("Llama"), make("Gemma2")
    for model in (llama, gemma):
        speed_up(model)
    assert {"model.norm", "model.layers.0.input_layernorm"} <= replaced(llama)
    assert not any("norm" in name for name in replaced(gemma))  # theirs add 1 to the weight


@needs_packing
def test_packed_weights_multiply_as_they_did():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 100, bias=False)).eval()
    speed_up(model)
    assert replaced(model) == {"0", "1"}
    for shape in ((300,), (1, 300), (50, 300), (4, 25, 300)):  # small products are left unpacked
        x = torch.randn(shape)
        want = x.double() @ model[0].weight.double().T + model[0].bias.double()
        want = want @ model[1].weight.double().T
        with torch.inference_mode():
            torch.testing.assert_close(model(x).double(), want, rtol=1e-4, atol=1e-4)


@needs_packing
def test_memory_does_not_hold_a_packed_weight_twice():
    torch.manual_seed(0)
    large = torch.nn.Linear(800, 700).eval()
    x, weight, bias = torch.randn(3, 800), large.weight.detach().clone(), large.bias
    speed_up(torch.nn.Sequential(large))
    assert large.weight.numel() == 0
    with torch.inference_mode():
        for rows in (x, x[:1], x[0]):
            torch.testing.assert_close(large(rows), rows @ weight.T + bias, rtol=1e-4, atol=1e-4)


@needs_packing
def test_a_weight_that_others_use_too_is_kept():
    embedding = torch.nn.Embedding(800, 700)
    head = torch.nn.Linear(700, 800, bias=False)
    head.weight = embedding.weight
    speed_up(torch.nn.Sequential(embedding, head).eval())
    assert head.weight is embedding.weight
    assert embedding(torch.tensor([5])).shape == (1, 700)


@needs_packing
def test_weights_that_are_elsewhere_or_more_than_a_tensor_are_left_alone():
    class Special(torch.Tensor):
        pass

    plain = make("Llama")
    model = copy.deepcopy(plain)
    layer = "model.layers.0."
    hooked, kept_away, special = (
        layer + part for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    )
    model.get_submodule(hooked).forward = forward = lambda states: states
    model.get_submodule(kept_away).to("meta")
    weight = model.get_submodule(special).weight
    model.get_submodule(special).weight = torch.nn.Parameter(weight.detach().as_subclass(Special))
    speed_up(model)
    speed_up(plain)
    assert model.get_submodule(hooked).forward is forward
    assert replaced(plain) - replaced(model) == {kept_away, special}
