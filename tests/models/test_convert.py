from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import chordal
from chordal.errors import CheckpointError, InputError
from chordal.models.checkpoint import Checkpoint
from chordal.models.convert import convert
from chordal.models.describe import describe
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


@pytest.fixture(scope="module", params=list(WRITERS))
def published(request, tmp_path_factory):
    """A checkpoint of each published family."""
    return WRITERS[request.param](tmp_path_factory.mktemp("published") / request.param)


@pytest.fixture(scope="module")
def ours(published, tmp_path_factory):
    """The same in our layout, in several shards."""
    return convert(published, tmp_path_factory.mktemp("ours") / published.name, max_shard_bytes=20_000)


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return published_llada.write_llada(tmp_path_factory.mktemp("published") / "llada")


def stored(folder):
    """Every tensor of a folder with its type, as bytes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                tensor = reader.get_tensor(name)
                found[name] = (tensor.dtype, tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
    return found


def others(folder):
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.is_file() and file.suffix != ".safetensors" and file.name != "model.safetensors.index.json"
    }


def test_there_and_back_every_byte_of_every_tensor_and_file_is_the_same(published, ours, tmp_path):
    back = convert(ours, tmp_path / "back")
    assert stored(back) == stored(published)
    assert others(back) == others(published)


def test_ours_is_the_same_model(published, ours):
    first, second = chordal.load(published, dtype="float32"), chordal.load(ours, dtype="float32")
    for name in ("kind", "mask_id", "shift", "block_length", "eos_ids", "settings"):
        assert getattr(first.family, name) == getattr(second.family, name), name
    prompt = np.arange(40, 49)
    results = [model.generate(prompt.tolist(), max_new_tokens=8) for model in (first, second)]
    assert results[0][0].error is None
    assert results[0][0].tokens == results[1][0].tokens


def test_ours_is_read_by_transformers_alone(ours):
    _, report = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_shards_stay_below_their_size(ours):
    checkpoint = Checkpoint.open(ours)
    by_file = {}
    for name, weight in checkpoint.weights.items():
        by_file.setdefault(weight.file, []).append(name)
    assert len(by_file) > 1
    for file, names in by_file.items():
        assert file.stat().st_size < 25_000 or len(names) == 1


def test_no_code_is_carried_along(llada, tmp_path):
    source = shutil.copytree(llada, tmp_path / "source")
    (source / "modeling_llada.py").write_text("raise SystemExit")
    made = convert(source, tmp_path / "ours")
    back = convert(made, tmp_path / "back")
    assert not [*made.rglob("*.py"), *back.rglob("*.py")]


def test_a_model_in_transformers_layout_has_nothing_to_convert(checkpoint_dir, tmp_path):
    with pytest.raises(CheckpointError, match="nothing to convert"):
        convert(checkpoint_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_alone(llada, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(InputError, match="must be new or empty"):
        convert(llada, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_failure_leaves_nothing_behind(llada, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(llada, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_the_published_files_the_way_back_is_refused(llada, tmp_path):
    made = convert(llada, tmp_path / "ours")
    shutil.rmtree(made / "published")
    with pytest.raises(CheckpointError, match=r"published/config\.json is missing"):
        convert(made, tmp_path / "back")


def test_a_lost_weight_is_named_on_the_way_back(tmp_path):
    published = published_llada.write_llada2(tmp_path / "llada2")
    made = convert(published, tmp_path / "ours")
    from safetensors.torch import load_file, save_file

    weights = load_file(made / "model.safetensors")
    del weights["model.layers.0.self_attn.k_proj.weight"]
    save_file(weights, made / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the weights lack model\.layers\.0\.self_attn\.k_proj"):
        convert(made, tmp_path / "back")


def test_a_fine_tune_of_ours_goes_back_too(llada, tmp_path):
    made = convert(llada, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(made)
    with torch.no_grad():
        model.lm_head.weight[3] = 1.0
    model.save_pretrained(made)
    back = chordal.load(convert(made, tmp_path / "back"), dtype="float32").engine.target.model
    assert (back.lm_head.weight[3] == 1).all()


def test_the_description_is_what_loading_finds(published):
    facts = describe(published)
    model = chordal.load(published)
    assert facts["family"] == model.family.name
    assert facts["kind"] == model.family.kind
    assert facts["backbone"] == type(model.engine.target.model).__name__
    assert facts["window"] == model.engine.target.window
    assert facts["vocab_size"] == model.engine.target.vocab_size
    assert facts["dtype"] == "bf16"
    assert list(facts["stop_tokens"]) == list(model.family.eos_ids)
    assert facts["default_decoder"] in facts["decoders"]
    assert facts["mask_token"] == model.tokenizer.convert_ids_to_tokens(model.family.mask_id)
    assert json.loads(json.dumps(facts))["parameters"] == sum(
        np.prod(weight.shape, dtype=int) for weight in Checkpoint.open(published).weights.values()
    )


def test_a_description_reads_no_weights(llada, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "slices", lambda self: pytest.fail("weights were read"))
    assert describe(llada)["family"] == "llada"


def test_layers_of_limited_reach_are_described():
    assert describe("tiny-ar")["layers"] == {"full_attention": None}
