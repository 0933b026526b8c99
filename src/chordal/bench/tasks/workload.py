"""What a benchmark decodes: prompts of generated tasks and of files, with their graders."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from chordal.bench.tasks import PARALLELBENCH, TASKS
from chordal.bench.tasks.task import Grade, Grader, Instance, Task
from chordal.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from chordal.generation import Prompt


@dataclass(frozen=True)
class Workload:
    """Prompts that are decoded together.

    Attributes:
        name: For the table, e.g. the task's.
        prompts: As `Model.generate` takes them.
        max_new_tokens: Most new tokens of each; None is the library's default.
        grade: Grades a text for the prompt of an index; None where nobody can tell.
        group: What it is reported with, e.g. the task's group.
        grader: Name of the rule that grades; None where there is none.
    """

    name: str
    prompts: Seq[Prompt]
    max_new_tokens: int | None = None
    grade: Callable[[int, str], Grade] | None = None
    group: str = "data"
    grader: str | None = None

    @property
    def hash(self) -> str:
        """SHA-256 of the prompts, 64 hexadecimal digits: the same ones have the same."""
        prompts = json.dumps([*self.prompts], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(prompts.encode()).hexdigest()

    @classmethod
    def of(
        cls,
        instances: Seq[Instance],
        *,
        name: str,
        group: str,
        grade: Grader | None,
        max_new_tokens: int | None = None,
    ) -> Workload:
        """Make a workload of instances that one grader grades.

        Args:
            instances: At least one.
            name: Of the workload.
            group: What it is reported with.
            grade: Grades an instance; None where nobody can tell.
            max_new_tokens: Most new tokens of each; None is the library's default.
        """
        return cls(
            name=name,
            prompts=[instance.request for instance in instances],
            max_new_tokens=max_new_tokens,
            grade=None if grade is None else lambda index, text: Grade.of(grade(instances[index], text)),
            group=group,
            grader=None if grade is None else grade.__name__.removeprefix("_").removeprefix("grade_"),
        )


def load_tasks(
    names: Iterable[str] = (),
    num_prompts: int | None = None,
    *,
    seed: int = 0,
    data: Iterable[str] = (),
    max_new_tokens: int | None = None,
    execute: bool = False,
    turns: Literal["first", "all"] = "first",
) -> list[Workload]:
    """Make the workloads of graded tasks, by name or group, and of files.

    Args:
        names: Tasks, or groups of them: "lists", "puzzles", "arithmetic", "edits", "parallelbench",
            "parallelbench_n15". Their held-out instances are taken.
        num_prompts: Of each task, and at most of each workload of a file, at even distances; at least 1.
            None takes 100 of a task and all of a file.
        seed: Of the instances.
        data: Paths of files; `read_workloads` says of what shape.
        max_new_tokens: For all of them; None takes the canvas of each task, or the usual length of a
            file's kind.
        execute: Run the programs that a file with tests asks for, which is what grades them; without
            this they are decoded and not graded.
        turns: What to ask of conversations: their first turn, or all of them in one message.

    Returns:
        One workload for each task, then those of the files. No task comes twice.

    Raises:
        UnknownNameError: No task or group has that name.
        InputError: A file cannot be read or is of no known shape.
    """
    from chordal.bench.tasks.files import read_workloads

    if num_prompts is not None and num_prompts < 1:
        raise InputError(f"the number of prompts must be at least 1; got {num_prompts}.")
    return [
        *(_workload(task, num_prompts or 100, seed, max_new_tokens) for task in _find(names)),
        *read_workloads(
            data, num_prompts=num_prompts, max_new_tokens=max_new_tokens, execute=execute, turns=turns
        ),
    ]


def _find(names: Iterable[str]) -> list[Task]:
    known = TASKS | PARALLELBENCH
    groups = {task.group for task in known.values()}
    chosen: dict[str, Task] = {}
    for name in names:
        if name not in known and name not in groups:
            raise UnknownNameError("task", name, {*known, *groups})
        chosen.update((task.name, task) for task in known.values() if name in (task.name, task.group))
    return [*chosen.values()]


def _workload(task: Task, num_prompts: int, seed: int, max_new_tokens: int | None) -> Workload:
    return Workload.of(
        [*itertools.islice(task.instances(seed), num_prompts)],
        name=task.name,
        group=task.group,
        grade=task.grade,
        max_new_tokens=max_new_tokens or task.canvas,
    )
