from __future__ import annotations

import itertools
import operator
import random
import re

import pytest

from chordal.bench.tasks import Instance
from chordal.bench.tasks.arithmetic import TASKS

(TASK,) = TASKS

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
# First match decides: "gets them" belongs to a multiplication, "gets 7" to an addition.
WORDING = [
    (r"times", "*"),
    (r"splits|shares", "/"),
    (r"gives away|loses|sells|takes", "-"),
    (r"buys|finds|gets|brings", "+"),
]


def draw(count):
    rng = random.Random("test arithmetic")
    return [TASK.make(rng) for _ in range(count)]


def steps_of(answer):
    return [re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", line).groups() for line in answer.split("\n")[:-1]]


WORKED = Instance(
    "arithmetic",
    "Ana has 12 apples. Ana buys 7 more. Ana gives away 5. How many apples now?",
    "12 + 7 = 19\n19 - 5 = 14\nanswer 14",
    {"result": 14},
)


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        (WORKED.answer, True),
        ("answer 14", True),
        ("12 + 7 = 20\n20 - 5 = 14\nanswer 14", True),  # only the last line is graded
        ("12 + 7 = 19\n19 - 5 = 14\nanswer 15", False),
        ("12 + 7 = 19\n19 - 5 = 14", False),
        ("answer 14\n19 - 5 = 14", False),
        ("12 + 7 = 19\n19 - 5 = 14\nanswer 14 apples", False),
        ("12 + 7 = 19\n19 - 5 = 14\nanswer", False),
        ("14", False),
        ("answer 014", False),
    ],
)
def test_last_line_decides(text, is_right):
    assert TASK.grade(WORKED, text) == is_right


def test_steps_are_true_equations_that_chain_to_the_answer():
    for instance in draw(1000):
        steps = steps_of(instance.answer)
        for left, symbol, right, result in steps:
            assert OPERATIONS[symbol](int(left), int(right)) == int(result)
        for (*_, result), (left, *_) in itertools.pairwise(steps):
            assert left == result
        assert instance.answer.split("\n")[-1] == f"answer {steps[-1][-1]}"
        assert instance.facts == {"result": int(steps[-1][-1])}


def test_problems_have_two_or_three_steps_of_all_four_operations():
    steps = [steps_of(instance.answer) for instance in draw(300)]
    assert {len(worked) for worked in steps} == {2, 3}
    assert {symbol for worked in steps for _, symbol, *_ in worked} == set("+-*/")


def test_numbers_stay_between_0_and_99():
    numbers = {
        int(n) for instance in draw(3000) for n in re.findall(r"\d+", instance.prompt + instance.answer)
    }
    assert min(numbers) == 0
    assert max(numbers) == 99


def test_prompt_tells_the_steps_of_the_answer():
    for instance in draw(1000):
        start, *told, question = re.findall(r"[^.?]+[.?]", instance.prompt)
        thing = re.fullmatch(r"\w+ has \d+ (\w+)\.", start)[1]
        assert question == f" How many {thing} now?"
        read = []
        for sentence in told:
            symbol = next(symbol for wording, symbol in WORDING if re.search(wording, sentence))
            (number,) = re.findall(r"\d+", sentence)
            read.append((symbol, number))
        steps = steps_of(instance.answer)
        assert re.search(r"\d+", start)[0] == steps[0][0]
        assert read == [(symbol, right) for _, symbol, right, _ in steps]


def test_exactly_one_final_answer_is_accepted():
    for instance in draw(50):
        assert sum(TASK.grade(instance, f"answer {n}") for n in range(-1, 200)) == 1
    assert not TASK.free
