"""Small edits of code-like text, whose answers mostly copy the input.

`rename` replaces one identifier everywhere; `insert_line` adds a given line after a numbered one
(line 0 is the first). This is where drafts copied from the prompt pay off.
"""

from __future__ import annotations

import random
import re

from chordal.bench.tasks.task import Instance, Task, same_text

IDENTIFIERS = (
    "total count items value index result left right size name data node "
    "limit score start end step price width height key row cell flag"
).split()
FUNCTIONS = "load save check update merge split find clean".split()


def _statement(rng: random.Random, names: list[str]) -> str:
    a, b, c = (rng.choice(names) for _ in range(3))
    number = rng.randint(0, 20)
    return rng.choice(
        (
            f"{a} = {b} + {c}",
            f"{a} = {b} - {number}",
            f"{a} = {number}",
            f"{a} = {rng.choice(FUNCTIONS)}({b}, {c})",
            f"{rng.choice(FUNCTIONS)}({a})",
            f"if {a} > {b}: {c} = {number}",
        )
    )


def _program(rng: random.Random) -> tuple[list[str], list[str]]:
    """Draw a function of 4 to 7 lines and the identifiers it may use."""
    names = rng.sample(IDENTIFIERS, 5)
    head = f"def {rng.choice(FUNCTIONS)}({names[0]}, {names[1]}):"
    body = [f"    {_statement(rng, names)}" for _ in range(rng.randint(2, 5))]
    return [head, *body, f"    return {rng.choice(names)}"], names


def _rename(rng: random.Random) -> Instance:
    lines, names = _program(rng)
    text = "\n".join(lines)
    old = rng.choice([name for name in names if re.search(rf"\b{name}\b", text)])
    new = rng.choice([name for name in IDENTIFIERS if name not in names])
    answer = re.sub(rf"\b{old}\b", new, text)
    return Instance("rename", f"rename {old} to {new}:\n{text}", answer)


def _insert_line(rng: random.Random) -> Instance:
    lines, names = _program(rng)
    after = rng.randrange(len(lines) - 1)
    added = _statement(rng, names)
    answer = [*lines[: after + 1], f"    {added}", *lines[after + 1 :]]
    text = "\n".join(lines)
    return Instance("insert_line", f"after line {after} add {added}\n{text}", "\n".join(answer))


# By the tokenizer of the bundled models.
CANVAS = 64

TASKS = (
    Task("rename", "edits", CANVAS, _rename, same_text),
    Task("insert_line", "edits", CANVAS, _insert_line, same_text),
)
