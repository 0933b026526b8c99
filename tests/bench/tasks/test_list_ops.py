from __future__ import annotations

import itertools
import random
import re
from math import factorial

import pytest

from chordal.bench.tasks import Instance
from chordal.bench.tasks.list_ops import MAX_ITEMS, MIN_ITEMS, NAMES, TASKS

OPS = {task.name: task for task in TASKS}

every_op = pytest.mark.parametrize("task", TASKS, ids=OPS)


def draw(task, count=400):
    rng = random.Random(f"test {task.name}")
    return [task.make(rng) for _ in range(count)]


def by_hand(task, line, **facts):
    """Make an instance of which the grader reads the facts alone."""
    return Instance(task, "", "", {"line": tuple(line.split()), **facts})


def solve(prompt):
    """Do what the prompt says, from its text alone; None where it leaves a choice."""
    request, line = prompt.split(": ")
    words, items = request.split(), line.split()
    match words:
        case ["copy"]:
            return items
        case ["reverse"]:
            return list(reversed(items))
        case ["sort"]:
            return sorted(items)
        case ["insert", name, "at", at]:
            items.insert(int(at), name)
            return items
        case ["remove", "at", at]:
            del items[int(at)]
            return items
        case ["replace", "at", at, "with", name]:
            items[int(at)] = name
            return items
    return None


def test_names_are_distinct_single_words():
    assert len(set(NAMES)) == len(NAMES)
    assert all(re.fullmatch("[A-Z][a-z]+", name) for name in NAMES)


@every_op
def test_lines_hold_three_to_eight_distinct_names_and_show_all_sizes(task):
    lines = [instance.facts["line"] for instance in draw(task)]
    assert (MIN_ITEMS, MAX_ITEMS) == (3, 8)
    assert {len(line) for line in lines} == set(range(3, 9))
    for line in lines:
        assert len(set(line)) == len(line)
        assert set(line) <= set(NAMES)


@every_op
def test_prompt_ends_with_the_line_and_a_new_name_is_not_in_it(task):
    for instance in draw(task, 100):
        request, line = instance.prompt.split(": ")
        assert tuple(line.split()) == instance.facts["line"]
        assert not set(request.split()) & set(line.split())


@pytest.mark.parametrize("name", ["insert_index", "remove_index", "replace_index"])
def test_every_valid_index_is_drawn_and_no_other(name):
    seen = {(len(i.facts["line"]), int(re.search(r"at (\d+)", i.prompt)[1])) for i in draw(OPS[name], 1500)}
    behind_the_last = name == "insert_index"
    assert seen == {(n, at) for n in range(3, 9) for at in range(n + behind_the_last)}


@pytest.mark.parametrize("name", ["insert_random", "remove_random", "replace_random"])
def test_references_of_random_places_use_every_place(name):
    seen = set()
    for instance in draw(OPS[name], 1500):
        line, answer = list(instance.facts["line"]), instance.answer.split()
        place = next(at for at in range(len(line) + 1) if answer[: at + 1] != line[: at + 1])
        seen.add((len(line), place))
    behind_the_last = name == "insert_random"
    assert seen == {(n, at) for n in range(3, 9) for at in range(n + behind_the_last)}


def test_references_of_shuffle_reach_every_other_order():
    orders = set()
    for instance in draw(OPS["shuffle"], 1500):
        line = instance.facts["line"]
        if len(line) == 4:
            orders.add(tuple(line.index(name) for name in instance.answer.split()))
    assert orders == set(itertools.permutations(range(4))) - {(0, 1, 2, 3)}


@every_op
def test_prompt_alone_determines_the_answer_unless_the_task_is_free(task):
    for instance in draw(task):
        answer = solve(instance.prompt)
        assert (answer is None) == task.free
        if answer is not None:
            assert instance.answer.split() == answer


@every_op
def test_number_of_accepted_answers_is_what_the_theory_counts(task):
    """Grade every list of up to n + 1 names out of the ones at hand and a stranger."""
    count = {
        "shuffle": lambda n: factorial(n) - 1,
        "insert_random": lambda n: n + 1,
        "remove_random": lambda n: n,
        "replace_random": lambda n: n,
    }.get(task.name, lambda n: 1)
    for n in (3, 4):
        instance = next(instance for instance in draw(task) if len(instance.facts["line"]) == n)
        used = {*instance.facts["line"], *instance.answer.split()}
        pool = [*sorted(used), next(name for name in NAMES if name not in used)]
        candidates = (
            " ".join(names) for length in range(n + 2) for names in itertools.product(pool, repeat=length)
        )
        assert sum(task.grade(instance, text) for text in candidates) == count(n)
        assert task.free == (count(n) > 1)


@pytest.mark.parametrize("name", [name for name in OPS if re.match("shuffle|insert|remove|replace", name)])
def test_unmodified_line_is_wrong(name):
    assert not any(OPS[name].grade(i, " ".join(i.facts["line"])) for i in draw(OPS[name]))


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("Cleo Ana Ben", True),
        ("Ana Ben Cleo", False),
        ("Cleo Ana", False),
        ("Cleo Ana Ben Ben", False),
        ("Cleo Ana Ana", False),
        ("Cleo Ana Dan", False),
    ],
)
def test_shuffle_is_the_same_names_in_another_order(text, is_right):
    assert OPS["shuffle"].grade(by_hand("shuffle", "Ana Ben Cleo"), text) == is_right


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("Dan Ana Ben Cleo", True),
        ("Ana Ben Cleo Dan", True),
        ("Dan Ana Dan Ben Cleo", False),  # inserted twice
        ("Dan Dan Ana Ben Cleo", False),
        ("Dan Ben Ana Cleo", False),  # inserted and reordered
        ("Dan Ana Ben", False),
        ("Eva Ana Ben Cleo", False),
        ("Dan Ana Eva Ben Cleo", False),
        ("Ana Ben Cleo", False),
    ],
)
def test_insert_random_adds_the_name_once_and_keeps_the_order(text, is_right):
    instance = by_hand("insert_random", "Ana Ben Cleo", name="Dan")
    assert OPS["insert_random"].grade(instance, text) == is_right


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("Ben Cleo", True),
        ("Ana Cleo", True),
        ("Ana Ben", True),
        ("Cleo Ana", False),  # removed and reordered
        ("Ana", False),
        ("Ana Ben Cleo", False),
        ("Ana Dan", False),
        ("Ana Ana", False),
    ],
)
def test_remove_random_drops_one_name_and_keeps_the_order(text, is_right):
    assert OPS["remove_random"].grade(by_hand("remove_random", "Ana Ben Cleo"), text) == is_right


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("Dan Ben Cleo", True),
        ("Ana Ben Dan", True),
        ("Dan Dan Cleo", False),  # replaced twice
        ("Dan Cleo Ben", False),  # replaced and reordered
        ("Eva Ben Cleo", False),
        ("Ana Ben Cleo", False),
        ("Ana Ben Cleo Dan", False),
        ("Ana Dan", False),
    ],
)
def test_replace_random_puts_the_name_in_one_place(text, is_right):
    instance = by_hand("replace_random", "Ana Ben Cleo", name="Dan")
    assert OPS["replace_random"].grade(instance, text) == is_right
