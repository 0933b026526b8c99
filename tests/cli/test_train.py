from __future__ import annotations

import dataclasses
import re
import shutil

import pytest

import chordal
from chordal.training import recipes

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.fixture
def runs(tmp_path, monkeypatch, tokenizer_dir):
    """A working folder with a tokenizer, and recipes small enough for tests."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tokenizer_dir, tmp_path / "runs" / "tokenizer")
    for name, recipe in recipes.RECIPES.items():
        backbone = {**recipe.backbone, **SMALL}
        monkeypatch.setitem(recipes.RECIPES, name, dataclasses.replace(recipe, backbone=backbone))
    return tmp_path / "runs"


def test_trains_into_a_run_folder_and_says_how_to_use_the_model(run, runs):
    result = run("train", "tiny-ar", "--steps", 2)
    assert result.code == 0
    first, second = result.out.splitlines()
    assert first == "Trained tiny-ar: runs/tiny-ar/model"
    assert second == 'Use it:  chordal generate --model runs/tiny-ar/model "copy: Ana Ben Cleo"'
    assert chordal.load(runs / "tiny-ar" / "model").family.kind == "causal"


def test_progress_has_fixed_width_and_units(run, runs):
    line = run("train", "tiny-ar", "--steps", 2).err.splitlines()[-1]
    assert re.fullmatch(r"step 00002 \| loss \d+\.\d{3} \| [\d,]+ tok/s \| \d+\.\d GB", line)


def test_running_again_goes_on_where_it_was(run, runs):
    run("train", "tiny-ar", "--steps", 2, "--save-every", 1)
    resumed = run("train", "tiny-ar", "--steps", 3)
    straight = run("train", "tiny-ar", "--steps", 3, "--out", "runs/other")
    loss = [re.search(r"loss (\S+)", result.err.splitlines()[-1])[1] for result in (resumed, straight)]
    assert resumed.err.count("step 0") == 1
    assert loss[0] == loss[1]


def test_recipe_starts_from_the_model_beside_it_and_keeps_its_vocabulary(run, runs, monkeypatch, tmp_path):
    monkeypatch.setattr("chordal.models.checkpoint.zoo_dir", lambda: tmp_path)
    run("train", "tiny-ar", "--steps", 1)
    shutil.rmtree(runs / "tokenizer")
    result = run("train", "tiny-block", "--steps", 1)
    assert result.code == 0, result.err
    assert not (runs / "tokenizer").exists()
    mine, base = (
        chordal.load(runs / name / "model").tokenizer.get_vocab() for name in ("tiny-block", "tiny-ar")
    )
    assert mine == base


def test_recipe_starts_from_the_bundled_model_otherwise(run, runs):
    assert run("train", "tiny-block", "--steps", 1).code == 0


def test_missing_start_is_one_clear_line(run, runs, monkeypatch, tmp_path):
    monkeypatch.setattr("chordal.models.checkpoint.zoo_dir", lambda: tmp_path)
    result = run("train", "tiny-block")
    assert (result.code, result.out) == (2, "")
    assert "Run chordal train tiny-ar first" in result.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tiny-arr"], ["unknown recipe", "tiny-ar"]),
        ([], ["--list"]),
        (["tiny-ar", "--steps", "0"], ["--steps"]),
        (["tiny-ar", "--out", "file/run"], ["cannot write file/run"]),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_2(run, runs, args, words):
    (runs.parent / "file").touch()
    result = run("train", *args)
    assert (result.code, result.out) == (2, "")
    first, second = result.err.splitlines()
    assert all(word in first for word in words)
    assert second == "Try: chordal train --help"


def test_list_names_every_recipe(run):
    shown = run("train", "--list").out
    assert all(name in shown for name in recipes.RECIPES)
