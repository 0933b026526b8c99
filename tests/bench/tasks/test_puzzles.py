from __future__ import annotations

import random

import pytest

from chordal.bench.tasks import Instance
from chordal.bench.tasks.puzzles import SYMBOLS, TASKS, latin_squares, sudoku_grids

LATIN, SUDOKU = TASKS

SQUARE = "A B C D\nB A D C\nC D A B\nD C B A"


def draw(task, count):
    rng = random.Random(f"test {task.name}")
    return [task.make(rng) for _ in range(count)]


def as_grid(text):
    return [[int(cell) for cell in line.split()] for line in text.split("\n")]


def solutions(grid):
    """Count the ways to fill the zeros of a 4x4 Sudoku, by trying."""
    for row in range(4):
        for column in range(4):
            if grid[row][column] == 0:
                taken = set(grid[row]) | {line[column] for line in grid}
                top, left = row // 2 * 2, column // 2 * 2
                taken |= {grid[r][c] for r in (top, top + 1) for c in (left, left + 1)}
                found = 0
                for digit in {1, 2, 3, 4} - taken:
                    grid[row][column] = digit
                    found += solutions(grid)
                grid[row][column] = 0
                return found
    return 1


def test_there_are_576_latin_squares_and_288_of_them_are_sudokus():
    assert len(set(latin_squares())) == len(latin_squares()) == 576
    assert len(set(sudoku_grids())) == len(sudoku_grids()) == 288
    for grid in latin_squares():
        for at in range(4):
            assert set(grid[4 * at : 4 * at + 4]) == set(grid[at::4]) == {0, 1, 2, 3}
    for grid in sudoku_grids():
        assert tuple(cell - 1 for cell in grid) in latin_squares()
        for corner in (0, 2, 8, 10):
            assert {grid[corner + at] for at in (0, 1, 4, 5)} == {1, 2, 3, 4}


def test_latin_symbols_are_four_distinct_letters_in_the_prompt():
    for instance in draw(LATIN, 100):
        symbols = instance.prompt.removeprefix("latin square: ").split()
        assert tuple(symbols) == instance.facts["symbols"]
        assert len(set(symbols)) == 4
        assert set(symbols) <= set(SYMBOLS)
    assert len(set(SYMBOLS)) == len(SYMBOLS)


def test_latin_references_reach_all_squares():
    reached = set()
    for instance in draw(LATIN, 6000):
        reached.add(tuple(instance.facts["symbols"].index(cell) for cell in instance.answer.split()))
    # 576 * exp(-6000 / 576) = 0.02 squares missing on average.
    assert len(reached) > 570


def test_every_latin_square_of_the_symbols_is_accepted():
    instance = Instance("latin", "", "", {"symbols": tuple("XKPA")})
    for grid in latin_squares():
        cells = ["XKPA"[cell] for cell in grid]
        assert LATIN.grade(instance, "\n".join(" ".join(cells[at : at + 4]) for at in (0, 4, 8, 12)))
    assert LATIN.free


@pytest.mark.parametrize(
    "text",
    [
        "A B C D\nB A D C\nC D A B\nC D A B",  # columns repeat, rows are right
        "A B C D\nA B C D\nA B C D\nA B C D",
        "A A A A\nB B B B\nC C C C\nD D D D",  # rows repeat, columns are right
        "A B C D\nB A D C\nC D A B",
        f"{SQUARE}\nA B C D",
        "A B C D D\nB A D C C\nC D A B B\nD C B A A",
        "A B C D\nB A D C\n\nC D A B\nD C B A",
        "E B C D\nB E D C\nC D E B\nD C B E",
        SQUARE.replace("\n", " "),
        SQUARE.lower(),
    ],
)
def test_latin_with_a_broken_row_column_or_shape_is_wrong(text):
    instance = Instance("latin", "latin square: A B C D", SQUARE, {"symbols": tuple("ABCD")})
    assert LATIN.grade(instance, SQUARE)
    assert not LATIN.grade(instance, text)


def test_latin_with_any_one_cell_changed_is_wrong():
    instance = Instance("latin", "", SQUARE, {"symbols": tuple("ABCD")})
    for at in range(0, len(SQUARE), 2):
        for symbol in set("ABCD") - {SQUARE[at]}:
            assert not LATIN.grade(instance, SQUARE[:at] + symbol + SQUARE[at + 1 :])


def test_sudoku_has_eight_givens_and_its_answer_keeps_them():
    for instance in draw(SUDOKU, 100):
        puzzle = as_grid(instance.prompt.removeprefix("sudoku:\n"))
        answer = as_grid(instance.answer)
        assert [len(row) for row in puzzle] == [4] * 4
        given = [(row, column) for row in range(4) for column in range(4) if puzzle[row][column]]
        assert len(given) == 8
        assert all(puzzle[row][column] == answer[row][column] for row, column in given)


def test_sudoku_has_exactly_one_solution_which_is_its_answer():
    for instance in draw(SUDOKU, 60):
        assert solutions(as_grid(instance.prompt.removeprefix("sudoku:\n"))) == 1
        assert tuple(map(int, instance.answer.split())) in sudoku_grids()


def test_sudoku_accepts_its_solution_alone():
    (instance,) = draw(SUDOKU, 1)
    texts = ["\n".join(" ".join(map(str, g[at : at + 4])) for at in (0, 4, 8, 12)) for g in sudoku_grids()]
    assert [text for text in texts if SUDOKU.grade(instance, text)] == [instance.answer]
    assert not SUDOKU.free


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_restated_prompt_is_wrong(task):
    for instance in draw(task, 20):
        assert not task.grade(instance, instance.prompt)
        assert not task.grade(instance, instance.prompt.split(":")[1])
        assert not task.grade(instance, f"{instance.prompt}\n{instance.answer}")
