"""Ten operations on a waiting line: ParallelBench's, with full names of several tokens each.

    You run the queue at a service counter. The line is now, front first:
    ["Grace Wells", "Alan Ramos", "Ruth Wright"]
    Reverse the line. Reply with the final list only.

Six have one right answer, so an ideal model may commit every position at once; the other four have
many, and their positions depend on each other.

What differs from the published instances: positions are said to count from 0, and `sort` is by last
name in the answer as well as in the request (the published labels sort by first name).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chordal.bench.tasks.parallelbench.names import draw_names
from chordal.bench.tasks.task import Grade, Instance, Task

SIZES = (3, 4, 5, 6)
LONG_SIZES = (15,)

_SCENE = "You run the queue at a service counter. "
_NOW = "The line is now, front first:"
_ONLY = "Reply with the final list only."

# What happened, before the list, and what to do, after it.
_WORDING = {
    "copy": (_NOW, "Copy the line without any change."),
    "reverse": (_NOW, "Reverse the line."),
    "sort": (_NOW, "Sort the line alphabetically by last name; equal last names go by first name."),
    "shuffle": (_NOW, "Put the line in a random order that differs from this one."),
    "insert_index": (
        f'"{{name}}" joins at position {{index}}, counting from 0. {_NOW}',
        "Put the new person at that position.",
    ),
    "insert_random": (
        f'"{{name}}" joins at a random position. {_NOW}',
        "Put the new person at any one position.",
    ),
    "remove_index": (
        f"The person at position {{index}}, counting from 0, leaves. {_NOW}",
        "Take that person out.",
    ),
    "remove_random": (f"A random person leaves. {_NOW}", "Take any one person out."),
    "replace_index": (
        f'"{{name}}" takes the place of the person at position {{index}}, counting from 0. {_NOW}',
        "Replace that person.",
    ),
    "replace_random": (
        f'"{{name}}" takes the place of a random person. {_NOW}',
        "Replace any one person.",
    ),
}
OPERATIONS = tuple(_WORDING)
FREE = ("shuffle", "insert_random", "remove_random", "replace_random")


@dataclass(frozen=True)
class Case:
    """A line of people and what to do with it.

    Attributes:
        operation: One of `OPERATIONS`.
        line: The people, front first.
        name: Who joins or takes a place; None where nobody does.
        index: Where, counted from 0; None where the operation leaves it open.
    """

    operation: str
    line: Sequence[str]
    name: str | None = None
    index: int | None = None

    @property
    def prompt(self) -> str:
        """What the user asks."""
        before, after = _WORDING[self.operation]
        before = before.format(name=self.name, index=self.index)
        return f"{_SCENE}{before}\n{render(self.line)}\n{after} {_ONLY}"

    def apply(self, at: int | None = None) -> list[str]:
        """Do it; `at` is the position where the operation leaves it open, not for `shuffle`."""
        line, at = list(self.line), self.index if at is None else at
        match self.operation.split("_")[0]:
            case "copy":
                return line
            case "reverse":
                return line[::-1]
            case "sort":
                return sorted(line, key=lambda name: name.split()[::-1])
        assert at is not None, f"{self.operation} needs a position"
        put = [] if self.name is None else [self.name]
        return [*line[:at], *put, *line[at + (not self.operation.startswith("insert")) :]]

    def instance(self, task: str, answer: Sequence[str], shots: tuple[tuple[str, str], ...] = ()) -> Instance:
        """Make the instance, with one right answer and the worked examples that go before."""
        facts = {"operation": self.operation, "line": tuple(self.line), "name": self.name}
        return Instance(task, self.prompt, render(answer), facts, shots)


def render(line: Sequence[str]) -> str:
    """Write a list of names as in prompts and answers: ["A B", "C D"]."""
    return json.dumps(list(line), ensure_ascii=False)


def read_list(text: str) -> list[str]:
    """Read the list of an answer generously.

    What stands behind the last opening bracket, if there is any, and before the next closing one, cut
    at the commas; quotes and white space around the items are dropped, and so are empty items.
    """
    inner = text.rpartition("[")[2].partition("]")[0]
    items = (item.strip().strip("\"'").strip() for item in inner.split(","))
    return [item for item in items if item]


def read_strict_list(text: str) -> list[str] | None:
    """Read the list of an answer in exactly the form of `render`; None if it is not."""
    _, opened, inner = text.rpartition("[")
    inner, closed, _ = inner.partition("]")
    items = inner.split(", ")
    if not opened or not closed:
        return None
    if any(len(item) < 2 or item[0] != '"' or item[-1] != '"' or '"' in item[1:-1] for item in items):
        return None
    return [item[1:-1] for item in items]


def draw_case(rng: random.Random, operation: str, size: int) -> tuple[Case, list[str]]:
    """Draw a line of so many people and one right answer."""
    *line, name = draw_names(rng, size + 1)
    if operation == "shuffle":
        answer = rng.sample(line, size)
        while answer == line:
            answer = rng.sample(line, size)
        return Case(operation, line), answer
    at = rng.randrange(size + operation.startswith("insert"))
    case = Case(
        operation,
        line,
        name if operation.startswith(("insert", "replace")) else None,
        at if operation.endswith("_index") else None,
    )
    return case, case.apply(at)


def grade_line(instance: Instance, text: str) -> Grade:
    """Grade an answer to any of the ten operations."""
    strict = read_strict_list(text)
    right = _is_right(instance, read_list(text))
    return Grade(right, float(right), right and strict is not None and _is_right(instance, strict))


def _is_right(instance: Instance, items: list[str]) -> bool:
    line, name = list(instance.facts["line"]), instance.facts["name"]
    operation = instance.facts["operation"]
    if operation == "shuffle":
        return Counter(items) == Counter(line) and items != line
    if operation in FREE:
        case = Case(operation, line, name)
        return any(items == case.apply(at) for at in range(len(line) + operation.startswith("insert")))
    return items == read_list(instance.answer)


def _maker(task: str, operation: str, sizes: tuple[int, ...]) -> Callable[[random.Random, int], Instance]:
    def make(rng: random.Random, size: int) -> Instance:
        case, answer = draw_case(rng, operation, size)
        example, example_answer = draw_case(rng, operation, rng.choice(sizes))
        return case.instance(task, answer, ((example.prompt, render(example_answer)),))

    return make


def _tasks(suffix: str, sizes: tuple[int, ...], canvas: int) -> tuple[Task, ...]:
    return tuple(
        Task(
            name := f"pb_{operation}{suffix}",
            f"parallelbench{suffix}",
            canvas,
            _maker(name, operation, sizes),
            grade_line,
            free=operation in FREE,
            sizes=sizes,
        )
        for operation in OPERATIONS
    )


TASKS = _tasks("", SIZES, 32)
LONG_TASKS = _tasks("_n15", LONG_SIZES, 128)
