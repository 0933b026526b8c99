from __future__ import annotations

import itertools
import random

import pytest

from chordal.bench.tasks import GROUPS, TASKS, Task, arithmetic, edits, is_held_out, list_ops, puzzles

MODULES = (list_ops, puzzles, arithmetic, edits)

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def take(task: Task, count: int, seed: int = 0, split: str = "held_out") -> list:
    return list(itertools.islice(task.instances(seed, split), count))


def test_names_are_unique_and_every_group_has_tasks():
    assert len(TASKS) == sum(len(module.TASKS) for module in MODULES)
    assert all(name == task.name for name, task in TASKS.items())
    assert {task.group for task in TASKS.values()} == set(GROUPS)


def test_free_tasks_are_the_ones_whose_positions_depend_on_each_other():
    # That this is true of them is shown by counting answers in test_list_ops and test_puzzles.
    free = {name for name, task in TASKS.items() if task.free}
    assert free == {"shuffle", "insert_random", "remove_random", "replace_random", "latin"}


@every_task
def test_reference_answer_is_graded_right_also_inside_white_space(task):
    for instance in take(task, 100):
        assert instance.task == task.name
        assert task.grade(instance, instance.answer)
        assert task.grade(instance, f"\n {instance.answer} \n")


@every_task
@pytest.mark.parametrize("text", ["", " \n", "?", "answer", "\n\n\n"])
def test_text_without_an_answer_is_graded_wrong(task, text):
    assert not any(task.grade(instance, text) for instance in take(task, 20))


@every_task
def test_answer_of_another_instance_is_graded_wrong(task):
    different = [
        (one, other)
        for one, other in itertools.pairwise(take(task, 120))
        if set(one.prompt.split()) != set(other.prompt.split()) and one.answer[-5:] != other.answer[-5:]
    ]
    assert len(different) > 20
    assert not any(task.grade(one, other.answer) for one, other in different)


@every_task
def test_same_seed_draws_the_same_instances_and_another_seed_others(task):
    assert take(task, 30, seed=5) == take(task, 30, seed=5)
    assert take(task, 30, seed=5) != take(task, 30, seed=6)


@every_task
def test_train_and_held_out_prompts_are_disjoint_whatever_the_seeds(task):
    held_out = {instance.prompt for seed in range(3) for instance in take(task, 50, seed)}
    train = {instance.prompt for seed in range(3) for instance in take(task, 300, seed, "train")}
    assert len(held_out) > 100
    assert not held_out & train
    assert all(is_held_out(prompt) for prompt in held_out)
    assert not any(is_held_out(prompt) for prompt in train)


@every_task
def test_about_one_in_sixteen_prompts_is_held_out(task):
    rng = random.Random(1)
    prompts = {task.make(rng).prompt for _ in range(1500)}
    expected = len(prompts) / 16
    # Five standard deviations; the draw is seeded.
    assert abs(sum(map(is_held_out, prompts)) - expected) < 5 * (expected * 15 / 16) ** 0.5


def test_split_of_a_prompt_never_changes():
    # A model trained under another split would have seen the prompts it is evaluated on.
    assert [n for n in range(60) if is_held_out(str(n))] == [28, 37, 49, 56]
