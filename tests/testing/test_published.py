from __future__ import annotations

import json

import torch
import transformers
from safetensors.torch import load_file

from chordal.testing.published import byte_tokenizer, random_weights, write_checkpoint

SPECIAL = ("<mask>", "<end>")


def test_every_weight_is_in_the_shard_that_the_index_names(tmp_path):
    weights = random_weights(dict.fromkeys("abcde", (4, 8)) | {"f_bias": (6,)}, float32="bias")
    folder = write_checkpoint(tmp_path / "model", {"model_type": "toy"}, weights, {}, shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert sorted(stored) == [f"model-0000{shard}-of-00003.safetensors" for shard in (1, 2, 3)]
    assert {name: file for file, part in stored.items() for name in part} == index["weight_map"]
    for name, weight in weights.items():
        assert torch.equal(stored[index["weight_map"][name]][name], weight)
    assert {name: weight.dtype for name, weight in weights.items()} == {
        **dict.fromkeys("abcde", torch.bfloat16),
        "f_bias": torch.float32,
    }
    assert index["metadata"]["total_size"] == 5 * 4 * 8 * 2 + 6 * 4


def test_a_byte_tokenizer_reads_any_text_and_has_its_special_tokens_where_they_should_be(tmp_path):
    for first in (5, 256):
        files = {"tokenizer.json": byte_tokenizer(SPECIAL, first=first), "tokenizer_config.json": {}}
        folder = write_checkpoint(tmp_path / str(first), {}, random_weights({"a": (2, 2)}), files, shards=1)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        text = "Voil\u00e0, \u4f60\u597d\n<mask>0<end>"
        tokens = tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokens) == text
        assert [tokens[-3], tokens[-1]] == [first, first + 1]
        assert sorted(tokenizer.get_vocab().values()) == list(range(258))
