"""ParallelBench (arXiv 2510.04767): 17 tasks that show what committing several tokens a pass loses.

Ten operations on a waiting line of full names (3 to 6 people, and again 15), two puzzles, five writing
tasks. Instances, wording and graders are our own; where the published ones are wrong, each module
says how ours differ. Not written for the bundled models, which know none of this wording.
"""

from __future__ import annotations

from chordal.bench.tasks.parallelbench import puzzles, waiting_line, writing
from chordal.bench.tasks.task import Task

PARALLELBENCH: dict[str, Task] = {
    task.name: task
    for task in (*waiting_line.TASKS, *puzzles.TASKS, *writing.TASKS, *waiting_line.LONG_TASKS)
}

__all__ = ["PARALLELBENCH"]
