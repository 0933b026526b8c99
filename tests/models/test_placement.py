from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile

import pytest
import transformers

import chordal
from chordal.errors import CheckpointError, InputError
from chordal.models.placement import place
from chordal.testing.published_llada import write_llada

ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
MOSTLY_ON_DISK = dict.fromkeys(ON_DISK, "disk") | {"model.rotary_emb": "cpu"}
PROMPTS = [[5, 9, 12], [30, 7, 7, 7, 41, 5]]

SPLIT = """
import json, os, pathlib, sys
import chordal

tokens = []
for folder in sys.argv[2:]:
    model = chordal.load(folder, tensor_parallel=True)
    tokens.append([one.tokens for one in model.generate(json.loads(sys.argv[1]), max_new_tokens=12)])
weights = model.engine.target.model.parameters()
shapes = [list(weight.to_local().shape) for weight in weights if hasattr(weight, "to_local")]
result = pathlib.Path(__file__).with_name(os.environ["RANK"] + ".json")
result.write_text(json.dumps([tokens, shapes]))
"""


def tokens_of(model):
    return [one.tokens for one in model.generate(PROMPTS, max_new_tokens=12)]


@pytest.fixture(scope="module")
def folders(checkpoint_dir, tokenizer, tmp_path_factory):
    """A plain checkpoint, one whose logits are more than an output embedding, and a published one."""
    root = tmp_path_factory.mktemp("placement")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma2Config(
        **shape,
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        initializer_range=0.3,
    )
    transformers.Gemma2ForCausalLM(config).save_pretrained(root / "gemma2")
    tokenizer.save_pretrained(root / "gemma2")
    return {"llama": checkpoint_dir, "gemma2": root / "gemma2", "llada": write_llada(root / "llada")}


@pytest.mark.parametrize("name", ["llama", "gemma2", "llada"])
@pytest.mark.parametrize(
    "device_map",
    ["auto", {"": "cpu"}, ON_DISK, MOSTLY_ON_DISK],
    ids=["auto", "cpu", "some on disk", "most on disk"],
)
def test_text_is_the_same_wherever_the_layers_are(folders, name, device_map):
    model = chordal.load(folders[name], device_map=device_map)
    is_away = any(weight.is_meta for weight in model.engine.target.model.parameters())
    assert is_away == ("disk" in list(device_map.values() if isinstance(device_map, dict) else ()))
    assert model.engine.target.device.type == "cpu"
    assert tokens_of(model) == tokens_of(chordal.load(folders[name]))


def test_what_is_written_to_disk_goes_with_the_model(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = chordal.load(folders["llada"], device_map=ON_DISK)
    [folder] = tmp_path.iterdir()
    assert len(list(folder.iterdir())) > 5
    del model
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match=r"does not give any device for .*lm_head"):
        chordal.load(folders["llada"], device_map={"model": "disk"})
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_model_split_over_two_processes_gives_the_same_text(folders, tmp_path):
    (tmp_path / "split.py").write_text(SPLIT)
    names = ["llada", "llama"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "split.py"), json.dumps(PROMPTS), *(str(folders[name]) for name in names)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    want = [tokens_of(chordal.load(folders[name], device="cpu")) for name in names]
    for rank in (0, 1):
        tokens, shapes = json.loads((tmp_path / f"{rank}.json").read_text())
        assert tokens == want
        assert [16, 32] in shapes  # half of the rows of a query projection


# What cannot be.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"device": "cpu", "device_map": "auto"},
            "device, device_map and tensor_parallel exclude each other; give one.",
        ),
        (
            {"device_map": "auto", "tensor_parallel": True},
            "device, device_map and tensor_parallel exclude each other; give one.",
        ),
        ({"device": "nowhere"}, "device 'nowhere' is not usable here: "),
        ({"device_map": {"": "nowhere"}}, "device 'nowhere' is not usable here: "),
        (
            {"device_map": "everywhere"},
            "device_map must be auto, balanced, balanced_low_0, sequential or a device by name",
        ),
        ({"tensor_parallel": True}, "tensor parallelism needs several processes; start them with torchrun"),
    ],
)
def test_a_place_that_is_not_there_is_refused(settings, message, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError) as error:
        place(**settings)
    assert str(error.value).startswith(message)
