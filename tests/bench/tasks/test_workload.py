from __future__ import annotations

import itertools

import pytest

from chordal.bench.tasks import GROUPS, PARALLELBENCH, TASKS, Grade, Instance
from chordal.bench.tasks.workload import Workload, load_tasks
from chordal.errors import InputError, UnknownNameError


def test_groups_stand_for_their_tasks_and_none_comes_twice():
    names = [workload.name for workload in load_tasks(["sudoku", "puzzles", "rename"], 1)]
    assert names == ["sudoku", "latin", "rename"]
    assert len(load_tasks(GROUPS, 1)) == len(TASKS)


def test_unknown_task_has_near_matches():
    with pytest.raises(UnknownNameError, match="Did you mean sudoku"):
        load_tasks(["sudok"], 1)


def test_grader_belongs_to_its_instance():
    [workload] = load_tasks(["copy"], 3)
    answers = [prompt.removeprefix("copy: ") for prompt in workload.prompts]
    assert all(workload.grade(index, answer) for index, answer in enumerate(answers))
    assert not workload.grade(0, answers[1])


def test_parallelbench_is_17_tasks_and_its_long_lines_another_10():
    short = load_tasks(["parallelbench"], 1)
    assert [workload.name for workload in short] == [name for name in PARALLELBENCH if "_n15" not in name]
    assert len(short) == 17
    assert len(load_tasks(["parallelbench_n15"], 1)) == 10
    assert not {*PARALLELBENCH} & {*TASKS}


def test_workload_says_how_a_task_is_run_and_graded():
    [copy, square, bundled] = load_tasks(["pb_copy", "pb_latin", "sudoku"], 2, seed=3)
    assert (copy.group, copy.grader, copy.max_new_tokens) == ("parallelbench", "line", 32)
    assert (square.group, square.grader, square.max_new_tokens) == ("parallelbench", "latin", 64)
    assert (bundled.group, bundled.grader, bundled.max_new_tokens) == ("puzzles", "sudoku", 20)
    instances = [*itertools.islice(PARALLELBENCH["pb_copy"].instances(3), 2)]
    assert copy.prompts == [instance.request for instance in instances]
    assert [copy.grade(index, instance.answer) for index, instance in enumerate(instances)] == [
        Grade(True, 1.0, True)
    ] * 2
    assert [workload.max_new_tokens for workload in load_tasks(["pb_copy", "copy"], 1, max_new_tokens=7)] == [
        7,
        7,
    ]


def test_first_prompts_are_the_same_whatever_their_number():
    [few], [many] = load_tasks(["pb_shuffle"], 4), load_tasks(["pb_shuffle"])
    assert len(many.prompts) == 100
    assert few.prompts == many.prompts[:4]


def test_plain_verdict_becomes_a_grade():
    workload = Workload.of(
        [Instance("x", "?", "yes")], name="x", group="g", grade=lambda instance, text: text == instance.answer
    )
    assert workload.grade(0, "yes") == Grade(True, 1.0, True)
    assert workload.grade(0, "no") == Grade(False, 0.0, False)
    assert not workload.grade(0, "no")


def test_hash_is_of_the_prompts_alone():
    one, same, other = (
        Workload("a", ["x", [1, 2]], 5),
        Workload("b", ["x", [1, 2]]),
        Workload("a", ["x", [1, 3]]),
    )
    assert one.hash == same.hash != other.hash
    assert len(one.hash) == 64
    assert Workload("a", ["xy"]).hash != Workload("a", ["x", "y"]).hash


def test_number_of_prompts_must_be_positive():
    with pytest.raises(InputError, match="at least 1; got 0"):
        load_tasks(["copy"], 0)
