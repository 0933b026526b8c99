"""The graded tasks by name: list operations, puzzles, arithmetic, code edits."""

from __future__ import annotations

from chordal.bench.tasks import arithmetic, edits, list_ops, puzzles
from chordal.bench.tasks.task import Instance, Split, Task, is_held_out

TASKS: dict[str, Task] = {
    task.name: task for module in (list_ops, puzzles, arithmetic, edits) for task in module.TASKS
}
GROUPS: tuple[str, ...] = ("lists", "puzzles", "arithmetic", "edits")

__all__ = ["GROUPS", "TASKS", "Instance", "Split", "Task", "is_held_out"]
