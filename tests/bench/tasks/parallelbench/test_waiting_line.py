from __future__ import annotations

import itertools
import json
import random
from collections import Counter

import pytest

from chordal.bench.tasks import Instance
from chordal.bench.tasks.parallelbench.names import FIRST, LAST, draw_names
from chordal.bench.tasks.parallelbench.waiting_line import (
    FREE,
    LONG_TASKS,
    TASKS,
    Case,
    grade_line,
    read_list,
    read_strict_list,
    render,
)

A, B, C, D, E = "Ann Ash", "Bob Bell", "Cat Cole", "Dan Dean", "Eve Ely"

every_task = pytest.mark.parametrize("task", [*TASKS, *LONG_TASKS], ids=lambda task: task.name)


def take(task, count=100):
    return [*itertools.islice(task.instances(0), count)]


def case(operation, *, name=None, index=None, line=(A, B, C)):
    found = Case(operation, line, name, index)
    return found.instance("test", [] if operation in FREE else found.apply())


def grade(operation, items, **facts):
    return grade_line(case(operation, **facts), render(items))


def test_names_are_many_and_different():
    assert len(set(FIRST)) == len(FIRST) >= 92
    assert len(set(LAST)) == len(LAST) >= 192
    drawn = draw_names(random.Random(0), 2000)
    assert len(set(drawn)) == 2000
    assert len({name.split()[0] for name in drawn}) < 2000
    assert set(draw_names(random.Random(0), len(FIRST) * len(LAST))) == {
        f"{first} {last}" for first in FIRST for last in LAST
    }


def test_ten_operations_in_two_lengths():
    assert [task.name.removeprefix("pb_") for task in TASKS] == [
        *("copy", "reverse", "sort", "shuffle"),
        *("insert_index", "insert_random", "remove_index", "remove_random"),
        *("replace_index", "replace_random"),
    ]
    assert [task.name for task in LONG_TASKS] == [f"{task.name}_n15" for task in TASKS]
    assert {task.canvas for task in TASKS} == {32}
    assert {task.canvas for task in LONG_TASKS} == {128}


@every_task
def test_lengths_are_even_and_people_distinct(task):
    instances = take(task)
    lengths = Counter(len(instance.facts["line"]) for instance in instances)
    assert lengths == ({15: 100} if task in LONG_TASKS else dict.fromkeys((3, 4, 5, 6), 25))
    for instance in instances:
        line, name = instance.facts["line"], instance.facts["name"]
        assert len({*line, name}) == len(line) + 1
        assert render(line) in instance.prompt.splitlines()
        assert name is None or f'"{name}"' in instance.prompt.splitlines()[0]


@every_task
def test_reference_and_its_worked_example_are_right_in_strict_form(task):
    for instance in take(task):
        assert grade_line(instance, instance.answer).strict
        [(asked, answered)] = instance.shots
        assert asked != instance.prompt
        assert read_strict_list(answered)
        assert instance.request == [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
            {"role": "user", "content": instance.prompt},
        ]


@every_task
def test_unchanged_line_is_wrong_where_something_was_to_be_done(task):
    if task.free or "index" in task.name:
        assert not any(grade_line(instance, render(instance.facts["line"])) for instance in take(task))


@every_task
def test_every_position_is_drawn(task):
    if "index" in task.name:
        positions = {
            int(instance.prompt.split("position ")[1].split(",")[0].split(" ")[0])
            for instance in itertools.islice(task.instances(0), 300)
        }
        longest = task.sizes[-1]
        assert positions == set(range(longest + ("insert" in task.name)))
        assert all("counting from 0" in instance.prompt for instance in take(task, 4))


@pytest.mark.parametrize(
    ("operation", "given", "answer"),
    [
        ("copy", {}, [A, B, C]),
        ("reverse", {}, [C, B, A]),
        ("insert_index", {"name": D, "index": 0}, [D, A, B, C]),
        ("insert_index", {"name": D, "index": 3}, [A, B, C, D]),
        ("remove_index", {"index": 1}, [A, C]),
        ("replace_index", {"name": D, "index": 2}, [A, B, D]),
    ],
)
def test_operation_with_one_answer(operation, given, answer):
    assert grade(operation, answer, **given).strict
    for wrong in itertools.permutations([A, B, C, D], len(answer)):
        if list(wrong) != answer:
            assert not grade(operation, wrong, **given)


def test_sort_is_by_last_name_then_first_name():
    line = ("Zoe Adams", "Amy Young", "Ben Adams")
    answer = ["Ben Adams", "Zoe Adams", "Amy Young"]
    assert grade("sort", answer, line=line)
    assert not grade("sort", sorted(line), line=line)
    assert "last name" in case("sort", line=line).prompt


@pytest.mark.parametrize("items", [*itertools.permutations([A, B, C])])
def test_shuffle_takes_any_other_order(items):
    assert bool(grade("shuffle", items)) == (items != (A, B, C))


@pytest.mark.parametrize("items", [[A, B], [A, B, B], [B, A, C, D], []])
def test_shuffle_takes_nothing_but_the_same_people(items):
    assert not grade("shuffle", items)


@pytest.mark.parametrize(
    ("operation", "right", "wrong"),
    [
        (
            "insert_random",
            [[D, A, B, C], [A, D, B, C], [A, B, D, C], [A, B, C, D]],
            [[A, B, C], [D, A, B, C, D], [B, D, A, C], [A, E, B, C], [D, B, C]],
        ),
        ("remove_random", [[B, C], [A, C], [A, B]], [[A, B, C], [B, A], [A], [A, A], [A, D]]),
        (
            "replace_random",
            [[D, B, C], [A, D, C], [A, B, D]],
            [[A, B, C], [D, D, C], [D, C, B], [A, B, C, D], [A, E, C], [B, D, C]],
        ),
    ],
)
def test_open_operation_takes_each_place_and_nothing_else(operation, right, wrong):
    name = None if operation == "remove_random" else D
    assert all(grade(operation, items, name=name).strict for items in right)
    assert not any(grade(operation, items, name=name) for items in wrong)


@pytest.mark.parametrize(
    ("text", "loose", "strict"),
    [
        ('["A B", "C D"]', ["A B", "C D"], ["A B", "C D"]),
        ('The list [1] is: ["A B", "C D"]. Done.', ["A B", "C D"], ["A B", "C D"]),
        ('"A B", "C D"', ["A B", "C D"], None),
        ('["A B", "C D"', ["A B", "C D"], None),
        ("[A B,C D, ]", ["A B", "C D"], None),
        ('["A B","C D"]', ["A B", "C D"], None),
        ('["A B",\n "C D"]', ["A B", "C D"], None),
        ("['A B', 'C D']", ["A B", "C D"], None),
        ('["A "B", "C D"]', ['A "B', "C D"], None),
        ("[]", [], None),
        ('["]', [], None),
        ("", [], None),
    ],
)
def test_lists_are_read_generously_and_strictly(text, loose, strict):
    assert read_list(text) == loose
    assert read_strict_list(text) == strict


def test_right_list_in_loose_form_is_right_and_not_strict():
    loose = grade_line(case("copy"), "Ann Ash, Bob Bell, Cat Cole")
    assert (loose.right, loose.score, loose.strict) == (True, 1.0, False)
    wrong = grade_line(case("copy"), "Ann Ash, Bob Bell")
    assert (wrong.right, wrong.score, wrong.strict) == (False, 0.0, False)


def test_lists_are_written_as_json():
    assert json.loads(render([A, B])) == [A, B]
    assert isinstance(case("copy"), Instance)
