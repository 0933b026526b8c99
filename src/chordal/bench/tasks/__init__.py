"""The graded tasks by name.

`TASKS` are those the bundled models are trained on: list operations, puzzles, arithmetic, code edits.
`PARALLELBENCH` are those of ParallelBench, for checkpoints that follow instructions.
"""

from __future__ import annotations

from chordal.bench.tasks import arithmetic, edits, list_ops, puzzles
from chordal.bench.tasks.parallelbench import PARALLELBENCH
from chordal.bench.tasks.task import Grade, Instance, Split, Task, is_held_out

TASKS: dict[str, Task] = {
    task.name: task for module in (list_ops, puzzles, arithmetic, edits) for task in module.TASKS
}
GROUPS: tuple[str, ...] = ("lists", "puzzles", "arithmetic", "edits")
CANVAS: dict[str, int] = {task.group: task.canvas for task in TASKS.values()}

__all__ = ["CANVAS", "GROUPS", "PARALLELBENCH", "TASKS", "Grade", "Instance", "Split", "Task", "is_held_out"]
