from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaModel

import chordal.models.checkpoint as checkpoint_module
import chordal.models.load as load_module
from chordal.errors import CheckpointError, InputError
from chordal.models.checkpoint import Checkpoint, bundled_models
from chordal.models.load import load_model
from chordal.testing.published import random_weights, write_checkpoint

INTRUDER = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): pass
class Tokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def folder(checkpoint_dir, tmp_path):
    """A good checkpoint folder, to be damaged."""
    return shutil.copytree(checkpoint_dir, tmp_path / "model")


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A folder of bundled models with three names in it, one of which is no model."""
    for name in ("tiny-ar", "tiny-mdm", "notes"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
    for name in ("tiny-ar", "tiny-mdm"):
        (tmp_path / "zoo" / name / "config.json").write_text("{}")
    monkeypatch.setattr(checkpoint_module, "zoo_dir", lambda: tmp_path / "zoo")
    return tmp_path / "zoo"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def refusal(folder, **settings):
    """The one line a folder is refused with."""
    with pytest.raises(CheckpointError) as error:
        load_model(folder, **settings)
    message = str(error.value)
    assert message.isprintable()
    return message


def test_a_folder_is_loaded_with_its_weights_tokenizer_and_stop_tokens(folder):
    model = load_model(folder, max_rows=3)
    assert (model.name, model.max_rows, model.window) == ("model", 3, 256)
    assert model.family.kind == "causal"
    assert model.family.eos_ids == (model.tokenizer.eos_token_id,)
    assert model.vocab_size == len(model.tokenizer)
    want = AutoModelForCausalLM.from_pretrained(folder)
    for (name, got), (_, expected) in zip(
        model.model.named_parameters(), want.named_parameters(), strict=True
    ):
        assert torch.equal(got, expected), name


def test_loading_says_nothing_and_leaves_transformers_as_talkative_as_it_was(folder, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(folder)
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    refusal(folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


# Names.


def test_bundled_models_are_those_with_a_config(zoo):
    assert bundled_models() == ["tiny-ar", "tiny-mdm"]


def test_an_unknown_name_is_answered_with_near_matches(zoo):
    assert refusal("tiny-at") == (
        "unknown model 'tiny-at': neither a bundled model nor a folder nor a hub id (owner/name). Did you "
        "mean tiny-ar or tiny-mdm? Bundled: tiny-ar, tiny-mdm."
    )
    assert refusal("/no/such/folder").startswith("unknown model '/no/such/folder': neither a bundled model")


def test_a_bundled_name_is_found_whatever_the_working_folder(zoo, folder, monkeypatch):
    shutil.rmtree(zoo / "tiny-ar")
    shutil.copytree(folder, zoo / "tiny-ar")
    monkeypatch.chdir(zoo.parent)
    assert load_model("tiny-ar").name == "tiny-ar"


def test_a_file_is_not_a_folder(folder):
    assert "neither a bundled model nor a folder" in refusal(folder / "config.json")


def test_a_home_relative_path_is_understood(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model("~/model").name == "model"


def test_a_snapshot_in_the_cache_of_the_hub_is_loaded_by_its_id(folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--owner--name"
    for part in ("refs", "blobs", f"snapshots/{commit}"):
        (repo / part).mkdir(parents=True)
    for ref in ("main", "v1"):
        (repo / "refs" / ref).write_text(commit)
    for file in folder.iterdir():
        file.rename(repo / "blobs" / file.name)
        (repo / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision in (None, "v1", commit):
        model = load_model("owner/name", revision=revision, local_files_only=True)
        assert model.name == "owner/name"
        assert model.family.eos_ids == (model.tokenizer.eos_token_id,)
    assert "it is not, or not whole, in " in refusal("owner/name", revision="v2", local_files_only=True)


# Weights that do not fit the config; what is wrong within the files is in test_checkpoint.py, and
# published layouts are in test_fit.py.


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_truncated_weights_are_named(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert refusal(folder).startswith(f"{path} is truncated: ")


def test_a_missing_weight_is_named(folder):
    path = folder / "model.safetensors"
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert refusal(folder) == (
        f"{path} lacks model.layers.1.mlp.up_proj.weight, which LlamaForCausalLM needs by config.json."
    )
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    assert refusal(folder).startswith(f"{path} lacks model.layers.1.mlp.up_proj.weight, which ")


def test_a_weight_there_is_only_one_of_is_named_when_it_is_missing(folder):
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    assert refusal(folder) == (
        f"{folder}/model.safetensors lacks model.norm.weight, which LlamaForCausalLM needs by config.json."
    )


def test_a_weight_too_many_is_named(folder):
    change_weights(folder, lambda weights: weights.update(adapter=torch.ones(2)))
    assert refusal(folder) == (
        f"{folder}/model.safetensors holds adapter, for which LlamaForCausalLM has no place by config.json."
    )


def test_a_layer_too_many_is_named(folder):
    change(folder / "config.json", num_hidden_layers=1)
    message = refusal(folder)
    assert message.startswith(
        f"{folder}/model.safetensors holds model.layers.1.input_layernorm.weight (and 8"
    )
    assert message.endswith(" more), for which LlamaForCausalLM has no place by config.json.")


def test_a_weight_of_another_shape_is_named(folder):
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(3)}))
    assert refusal(folder) == (
        f"{folder}/model.safetensors: model.norm.weight must have the shape [32] by config.json; it has [3]."
    )


@pytest.mark.parametrize("value", [33, "wide", -1, None, [32]])
def test_a_size_that_cannot_be_is_refused(folder, value):
    change(folder / "config.json", hidden_size=value)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_a_missing_or_broken_tokenizer_is_refused(folder, damage):
    damage(folder / "tokenizer.json")
    assert refusal(folder).startswith(f"the tokenizer of {folder} cannot be loaded: ")


# What is no model we know.


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ({"model_type": "nothing"}, "architectures ['LlamaForCausalLM'], model_type 'nothing'"),
        ({"model_type": "t5"}, "architectures ['LlamaForCausalLM'], model_type 't5'"),
        ({"model_type": "LLaDA", "architectures": ["LLaDA"]}, "architectures ['LLaDA'], model_type 'LLaDA'"),
        (
            {"model_type": "new", "auto_map": {"AutoModel": "new.New"}},
            "architectures ['LlamaForCausalLM'], model_type 'new', auto_map {'AutoModel': 'new.New'}",
        ),
    ],
)
def test_a_config_of_no_known_model_is_refused_with_what_was_seen(folder, values, seen):
    change(folder / "config.json", **values)
    assert refusal(folder) == (
        f"{folder}: no causal language model of transformers and no published diffusion model that is known "
        f"here. Seen: {seen}; first weight lm_head.weight. Code that comes with a checkpoint is never run."
    )


def test_a_config_that_says_nothing_is_refused(folder):
    (folder / "config.json").write_text("{}")
    assert "Seen: none of architectures, model_type, auto_map; first weight lm_head.weight" in refusal(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": ["llama"]},
        {"model_type": {"a": 1}},
        {"architectures": 5, "model_type": "nothing"},
        {"architectures": [["LLaDAModelLM"]], "model_type": "nothing"},
        {"architectures": "LLaDAModelLM", "model_type": None},
        {"chordal": "masked"},
        {"chordal": {"family": ["masked"]}},
    ],
)
def test_a_config_of_other_types_than_configs_have_is_refused(folder, values):
    change(folder / "config.json", **values)
    assert str(folder) in refusal(folder)


# What would be computed wrongly.


def ignore_masks(monkeypatch):
    """Have attention see all that was fed."""
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def full(module, query, key, value, attention_mask, **more):
        nothing = torch.ones(query.shape[0], 1, query.shape[2], key.shape[2], dtype=torch.bool)
        return attend(module, query, key, value, nothing, **more)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", full)


def ignore_positions(monkeypatch):
    """Have positions counted from the length of the cache, as a model does that is given none."""
    forward = LlamaModel.forward

    def counted(self, *args, position_ids=None, **more):
        return forward(self, *args, **more)

    monkeypatch.setattr(LlamaModel, "forward", counted)


def lose_values(monkeypatch):
    """Have attention over more keys than queries give no numbers."""
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def lost(module, query, key, value, attention_mask, **more):
        output, weights = attend(module, query, key, value, attention_mask, **more)
        return output * (float("nan") if key.shape[2] > query.shape[2] else 1), weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lost)


@pytest.mark.parametrize("damage", [ignore_masks, ignore_positions, lose_values])
def test_a_model_that_does_not_do_as_it_is_told_is_refused(folder, monkeypatch, damage):
    load_model(folder)
    damage(monkeypatch)
    message = refusal(folder)
    assert "LlamaForCausalLM gives other logits when its tokens are placed freely (by " in message
    assert message.endswith("so it cannot be decoded in parallel here.")


def test_a_model_whose_own_logits_are_no_numbers_is_loaded(folder):
    """They are found, and said, when a sequence is decoded."""
    change_weights(folder, lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    load_model(folder)
    change_weights(folder, lambda weights: [weight.zero_() for weight in weights.values()])
    load_model(folder)


def test_what_never_ends_up_in_a_text_is_no_difference(folder):
    change(folder / "config.json", chordal={"family": "masked", "mask_token_id": 5})
    change_weights(folder, lambda weights: weights["lm_head.weight"][5].fill_(1000.0))
    assert load_model(folder).family.mask_id == 5


# Code.


@pytest.mark.parametrize("model_type", ["llama", "intruder"])
def test_code_in_a_checkpoint_is_never_run_nor_asked_about(folder, model_type, monkeypatch):
    """transformers asks on the terminal whether to run the code of a model type it does not know."""
    mark = folder / "mark"
    (folder / "intruder.py").write_text(INTRUDER.format(mark=str(mark)))
    auto_map = {"AutoConfig": "intruder.Config", "AutoModelForCausalLM": "intruder.Model"}
    change(folder / "config.json", model_type=model_type, auto_map=auto_map)
    auto_map = {"AutoTokenizer": [None, "intruder.Tokenizer"]}
    change(folder / "tokenizer_config.json", auto_map=auto_map)
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *text: asked.append(text) or "y")

    if model_type == "llama":
        assert type(load_model(folder).model).__module__.startswith("transformers.")
    else:
        message = refusal(folder)
        assert "'AutoModelForCausalLM': 'intruder.Model'" in message
        assert message.endswith("Code that comes with a checkpoint is never run.")
    assert not mark.exists()
    assert asked == []
    assert not any("intruder" in name for name in sys.modules)


# Memory.

MEASURE = """
import gc
import sys
from pathlib import Path
from chordal.models.load import load_model

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) * 1024

small, large = sys.argv[1:]
load_model(small, device="cpu", dtype="bfloat16")  # brings in all that is imported
before = status("VmRSS")
for dtype in ("bfloat16", "float32"):
    model = load_model(large, device="cpu", dtype=dtype)
    print(dtype, status("VmHWM") - before)
    del model
    gc.collect()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_loading_peaks_at_little_more_than_the_weights_take(checkpoint_dir, tokenizer, tmp_path):
    """In its own process, once in the type the shards are stored in and once in another."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        num_hidden_layers=14,
        num_attention_heads=12,
        intermediate_size=2048,
        max_position_embeddings=256,
    )
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in LlamaForCausalLM(config).state_dict().items()}
    weights = random_weights(shapes)
    write_checkpoint(tmp_path, json.loads(config.to_json_string(use_diff=False)), weights, {}, shards=4)
    tokenizer.save_pretrained(tmp_path)
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(checkpoint_dir), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    measured = [line.split() for line in output.splitlines()]
    assert [dtype for dtype, _ in measured] == ["bfloat16", "float32"]
    count = sum(weight.numel() for weight in weights.values())
    for (dtype, growth), item_bytes in zip(measured, (2, 4), strict=True):
        assert int(growth) <= 1.2 * count * item_bytes, (dtype, int(growth) / (count * item_bytes))


def test_weights_are_read_one_after_the_other(folder, monkeypatch):
    """Read ahead in threads, those that are stacked into one would be in memory twice."""
    threads = []
    slices = Checkpoint.slices

    class Spy:
        def __init__(self, weight):
            self.weight = weight

        def __getitem__(self, index):
            threads.append(threading.current_thread())
            return self.weight[index]

    monkeypatch.setattr(
        Checkpoint, "slices", lambda self: {name: Spy(weight) for name, weight in slices(self).items()}
    )
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "as it was")
    load_model(folder, device="cpu")
    assert set(threads) == {threading.main_thread()}
    assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "as it was"
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD")
    load_model(folder, device="cpu")
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


# Devices and types.


def test_a_device_that_is_not_there_is_refused(folder):
    with pytest.raises(InputError, match=r"^device 'nowhere' is not usable here: "):
        load_model(folder, device="nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"^device 'cuda' is not usable here: "):
            load_model(folder, device="cuda")


def test_an_unknown_type_is_refused(folder):
    with pytest.raises(InputError) as error:
        load_model(folder, dtype="int8")
    assert str(error.value) == "dtype must be one of float32, bfloat16, float16, float64; got 'int8'."


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_type_asked_for_is_taken(folder, dtype):
    assert load_model(folder, device="cpu", dtype=dtype).model.dtype == getattr(torch, dtype)


def test_a_small_model_on_a_cpu_is_float32_and_a_large_one_of_its_own_type(folder, monkeypatch):
    change(folder / "config.json", dtype="bfloat16")
    change_weights(folder, lambda weights: weights.update({k: w.bfloat16() for k, w in weights.items()}))
    assert load_model(folder, device="cpu").model.dtype == torch.float32
    monkeypatch.setattr(load_module, "_FLOAT32_BELOW", 1000)
    assert load_model(folder, device="cpu").model.dtype == torch.bfloat16


# The facts Chordal needs.


def test_the_family_is_read_from_the_config(folder):
    change(folder / "config.json", chordal={"family": "block", "mask_token_id": 1, "block_length": 4})
    family = load_model(folder).family
    assert (family.kind, family.mask_id, family.shift, family.block_length) == ("block", 1, 0, 4)


def test_facts_that_cannot_be_are_refused(folder):
    change(folder / "config.json", chordal={"family": "masked", "mask_token_id": 10_000_000})
    message = refusal(folder)
    assert message.startswith(f"{folder}: config.json: chordal.mask_token_id must be from 0 to ")
    assert message.endswith("; got 10000000.")


@pytest.mark.parametrize("value", ["<e>", [3, "<e>"], 3.0, True])
def test_stop_tokens_that_are_no_numbers_are_refused(folder, value):
    change(folder / "generation_config.json", eos_token_id=value)
    wrong = value[1] if isinstance(value, list) else value
    assert refusal(folder) == f"{folder}: eos_token_id must be a number or several; got {wrong!r}."


@pytest.mark.parametrize(("eos", "ids"), [(3, (3,)), ([3, 5], (3, 5))])
def test_stop_tokens_come_from_the_generation_config(folder, eos, ids):
    change(folder / "generation_config.json", eos_token_id=eos)
    assert load_model(folder).family.eos_ids == ids


def test_without_a_generation_config_the_tokenizer_names_the_stop_token(folder):
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=None)
    model = load_model(folder)
    assert model.family.eos_ids == (model.tokenizer.eos_token_id,)
