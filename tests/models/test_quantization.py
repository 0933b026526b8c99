from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import chordal
from chordal.errors import InputError
from chordal.forward import Causal, Forward, Logits
from chordal.models.load import load_model
from chordal.models.quantization import quantize


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A checkpoint most of whose weights are in linear layers."""
    path = tmp_path_factory.mktemp("quantization") / "model"
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def logits(model):
    at = np.arange(20)
    return model.run([(0, Forward(at + 5, at, Causal(), Logits(at), slots=at))])[0].logits


def linear_bytes(model):
    """What the weights of the layers' linear maps take, scales and all."""
    weights = [one.weight for one in model.model.model.layers.modules() if isinstance(one, torch.nn.Linear)]
    parts = [
        [getattr(weight, name) for name in weight.tensor_data_names]
        if hasattr(weight, "tensor_data_names")
        else [weight]
        for weight in weights
    ]
    return sum(part.nbytes for some in parts for part in some)


# Weights of int8-dynamic are packed and given up.
@pytest.mark.parametrize(
    ("bits", "share", "error"), [("int8", 0.27, 0.04), ("int8-dynamic", 0.27, 0.06), ("int4", 0.2, 0.4)]
)
def test_weights_take_less_and_mean_nearly_the_same(folder, bits, share, error):
    """Against float32; the weights are random, which is the worst there is to quantise."""
    exact, model = load_model(folder), load_model(folder, quantization=bits)
    assert linear_bytes(model) < share * linear_bytes(exact)
    want, got = logits(exact), logits(model)
    assert 0 < (got - want).norm() < error * want.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_are_rounded_row_by_row(folder, dtype):
    """So that what a row gives does not depend on what is fed beside it, as in a batch."""
    model = load_model(folder, quantization="int8-dynamic", dtype=dtype)
    layer = model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    x[1] *= 1000
    x[0, 2] = 0
    with torch.inference_mode():
        y = layer(x)
        assert (y.dtype, y.shape) == (x.dtype, (2, 3, 512))
        assert (y[0, 2] == 0).all()
        for at in np.ndindex(2, 3):
            assert torch.equal(layer(x[at]), y[at])


def test_products_in_8_bits_are_those_of_torchao(folder, monkeypatch):
    """Which has to do where torch has no packed product."""
    packed = load_model(folder, quantization="int8-dynamic")

    def none(*args):
        raise RuntimeError("not in this build")

    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", none)
    plain = load_model(folder, quantization="int8-dynamic")
    with_forward = [
        sum("forward" in vars(one) for one in model.model.modules() if isinstance(one, torch.nn.Linear))
        for model in (packed, plain)
    ]
    assert with_forward == [15, 1]  # the output embedding is not quantised
    assert linear_bytes(plain) > 0 == linear_bytes(packed)
    want, got = logits(plain), logits(packed)
    assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("bits", ["int8", "int8-dynamic", "int4"])
def test_quantised_models_decode_and_drafts_change_nothing(folder, bits):
    model = chordal.load(folder, quantization=bits)
    prompts = [[5, 6, 7, 5, 6], [9] * 10]
    plain, drafted = (
        [one.tokens for one in model.generate(prompts, decoder=decoder, max_new_tokens=20, ignore_eos=True)]
        for decoder in ("autoregressive", "prompt_lookup")
    )
    assert [len(tokens) for tokens in plain] == [20, 20]
    assert len(set(plain[0])) > 3
    assert drafted == plain


def test_a_model_in_fewer_bits_drafts_for_itself_and_changes_nothing(folder):
    model = chordal.load(folder, middle=folder, middle_quantization="int8-dynamic")
    [plain] = model.generate([[5, 6, 7, 5, 6]], max_new_tokens=30, ignore_eos=True)
    [drafted] = model.generate([[5, 6, 7, 5, 6]], decoder="specmquant", max_new_tokens=30, ignore_eos=True)
    assert drafted.tokens == plain.tokens
    assert drafted.stats["accepted_tokens"] > drafted.stats["draft_tokens"] / 2


def test_a_checkpoint_that_is_already_quantised_is_loaded_as_it_is(folder, tokenizer, tmp_path):
    model = load_model(folder, quantization="int8")
    model.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert linear_bytes(loaded) == linear_bytes(model)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(InputError, match="is already quantised; leave out quantization"):
        load_model(tmp_path, quantization="int8")


def test_loading_says_nothing_though_torchao_has_much_to_say(folder):
    """transformers imports it wherever it is installed; only the first time is to be heard."""
    code = "import sys, chordal; chordal.load(sys.argv[1], quantization='int8')"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# What cannot be.


@pytest.mark.parametrize(
    ("bits", "on_cpu", "dtype", "message"),
    [
        ("int2", True, None, "quantization must be int8, int8-dynamic or int4; got 'int2'."),
        ("int4", False, "float32", "int4 on a GPU computes in bfloat16; got dtype float32. Leave it out."),
    ],
)
def test_what_there_is_no_kernel_for_is_refused(bits, on_cpu, dtype, message):
    with pytest.raises(InputError) as error:
        quantize(bits, on_cpu=on_cpu, dtype=dtype)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("bits", "module", "message"),
    [
        ("int8", "torchao.quantization", r"pip install 'chordal\[quantization\]'"),
        ("int4", "torchao.prototype.quantization.int4", "int4 on a CPU needs a torchao that has it"),
        ("int8-dynamic", "torchao.utils", "int8-dynamic needs a torchao that knows which CPUs overflow"),
    ],
)
def test_what_is_not_installed_is_named(monkeypatch, bits, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=message):
        quantize(bits, on_cpu=True, dtype=None)
