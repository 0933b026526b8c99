"""The published models built on Qwen: loaded from their own files, against the same nets written down."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import chordal
from chordal.errors import CheckpointError, InputError
from chordal.forward import Blocks, Causal, Forward, Full, Logits, Sees
from chordal.models.checkpoint import Checkpoint
from chordal.models.family import Family
from chordal.models.recognise import recognise
from chordal.testing import published_qwen as writers

from .layers import blocks, causal, error, full, read_published
from .reference_qwen import qwen

# Largest difference of a logit, relative to the largest one. Ours are float32, the others float64.
EXACT = 1e-5
WRONG = 1e-3

# Ids in all these checkpoints.
END, IM_END = 260, 262

NUM_TOKENS = 24


@dataclass(frozen=True)
class Case:
    """A kind of checkpoint: who makes it, what it is loaded as, and what a token of it sees."""

    make: Callable[..., Path]
    backbone: str
    family: Family
    sees: Sees
    can_attend_TT: torch.Tensor

    @property
    def tokens(self):
        """Random text that ends in masks, as in decoding."""
        tokens = np.random.default_rng(0).integers(0, 250, NUM_TOKENS)
        tokens[-5:] = self.family.mask_id
        return tokens


def block_case(maker, backbone, name, *, mask_id, length, shift=0, num_experts=None):
    family = Family(
        name=name,
        kind="block",
        mask_id=mask_id,
        shift=shift,
        block_length=length,
        num_experts=num_experts,
        eos_ids=(IM_END, END),
    )
    return Case(maker, backbone, family, Blocks(length), blocks(NUM_TOKENS, length))


def wedlm_case(maker, backbone):
    family = Family(name="wedlm", kind="masked_causal", mask_id=263, shift=0, eos_ids=(END, IM_END))
    return Case(maker, backbone, family, Causal(), causal(NUM_TOKENS))


DREAM = Family(
    name="dream", kind="masked", mask_id=264, shift=1, eos_ids=(END, IM_END), settings={"order": "entropy"}
)
FAST_DLLM_1_5B = functools.partial(writers.write_fast_dllm_v2, size="1.5B", has_head=False)
CASES = {
    "dream": Case(writers.write_dream, "Qwen2", DREAM, Full(NUM_TOKENS), full(NUM_TOKENS)),
    "sdar": block_case(writers.write_sdar, "Qwen3", "sdar", mask_id=267, length=4),
    "sdar_moe": block_case(
        writers.write_sdar_moe, "Qwen3Moe", "sdar_moe", mask_id=267, length=4, num_experts=8
    ),
    "fast_dllm_v2_7b": block_case(
        writers.write_fast_dllm_v2, "Qwen2", "fast_dllm_v2", mask_id=263, length=8, shift=1
    ),
    "fast_dllm_v2_1.5b": block_case(FAST_DLLM_1_5B, "Qwen2", "fast_dllm_v2", mask_id=263, length=8, shift=1),
    "wedlm_8b": wedlm_case(writers.write_wedlm, "Qwen3"),
    "wedlm_7b": wedlm_case(functools.partial(writers.write_wedlm, size="7B"), "Qwen2"),
}
BLOCK_CASES = [name for name, case in CASES.items() if case.family.kind == "block"]
WEDLM_CASES = ["wedlm_8b", "wedlm_7b"]
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Give the folder of a case, as published."""
    made = {}

    def folder(name, dtype=torch.bfloat16):
        if (name, dtype) not in made:
            made[name, dtype] = CASES[name].make(tmp_path_factory.mktemp(name) / "model", dtype=dtype)
        return made[name, dtype]

    return folder


@pytest.fixture(scope="session")
def load(folder):
    """Load a case, computing in float32."""
    return functools.cache(lambda name: chordal.load(folder(name), dtype="float32"))


def run(model, tokens, positions, sees, slots=None):
    """The logits of all fed tokens."""
    slots = positions if slots is None else slots
    forward = Forward(tokens, positions, sees, Logits(np.arange(len(tokens))), slots=slots)
    return model.engine.target.run([(0, forward)])[0].logits


def once(model, tokens, sees, positions=None):
    """The logits of tokens that are fed together to an empty cache."""
    slots = np.arange(len(tokens))
    logits = run(model, tokens, slots if positions is None else positions, sees, slots)
    model.engine.target.free_row(0, clear=True)
    return logits


# The computation.


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@every_case
def test_logits_are_those_of_the_architecture_written_down(folder, name, stored):
    case = CASES[name]
    model = chordal.load(folder(name, stored), dtype="float32")
    want_TV = qwen(*read_published(folder(name, stored)), case.tokens, case.can_attend_TT)
    assert type(model.engine.target.model).__name__ == f"{case.backbone}ForCausalLM"
    assert error(once(model, case.tokens, case.sees), want_TV, case.family.mask_id) < EXACT


def zeroed(weights, end):
    assert any(name.endswith(end) for name in weights)
    return {name: 0 * weight if name.endswith(end) else weight for name, weight in weights.items()}


def ones(weights, end):
    assert any(name.endswith(end) for name in weights)
    return {
        name: weight.new_ones(weight.shape) if name.endswith(end) else weight
        for name, weight in weights.items()
    }


MISTAKES = {
    "dream sees the past only": ("dream", lambda c, w: (c, w, causal(NUM_TOKENS))),
    "dream without biases": ("dream", lambda c, w: (c, zeroed(w, "k_proj.bias"))),
    "dream with other angles": ("dream", lambda c, w: (c | {"rope_theta": 10_000.0}, w)),
    "sdar with longer blocks": ("sdar", lambda c, w: (c, w, blocks(NUM_TOKENS, 8))),
    "sdar without norms of heads": ("sdar", lambda c, w: (c, ones(w, "k_norm.weight"))),
    "sdar_moe with shares as they are": ("sdar_moe", lambda c, w: (c | {"norm_topk_prob": False}, w)),
    "sdar_moe with fewer experts": ("sdar_moe", lambda c, w: (c | {"num_experts_per_tok": 2}, w)),
    "sdar_moe that sees everything": ("sdar_moe", lambda c, w: (c, w, full(NUM_TOKENS))),
    "fast_dllm_v2 with shorter blocks": ("fast_dllm_v2_7b", lambda c, w: (c, w, blocks(NUM_TOKENS, 4))),
    "fast_dllm_v2 without biases": ("fast_dllm_v2_7b", lambda c, w: (c, zeroed(w, "v_proj.bias"))),
    "fast_dllm_v2 tied": ("fast_dllm_v2_7b", lambda c, w: (c | {"tie_word_embeddings": True}, w)),
    "wedlm sees everything": ("wedlm_8b", lambda c, w: (c, w, full(NUM_TOKENS))),
    "wedlm without norms of heads": ("wedlm_8b", lambda c, w: (c, ones(w, "q_norm.weight"))),
    "wedlm without biases": ("wedlm_7b", lambda c, w: (c, zeroed(w, "q_proj.bias"))),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(folder, load, mistake):
    name, change = MISTAKES[mistake]
    case = CASES[name]
    config, weights, *can_attend_TT = change(*read_published(folder(name)))
    wrong_TV = qwen(config, weights, case.tokens, *(can_attend_TT or [case.can_attend_TT]))
    got_TV = once(load(name), case.tokens, case.sees)
    assert error(got_TV, wrong_TV, case.family.mask_id) > WRONG


@pytest.mark.parametrize("name", BLOCK_CASES)
def test_blocks_fed_one_by_one_over_the_cache_give_the_same_logits(folder, load, name):
    case, model = CASES[name], load(name)
    length = case.family.block_length
    want_TV = qwen(*read_published(folder(name)), case.tokens, case.can_attend_TT)
    got = []
    for start in range(0, NUM_TOKENS, length):
        positions = np.arange(start, start + length)
        run(model, np.full(length, case.family.mask_id), positions, case.sees)  # as decoding finds it
        got.append(run(model, case.tokens[positions], positions, case.sees))
    model.engine.target.free_row(0, clear=True)
    assert error(torch.cat(got), want_TV, case.family.mask_id) < EXACT


@pytest.mark.parametrize("name", WEDLM_CASES)
def test_tokens_fed_out_of_order_stand_where_their_positions_say(folder, load, name):
    case, model = CASES[name], load(name)
    known, masked = np.r_[0:8, 15, 10, 22], np.r_[8, 9, 11:15]
    positions = np.r_[known, masked]
    tokens = case.tokens.copy()
    tokens[masked] = case.family.mask_id
    published = read_published(folder(name))
    want_TV = qwen(*published, tokens[positions], causal(len(positions)), positions)
    got_TV = once(model, tokens[positions], Causal(), positions)
    assert error(got_TV, want_TV, case.family.mask_id) < EXACT
    in_order_TV = qwen(*published, tokens[positions], causal(len(positions)))
    assert error(got_TV, in_order_TV, case.family.mask_id) > WRONG


@pytest.mark.parametrize("name", WEDLM_CASES)
def test_the_leading_rows_stay_and_the_others_are_fed_again(folder, load, name):
    case, model = CASES[name], load(name)
    run(model, case.tokens[np.r_[0:8, 15, 10]], np.r_[0:8, 15, 10], Causal(), np.arange(10))
    again = np.r_[8, 15, 10, 9]
    got_TV = run(model, case.tokens[again], again, Causal(), 8 + np.arange(4))
    model.engine.target.free_row(0, clear=True)
    rows = np.r_[0:8, again]
    want_TV = qwen(*read_published(folder(name)), case.tokens[rows], causal(len(rows)), rows)
    assert error(got_TV, want_TV[8:], case.family.mask_id) < EXACT


@every_case
def test_in_bfloat16_logits_are_nearly_the_same(folder, load, name):
    case = CASES[name]
    model = chordal.load(folder(name), dtype="bfloat16")
    assert model.engine.target.dtype == torch.bfloat16
    exact_TV, got_TV = (once(m, case.tokens, case.sees) for m in (load(name), model))
    is_token_V = torch.arange(got_TV.shape[1]) != case.family.mask_id
    assert (got_TV - exact_TV)[:, is_token_V].norm() < 0.1 * exact_TV[:, is_token_V].norm()


# What the files say.


@every_case
def test_family_facts_are_the_published_ones(load, name):
    model, case = load(name), CASES[name]
    assert model.family == case.family
    decoders = {"masked": "low_confidence", "block": "block_diffusion", "masked_causal": "wedlm"}
    assert model.family.default_decoder == decoders[case.family.kind]


@every_case
def test_text_is_cut_as_qwen_does_and_stands_in_the_template(folder, load, name):
    model = load(name)
    vocabulary = json.loads((folder(name) / "vocab.json").read_text())
    pieces = ["the", "\u0120the", "\u0120", "1", "2"]
    assert model.tokenizer("the the 12")["input_ids"] == [vocabulary[piece] for piece in pieces]
    assert model.tokenizer("<|im_end|>")["input_ids"] == [IM_END]
    tokens = model.encode("hi")
    assert model.tokenizer.decode(tokens) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokens) == len("user\nhi\nassistant\n") + 3


@every_case
def test_text_is_generated_by_the_default_decoder(load, name):
    model = load(name)
    results = model.generate(["the end", "12"], max_new_tokens=10)
    for result in results:
        assert result.error is None
        assert result.decoder == model.family.default_decoder
        assert result.finish_reason == ("stop" if {END, IM_END} & set(result.tokens) else "length")
        assert len(result.tokens) == 10 or result.finish_reason == "stop"
        assert model.family.mask_id not in result.tokens


@every_case
def test_code_in_the_folder_is_not_run(name, tmp_path):
    folder = CASES[name].make(tmp_path / "model")
    mark = tmp_path / "mark"
    named = json.loads((folder / "config.json").read_text())["auto_map"].values()
    for module in {str(place).split(".")[0] for place in named} | {
        "tokenization_dream",
        "tokenization_qwen2",
    }:
        (folder / f"{module}.py").write_text(f"open({str(mark)!r}, 'w')\n")
    chordal.load(folder)
    assert not mark.exists()


# The mask token.


def change(file, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def family_of(folder, **settings):
    return recognise(Checkpoint.open(folder), **settings).family


def without_mask_token(folder):
    """Leave a tokenizer that knows no mask token, by name or by text."""

    def edit(tokenizer):
        tokenizer.pop("mask_token", None)
        tokens = tokenizer["added_tokens_decoder"]
        kept = {number: token for number, token in tokens.items() if "mask" not in token["content"].lower()}
        tokenizer |= {"added_tokens_decoder": kept, "additional_special_tokens": []}

    change(folder / "tokenizer_config.json", edit)
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "mask_id"),
    [
        ("dream", 151666),
        ("sdar", 151669),
        ("sdar_moe", 151669),
        ("fast_dllm_v2_7b", 151665),
        ("wedlm_8b", 151665),
        ("wedlm_7b", 151665),
    ],
)
def test_a_mask_that_no_file_names_is_the_published_one(name, mask_id, tmp_path):
    folder = CASES[name].make(tmp_path / "model", vocab_size=152064, hidden_size=8, mask_token_id=None)
    assert family_of(without_mask_token(folder)).mask_id == mask_id


def test_a_mask_id_that_is_null_is_looked_for_elsewhere(tmp_path):
    folder = writers.write_dream(tmp_path / "model")
    change(folder / "config.json", lambda config: config.update(mask_token_id=None))
    assert family_of(folder).mask_id == 264


def test_a_mask_id_in_the_config_counts_where_the_tokenizer_has_none(tmp_path):
    assert family_of(writers.write_wedlm(tmp_path / "model", mask_token_id=300)).mask_id == 300


def test_files_that_name_two_masks_are_refused(tmp_path):
    folder = writers.write_dream(tmp_path / "model", mask_token_id=300)
    with pytest.raises(CheckpointError, match=r"must agree on the mask token; config\.json says 300, "):
        family_of(folder)


@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_sdar_with_two_spellings_of_the_mask_has_one(tokenizer_class, tmp_path):
    """Loaded by another class, the second spelling became a new token with the next id."""
    folder = writers.write_sdar(tmp_path / "model")
    assert "<MASK>" in (folder / "tokenizer.json").read_text()
    change(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class=tokenizer_class))
    assert family_of(folder).mask_id == 267


def test_dreams_tokenizer_is_found_without_a_pointer_to_its_code(tmp_path):
    folder = writers.write_dream(tmp_path / "model")
    change(folder / "tokenizer_config.json", lambda config: config.pop("auto_map"))
    assert family_of(folder) == DREAM


# Block length, head size, tied embeddings.


@pytest.mark.parametrize("name", ["sdar", "sdar_moe"])
def test_sdar_blocks_are_4_unless_the_files_or_the_caller_say_otherwise(name, tmp_path):
    folder = CASES[name].make(tmp_path / "model")
    assert family_of(folder).block_length == 4
    assert family_of(folder, block_length=16).block_length == 16
    change(folder / "config.json", lambda config: config.update(block_size=8, mask_token_id=267))
    assert family_of(folder).block_length == 8
    with pytest.raises(InputError, match="says block_size 8; block_length 16 contradicts it"):
        family_of(folder, block_length=16)


def test_a_block_length_in_the_name_is_pointed_out_and_not_believed(tmp_path):
    folder = writers.write_sdar(tmp_path / "SDAR-1.7B-Chat-b32")
    with pytest.warns(UserWarning, match="Give block_length=32"):
        assert family_of(folder).block_length == 4
    assert family_of(folder, block_length=32).block_length == 32


def test_fast_dllm_v2_without_a_block_length_has_32(tmp_path):
    assert family_of(writers.write_fast_dllm_v2(tmp_path / "model", bd_size=None)).block_length == 32


@pytest.mark.parametrize("has_head", [True, False])
def test_tied_embeddings_may_be_stored_once_or_twice(has_head, tmp_path):
    case = CASES["fast_dllm_v2_1.5b"]
    folder = writers.write_fast_dllm_v2(tmp_path / "model", size="1.5B", has_head=has_head)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == has_head
    want_TV = qwen(*read_published(folder), case.tokens, case.can_attend_TT)
    model = chordal.load(folder, dtype="float32")
    assert error(once(model, case.tokens, case.sees), want_TV, case.family.mask_id) < EXACT


@pytest.mark.parametrize("name", WEDLM_CASES)
def test_wedlm_heads_share_the_hidden_size_where_the_config_does_not_say(name, tmp_path):
    case = CASES[name]
    folder = case.make(tmp_path / "model", head_dim=None)
    want_TV = qwen(*read_published(folder), case.tokens, case.can_attend_TT)
    for content in ("left out", None):
        if content is None:
            change(folder / "config.json", lambda config: config.update(head_dim=None))
        model = chordal.load(folder, dtype="float32")
        assert error(once(model, case.tokens, case.sees), want_TV, case.family.mask_id) < EXACT


def test_wedlm_without_its_two_keys_is_a_qwen2(tmp_path):
    folder = writers.write_wedlm(tmp_path / "model", size="7B", attention_bias=None, qk_norm=None)
    assert type(chordal.load(folder).engine.target.model).__name__ == "Qwen2ForCausalLM"


# Refusals.


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dream", {"use_sliding_window": True}, "dream with use_sliding_window True is not supported"),
        ("dream", {"use_mrope": True}, "dream with use_mrope True is not supported"),
        ("sdar", {"attention_bias": True}, "sdar with attention_bias True is not supported"),
        ("sdar_moe", {"norm_topk_prob": None}, "missing here: norm_topk_prob"),
        ("wedlm_8b", {"attention_bias": True}, "needs either attention_bias or qk_norm"),
    ],
)
def test_a_config_that_means_another_computation_is_refused(name, changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        family_of(CASES[name].make(tmp_path / "model", **changes))


def test_a_lost_expert_is_named_as_published(tmp_path):
    folder = writers.write_sdar_moe(tmp_path / "model")
    file, lost = folder / "layer-1-ep-0-of-1.safetensors", "model.layers.1.mlp.experts.5.up_proj.weight"
    weights = load_file(file)
    del weights[lost]
    save_file(weights, file, {"format": "pt"})
    change(folder / "model.safetensors.index.json", lambda index: index["weight_map"].pop(lost))
    with pytest.raises(CheckpointError, match=re.escape(f"lacks {lost}")):
        chordal.load(folder)


def test_weights_of_another_backbone_are_named(tmp_path):
    folder = writers.write_wedlm(tmp_path / "model", size="7B")
    change(folder / "config.json", lambda config: config.update(attention_bias=False, qk_norm=True))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.self_attn\.k_norm\.weight"):
        chordal.load(folder)
