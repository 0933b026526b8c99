"""What a graded task is: a seeded generator of instances and an exact grader.

Instances are pure Python values made from a `random.Random`, so a task costs no file and no
download. A fixed hash of the prompt decides whether an instance belongs to the held-out split:
training never sees one, evaluation uses nothing else, whatever the seeds.
"""

from __future__ import annotations

import itertools
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
        answer: One correct answer; other answers may be right as well. Empty where none is known.
        facts: Grader inputs, e.g. the input list or the symbols of a square.
        shots: Worked examples that go before, each what was asked and what was answered.
    """

    task: str
    prompt: str
    answer: str
    facts: dict[str, Any] = field(default_factory=dict)
    shots: tuple[tuple[str, str], ...] = ()

    @property
    def request(self) -> str | list[dict[str, str]]:
        """The prompt as `Model.generate` takes it: a chat where there are worked examples."""
        if not self.shots:
            return self.prompt
        turns = [*itertools.chain(*self.shots), self.prompt]
        roles = itertools.cycle(("user", "assistant"))
        return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]


@dataclass(frozen=True)
class Grade:
    """What a grader says of a text; true where it is right.

    Attributes:
        right: Whether the text answers the prompt, its form read generously.
        score: How well, from 0 to 1; 1 or 0 where there are no degrees.
        strict: Whether it is right in exactly the form that was asked for.
    """

    right: bool
    score: float
    strict: bool

    def __bool__(self) -> bool:
        return self.right

    @classmethod
    def of(cls, verdict: Grade | bool) -> Grade:
        """Make a grade of a plain right or wrong."""
        return verdict if isinstance(verdict, Grade) else cls(verdict, float(verdict), verdict)


Grader = Callable[[Instance, str], "Grade | bool"]


@dataclass(frozen=True)
class Task:
    """A named generator with its grader.

    Attributes:
        name: Lower-case name, unique.
        group: Family used for reporting: "lists", "puzzles", "arithmetic", "edits", "parallelbench" or
            "parallelbench_n15".
        canvas: Tokens that hold every answer and little more. A masked-diffusion model fills a canvas of
            this length; for the others it is the limit.
        make: Draw one instance from a random number generator, of a given size where there are `sizes`.
        grade: Whether, or how well, a text answers the instance; surrounding white space never matters.
        free: True if several answers are valid, so that the positions of the answer depend on each
            other given the prompt and committing them in parallel must cost accuracy.
        sizes: Sizes that the instances have in turn, so that any number of them is balanced.
    """

    name: str
    group: str
    canvas: int
    make: Callable[..., Instance]
    grade: Grader
    free: bool = False
    sizes: tuple[int, ...] = ()

    def instances(self, seed: int, split: Split = "held_out") -> Iterator[Instance]:
        """Yield instances of one split forever, the same ones for the same seed."""
        rng = random.Random(f"{self.name}:{split}:{seed}")
        for size in itertools.cycle([(size,) for size in self.sizes] or [()]):
            instance = self.make(rng, *size)
            while is_held_out(instance.prompt) != (split == "held_out"):
                instance = self.make(rng, *size)
            yield instance


def is_held_out(prompt: str) -> bool:
    """Tell whether a prompt belongs to the evaluation split (one in 16, by hash)."""
    return zlib.crc32(prompt.encode()) % _HELD_OUT_ONE_IN == 0


def same_text(instance: Instance, text: str) -> bool:
    """Grade by equality with the reference answer, white space at both ends aside."""
    return text.strip() == instance.answer.strip()
