from __future__ import annotations

import pytest

from chordal.models.describe import describe
from chordal.testing.published_llada import write_llada2


@pytest.fixture(scope="module")
def llada2(tmp_path_factory):
    return write_llada2(tmp_path_factory.mktemp("published") / "llada2")


def test_json_is_what_the_library_says(run, llada2):
    result = run("inspect", llada2, "--json")
    facts = describe(llada2)
    assert result.code == 0
    assert result.json == facts | {"stop_tokens": {str(k): v for k, v in facts["stop_tokens"].items()}}
    assert (facts["family"], facts["kind"], facts["block_length"]) == ("llada2", "block", 32)


def test_every_fact_has_a_line(run, llada2):
    lines = run("inspect", llada2).out.splitlines()
    facts = describe(llada2)
    assert len(lines) == len(facts)
    for line, name in zip(lines, facts, strict=True):
        assert line.startswith(name.replace("_", " "))
    [parameters] = [line for line in lines if line.startswith("parameters")]
    assert f"{facts['parameters']:,}" in parameters
    [settings] = [line for line in lines if line.startswith("settings")]
    assert settings.split() == ["settings", "threshold", "0.95"]


def test_block_length_is_taken_for_models_that_do_not_say_it(run, llada2):
    assert run("inspect", llada2, "--block-length", "8", "--json").json["block_length"] == 8


@pytest.mark.parametrize("name", ["tiny-ar", "tiny-mdm", "tiny-block"])
def test_decoders_that_fit_include_the_default_one(run, name):
    facts = run("inspect", name, "--json").json
    assert facts["default_decoder"] in facts["decoders"]
    assert (facts["kind"] == "causal") == ("autoregressive" in facts["decoders"])


def test_an_unknown_model_is_one_line_and_exit_2(run):
    result = run("inspect", "tiny-arr")
    assert result.code == 2
    assert "Did you mean tiny-ar" in result.err
    assert result.out == ""


def test_a_hub_repository_that_is_not_there_is_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = run("inspect", "nobody/nothing", "--revision", "main", "--token", "hf_x", "--local-files-only")
    assert result.code == 2
    assert "nobody/nothing" in result.err
    assert "Traceback" not in result.err
