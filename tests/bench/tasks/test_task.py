from __future__ import annotations

import itertools
import random

import pytest

from chordal.bench.tasks import (
    GROUPS,
    PARALLELBENCH,
    TASKS,
    Grade,
    Instance,
    Task,
    arithmetic,
    edits,
    is_held_out,
    list_ops,
    puzzles,
)

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


def test_prompt_with_worked_examples_is_a_chat():
    alone = Instance("x", "question", "answer")
    assert alone.request == "question"
    shown = Instance("x", "question", "answer", shots=(("1 + 1", "2"), ("2 + 2", "4")))
    assert [(message["role"], message["content"]) for message in shown.request] == [
        ("user", "1 + 1"),
        ("assistant", "2"),
        ("user", "2 + 2"),
        ("assistant", "4"),
        ("user", "question"),
    ]


def test_a_grade_is_true_where_it_is_right():
    assert Grade(True, 0.2, False)
    assert not Grade(False, 0.2, False)
    assert Grade.of(Grade(True, 0.2, False)) == Grade(True, 0.2, False)
    assert Grade.of(True) == Grade(True, 1.0, True)


def test_sizes_come_in_turn_in_either_split():
    task = Task(
        "x", "g", 1, lambda rng, size: Instance("x", f"{size} {rng.random()}", ""), bool, sizes=(3, 4, 5)
    )
    for split in ("train", "held_out"):
        assert [instance.prompt[0] for instance in take(task, 7, split=split)] == [*"3453453"]


@pytest.mark.parametrize("task", PARALLELBENCH.values(), ids=PARALLELBENCH)
def test_every_task_of_parallelbench_is_seeded_held_out_and_rejects_nothing_said(task):
    instances = take(task, 20, seed=5)
    assert instances == take(task, 20, seed=5) != take(task, 20, seed=6)
    for instance in instances:
        assert instance.task == task.name
        assert is_held_out(instance.prompt)
        for text in ("", " \n", "?", "Sure!", "[]"):
            grade = task.grade(instance, text)
            assert (grade.right, grade.score, grade.strict) == (False, 0.0, False)
