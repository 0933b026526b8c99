from __future__ import annotations

import ast
import random
import re

import pytest

from chordal.bench.tasks.edits import FUNCTIONS, IDENTIFIERS, TASKS

RENAME, INSERT_LINE = TASKS

every_edit = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def draw(task, count=300):
    rng = random.Random(f"test {task.name}")
    return [task.make(rng) for _ in range(count)]


def source(instance):
    """Return the program of the prompt, its request cut off."""
    return instance.prompt.split("\n", 1)[1]


def words(text):
    """Cut into identifiers and single other characters, nothing lost."""
    return re.findall(r"\w+|\W", text)


def test_identifiers_are_distinct_single_words():
    names = [*IDENTIFIERS, *FUNCTIONS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z]+", name) for name in names)


@every_edit
def test_programs_and_answers_are_valid_functions_of_four_to_seven_lines(task):
    sizes = set()
    for instance in draw(task):
        ast.parse(instance.answer)
        (function,) = ast.parse(source(instance)).body
        assert isinstance(function, ast.FunctionDef)
        sizes.add(len(source(instance).split("\n")))
    assert sizes == {4, 5, 6, 7}


def test_rename_replaces_every_occurrence_and_nothing_else():
    for instance in draw(RENAME):
        old, new = re.match(r"rename (\w+) to (\w+):\n", instance.prompt).groups()
        before = words(source(instance))
        assert old in before
        assert new not in before
        assert words(instance.answer) == [new if word == old else word for word in before]


def test_rename_that_misses_or_adds_one_place_is_wrong():
    missed = 0
    for instance in draw(RENAME, 100):
        old, new = re.match(r"rename (\w+) to (\w+):\n", instance.prompt).groups()
        answer = words(instance.answer)
        for at, word in enumerate(answer):
            if word == new:
                assert not RENAME.grade(instance, "".join([*answer[:at], old, *answer[at + 1 :]]))
                missed += 1
            elif word.isalpha():
                assert not RENAME.grade(instance, "".join([*answer[:at], new, *answer[at + 1 :]]))
    assert missed > 100


def test_insert_line_adds_the_given_line_after_the_numbered_one():
    places = set()
    for instance in draw(INSERT_LINE):
        request, *lines = instance.prompt.split("\n")
        after, added = re.fullmatch(r"after line (\d) add (.+)", request).groups()
        places.add((len(lines), int(after)))
        lines.insert(int(after) + 1, f"    {added}")
        assert instance.answer == "\n".join(lines)
    # Never after the last line, which returns.
    assert places == {(n, after) for n in range(4, 8) for after in range(n - 1)}


def test_insert_line_elsewhere_or_without_its_indent_is_wrong():
    for instance in draw(INSERT_LINE, 100):
        lines = source(instance).split("\n")
        after, added = re.match(r"after line (\d) add (.+)", instance.prompt).groups()
        for at in range(len(lines) + 1):
            text = "\n".join([*lines[:at], f"    {added}", *lines[at:]])
            assert INSERT_LINE.grade(instance, text) == (text == instance.answer)
        at = int(after) + 1
        assert not INSERT_LINE.grade(instance, "\n".join([*lines[:at], added, *lines[at:]]))


@every_edit
def test_unedited_program_is_wrong(task):
    assert not any(task.grade(instance, source(instance)) for instance in draw(task))
    assert not task.free
