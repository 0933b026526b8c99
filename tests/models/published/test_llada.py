"""LLaDA, iLLaDA, LLaDA-MoE and LLaDA2: what is loaded computes what was published."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import chordal
from chordal.errors import CheckpointError
from chordal.forward import Blocks, Forward, Full, Logits
from chordal.models.family import Family
from chordal.models.published import FAMILIES, identify
from chordal.testing import published_llada as writers

from . import reference_llada as reference
from .layers import blocks, causal, error, full, read_published

# Largest difference of a logit, relative to the largest one. Ours are float32, the others float64.
EXACT = 1e-5
WRONG = 1e-3

# Special tokens of the tiny checkpoints.
END, MASK, TURN_END = 257, 259, 262

# Three blocks of LLaDA2.
LENGTH, BLOCK = 96, 32

FACTS = {
    "llada": Family(name="llada", kind="masked", mask_id=260, shift=0, eos_ids=(END, 265)),
    "illada": Family(name="illada", kind="masked", mask_id=5, shift=0, eos_ids=(7,)),
    "llada_moe": Family(
        name="llada_moe", kind="masked", mask_id=MASK, shift=0, num_experts=8, eos_ids=(END, TURN_END)
    ),
    "llada2": Family(
        name="llada2",
        kind="block",
        mask_id=MASK,
        shift=0,
        block_length=BLOCK,
        num_experts=16,
        eos_ids=(END, TURN_END),
        settings={"threshold": 0.95},
    ),
}
FAMILY = pytest.mark.parametrize("name", FACTS)


def write(name, folder, **settings):
    return getattr(writers, f"write_{name}")(folder, **settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each family."""
    parent = tmp_path_factory.mktemp("published")
    return {name: write(name, parent / name) for name in FACTS}


@pytest.fixture(scope="module")
def models(folders):
    return {name: chordal.load(folder, dtype="float32") for name, folder in folders.items()}


@pytest.fixture
def copy(folders, tmp_path):
    """Give a copy of a checkpoint with changes to its JSON files; None removes a key."""

    def copy(name, **changes):
        folder = shutil.copytree(folders[name], tmp_path / name)
        for stem, values in changes.items():
            path = folder / f"{stem}.json"
            content = json.loads(path.read_text()) | values
            path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return folder

    return copy


def tokens_of(name, seed=0):
    """Bytes, and the mask token here and there."""
    random = np.random.default_rng(seed)
    tokens = random.integers(8, 256, LENGTH)
    tokens[random.random(LENGTH) < 0.3] = FACTS[name].mask_id
    return tokens


def feed(model, tokens, sees, start=0):
    """Feed tokens at consecutive positions, after forgetting all if these begin; gives their logits."""
    if start == 0:
        model.engine.target.free_row(0, clear=True)
    positions = np.arange(start, start + len(tokens))
    forward = Forward(tokens, positions, sees, Logits(np.arange(len(tokens))), slots=positions)
    [reading] = model.engine.target.run([(0, forward)])
    return reading.logits


def sees(name):
    return (Blocks(BLOCK), blocks(LENGTH, BLOCK)) if name == "llada2" else (Full(LENGTH), full(LENGTH))


def compare(model, name, folder):
    """Compare the logits of a loaded model with those of the plain one."""
    tokens, (ours, theirs) = tokens_of(name), sees(name)
    want = getattr(reference, name)(*read_published(folder), tokens, theirs)
    return error(feed(model, tokens, ours), want, FACTS[name].mask_id)


# Logits.


@FAMILY
def test_logits_are_those_of_the_published_architecture(name, models, folders):
    assert compare(models[name], name, folders[name]) < EXACT


@FAMILY
def test_weights_stored_in_float32_are_not_rounded(name, tmp_path):
    folder = write(name, tmp_path / name, dtype=torch.float32)
    assert compare(chordal.load(folder), name, folder) < EXACT


def test_a_tied_output_embedding_may_be_stored_all_the_same(tmp_path):
    folder = write("illada", tmp_path / "illada", has_head=True)
    assert compare(chordal.load(folder), "illada", folder) < EXACT


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llada", {"n_kv_heads": 2}),
        ("llada", {"weight_tying": True}),
        ("llada_moe", {"moe_layer_freq": [0, 1]}),
        ("llada2", {"first_k_dense_replace": 2, "num_shared_experts": 2}),
        ("llada2", {"partial_rotary_factor": 0.25}),
        ("llada2", {"use_qkv_bias": True}),
        # With one expert for each token its weight is not made 1.
        ("llada2", {"num_experts_per_tok": 1}),
        # Keys that the published models do not look at.
        ("llada_moe", {"norm_topk_prob": True, "routed_scaling_factor": 3.0}),
        ("llada2", {"norm_topk_prob": False, "use_qk_norm": False, "score_function": "softmax"}),
    ],
)
def test_a_config_of_the_same_family_is_read_as_its_own_code_reads_it(name, changes, tmp_path):
    folder = write(name, tmp_path / name, **changes)
    assert compare(chordal.load(folder), name, folder) < EXACT


def swapped(weights, one, other):
    """Weights of two names for each other."""
    return {
        name.replace(one, "#").replace(other, one).replace("#", other): weight
        for name, weight in weights.items()
    }


def renormalised(config, weights, at, x):
    routed_TX = reference.softmax_router(config, weights, at, x)
    return routed_TX / routed_TX.sum(1, keepdim=True)


def biased(config, weights, at, x):
    """As LLaDA2's router, were the biases part of the weights."""
    is_chosen_TX = reference.group_router(config, weights, at, x) > 0
    liked_TX = (x @ weights[f"{at}.gate.weight"].T).sigmoid() + weights[f"{at}.gate.expert_bias"]
    routed_TX = liked_TX * is_chosen_TX
    return config["routed_scaling_factor"] * routed_TX / routed_TX.sum(1, keepdim=True)


def without_bias(weights):
    return {name: 0 * w if name.endswith("expert_bias") else w for name, w in weights.items()}


def values_first(config, weights):
    """As if the rows of LLaDA2's joint matrix were queries, values, keys."""
    rows = [config["head_dim"] * config[f"num_{part}_heads"] for part in ("attention", "key_value")]
    parts = {name: w.split([rows[0], rows[1], rows[1]]) for name, w in weights.items() if "query_key" in name}
    return weights | {name: torch.cat([q, v, k]) for name, (q, k, v) in parts.items()}


def interleaved(weights):
    """As if neighbouring numbers of a head were turned together."""
    return {
        name: w.unflatten(0, (4, -1, 2)).transpose(1, 2).reshape(w.shape)
        if "q_proj" in name or "k_proj" in name
        else w
        for name, w in weights.items()
    }


# The plain model with one thing wrong: p is the right one, of config, weights, tokens and who sees whom.
ANYWHERE = {
    "causal": lambda p, c, w, t, m: p(c, w, t, causal(LENGTH)),
    "shifted": lambda p, c, w, t, m: p(c, w, t, m).roll(1, 0),
    "theta": lambda p, c, w, t, m: p(c | {"rope_theta": 10_000.0}, w, t, m),
}
MISTAKES = {(name, mistake): wrong for name in FACTS for mistake, wrong in ANYWHERE.items()} | {
    ("llada", "gate"): lambda p, c, w, t, m: p(c, swapped(w, "ff_proj", "up_proj"), t, m),
    ("llada", "interleaved"): lambda p, c, w, t, m: p(c, interleaved(w), t, m),
    ("illada", "gate"): lambda p, c, w, t, m: p(c, swapped(w, "gate_proj", "up_proj"), t, m),
    ("llada_moe", "gate"): lambda p, c, w, t, m: p(c, swapped(w, "gate_proj", "up_proj"), t, m),
    ("llada_moe", "norms"): lambda p, c, w, t, m: p(c, swapped(w, "q_norm", "k_norm"), t, m),
    ("llada_moe", "experts"): lambda p, c, w, t, m: p(c, swapped(w, "experts.1.", "experts.2."), t, m),
    ("llada_moe", "fewer"): lambda p, c, w, t, m: p(c | {"num_experts_per_tok": 2}, w, t, m),
    ("llada_moe", "renormalised"): lambda p, c, w, t, m: p(c, w, t, m, renormalised),
    ("llada2", "gate"): lambda p, c, w, t, m: p(c, swapped(w, "gate_proj", "up_proj"), t, m),
    ("llada2", "norms"): lambda p, c, w, t, m: p(c, swapped(w, "query_layernorm", "key_layernorm"), t, m),
    ("llada2", "experts"): lambda p, c, w, t, m: p(c, swapped(w, "experts.1.", "experts.2."), t, m),
    ("llada2", "full"): lambda p, c, w, t, m: p(c, w, t, full(LENGTH)),
    ("llada2", "blocks"): lambda p, c, w, t, m: p(c, w, t, blocks(LENGTH, BLOCK // 2)),
    ("llada2", "rotated"): lambda p, c, w, t, m: p(c | {"partial_rotary_factor": 1.0}, w, t, m),
    ("llada2", "rows"): lambda p, c, w, t, m: p(c, values_first(c, w), t, m),
    ("llada2", "unscaled"): lambda p, c, w, t, m: p(c | {"routed_scaling_factor": 1.0}, w, t, m),
    ("llada2", "ungrouped"): lambda p, c, w, t, m: p(c | {"n_group": 1, "topk_group": 1}, w, t, m),
    ("llada2", "unbiased"): lambda p, c, w, t, m: p(c, without_bias(w), t, m),
    ("llada2", "biased"): lambda p, c, w, t, m: p(c, w, t, m, biased),
}


@pytest.mark.parametrize(("name", "mistake"), MISTAKES, ids="-".join)
def test_the_comparison_notices_one_wrong_thing(name, mistake, models, folders):
    tokens, (ours, theirs) = tokens_of(name), sees(name)
    right = getattr(reference, name)
    wrong = MISTAKES[name, mistake](right, *read_published(folders[name]), tokens, theirs)
    assert error(feed(models[name], tokens, ours), wrong, FACTS[name].mask_id) > WRONG


def test_block_after_block_over_the_cache_gives_the_same_as_all_at_once(models, folders):
    name, model = "llada2", models["llada2"]
    tokens = tokens_of(name, seed=1)
    want = reference.llada2(*read_published(folders[name]), tokens, blocks(LENGTH, BLOCK))
    for start in range(0, LENGTH, BLOCK):
        # What a block held before it was finished must leave nothing behind.
        feed(model, np.full(BLOCK, MASK), Blocks(BLOCK), start)
        got = feed(model, tokens[start : start + BLOCK], Blocks(BLOCK), start)
        assert error(got, want[start : start + BLOCK], MASK) < EXACT


def test_expert_biases_stay_float32_in_a_half_precision_model(folders):
    model = chordal.load(folders["llada2"], dtype="bfloat16").engine.target.model
    for number, layer in enumerate(model.model.layers[1:], 1):
        name = f"model.layers.{number}.mlp.gate.expert_bias"
        [stored] = [w[name] for w in map(load_file, folders["llada2"].glob("*.safetensors")) if name in w]
        assert layer.mlp.gate.weight.dtype == torch.bfloat16
        assert stored.dtype == torch.float32
        assert torch.equal(layer.mlp.gate.e_score_correction_bias, stored)


# Facts.


@FAMILY
def test_facts_are_those_published(name, models):
    assert models[name].family == FACTS[name]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llada", {"config": {"mask_token_id": None}}),
        ("llada_moe", {"config": {"mask_token_id": MASK}}),
        ("llada_moe", {"tokenizer_config": {"mask_token": "<|mask|>"}}),
        ("llada2", {"tokenizer_config": {"mask_token": None}}),
    ],
)
def test_the_mask_token_is_found_wherever_a_file_names_it(name, changes, copy):
    assert chordal.load(copy(name, **changes)).family.mask_id == FACTS[name].mask_id


def test_files_that_disagree_on_the_mask_token_are_refused(copy):
    with pytest.raises(
        CheckpointError, match=r"config\.json says 200, the added token <\|mdm_mask\|> says 260"
    ):
        chordal.load(copy("llada", config={"mask_token_id": 200}))


def test_a_block_length_in_the_config_is_believed(copy):
    assert chordal.load(copy("llada2", config={"block_size": 16})).family.block_length == 16


MOE_PROMPT = (
    "<role>SYSTEM</role>detailed thinking off<|role_end|>"
    "<role>HUMAN</role>Two?<|role_end|><role>ASSISTANT</role>"
)
LLADA_PROMPT = (
    "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.mark.parametrize(
    ("name", "prompt", "num_tokens"),
    [
        ("llada", LLADA_PROMPT, 27),
        ("illada", "Two?", 4),
        ("llada_moe", MOE_PROMPT, 53),
        ("llada2", MOE_PROMPT, 53),
    ],
)
def test_text_is_put_into_the_published_template(name, prompt, num_tokens, models):
    tokens = models[name].encode("Two?")
    assert models[name].tokenizer.decode(tokens) == prompt
    assert len(tokens) == num_tokens  # each special token is one, each other letter too


@FAMILY
def test_text_is_generated_by_the_default_decoder(name, models):
    [result] = models[name].generate("Two?", max_new_tokens=8)
    assert result.decoder == ("block_diffusion" if name == "llada2" else "low_confidence")
    assert len(result.tokens) == 8 or result.finish_reason == "stop"
    assert FACTS[name].mask_id not in result.tokens


# Full size.

# Parameters of the published models, and the sizes in their config.json.
SIZES = {
    "LLaDA-8B": (
        "llada",
        {
            "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288,
            "embedding_size": 126464, "vocab_size": 126464,
        },
        8_015_581_184,
    ),
    "iLLaDA-8B": (
        "illada",
        {
            "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
            "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 155136,
        },
        7_615_025_152,
    ),
    "LLaDA-MoE-7B-A1B": (
        "llada_moe",
        {
            "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
            "num_hidden_layers": 16, "expert_intermediate_size": 1024, "dense_intermediate_size": 8192,
            "moe_layer_freq": [1] * 16, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 157184,
        },
        7_356_880_896,
    ),
    "LLaDA2.1-mini": (
        "llada2",
        {
            "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4,
            "num_hidden_layers": 20, "head_dim": 128, "intermediate_size": 5120, "num_experts": 256,
            "moe_intermediate_size": 512, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
            "vocab_size": 157184,
        },
        16_255_643_392,
    ),
    "LLaDA2.1-flash": (
        "llada2",
        {
            "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 4,
            "num_hidden_layers": 32, "head_dim": 128, "intermediate_size": 9216, "num_experts": 256,
            "moe_intermediate_size": 1024, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
            "vocab_size": 157184,
        },
        102_889_705_216,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", SIZES)
def test_at_full_size_the_model_has_the_published_number_of_parameters(model, folders):
    name, sizes, num_parameters = SIZES[model]
    config, _ = read_published(folders[name])
    family = identify(config | sizes)
    model_class = getattr(transformers, f"{family.backbone(config)}ForCausalLM")
    with torch.device("meta"):
        backbone = model_class(model_class.config_class(**family.config(config | sizes)))
    biases = [weight for name, weight in backbone.named_buffers() if name.endswith("bias")]
    assert sum(weight.numel() for weight in (*backbone.parameters(), *biases)) == num_parameters


# What is refused.

UNSUPPORTED = {
    "llada": {
        "block_type": "sequential",
        "layer_norm_type": "default",
        "activation_type": "swiglu",
        "rope": False,
        "alibi": True,
        "attention_layer_norm": True,
        "include_bias": True,
        "include_qkv_bias": True,
        "input_emb_norm": True,
        "scale_logits": True,
        "block_group_size": 2,
        "layer_norm_with_affine": False,
    },
    "illada": {"layer_norm_eps": 1e-5},
    "llada_moe": {
        "qk_layernorm": False,
        "partial_rotary_factor": 0.5,
        "moe_router_enable_expert_bias": True,
        "shared_expert_intermediate_size": 16,
        "clip_qkv": 8.0,
        "attention_bias": True,
    },
    "llada2": {
        "use_bias": True,
        "use_sliding_window": True,
        "use_rmsnorm": False,
        "using_split_qkv_in_self_attention": True,
    },
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in UNSUPPORTED for key in UNSUPPORTED[name]])
def test_a_key_that_changes_the_computation_is_refused(name, key, folders):
    config, _ = read_published(folders[name])
    value = UNSUPPORTED[name][key]
    with pytest.raises(CheckpointError, match=f"{name} with {key} {value!r} is not supported; it must be"):
        identify(config | {key: value})


@FAMILY
def test_a_config_that_lacks_what_its_family_has_is_refused(name, folders):
    config, _ = read_published(folders[name])
    [family] = [family for family in FAMILIES if family.name == name]
    for key in family.needs:
        with pytest.raises(CheckpointError, match=f"missing here: {key}. Seen: "):
            identify({k: v for k, v in config.items() if k != key})


def test_llada_under_the_keys_of_another_layout_is_refused(copy):
    config = {"d_model": None, "hidden_size": 32, "n_layers": None, "num_hidden_layers": 2}
    with pytest.raises(CheckpointError, match=r"missing here: d_model, n_layers\. Seen: .*num_hidden_layers"):
        chordal.load(copy("llada", config=config))


def test_llada22_is_refused_as_what_it_is(copy):
    config = {"expert_capacity": 6, "block_size": 32, "delete_token_id": 264, "rope_theta": 3_000_000}
    with pytest.raises(
        CheckpointError, match=r"expert_capacity 6 is not supported; LLaDA2\.2 routes the tokens"
    ):
        chordal.load(copy("llada2", config=config))
