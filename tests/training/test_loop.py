from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chordal.bench.tasks import GROUPS, TASKS, is_held_out
from chordal.training.data import EVEN, make_batches
from chordal.training.loop import Recipe, Stage, _schedule, train
from chordal.training.recipes import RECIPES

NUM_STEPS = 12

# How the prompts of each task begin.
WORDINGS = {
    "copy": "copy:",
    "reverse": "reverse:",
    "sort": "sort:",
    "shuffle": "shuffle:",
    "insert_index": r"insert \w+ at",
    "insert_random": r"insert \w+ anywhere",
    "remove_index": "remove at",
    "remove_random": "remove anyone",
    "replace_index": "replace at",
    "replace_random": "replace anyone",
    "latin": "latin square:",
    "sudoku": "sudoku:",
    "arithmetic": r"\w+ has",
    "rename": r"rename \w+ to",
    "insert_line": "after line",
}


def shrink(recipe: Recipe) -> Recipe:
    """Keep everything but the size, and learn fast enough to see it in a few steps of the warm-up."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    return dataclasses.replace(recipe, backbone={**recipe.backbone, **small}, learning_rate=0.1)


@pytest.fixture(scope="module")
def run(tokenizer_dir):
    """Run a shrunken recipe in a folder; the keywords are those of `train`."""

    def start(recipe, directory, **keywords):
        keywords = {"num_steps": NUM_STEPS, "scale": 0.1, **keywords}
        return train(shrink(recipe), directory, tokenizer_dir=tokenizer_dir, **keywords)

    return start


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run):
    """Every recipe, trained for a few steps: name -> (run folder, progress of each step)."""
    root, runs = tmp_path_factory.mktemp("runs"), {}
    for name, recipe in RECIPES.items():
        init_dir = runs[recipe.init_from][0] / "model" if recipe.init_from else None
        runs[name] = root / name, list(run(recipe, root / name, init_dir=init_dir))
    return runs


every_recipe = pytest.mark.parametrize("name", RECIPES)


def weights(directory):
    return load_file(directory / "model" / "model.safetensors")


def assert_same_state(one, other):
    """Compare what two runs left to continue from, bit by bit; only the clock may differ."""
    one, other = (torch.load(directory / "state.pt", weights_only=True) for directory in (one, other))
    assert one.keys() == other.keys()
    assert one["step"] == other["step"]
    for key in ("model", "ema"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
    for first, second in zip(one["optimizers"], other["optimizers"], strict=True):
        assert first["param_groups"] == second["param_groups"]
        torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)


# --- batches --------------------------------------------------------------------------------------


def rows_of(tokenizer, batch):
    """Yield the prompt and the answer of each row as text."""
    for tokens, start, end in zip(batch.tokens_BT, batch.prompt_length_B, batch.length_B, strict=True):
        prompt = tokenizer.decode(tokens[:start])
        yield (
            re.fullmatch(r"<\|user\|> ?(.*)<\|assistant\|>", prompt, re.DOTALL)[1],
            tokenizer.decode(tokens[start : end - 1]),
        )


def test_same_seed_and_step_give_the_same_batches_and_others_differ(tokenizer):
    def tokens(seed, step):
        return [
            batch.tokens_BT.tolist() for batch in make_batches(tokenizer, seed=seed, step=step, scale=0.2)
        ]

    assert tokens(3, 7) == tokens(3, 7)
    for one, same_seed, same_step in zip(tokens(3, 7), tokens(3, 8), tokens(4, 7), strict=True):
        assert one != same_seed
        assert one != same_step


def test_held_out_prompts_are_never_in_a_batch(tokenizer):
    prompts = {
        prompt
        for step in range(8)
        for batch in make_batches(tokenizer, seed=0, step=step)
        for prompt, _ in rows_of(tokenizer, batch)
    }
    # One in sixteen of so many would be held out if they were let in.
    assert len(prompts) > 900
    assert not any(is_held_out(prompt) for prompt in prompts)


def test_rows_are_prompt_answer_and_end_tokens(tokenizer):
    for group, batch in zip(GROUPS, make_batches(tokenizer, seed=0, step=0, slack=5), strict=True):
        assert (len(batch.tokens_BT), batch.weight) == EVEN[group]
        assert batch.tokens_BT.shape[1] == batch.length_B.max() + 5
        at_T = torch.arange(batch.tokens_BT.shape[1])
        is_end = batch.tokens_BT == tokenizer.eos_token_id
        assert torch.equal(is_end, at_T >= batch.length_B[:, None] - 1)


def test_rows_of_tasks_with_one_answer_hold_it(tokenizer):
    lists, puzzles, *_ = make_batches(tokenizer, seed=0, step=0)
    for prompt, answer in rows_of(tokenizer, lists):
        request, line = prompt.split(": ")
        if request in ("copy", "reverse", "sort"):
            names = line.split()
            solved = {"copy": names, "reverse": names[::-1], "sort": sorted(names)}[request]
            assert answer.split() == solved
    for prompt, answer in rows_of(tokenizer, puzzles):
        if prompt.startswith("sudoku"):
            given = prompt.removeprefix("sudoku:\n").split()
            assert all(cell in ("0", solved) for cell, solved in zip(given, answer.split(), strict=True))


def test_every_task_is_in_every_step(tokenizer):
    for step in range(3):
        batches = make_batches(tokenizer, seed=0, step=step)
        prompts = [prompt for batch in batches for prompt, _ in rows_of(tokenizer, batch)]
        counts = {
            task: sum(re.match(wording, prompt) is not None for prompt in prompts)
            for task, wording in WORDINGS.items()
        }
        assert counts.keys() == TASKS.keys()
        assert sum(counts.values()) == sum(count for count, _ in EVEN.values())
        assert min(counts.values()) >= 6


@pytest.mark.parametrize("name", RECIPES)
def test_weights_of_every_stage_share_out_the_whole_loss(name):
    stages = RECIPES[name].stages
    assert stages[0].start == 0
    assert [stage.start for stage in stages] == sorted(stage.start for stage in stages)
    for stage in stages:
        assert set(stage.mixture) == set(GROUPS)
        assert sum(weight for _, weight in stage.mixture.values()) == pytest.approx(1)


def test_a_stage_takes_over_at_its_start(tmp_path, run, tokenizer):
    seen = []

    def stage(name, start):
        def objective(model, batch, generator):
            seen.append(name)
            return sum(p.sum() for p in model.parameters()) * 0.0

        return Stage(start=start, objective=objective)

    recipe = dataclasses.replace(RECIPES["tiny-ar"], stages=(stage("first", 0), stage("second", 2)))
    list(run(recipe, tmp_path, num_steps=3))
    assert seen == ["first"] * 8 + ["second"] * 4


# --- recipes --------------------------------------------------------------------------------------


def test_recipes_are_listed_by_their_name_and_start_from_recipes():
    for name, recipe in RECIPES.items():
        assert name == recipe.name
        assert recipe.init_from is None or recipe.init_from in RECIPES


@every_recipe
def test_loss_of_every_recipe_falls(trained, name):
    losses = [progress.loss for progress in trained[name][1]]
    assert all(0 < loss < 20 for loss in losses)
    assert sum(losses[-3:]) < sum(losses[:3])


@every_recipe
def test_progress_counts_the_steps(trained, name):
    progress = trained[name][1]
    assert [(p.step, p.num_steps) for p in progress] == [(n + 1, NUM_STEPS) for n in range(NUM_STEPS)]
    assert all(p.tokens_per_second > 0 and p.memory_gb > 0 for p in progress)


@every_recipe
def test_exported_folder_loads_in_transformers_with_family_and_tokenizer(trained, name):
    folder = trained[name][0] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.chordal == RECIPES[name].family
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert RECIPES[name].family.get("mask_token_id", tokenizer.mask_token_id) == tokenizer.mask_token_id
    logits = model(torch.tensor([tokenizer("Ana Ben")["input_ids"]])).logits
    assert logits.isfinite().all()
    facts = json.loads((folder / "training.json").read_text())
    assert facts["recipe"] == name
    assert (facts["steps"], facts["seed"]) == (NUM_STEPS, 0)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


@every_recipe
def test_exported_weights_are_the_running_average(trained, name):
    directory = trained[name][0]
    state = torch.load(directory / "state.pt", weights_only=True)
    exported = AutoModelForCausalLM.from_pretrained(directory / "model")
    names = [name for name, _ in exported.named_parameters()]
    average = dict(zip(names, state["ema"], strict=True))
    for parameter_name, parameter in exported.named_parameters():
        assert torch.equal(parameter, average[parameter_name].bfloat16())
    assert any(not torch.equal(average[n], state["model"][n]) for n in names)


# --- the loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-ar", "tiny-mdm"])
def test_stopped_and_resumed_run_equals_one_that_was_not(tmp_path, run, name):
    recipe = dataclasses.replace(RECIPES[name], init_from=None)
    list(run(recipe, tmp_path / "straight", num_steps=6, save_every=3))
    stopped = run(recipe, tmp_path / "stopped", num_steps=6, save_every=3)
    # One step further than the checkpoint: that step is lost, and done again.
    assert [next(stopped).step for _ in range(4)] == [1, 2, 3, 4]
    stopped.close()
    # What a run killed while saving leaves behind.
    (tmp_path / "stopped" / "state.tmp").write_bytes(b"half a checkpoint")
    resumed = list(run(recipe, tmp_path / "stopped", num_steps=6, save_every=3))
    assert [progress.step for progress in resumed] == [4, 5, 6]
    assert_same_state(tmp_path / "straight", tmp_path / "stopped")
    torch.testing.assert_close(weights(tmp_path / "stopped"), weights(tmp_path / "straight"), rtol=0, atol=0)


def test_every_step_has_its_own_batches_and_masks(tmp_path, run, tokenizer):
    fed, seeds = [], []

    def spy(model, batch, generator):
        fed.append(batch.tokens_BT)
        seeds.append(generator.initial_seed())
        return RECIPES["tiny-block"].stages[0].objective(model, batch, generator)

    recipe = dataclasses.replace(RECIPES["tiny-block"], stages=(Stage(objective=spy),), init_from=None)
    list(run(recipe, tmp_path, num_steps=3, seed=5))
    made = [
        batch.tokens_BT
        for step in range(3)
        for batch in make_batches(tokenizer, seed=5, step=step, slack=recipe.slack, scale=0.1)
    ]
    assert all(torch.equal(one, other) for one, other in zip(fed, made, strict=True))
    assert len(set(seeds)) == 3


def test_finished_run_can_be_extended(tmp_path, run):
    """All six steps are warm-up, so the schedule does not depend on where the run was to end."""
    recipe = RECIPES["tiny-draft"]
    list(run(recipe, tmp_path / "straight", num_steps=6))
    list(run(recipe, tmp_path / "extended", num_steps=3))
    assert [p.step for p in run(recipe, tmp_path / "extended", num_steps=6)] == [4, 5, 6]
    assert_same_state(tmp_path / "straight", tmp_path / "extended")


def test_finished_run_is_exported_again_without_a_step(tmp_path, run):
    recipe = RECIPES["tiny-draft"]
    list(run(recipe, tmp_path, num_steps=2))
    before = weights(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert list(run(recipe, tmp_path, num_steps=2)) == []
    torch.testing.assert_close(weights(tmp_path), before, rtol=0, atol=0)


def test_seed_decides_the_weights(tmp_path, run):
    for directory, seed in (("one", 1), ("same", 1), ("other", 2)):
        list(run(RECIPES["tiny-draft"], tmp_path / directory, num_steps=2, seed=seed))
    assert_same_state(tmp_path / "one", tmp_path / "same")
    assert not torch.equal(*(weights(tmp_path / d)["model.embed_tokens.weight"] for d in ("one", "other")))


def test_recipe_with_a_start_begins_from_its_weights(tmp_path, trained, run):
    start = trained["tiny-ar"][0] / "model"
    list(run(RECIPES["tiny-block"], tmp_path, init_dir=start, num_steps=1))
    before, after = load_file(start / "model.safetensors"), weights(tmp_path)
    assert before.keys() == after.keys()
    for name in before:
        # One step at a hundredth of the learning rate of 0.1.
        assert (after[name].float() - before[name].float()).abs().max() < 0.02


@pytest.mark.parametrize("init_dir", [None, "empty"])
def test_missing_start_names_the_recipe_to_train_first(tmp_path, run, init_dir):
    if init_dir is not None:
        init_dir = tmp_path / init_dir
        init_dir.mkdir()
    expected = "tiny-block starts from tiny-ar, which must be trained first.*Run: chordal train tiny-ar"
    with pytest.raises(FileNotFoundError, match=expected):
        next(run(RECIPES["tiny-block"], tmp_path / "run", init_dir=init_dir))


def test_learning_rate_warms_up_stays_and_falls():
    schedule = [_schedule(step, 1000) for step in range(1000)]
    assert schedule[0] == pytest.approx(0.01)
    assert schedule[:100] == sorted(schedule[:100])
    assert set(schedule[100:650]) == {1.0}
    assert schedule[650:] == sorted(schedule[650:], reverse=True)
    assert schedule[825] == pytest.approx(0.5)
    assert schedule[-1] == pytest.approx(0.02)
