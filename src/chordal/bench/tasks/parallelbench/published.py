"""Read the published instances of ParallelBench: its questions in our wording, graded by our graders.

A line holds `input` (the slots of a prompt, and worked examples under `icl_examples`), and `answer`: a
text, or an object with what the grader needs and one `example`. No line says which task it is of; the
slots and the answers do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any, NamedTuple

from chordal.bench.tasks.parallelbench import puzzles, waiting_line, writing
from chordal.bench.tasks.parallelbench.waiting_line import FREE, OPERATIONS, Case, read_list, render
from chordal.bench.tasks.puzzles import SIZE
from chordal.bench.tasks.rows import Row
from chordal.bench.tasks.task import Grader, Instance
from chordal.bench.tasks.workload import Workload


def read(rows: Seq[Row], name: str) -> Workload:
    """Read the lines of a file of one task.

    Args:
        rows: At least one, each an object.
        name: Of the workload.

    Raises:
        InputError: The task is unknown, or a line lacks something or has a wrong answer.
    """
    inputs = [row.get("input", dict) for row in rows]
    answer = rows[0].value["answer"]
    keys = {*inputs[0], *(answer if isinstance(answer, dict) else ())}
    for key, (make, grade) in _TASKS.items():
        if key in keys:
            instances = make(rows, name)
            lengths = [len(instance.facts.get("line", ())) for instance in instances]
            is_long = max(lengths) > max(waiting_line.SIZES)
            return Workload.of(
                instances,
                name=name,
                group="parallelbench_n15" if is_long else "parallelbench",
                grade=grade,
                max_new_tokens=128 if is_long else 32 if max(lengths) else 64,
            )
    raise rows[0].error(
        f"no known task of ParallelBench; it has {', '.join(sorted(keys))}. Known are those with "
        f"{', '.join(_TASKS)}."
    )


class _Line(NamedTuple):
    """A waiting line and what became of it; `is_open` where that is one answer of several."""

    line: list[str]
    name: str | None
    at: int | None
    answer: list[str]
    is_open: bool

    def case(self, operation: str) -> Case:
        return Case(operation, self.line, self.name, self.at)

    def is_of(self, operation: str) -> bool:
        """Whether the answer is that of an operation, also `sort` by first name as published."""
        needs = (
            operation in FREE,
            operation.startswith(("insert", "replace")),
            operation.endswith("_index"),
        )
        if (self.is_open, self.name is not None, self.at is not None) != needs:
            return False
        if operation == "shuffle":
            return Counter(self.answer) == Counter(self.line)
        if operation == "sort" and self.answer == sorted(self.line):
            return True
        places = range(len(self.line) + 1) if self.is_open else [None]
        return any(self.answer == self.case(operation).apply(at) for at in places)

    def right(self, operation: str) -> list[str]:
        """Give a right answer, worked out where there is only one."""
        return self.answer if self.is_open else self.case(operation).apply()


def _lines(rows: Seq[Row], name: str) -> list[Instance]:
    tests = [_line(row, row.value) for row in rows]
    shots = [[_line(row, shot) for shot in _shots(row)] for row in rows]
    operation = _operation(rows, [[test, *more] for test, more in zip(tests, shots, strict=True)])
    return [
        test.case(operation).instance(
            name,
            test.right(operation),
            tuple((shot.case(operation).prompt, render(shot.right(operation))) for shot in more),
        )
        for test, more in zip(tests, shots, strict=True)
    ]


def _operation(rows: Seq[Row], lines: Seq[Seq[_Line]]) -> str:
    """Find the operation of most lines; it must be that of all. Of equals, e.g. a sorted list, the first."""
    fits = {
        operation: [all(line.is_of(operation) for line in group) for group in lines]
        for operation in OPERATIONS
    }
    operation = max(fits, key=lambda operation: sum(fits[operation]))
    if not all(fits[operation]):
        odd = rows[fits[operation].index(False)]
        known = operation if any(fits[operation]) else "a known operation"
        raise odd.error(f'"answer" must be a result of {known}, here and in the worked examples.')
    return operation


def _shots(row: Row) -> list[Mapping[str, Any]]:
    shots = row.value["input"].get("icl_examples") or []
    if not isinstance(shots, list) or not all(isinstance(shot, dict) for shot in shots):
        raise row.error('"input.icl_examples" must be a list of objects.')
    return shots


def _line(row: Row, value: Mapping[str, Any]) -> _Line:
    try:
        given, answer = value["input"], value["answer"]
        is_open = isinstance(answer, dict)
        result = read_list(answer["example"] if is_open else answer)
        line, name, index = read_list(given["context"]), given.get("word"), given.get("index")
        if not isinstance(name, str | None) or not isinstance(index, int | None):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise row.error(
            'must hold texts in "input.context" and in "answer" or "answer.example", also in the worked '
            'examples; "input.word" is a text and "input.index" a whole number.'
        ) from None
    return _Line(line, name, index, result, is_open)


def _latin(rows: Seq[Row], name: str) -> list[Instance]:
    def read_square(row: Row, value: Mapping[str, Any]) -> Instance:
        try:
            symbols, square = tuple(map(str, value["answer"]["symbols"])), value["answer"]["example"]
        except (KeyError, TypeError):
            raise row.error(
                'must hold "answer.symbols" and "answer.example", also in the examples.'
            ) from None
        found = Instance(name, puzzles.latin_prompt(symbols), square, {"symbols": symbols})
        if not isinstance(square, str) or not puzzles.grade_latin(found, square):
            raise row.error(f'"answer.example" must be a Latin square of {", ".join(symbols)}.')
        return found

    return [_with_shots(row, read_square) for row in rows]


def _sudoku(rows: Seq[Row], name: str) -> list[Instance]:
    def read_grid(row: Row, value: Mapping[str, Any]) -> Instance:
        try:
            puzzle, solution = value["input"]["sudoku"].strip(), value["answer"]
        except (KeyError, TypeError, AttributeError):
            puzzle = ""
        digits = [digit for digit in puzzle if digit.isdigit()]
        if len(digits) != SIZE**2:
            raise row.error('must hold a 4x4 grid in "input.sudoku", also in the worked examples.')
        found = puzzles.solve(digits)
        if [puzzles.rows([*map(str, grid)], "") for grid in found] != [solution]:
            raise row.error(f'"answer" must be the only solution; the grid has {len(found)}.')
        return Instance(name, puzzles.sudoku_prompt(puzzle), solution)

    return [_with_shots(row, read_grid) for row in rows]


def _with_shots(row: Row, make: Callable[[Row, Mapping[str, Any]], Instance]) -> Instance:
    shots = [make(row, shot) for shot in _shots(row)]
    return replace(make(row, row.value), shots=tuple((shot.prompt, shot.answer) for shot in shots))


def _words(rows: Seq[Row], name: str) -> list[Instance]:
    instances = []
    for row in rows:
        row.get("answer", dict)
        words = row.get("words", list, within="answer")
        if not words or not all(isinstance(word, str) and word for word in words):
            raise row.error('"answer.words" must be a list of words, at least one.')
        instances.append(Instance(name, writing.sentence_prompt(words), "", {"words": tuple(words)}))
    return instances


def _summaries(rows: Seq[Row], name: str) -> list[Instance]:
    instances = []
    for row in rows:
        row.get("answer", dict)
        text, summary = row.get("text", str, within="input"), row.get("summary", str, within="answer")
        facts = {"text": text, "keys": ()}
        instances.append(Instance(name, writing.summary_prompt(text), summary, facts))
    return instances


def _paraphrases(rows: Seq[Row], name: str) -> list[Instance]:
    texts = [row.get("text", str, within="input") for row in rows]
    return [Instance(name, writing.paraphrase_prompt(text), "", {"text": text}) for text in texts]


# By a key that only this task has, except that a text without a summary is to be paraphrased.
_TASKS: dict[str, tuple[Callable[[Seq[Row], str], list[Instance]], Grader]] = {
    "context": (_lines, waiting_line.grade_line),
    "symbols": (_latin, puzzles.grade_latin),
    "sudoku": (_sudoku, puzzles.grade_sudoku),
    "words": (_words, writing.grade_words),
    "summary": (_summaries, writing.grade_summary),
    "text": (_paraphrases, writing.grade_paraphrase),
}
