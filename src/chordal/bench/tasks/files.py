"""Benchmark files of others, told apart by their keys: one JSON object a line, .gz or plain.

| shape | keys | graded by |
|---|---|---|
| ParallelBench | `input` (an object), `answer` | the task that the line is an instance of |
| GSM8K | `question`, `answer` ("... #### 18") | the number after "####", or the last one |
| HumanEval | `prompt`, `test`, `entry_point` | running it, where that is allowed |
| Spec-Bench | `category`, `turns` | nobody: speed and identity only |
| prompts | `prompt` or `messages`, or a text | nobody |
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal

from chordal.bench.tasks import programs
from chordal.bench.tasks.parallelbench import published
from chordal.bench.tasks.rows import read_objects, read_rows
from chordal.bench.tasks.task import Grade, Instance
from chordal.bench.tasks.workload import Workload
from chordal.errors import InputError

Turns = Literal["first", "all"]

# Most new tokens of an answer, as usual in published results on such files.
MATHS_LENGTH = 256
PROGRAM_LENGTH = 512
CONVERSATION_LENGTH = 1024

# The six of Spec-Bench; its first 80 questions carry the eight categories of MT-Bench.
_OTHER_CATEGORIES = ("translation", "summarization", "qa", "math_reasoning", "rag")
_CHAT = "mt_bench"


def read_workloads(
    paths: Iterable[str],
    *,
    num_prompts: int | None = None,
    max_new_tokens: int | None = None,
    execute: bool = False,
    turns: Turns = "first",
) -> list[Workload]:
    """Read files into workloads, named after their files.

    A file is one workload, except that Spec-Bench gives one for each of its kinds of prompts.

    Args:
        paths: Of the files, in any of the shapes above.
        num_prompts: Most prompts of each workload, at even distances in the file; None for all.
        max_new_tokens: For all of them; None takes what is usual for the shape, the library's default
            for plain prompts.
        execute: Run programs, which is what grades them.
        turns: What to ask of conversations: their first turn, or all in one message. Later turns follow
            on answers that do not exist before the run.

    Raises:
        InputError: A file cannot be read, a line is not what the first line promises, or the shape is
            unknown; file and line are named.
    """
    paths = [*dict.fromkeys(paths)]
    return [
        _part(workload, num_prompts, max_new_tokens)
        for path, name in zip(paths, _short_names(paths), strict=True)
        for workload in _read(path, name, execute, turns)
    ]


def _part(workload: Workload, num_prompts: int | None, max_new_tokens: int | None) -> Workload:
    """Take prompts at even distances: files are often sorted by length or kind."""
    total = len(workload.prompts)
    count = min(num_prompts or total, total)
    chosen = [at * total // count for at in range(count)]
    grade = workload.grade
    return replace(
        workload,
        prompts=[workload.prompts[at] for at in chosen],
        max_new_tokens=max_new_tokens or workload.max_new_tokens,
        grade=None if grade is None else lambda index, text: grade(chosen[index], text),
    )


def _short_names(paths: Seq[str]) -> list[str]:
    """Name files by as few last parts of their paths as tell them apart."""
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts), default=0)):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _read(path: str, name: str, execute: bool, turns: Turns) -> list[Workload]:
    first = next(read_rows(path), None)
    if first is None:
        raise InputError(f"{path} holds no prompts.")
    keys = set(first.value) if isinstance(first.value, dict) else set()
    if {"prompt", "test", "entry_point"} <= keys:
        return [_programs(path, name, execute)]
    if not keys or keys & {"prompt", "messages"}:
        return [_prompts(path, name)]
    if {"question", "answer"} <= keys:
        return [_maths(path, name)]
    if {"category", "turns"} <= keys:
        return _conversations(path, name, turns)
    if {"input", "answer"} <= keys:
        return [published.read(read_objects(path), name)]
    raise first.error(
        f"no known kind of prompts; its keys are {', '.join(sorted(keys))}. Give lines with "
        '"prompt" or "messages", or a file of ParallelBench, GSM8K, HumanEval or Spec-Bench.'
    )


def _prompts(path: str, name: str) -> Workload:
    from chordal.cli.prompts import read_all_prompts

    return Workload(name, read_all_prompts(path))


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _maths(path: str, name: str) -> Workload:
    instances = []
    for row in read_objects(path):
        question, answer = row.get("question", str), row.get("answer", str)
        result = _number_after_mark(answer)
        if result is None:
            raise row.error('"answer" must end with "#### " and a number.')
        prompt = (
            f"{question}\n\nWork it out step by step. Write the result, as a number only, on a last line "
            'that starts with "####".'
        )
        instances.append(Instance(name, prompt, answer, {"result": result}))
    return Workload.of(instances, name=name, group="maths", grade=grade_number, max_new_tokens=MATHS_LENGTH)


def grade_number(instance: Instance, text: str) -> Grade:
    """Grade by the number after the last "####", or where there is none by the last number.

    Strictly there must be the mark.
    """
    marked = _number_after_mark(text)
    numbers = _NUMBER.findall(text)
    given = marked if marked is not None else _value(numbers[-1]) if numbers else None
    right = given == instance.facts["result"]
    return Grade(right, float(right), right and marked is not None)


def _number_after_mark(text: str) -> Decimal | None:
    _, mark, behind = text.rpartition("####")
    number = _NUMBER.match(behind.strip().lstrip("$").strip())
    return _value(number[0]) if mark and number else None


def _value(number: str) -> Decimal | None:
    try:
        return Decimal(number.replace(",", ""))
    except InvalidOperation:
        return None


def _programs(path: str, name: str, execute: bool) -> Workload:
    instances = []
    for row in read_objects(path):
        code, test, entry = (row.get(key, str) for key in ("prompt", "test", "entry_point"))
        if not re.search(rf"^def {re.escape(entry)}\b", code, re.MULTILINE):
            raise row.error(f'"prompt" must hold the head of the function {entry} that "entry_point" names.')
        prompt = (
            "Complete this Python function. Reply with the whole function in one code block.\n\n"
            f"```python\n{code.rstrip()}\n```"
        )
        solution = row.value.get("canonical_solution")
        answer = code + solution if isinstance(solution, str) else ""
        instances.append(Instance(name, prompt, answer, {"code": code, "test": test, "entry_point": entry}))
    return Workload.of(
        instances,
        name=name,
        group="programs",
        grade=grade_program if execute else None,
        max_new_tokens=PROGRAM_LENGTH,
    )


def grade_program(instance: Instance, text: str) -> bool:
    """Grade by running the function with the tests of its file, within the limits of `programs`."""
    facts = instance.facts
    entry = facts["entry_point"]
    source = written_function(text, facts["code"], entry)
    return programs.passes(f"{source}\n\n{facts['test']}\n\ncheck({entry})\n")


def written_function(text: str, code: str, entry: str) -> str:
    """Find the function in an answer and put what its file gave before it in front.

    It is taken from the last code block that defines it, else from the text if that defines it; a text
    that does not is what continues the given head.

    Args:
        text: The answer.
        code: Imports, helpers and the head of the function, as given.
        entry: Name of the function.
    """
    head = re.compile(rf"^def {re.escape(entry)}\b", re.MULTILINE)
    blocks = re.findall(r"```[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    for found in [*reversed(blocks), text]:
        if head.search(found):
            given = head.search(code)
            assert given is not None, "the reader has checked the head"
            return f"{code[: given.start()]}\n{found}"
    return code + (blocks[-1] if blocks else text)


def _conversations(path: str, name: str, turns: Turns) -> list[Workload]:
    sets: dict[str, list[str]] = {}
    for row in read_objects(path):
        category, said = row.get("category", str), row.get("turns", list)
        if not said or not all(isinstance(turn, str) and turn.strip() for turn in said):
            raise row.error('"turns" must be a list of texts, at least one.')
        kind = category if category in _OTHER_CATEGORIES else _CHAT
        sets.setdefault(kind, []).append(said[0] if turns == "first" else "\n\n".join(said))
    return [
        Workload(f"{name}:{kind}", prompts, CONVERSATION_LENGTH, group="conversations")
        for kind, prompts in sets.items()
    ]
