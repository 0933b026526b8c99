"""Arithmetic word problems of two or three steps, answered with the steps worked out.

    Ana has 12 apples. She buys 7 more. She gives away 5. How many apples now?
    12 + 7 = 19
    19 - 5 = 14
    answer 14

All numbers stay between 0 and 99. Graded on the last line alone, as such problems usually are.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from chordal.bench.tasks.list_ops import NAMES
from chordal.bench.tasks.task import Instance, Task

THINGS = "apples books coins eggs cards stamps shells pens balls nuts keys cups".split()
LIMIT = 99

_ADD = ("{p} buys {n} more.", "{p} finds {n} more.", "Then {p} gets {n} from {o}.", "{o} brings {n} more.")
_SUB = ("{p} gives away {n}.", "{p} loses {n}.", "{p} sells {n} to {o}.", "{o} takes {n}.")
_MUL = ("Then the number grows {n} times.", "{p} now wants {n} times as many and gets them.")
_DIV = (
    "{p} splits them into {n} equal bags and keeps one.",
    "{p} shares them equally with others, {n} in all.",
)

# Each step: draw an operand that keeps the value a whole number within the limit, or None.
_Step = tuple[str, tuple[str, ...], Callable[[random.Random, int], int | None], Callable[[int, int], int]]


def _between(rng: random.Random, low: int, high: int) -> int | None:
    return rng.randint(low, high) if low <= high else None


def _divisor(rng: random.Random, value: int) -> int | None:
    fitting = [n for n in range(2, 6) if value >= n and value % n == 0]
    return rng.choice(fitting) if fitting else None


_STEPS: tuple[_Step, ...] = (
    ("+", _ADD, lambda rng, v: _between(rng, 2, min(30, LIMIT - v)), lambda v, n: v + n),
    ("-", _SUB, lambda rng, v: _between(rng, 2, min(30, v)), lambda v, n: v - n),
    ("*", _MUL, lambda rng, v: _between(rng, 2, min(5, LIMIT // v)) if v else None, lambda v, n: v * n),
    ("/", _DIV, _divisor, lambda v, n: v // n),
)


def _make(rng: random.Random) -> Instance:
    person, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    value = rng.randint(2, 60)
    sentences = [f"{person} has {value} {thing}."]
    worked: list[str] = []
    for _ in range(rng.choice((2, 3))):
        while True:
            symbol, phrases, draw, apply = rng.choice(_STEPS)
            operand = draw(rng, value)
            if operand is not None:
                break
        result = apply(value, operand)
        sentences.append(rng.choice(phrases).format(p=person, o=other, n=operand))
        worked.append(f"{value} {symbol} {operand} = {result}")
        value = result
    prompt = f"{' '.join(sentences)} How many {thing} now?"
    return Instance("arithmetic", prompt, "\n".join([*worked, f"answer {value}"]), {"result": value})


def _grade(instance: Instance, text: str) -> bool:
    last = text.strip().rsplit("\n", 1)[-1].split()
    return last == ["answer", str(instance.facts["result"])]


# By the tokenizer of the bundled models.
CANVAS = 20

TASKS = (Task("arithmetic", "arithmetic", CANVAS, _make, _grade),)
