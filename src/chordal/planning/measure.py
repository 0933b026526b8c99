"""Runs of a model on prompts: how fast, where the time goes, and what became of the drafts."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chordal.errors import InputError
from chordal.sequence import Event, Sequence
from chordal.stats import TARGET

if TYPE_CHECKING:
    from chordal.generation import Model, Prompt


# Prompts take turns until there have been this many for each row: few ticks have a full batch of old texts.
_ROUNDS = 8


@dataclass(frozen=True)
class Run:
    """A decoder on prompts, with all rows of a batch busy.

    Prefill, and ticks in which fewer rows are left, do not count: this is the speed under load.

    Attributes:
        tokens: Tokens committed in the ticks that count.
        seconds: What these took.
        host_s: Seconds of one of them outside of the models.
        seqs: The decoded prompts, each once.
        traces: Their events.
    """

    tokens: int
    seconds: float
    host_s: float
    seqs: list[Sequence]
    traces: list[list[Event]]

    @property
    def tokens_per_s(self) -> float:
        """Speed of the batch.

        Raises:
            InputError: Nothing was timed.
        """
        if not self.tokens:
            raise InputError(
                "texts are too short to be timed: no pass but the first had a full batch of them. "
                "Use prompts with longer answers, or a smaller batch."
            )
        return self.tokens / self.seconds


def decode_prompts(
    model: Model,
    prompts: Seq[Prompt],
    decoder: str,
    settings: Mapping[str, Any],
    *,
    batch: int,
    clock: Callable[[], float] = time.perf_counter,
    **request: Any,
) -> Run:
    """Decode prompts, as many at once as the batch has rows, and time the ticks of a full batch.

    Args:
        model: The model.
        prompts: At least one; they take turns until the batch has been filled a few times.
        decoder: Name of the decoder.
        settings: Those that differ from its defaults.
        batch: Rows, at most what the engine holds.
        clock: Gives the time in seconds.
        **request: Further fields of `Request`.

    Raises:
        InputError: A setting cannot be used.
        Exception: What ended a sequence, if one ended with an error.
    """
    from chordal.generation import make_request

    asked = make_request({"decoder": decoder, "config": settings, **request})
    made = model.decoder(asked)
    traces: list[list[Event]] = [[] for _ in prompts]

    def listen(trace: list[Event]) -> Callable[[Sequence, Event], None]:
        return lambda seq, event: trace.append(event)

    first = [
        model.sequence(prompt, asked, [listen(trace)]) for prompt, trace in zip(prompts, traces, strict=True)
    ]
    more = max(0, _ROUNDS * batch - len(prompts))
    again = [model.sequence(prompt, asked) for prompt in itertools.islice(itertools.cycle(prompts), more)]
    engine, waiting = model.engine, deque([*first, *again])
    live: list[Sequence] = []
    tokens, ticks, seconds, model_s = 0, 0, 0.0, 0.0
    try:
        while live or waiting:
            while waiting and len(live) < batch:
                live.append(engine.submit(made, waiting.popleft()))
            is_steady = len(live) == batch and all(seq.stats.forwards.get(TARGET) for seq in live)
            committed, inside = sum(seq.stats.committed_tokens for seq in live), engine.model_s
            started = clock()
            engine.step()
            elapsed = clock() - started
            if failed := next((seq.error for seq in live if seq.error is not None), None):
                raise failed
            if is_steady:
                ticks += 1
                seconds += elapsed
                model_s += engine.model_s - inside
                tokens += sum(seq.stats.committed_tokens for seq in live) - committed
            live = [seq for seq in live if not seq.done]
    finally:
        for seq in live:
            engine.cancel(seq)
    return Run(tokens, seconds, max(0.0, seconds - model_s) / max(1, ticks), first, traces)
