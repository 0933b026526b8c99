"""Latin squares (many answers) and Sudoku (one answer), both 4x4: ParallelBench's two puzzles.

Unlike the published Latin squares, which one construction reaches a quarter of, every square is as
likely to be the worked example; Sudokus are drawn here, each with 12 givens and one solution.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

from chordal.bench.tasks.puzzles import SIZE, Grid, latin_squares, sudoku_grids
from chordal.bench.tasks.task import Grade, Instance, Task

NUM_GIVENS = 12
SYMBOLS = string.ascii_uppercase + string.digits

_SUDOKU = (
    "Replace every 0 of this 4x4 grid by a digit from 1 to 4, so that each row, each column and each of the "
    "four 2x2 boxes holds all of 1, 2, 3 and 4. Reply with the full grid only.\n\nInput:\n{puzzle}\nOutput:"
)
_LATIN = (
    "Make a Latin square of size {size} with the symbols [{symbols}]: each row and each column holds every "
    "symbol once. Reply with the square as CSV only."
)


def latin_prompt(symbols: Sequence[str]) -> str:
    """Ask for a Latin square of these symbols."""
    return _LATIN.format(size=len(symbols), symbols=", ".join(symbols))


def sudoku_prompt(puzzle: str) -> str:
    """Ask to fill a grid, given as lines of digits with 0 for blanks."""
    return _SUDOKU.format(puzzle=puzzle)


def rows(cells: list[str], separator: str) -> str:
    """Write 16 cells as four lines."""
    return "\n".join(separator.join(cells[at : at + SIZE]) for at in range(0, SIZE * SIZE, SIZE))


def _draw_latin(rng: random.Random) -> tuple[list[str], str]:
    symbols = rng.sample(SYMBOLS, SIZE)
    return symbols, rows([symbols[cell] for cell in rng.choice(latin_squares())], ",")


def _latin(rng: random.Random) -> Instance:
    symbols, answer = _draw_latin(rng)
    example, example_answer = _draw_latin(rng)
    return Instance(
        "pb_latin",
        latin_prompt(symbols),
        answer,
        {"symbols": tuple(symbols)},
        ((latin_prompt(example), example_answer),),
    )


def _draw_sudoku(rng: random.Random) -> tuple[str, str]:
    grid = rng.choice(sudoku_grids())
    while True:
        givens = rng.sample(range(SIZE * SIZE), NUM_GIVENS)
        puzzle = [str(cell) if at in givens else "0" for at, cell in enumerate(grid)]
        if len(solve(puzzle)) == 1:
            return rows(puzzle, ""), rows([str(cell) for cell in grid], "")


def solve(puzzle: list[str]) -> list[Grid]:
    """Find every solution of a 4x4 Sudoku, given as 16 digits with 0 for blanks."""
    givens = [(at, int(digit)) for at, digit in enumerate(puzzle) if digit != "0"]
    return [grid for grid in sudoku_grids() if all(grid[at] == digit for at, digit in givens)]


def _sudoku(rng: random.Random) -> Instance:
    puzzle, answer = _draw_sudoku(rng)
    example, example_answer = _draw_sudoku(rng)
    return Instance(
        "pb_sudoku", sudoku_prompt(puzzle), answer, {}, ((sudoku_prompt(example), example_answer),)
    )


def grade_latin(instance: Instance, text: str) -> Grade:
    """Grade a square: four lines of the symbols, each once in its row and in its column.

    Lines of anything else may stand between; strictly there are none and no spaces either. Unlike the
    published grader it asks for four cells a line, so that a fifth one that repeats a symbol is wrong.
    """
    symbols = set(instance.facts["symbols"])
    lines = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    square = [line for line in lines if len(line) == len(symbols) and set(line) == symbols][: len(symbols)]
    right = len(square) == len(symbols) and all(
        set(column) == symbols for column in zip(*square, strict=True)
    )
    return Grade(right, float(right), right and text.strip() == "\n".join(map(",".join, square)))


def grade_sudoku(instance: Instance, text: str) -> Grade:
    """Grade a grid: exactly four lines of four digits, spaces and commas aside, equal to the solution.

    Lines without four digits may stand between; strictly there are none. Restating the puzzle is wrong.
    """
    lines = ["".join(filter(str.isdigit, line)) for line in text.splitlines()]
    grid = "\n".join(line for line in lines if len(line) == SIZE)
    right = grid == instance.answer
    return Grade(right, float(right), right and text.strip() == instance.answer)


TASKS = (
    Task("pb_latin", "parallelbench", 64, _latin, grade_latin, free=True),
    Task("pb_sudoku", "parallelbench", 64, _sudoku, grade_sudoku),
)
