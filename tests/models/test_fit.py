from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chordal.errors import CheckpointError
from chordal.models.checkpoint import Checkpoint
from chordal.models.fit import Fit
from chordal.models.load import load_model
from chordal.models.recognise import recognise
from chordal.models.weights import WeightMap
from chordal.testing import published_llada, published_qwen

WRITERS = {
    "llada": published_llada.write_llada,
    "illada": published_llada.write_illada,
    "llada_moe": published_llada.write_llada_moe,
    "llada2": published_llada.write_llada2,
    "dream": published_qwen.write_dream,
    "sdar": published_qwen.write_sdar,
    "sdar_moe": published_qwen.write_sdar_moe,
    "fast_dllm_v2": published_qwen.write_fast_dllm_v2,
    "wedlm": published_qwen.write_wedlm,
}
INDEX = "model.safetensors.index.json"


def change_weights(folder, edit):
    """Change the weights of a sharded checkpoint; new ones go into the first shard."""
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    weights = {}
    for file in sorted(set(places.values())):
        weights |= load_file(folder / file)
    edit(weights)
    first = min(places.values())
    places = {name: places.get(name, first) for name in weights}
    for file in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return places


def file_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def refusal(folder):
    with pytest.raises(CheckpointError) as error:
        load_model(folder, device="cpu")
    message = str(error.value)
    assert message.isprintable()
    return message


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_published_family_needs_is_what_its_files_hold(name, tmp_path):
    found = recognise(Checkpoint.open(WRITERS[name](tmp_path / name)))
    checkpoint = found.checkpoint
    fit = Fit.of(checkpoint, found.model_class, found.config, found.published.weights(checkpoint.config))
    stored = {name: weight.shape for name, weight in checkpoint.weights.items()}
    assert {name: shape for name, shape in fit.shapes.items() if name not in fit.optional} == stored
    fit.refuse_unread()


# A published name each, and how many of ours it stands for or is part of makes no difference.
LOST = {
    "llada": ["model.transformer.blocks.1.ff_out.weight", "model.transformer.ff_out.weight"],
    "llada_moe": ["model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.0.self_attn.q_norm.weight"],
    "llada2": [
        "model.layers.2.attention.query_key_value.weight",
        "model.layers.1.mlp.experts.15.down_proj.weight",
        "model.layers.2.mlp.gate.expert_bias",
        "model.word_embeddings.weight",
    ],
    "dream": ["model.layers.0.self_attn.q_proj.bias"],
    "sdar_moe": ["model.layers.0.mlp.experts.0.gate_proj.weight"],
    "illada": ["model.embed_tokens.weight"],
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in LOST for name in LOST[family]])
def test_a_missing_weight_is_named_as_published(family, name, tmp_path):
    folder = WRITERS[family](tmp_path / "model")
    change_weights(folder, lambda weights: weights.pop(name))
    assert refusal(folder).startswith(f"{folder} lacks {name}, which ")


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in LOST for name in LOST[family]])
def test_a_weight_of_another_shape_is_named_as_published_with_its_file(family, name, tmp_path):
    folder = WRITERS[family](tmp_path / "model")
    shape = Checkpoint.open(folder).weights[name].shape

    def widen(weights):
        weights[name] = torch.cat([weights[name], weights[name][:1]])

    change_weights(folder, widen)
    assert refusal(folder) == (
        f"{file_of(folder, name)}: {name} must have the shape {list(shape)} by config.json; it has "
        f"{[shape[0] + 1, *shape[1:]]}."
    )


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("llada", "model.transformer.blocks.2.ff_out.weight", (32, 48)),
        ("llada", "model.transformer.blocks.0.q_proj.bias", (32,)),
        ("llada", "adapter", (2,)),
        ("llada_moe", "model.layers.1.mlp.experts.8.up_proj.weight", (24, 32)),
        ("llada2", "model.layers.3.attention.query_key_value.weight", (128, 32)),
        ("llada2", "model.layers.0.attention.query_key_value.bias", (128,)),
        ("wedlm", "model.layers.0.self_attn.o_proj.bias", (32,)),
    ],
)
def test_a_weight_too_many_is_named_as_published_with_its_file(family, name, shape, tmp_path):
    folder = WRITERS[family](tmp_path / "model")
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(shape)}))
    message = refusal(folder)
    assert message.startswith(f"{file_of(folder, name)} holds {name}, for which ")
    assert message.endswith(" has no place by config.json.")


def test_an_expert_under_a_wrong_number_is_found_though_their_count_is_right(tmp_path):
    """transformers stacks experts in the order of their numbers and does not look at the numbers."""
    folder = WRITERS["llada_moe"](tmp_path / "model")
    at = "model.layers.1.mlp.experts"

    def renumber(weights):
        for part in ("gate_proj", "up_proj", "down_proj"):
            weights[f"{at}.9.{part}.weight"] = weights.pop(f"{at}.3.{part}.weight")

    change_weights(folder, renumber)
    assert refusal(folder).startswith(f"{folder} lacks {at}.3.down_proj.weight (and 2 more), which ")


def test_all_experts_missing_are_named_as_stored(tmp_path):
    folder = WRITERS["llada2"](tmp_path / "model")

    def drop(weights):
        for name in [name for name in weights if ".mlp.experts." in name]:
            del weights[name]

    change_weights(folder, drop)
    message = refusal(folder)
    assert message.startswith(f"{folder} lacks model.layers.1.mlp.experts.0.")
    assert " (and 95 more), which " in message


def test_misfits_are_found_before_a_value_is_read(tmp_path, monkeypatch):
    folder = WRITERS["llada"](tmp_path / "model")
    change_weights(folder, lambda weights: weights.pop("model.transformer.blocks.1.ff_out.weight"))

    class Unread:
        def __getitem__(self, index):
            raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "slices", lambda checkpoint: dict.fromkeys(checkpoint.weights, Unread()))
    assert "lacks model.transformer.blocks.1.ff_out.weight" in refusal(folder)


def test_a_tied_head_may_be_stored_or_not_but_not_in_another_shape(tmp_path):
    for has_head in (False, True):
        folder = published_llada.write_illada(tmp_path / str(has_head), has_head=has_head)
        model = load_model(folder).model
        assert model.lm_head.weight is model.model.embed_tokens.weight
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.ones(3, 32)}))
    message = refusal(folder)
    assert message.startswith(f"{file_of(folder, 'lm_head.weight')}: lm_head.weight must have the shape [")
    assert message.endswith("; it has [3, 32].")


def test_one_weight_under_two_names_is_refused(tmp_path):
    folder = WRITERS["llada"](tmp_path / "model")
    change_weights(
        folder,
        lambda weights: weights.update({"lm_head.weight": weights["model.transformer.ff_out.weight"] + 1}),
    )
    message = refusal(folder)
    assert message.startswith(f"{folder}: the weights hold ")
    assert "lm_head.weight" in message
    assert "model.transformer.ff_out.weight" in message


# Any causal model of transformers.


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("Llama", {}),
        ("Gemma3Text", {"head_dim": 8, "tie_word_embeddings": True}),
        ("Phi3", {}),
        ("GPTNeoX", {}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}),
        ("Mixtral", {"num_local_experts": 4}),
    ],
)
def test_what_an_architecture_needs_is_what_transformers_saves(architecture, more, tmp_path):
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **({} if architecture == "GPTNeoX" else {"num_key_value_heads": 2}),
        **more,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    before = config.to_dict()
    fit = Fit.of(checkpoint, type(model), config, WeightMap())
    assert config.to_dict() == before
    assert fit.architecture == type(model).__name__
    stored = {name: weight.shape for name, weight in checkpoint.weights.items()}
    assert {name: shape for name, shape in fit.shapes.items() if name not in fit.optional} == stored
    fit.refuse_unread()
    fit.refuse_reported({"mismatched_keys": (), "missing_keys": (), "unexpected_keys": (), "error_msgs": []})


def test_buffers_of_older_checkpoints_are_left_to_transformers(checkpoint_dir, tmp_path):
    """Llama used to store the frequencies of its positions in every layer."""
    import shutil

    folder = shutil.copytree(checkpoint_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load_model(folder)
