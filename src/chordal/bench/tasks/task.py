"""What a graded task is: a seeded generator of instances and an exact grader.

Instances are pure Python values made from a `random.Random`, so a task costs no file and no
download. A fixed hash of the prompt decides whether an instance belongs to the held-out split:
training never sees one, evaluation uses nothing else, whatever the seeds.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "held_out"]

_HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Instance:
    """One prompt with one correct answer and whatever its grader needs.

    Attributes:
        task: Name of the task it came from.
        prompt: What the user asks, without any chat template.
        answer: One correct answer; other answers may be right as well.
        facts: Grader inputs, e.g. the input list or the symbols of a square.
    """

    task: str
    prompt: str
    answer: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A named generator with its grader.

    Attributes:
        name: Lower-case name, unique.
        group: Family used for reporting: "lists", "puzzles", "arithmetic" or "edits".
        make: Draw one instance from a random number generator.
        grade: Whether a text answers the instance; surrounding white space never matters.
        free: True if several answers are valid, so that the positions of the answer depend on each
            other given the prompt and committing them in parallel must cost accuracy.
    """

    name: str
    group: str
    make: Callable[[random.Random], Instance]
    grade: Callable[[Instance, str], bool]
    free: bool = False

    def instances(self, seed: int, split: Split = "held_out") -> Iterator[Instance]:
        """Yield instances of one split forever, the same ones for the same seed."""
        rng = random.Random(f"{self.name}:{split}:{seed}")
        while True:
            instance = self.make(rng)
            if is_held_out(instance.prompt) == (split == "held_out"):
                yield instance


def is_held_out(prompt: str) -> bool:
    """Tell whether a prompt belongs to the evaluation split (one in 16, by hash)."""
    return zlib.crc32(prompt.encode()) % _HELD_OUT_ONE_IN == 0


def same_text(instance: Instance, text: str) -> bool:
    """Grade by equality with the reference answer, white space at both ends aside."""
    return text.strip() == instance.answer.strip()
