"""The graded tasks by name: list operations, puzzles, arithmetic, code edits."""

from __future__ import annotations

from chordal.bench.tasks import arithmetic, edits, list_ops, puzzles
from chordal.bench.tasks.task import Instance, Split, Task, is_held_out

TASKS: dict[str, Task] = {
    task.name: task for module in (list_ops, puzzles, arithmetic, edits) for task in module.TASKS
}
GROUPS: tuple[str, ...] = ("lists", "puzzles", "arithmetic", "edits")

# Tokens that hold every answer of a group and little more, by the tokenizer of the bundled models.
# A masked-diffusion model fills a canvas of this length; for the others it is the limit.
CANVAS: dict[str, int] = {"lists": 12, "puzzles": 20, "arithmetic": 20, "edits": 64}

__all__ = ["CANVAS", "GROUPS", "TASKS", "Instance", "Split", "Task", "is_held_out"]
