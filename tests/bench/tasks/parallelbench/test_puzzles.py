from __future__ import annotations

import itertools

import pytest

from chordal.bench.tasks import Instance
from chordal.bench.tasks.parallelbench.puzzles import (
    SYMBOLS,
    TASKS,
    grade_latin,
    grade_sudoku,
    rows,
    solve,
)

LATIN, SUDOKU = TASKS

SQUARE = Instance("test", "", "", {"symbols": ("A", "B", "C", "7")})
GRID = Instance("test", "", "1234\n3412\n2143\n4321")


def take(task, count=100):
    return [*itertools.islice(task.instances(0), count)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_reference_and_worked_example_are_right_in_strict_form(task):
    for instance in take(task):
        assert task.grade(instance, instance.answer).strict
        [(asked, answered)] = instance.shots
        assert asked != instance.prompt
        assert answered != instance.answer


def test_latin_symbols_are_four_letters_and_digits_without_quotes():
    drawn = set()
    for instance in take(LATIN):
        symbols = instance.facts["symbols"]
        assert len(set(symbols)) == 4
        assert f"[{', '.join(symbols)}]" in instance.prompt
        drawn |= {*symbols}
    assert drawn == {*SYMBOLS} == {*"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"}


@pytest.mark.parametrize(
    ("text", "right", "strict"),
    [
        ("A,B,C,7\nB,A,7,C\nC,7,A,B\n7,C,B,A", True, True),
        ("\nA,B,C,7\nB,C,7,A\nC,7,A,B\n7,A,B,C\n", True, True),
        ("Here it is:\nA, B, C, 7\n\nB, A, 7, C\nC, 7, A, B\n7, C, B, A\nDone.", True, False),
        # A column that repeats.
        ("A,B,C,7\nA,B,C,7\nC,7,A,B\n7,C,B,A", False, False),
        ("A,B,C,7\nB,A,7,C\nC,7,A,B", False, False),
        ("A,B,C\nB,A,7\nC,7,A\n7,C,B", False, False),
        ("A,B,C,8\nB,A,8,C\nC,8,A,B\n8,C,B,A", False, False),
        # Five cells have the same set of symbols.
        ("A,B,C,7,7\nB,A,7,C,C\nC,7,A,B,B\n7,C,B,A,A", False, False),
        ("", False, False),
    ],
)
def test_latin_square_is_graded_by_rows_and_columns(text, right, strict):
    grade = grade_latin(SQUARE, text)
    assert (grade.right, grade.strict) == (right, strict)


def test_sudoku_has_12_givens_and_one_solution():
    for instance in take(SUDOKU):
        puzzle = instance.prompt.split("Input:\n")[1].removesuffix("\nOutput:").split("\n")
        cells = [*"".join(puzzle)]
        assert [len(line) for line in puzzle] == [4] * 4
        assert cells.count("0") == 4
        assert [rows([str(digit) for digit in grid], "") for grid in solve(cells)] == [instance.answer]
        # Restating the puzzle is no answer.
        assert not SUDOKU.grade(instance, "\n".join(puzzle))


def test_empty_grid_has_every_solution():
    assert len(solve(["0"] * 16)) == 288
    assert solve([*"11", *"0" * 14]) == []


@pytest.mark.parametrize(
    ("text", "right", "strict"),
    [
        ("1234\n3412\n2143\n4321", True, True),
        ("Output:\n1 2 3 4\n3, 4, 1, 2\n2 1 4 3\n4321\n", True, False),
        ("1234\n3412\n2143\n4312", False, False),
        ("1234\n3412\n2143", False, False),
        ("1234\n3412\n2143\n4321\n1234", False, False),
        ("1234341221434321", False, False),
        ("", False, False),
    ],
)
def test_sudoku_is_graded_by_its_four_lines(text, right, strict):
    grade = grade_sudoku(GRID, text)
    assert (grade.right, grade.strict) == (right, strict)
