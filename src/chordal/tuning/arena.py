"""Where decoders meet: prompts in a fixed order, timed runs, and quality against the plain decoder."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from chordal.bench.compare import Contender
from chordal.errors import DecodingError

if TYPE_CHECKING:
    from chordal.bench.tasks.workload import Workload
    from chordal.generation import Generation, Model, Prompt

# Prompts of a turn for each row of a batch; with fewer, rows that are done would wait for the others.
_TURN = 4


@dataclass(frozen=True, slots=True)
class Output:
    """What a decoder made of one prompt.

    Attributes:
        tokens: Generated token ids.
        num_tokens: Committed tokens, of which some may not be in the text.
        forwards: Forward passes of the target after prefill.
        right: Whether the answer is right, None if nobody can tell.
    """

    tokens: tuple[int, ...]
    num_tokens: int
    forwards: int
    right: bool | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A decoder over some of the prompts.

    Attributes:
        seconds: Wall-clock.
        outputs: One for each prompt, in order.
        promise: Of the decoder with its settings.
    """

    seconds: float
    outputs: list[Output]
    promise: Literal["exact", "approximate"]

    @property
    def num_tokens(self) -> int:
        """Committed tokens of all prompts."""
        return sum(output.num_tokens for output in self.outputs)

    @property
    def forwards(self) -> int:
        """Forward passes of all prompts."""
        return sum(output.forwards for output in self.outputs)

    @property
    def tokens_per_s(self) -> float:
        """Committed tokens a second."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def __add__(self, other: Run) -> Run:
        return Run(self.seconds + other.seconds, self.outputs + other.outputs, other.promise)


class Arena(Protocol):
    """Runs decoders over prompts; the search knows no more of models than this.

    Attributes:
        plain: The plain decoder with the settings at which it is the reference.
        num_prompts: How many prompts there are.
        batch_size: How many are decoded at once.
    """

    plain: Contender
    num_prompts: int
    batch_size: int

    def run(self, contender: Contender, start: int, end: int) -> Run:
        """Run a decoder over the prompts from `start` up to `end`.

        Raises:
            InputError: It does not fit the model, or a setting cannot be used.
            DecodingError: A prompt ended with an error.
        """
        ...


class ModelArena:
    """Runs decoders on a model.

    Args:
        model: The model; its engine says how many prompts share a forward pass.
        workloads: What to decode. Their prompts are mixed, so that any first few are like all of them.
        seed: Of the order.
        clock: Gives the time in seconds.
        **request: Further fields of `Request` for every prompt, e.g. the temperature.
    """

    def __init__(
        self,
        model: Model,
        workloads: Seq[Workload],
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        **request: Any,
    ) -> None:
        self.plain = Contender(model.family.default_decoder, dict(model.family.plain_settings))
        self.batch_size = model.engine.max_rows
        self._model, self._clock, self._request = model, clock, request
        self._items = [(workload, index) for workload in workloads for index in range(len(workload.prompts))]
        random.Random(seed).shuffle(self._items)
        self.num_prompts = len(self._items)

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts in their order."""
        return [workload.prompts[index] for workload, index in self._items]

    @property
    def max_new_tokens(self) -> int | None:
        """The most that any prompt may be answered with, None for the library's default."""
        lengths = [workload.max_new_tokens for workload, _ in self._items]
        return max((length for length in lengths if length is not None), default=None)

    def run(self, contender: Contender, start: int, end: int) -> Run:
        """Run a decoder over the prompts from `start` up to `end`; only decoding is timed."""
        by_length: dict[int | None, list[int]] = defaultdict(list)
        for place in range(start, end):
            by_length[self._items[place][0].max_new_tokens].append(place)
        results: dict[int, Generation] = {}
        seconds = 0.0
        for length, places in by_length.items():
            prompts = [self._items[place][0].prompts[self._items[place][1]] for place in places]
            request = self._request if length is None else {**self._request, "max_new_tokens": length}
            started = self._clock()
            made = self._model.generate(
                prompts, decoder=contender.decoder, config=contender.settings, **request
            )
            seconds += self._clock() - started
            results.update(zip(places, made, strict=True))
        for result in results.values():
            if result.error is not None:
                raise DecodingError(f"{contender.label}: {result.error}") from result.error
        outputs = [self._output(place, results[place]) for place in range(start, end)]
        return Run(seconds, outputs, results[start].promise)  # type: ignore[arg-type]

    def _output(self, place: int, result: Generation) -> Output:
        workload, index = self._items[place]
        right = bool(workload.grade(index, result.text)) if workload.grade is not None else None
        stats = result.stats
        return Output(tuple(result.tokens), stats["committed_tokens"], stats["forwards"], right)


def side_by_side(
    arena: Arena, contenders: Seq[Contender], start: int, end: int, *, flip: bool = False
) -> list[Run]:
    """Run decoders over the prompts from `start` up to `end`, few prompts at a time.

    They take turns, every second one backwards, so that a machine that is slow for a while slows all of them.

    Args:
        arena: Runs them.
        contenders: The decoders.
        start: First prompt.
        end: The one behind the last.
        flip: Begin backwards.

    Returns:
        A run for each, in order.
    """
    runs: list[list[Run]] = [[] for _ in contenders]
    for turn, place in enumerate(range(start, end, _TURN * arena.batch_size)):
        order = list(enumerate(contenders))
        for index, contender in reversed(order) if (turn + flip) % 2 else order:
            runs[index].append(arena.run(contender, place, min(place + _TURN * arena.batch_size, end)))
    return [sum(mine[1:], mine[0]) for mine in runs]


@dataclass(frozen=True)
class Yardstick:
    """Quality against the plain decoder.

    Attributes:
        run: The plain decoder over all prompts.
        metric: "accuracy": right answers, of those the plain decoder gets right, where prompts are graded and
            it gets any. "agreement": how much of its text is the same.
        scores: Its own score for each prompt.
    """

    run: Run
    metric: Literal["accuracy", "agreement"] = field(init=False)
    scores: list[float] = field(init=False)

    def __post_init__(self) -> None:
        is_graded = any(output.right for output in self.run.outputs)
        object.__setattr__(self, "metric", "accuracy" if is_graded else "agreement")
        scores = [float(output.right or False) if is_graded else 1.0 for output in self.run.outputs]
        object.__setattr__(self, "scores", scores)

    def score(self, place: int, output: Output) -> float:
        """Score the output for a prompt from 0 to 1."""
        if self.metric == "accuracy":
            return float(output.right or False)
        return agreement(self.run.outputs[place].tokens, output.tokens)

    def quality(self, outputs: Seq[Output]) -> float:
        """Give what the first prompts keep of the plain decoder's quality; 1 is all of it."""
        own = sum(self.score(place, output) for place, output in enumerate(outputs))
        plain = sum(self.scores[: len(outputs)])
        return own / plain if plain else 1.0

    def misses(self, floor: float, outputs: Seq[Output]) -> bool:
        """Whether the first prompts say that the floor is missed.

        While prompts are left, one bad one is forgiven, unless no answer to the others could make up for it.
        """
        left = len(self.run.outputs) - len(outputs)
        own = sum(self.score(place, output) for place, output in enumerate(outputs))
        plain, all_plain = sum(self.scores[: len(outputs)]), sum(self.scores)
        # A sum of many shares may lose its last digits.
        slack = 1e-9
        return own + left + slack < floor * all_plain or own + (1 if left else 0) + slack < floor * plain


def agreement(plain: Seq[int], other: Seq[int]) -> float:
    """Give the share of the longer text that is the common beginning of both.

    Behind the first token that differs a text is another text, so what happens to be the same there does not
    count: 1 2 3 4 and 1 2 5 4 6 agree on 2 of 5.
    """
    longer = max(len(plain), len(other))
    same = 0
    for mine, its in zip(plain, other, strict=False):
        if mine != its:
            break
        same += 1
    return same / longer if longer else 1.0
