from __future__ import annotations

import pytest
from safetensors.torch import load_file

from chordal.testing.published_llada import write_llada


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return write_llada(tmp_path_factory.mktemp("published") / "llada")


def test_a_checkpoint_goes_there_and_back(run, llada, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    result = run("convert", llada, ours, "--max-shard-bytes", "100000000")
    assert (result.code, result.out) == (0, f"{ours}\n")
    assert run("inspect", ours, "--json").json["backbone"] == "LlamaForCausalLM"
    assert run("generate", "abc", "--model", ours, "--max-new-tokens", "4").code == 0
    assert run("convert", ours, back).code == 0
    assert "model.transformer.wte.weight" in load_file(back / "model.safetensors")


def test_a_target_that_is_not_empty_is_refused_untouched(run, llada, tmp_path):
    (tmp_path / "file").touch()
    result = run("convert", llada, tmp_path)
    assert result.code == 2
    assert "must be new or empty" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_length_of_blocks_is_kept(run, tmp_path):
    from chordal.testing.published_qwen import write_sdar

    sdar = write_sdar(tmp_path / "sdar")
    assert run("convert", sdar, tmp_path / "ours", "--block-length", "8").code == 0
    assert run("inspect", tmp_path / "ours", "--json").json["block_length"] == 8
