from __future__ import annotations

import builtins
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import chordal.models.checkpoint as checkpoint_module
from chordal.errors import CheckpointError, InputError
from chordal.models.checkpoint import bundled_models
from chordal.models.load import load_model

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
    assert "\n" not in message
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
        "unknown model 'tiny-at': neither a bundled model nor a folder. Did you mean tiny-ar or tiny-mdm? "
        "Bundled: tiny-ar, tiny-mdm."
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


# Damaged folders.


def test_a_folder_without_a_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder} has no config.json; is it a checkpoint folder?"


@pytest.mark.parametrize(
    "content", [b"", b"{ nope", b"\xff\xfe\x00", b"[]", b"{}", b'{"model_type": "nothing"}']
)
def test_a_config_that_cannot_be_read_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    assert refusal(folder).startswith(f"{folder}/config.json cannot be ")


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder} holds no .safetensors weights."


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_unopened(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    assert refusal(folder).endswith(f" {name} is a pickle, which could run code; convert it to safetensors.")


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_truncated_weights_are_named(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert refusal(folder).startswith(f"{path} cannot be read: ")


def test_a_missing_part_of_the_weights_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in refusal(folder)


def test_a_missing_weight_is_named(folder):
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert refusal(folder) == f"{folder}: missing keys in the weights: model.layers.1.mlp.up_proj.weight."


def test_a_weight_too_many_is_named(folder):
    change_weights(folder, lambda weights: weights.update(adapter=torch.ones(2)))
    assert refusal(folder) == f"{folder}: unexpected keys in the weights: adapter."


def test_a_weight_of_another_shape_is_named(folder):
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(3)}))
    message = refusal(folder)
    assert message.startswith(f"{folder}: mismatched keys in the weights: ")
    assert "model.norm.weight" in message


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_a_missing_or_broken_tokenizer_is_refused(folder, damage):
    damage(folder / "tokenizer.json")
    assert refusal(folder).startswith(f"the tokenizer of {folder} cannot be loaded: ")


# What would be computed wrongly, or run.


@pytest.mark.parametrize(
    ("model_type", "values", "reason"),
    [
        ("mistral", {"sliding_window": 16}, "mistral layers with a sliding window are not supported yet"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "qwen2 layers with a sl",
        ),
        ("gemma2", {}, "gemma2 models with final_logit_softcapping are not supported yet"),
        ("cohere", {"logit_scale": 0.0625}, "cohere models with logit_scale are not supported yet"),
        ("granite", {"logits_scaling": 8.0}, "granite models with logits_scaling are not supported yet"),
        ("t5", {}, "T5Config has no causal language model in transformers"),
    ],
)
def test_models_that_need_what_is_not_there_yet_are_refused(folder, model_type, values, reason):
    change(folder / "config.json", model_type=model_type, **values)
    assert refusal(folder).startswith(f"{folder}: {reason}")


@pytest.mark.parametrize(
    ("model_type", "values"),
    [("mistral", {"sliding_window": None}), ("qwen2", {"use_sliding_window": False, "sliding_window": 16})],
)
def test_models_that_could_slide_but_do_not_are_loaded(folder, model_type, values):
    change(folder / "config.json", model_type=model_type, **values)
    if model_type == "qwen2":  # has biases where Llama has none
        bias = {"q": 32, "k": 16, "v": 16}
        change_weights(
            folder,
            lambda weights: weights.update(
                {
                    f"model.layers.{n}.self_attn.{p}_proj.bias": torch.zeros(size)
                    for n in (0, 1)
                    for p, size in bias.items()
                }
            ),
        )
    assert load_model(folder).model.config.model_type == model_type


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
        assert "custom code" in refusal(folder)
    assert not mark.exists()
    assert asked == []
    assert not any("intruder" in name for name in sys.modules)


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
    assert "chordal.mask_token_id must be from 0 to" in refusal(folder)


@pytest.mark.parametrize(("eos", "ids"), [(3, (3,)), ([3, 5], (3, 5))])
def test_stop_tokens_come_from_the_generation_config(folder, eos, ids):
    change(folder / "generation_config.json", eos_token_id=eos)
    assert load_model(folder).family.eos_ids == ids


def test_without_a_generation_config_the_tokenizer_names_the_stop_token(folder):
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=None)
    model = load_model(folder)
    assert model.family.eos_ids == (model.tokenizer.eos_token_id,)
