"""Latin squares (many answers) and Sudoku (one answer), both 4x4, one token a cell.

The pair is the clean contrast of ParallelBench: given the prompt, the cells of a Sudoku with one
solution are fixed, so all may be committed at once; the cells of a Latin square constrain each
other, so committing two in one forward pass can break it.
"""

from __future__ import annotations

import functools
import itertools
import random

from chordal.bench.tasks.task import Instance, Task

SIZE = 4
NUM_GIVENS = 8
SYMBOLS = "A B C D E F G H K M P R S T X Z".split()

Grid = tuple[int, ...]


@functools.cache
def latin_squares() -> tuple[Grid, ...]:
    """List all 576 Latin squares of order 4, rows concatenated, cells 0 to 3."""
    rows = list(itertools.permutations(range(SIZE)))
    return tuple(
        sum(square, ())
        for square in itertools.product(rows, repeat=SIZE)
        if all(len(set(column)) == SIZE for column in zip(*square, strict=True))
    )


@functools.cache
def sudoku_grids() -> tuple[Grid, ...]:
    """List all 288 completed 4x4 Sudokus, rows concatenated, cells 1 to 4."""
    boxes = [[r * SIZE + c for r in (i, i + 1) for c in (j, j + 1)] for i in (0, 2) for j in (0, 2)]
    return tuple(
        tuple(cell + 1 for cell in grid)
        for grid in latin_squares()
        if all(len({grid[at] for at in box}) == SIZE for box in boxes)
    )


def _lines(cells: list[str]) -> str:
    return "\n".join(" ".join(cells[at : at + SIZE]) for at in range(0, SIZE * SIZE, SIZE))


def _latin(rng: random.Random) -> Instance:
    symbols = rng.sample(SYMBOLS, SIZE)
    answer = _lines([symbols[cell] for cell in rng.choice(latin_squares())])
    return Instance("latin", f"latin square: {' '.join(symbols)}", answer, {"symbols": tuple(symbols)})


def _sudoku(rng: random.Random) -> Instance:
    grid = rng.choice(sudoku_grids())
    while True:
        givens = rng.sample(range(SIZE * SIZE), NUM_GIVENS)
        if sum(all(other[at] == grid[at] for at in givens) for other in sudoku_grids()) == 1:
            break
    puzzle = _lines([str(cell) if at in givens else "0" for at, cell in enumerate(grid)])
    return Instance("sudoku", f"sudoku:\n{puzzle}", _lines([str(cell) for cell in grid]))


def _cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().split("\n")]


def _grade_latin(instance: Instance, text: str) -> bool:
    rows, symbols = _cells(text), set(instance.facts["symbols"])
    if len(rows) != SIZE or any(len(row) != SIZE for row in rows):
        return False
    return all(set(group) == symbols for group in [*rows, *zip(*rows, strict=True)])


def _grade_sudoku(instance: Instance, text: str) -> bool:
    return _cells(text) == _cells(instance.answer)


# By the tokenizer of the bundled models.
CANVAS = 20

TASKS = (
    Task("latin", "puzzles", CANVAS, _latin, _grade_latin, free=True),
    Task("sudoku", "puzzles", CANVAS, _sudoku, _grade_sudoku),
)
