"""List operations in the manner of ParallelBench (arXiv 2510.04767): a line of names to rearrange.

Half of them have one right answer, so every position can be filled at once; the others (shuffle
and the three `_random` ones) have many, and their positions depend on each other.

What differs from the published instances: names are single words, lists have 3 to 8 items without
quotes or commas, indices count from 0, and `sort` orders by the whole name (the published labels
disagree with their own prompt there).
"""

from __future__ import annotations

import random
from collections import Counter

from chordal.bench.tasks.task import Instance, Task, same_text

NAMES = (
    "Ana Ben Cleo Dan Eva Finn Gina Hugo Ida Jack Kim Leo Mia Noah Olga Paul "
    "Quinn Rosa Sam Tess Uma Vera Will Xena Yuri Zoe Amy Bob Carl Dora Emil Fay"
).split()

MIN_ITEMS, MAX_ITEMS = 3, 8


def _draw(rng: random.Random) -> tuple[list[str], str]:
    """Draw a line of distinct names and one more name that is not in it."""
    drawn = rng.sample(NAMES, rng.randint(MIN_ITEMS, MAX_ITEMS) + 1)
    return drawn[:-1], drawn[-1]


def _instance(task: str, request: str, line: list[str], answer: list[str], **facts: object) -> Instance:
    prompt = f"{request}: {' '.join(line)}"
    return Instance(task, prompt, " ".join(answer), {"line": tuple(line), **facts})


def _copy(rng: random.Random) -> Instance:
    line, _ = _draw(rng)
    return _instance("copy", "copy", line, line)


def _reverse(rng: random.Random) -> Instance:
    line, _ = _draw(rng)
    return _instance("reverse", "reverse", line, line[::-1])


def _sort(rng: random.Random) -> Instance:
    line, _ = _draw(rng)
    return _instance("sort", "sort", line, sorted(line))


def _shuffle(rng: random.Random) -> Instance:
    line, _ = _draw(rng)
    answer = rng.sample(line, len(line))
    while answer == line:
        answer = rng.sample(line, len(line))
    return _instance("shuffle", "shuffle", line, answer)


def _insert_index(rng: random.Random) -> Instance:
    line, name = _draw(rng)
    at = rng.randint(0, len(line))
    return _instance("insert_index", f"insert {name} at {at}", line, [*line[:at], name, *line[at:]])


def _insert_random(rng: random.Random) -> Instance:
    line, name = _draw(rng)
    at = rng.randint(0, len(line))
    answer = [*line[:at], name, *line[at:]]
    return _instance("insert_random", f"insert {name} anywhere", line, answer, name=name)


def _remove_index(rng: random.Random) -> Instance:
    line, _ = _draw(rng)
    at = rng.randrange(len(line))
    return _instance("remove_index", f"remove at {at}", line, [*line[:at], *line[at + 1 :]])


def _remove_random(rng: random.Random) -> Instance:
    line, _ = _draw(rng)
    at = rng.randrange(len(line))
    return _instance("remove_random", "remove anyone", line, [*line[:at], *line[at + 1 :]])


def _replace_index(rng: random.Random) -> Instance:
    line, name = _draw(rng)
    at = rng.randrange(len(line))
    answer = [*line[:at], name, *line[at + 1 :]]
    return _instance("replace_index", f"replace at {at} with {name}", line, answer)


def _replace_random(rng: random.Random) -> Instance:
    line, name = _draw(rng)
    at = rng.randrange(len(line))
    answer = [*line[:at], name, *line[at + 1 :]]
    return _instance("replace_random", f"replace anyone with {name}", line, answer, name=name)


def _grade_shuffle(instance: Instance, text: str) -> bool:
    line, items = list(instance.facts["line"]), text.split()
    return Counter(items) == Counter(line) and items != line


def _grade_insert_random(instance: Instance, text: str) -> bool:
    line, name, items = list(instance.facts["line"]), instance.facts["name"], text.split()
    if items.count(name) != 1:
        return False
    items.remove(name)
    return items == line


def _grade_remove_random(instance: Instance, text: str) -> bool:
    line, items = list(instance.facts["line"]), text.split()
    return any(items == line[:at] + line[at + 1 :] for at in range(len(line)))


def _grade_replace_random(instance: Instance, text: str) -> bool:
    line, name, items = list(instance.facts["line"]), instance.facts["name"], text.split()
    return any(items == [*line[:at], name, *line[at + 1 :]] for at in range(len(line)))


# By the tokenizer of the bundled models.
CANVAS = 12

TASKS = (
    Task("copy", "lists", CANVAS, _copy, same_text),
    Task("reverse", "lists", CANVAS, _reverse, same_text),
    Task("sort", "lists", CANVAS, _sort, same_text),
    Task("shuffle", "lists", CANVAS, _shuffle, _grade_shuffle, free=True),
    Task("insert_index", "lists", CANVAS, _insert_index, same_text),
    Task("insert_random", "lists", CANVAS, _insert_random, _grade_insert_random, free=True),
    Task("remove_index", "lists", CANVAS, _remove_index, same_text),
    Task("remove_random", "lists", CANVAS, _remove_random, _grade_remove_random, free=True),
    Task("replace_index", "lists", CANVAS, _replace_index, same_text),
    Task("replace_random", "lists", CANVAS, _replace_random, _grade_replace_random, free=True),
)
