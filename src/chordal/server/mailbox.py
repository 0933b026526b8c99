"""Where the engine thread leaves what is new of a request, and whoever waits for it takes it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from chordal.forward import Ints
from chordal.generation import Generation
from chordal.sequence import Event, TokenLogprob


@dataclass(frozen=True)
class Update:
    """What is new of one job since its last update.

    Attributes:
        index: Which job of the ticket.
        text: Text that became certain.
        tokens: Tokens that joined the committed prefix, int `[n]`.
        start: Where the first of them stands, counted from the first new token.
        logprobs: Of those tokens; empty if they were not asked for.
        events: What happened to the sequence, if asked for; of guesses nobody took, the last.
        queue_s: Seconds the job waited for its start.
        result: With a job's last update, its result.
    """

    index: int
    text: str
    tokens: Ints
    start: int
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    queue_s: float = 0.0
    result: Generation | None = None


class Ticket:
    """The updates of a request, an async iterator that ends when all of its jobs are done.

    What is not taken is merged, so a slow reader gets fewer and larger updates, and one that never
    reads holds no more than one update a job. Dropping the ticket cancels what is not done.

    Args:
        mailbox: Where the updates are left.
        on_cancel: Called when it is cancelled, from any thread and perhaps again; it must not wait.
    """

    def __init__(self, mailbox: Mailbox, on_cancel: Callable[[], None]) -> None:
        self._mailbox, self._on_cancel = mailbox, on_cancel

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Update:
        while True:
            if (update := self._mailbox.take()) is not None:
                return update
            if not self._mailbox.num_open:
                raise StopAsyncIteration
            await self._mailbox.arrived.wait()

    def cancel(self) -> None:
        """End what is not done before the next tick; from any thread, and again without effect."""
        # No lock: `__del__` may run in any thread, amid anything.
        self._mailbox.is_cancelled = True
        self._on_cancel()

    def __del__(self) -> None:
        self.cancel()


@dataclass(eq=False)
class _News:
    """What nobody has taken yet of a job."""

    start: int
    queue_s: float
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    result: Generation | None = None

    def add(self, update: Update) -> None:
        """Add what is new; a guess stands in place of the one before."""
        if update.text:
            self.text.append(update.text)
        self.tokens += update.tokens.tolist()
        self.logprobs += update.logprobs
        self.result = update.result
        for event in update.events:
            if event.kind == "guess":
                self.events = [one for one in self.events if one.kind != "guess"]
            self.events.append(event)


class Mailbox:
    """Where the engine thread leaves what is new of a request, and an event loop takes it.

    Attributes:
        loop: The event loop.
        arrived: Set, in that loop, when there is something to take.
        num_open: Jobs whose result was not taken yet.
        is_cancelled: Nobody waits for it any more.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, num_jobs: int) -> None:
        self.loop = loop
        self.arrived = asyncio.Event()
        self.num_open = num_jobs
        self.is_cancelled = False
        self._news: dict[int, _News] = {}
        self._lock = threading.Lock()
        self._is_called = False  # the loop is, or will be, awake

    def put(self, update: Update) -> bool:
        """Leave what is new of a job.

        Returns:
            Whether the loop must be woken for it.
        """
        with self._lock:
            news = self._news.get(update.index)
            if news is None:
                news = self._news[update.index] = _News(update.start, update.queue_s)
            news.add(update)
            was_called, self._is_called = self._is_called, True
        return not was_called

    def take(self) -> Update | None:
        """Take what is new of one job; None if there is nothing. Called in the loop."""
        with self._lock:
            if not self._news:
                self.arrived.clear()
                self._is_called = False
                return None
            index = next(iter(self._news))
            news = self._news.pop(index)
        if news.result is not None:
            self.num_open -= 1
        return Update(
            index=index,
            text="".join(news.text),
            tokens=np.array(news.tokens, np.int64),
            start=news.start,
            logprobs=news.logprobs,
            events=news.events,
            queue_s=news.queue_s,
            result=news.result,
        )


def announce(mailboxes: Iterable[Mailbox]) -> None:
    """Tell, in their loop, that there is something to take."""
    for mailbox in mailboxes:
        mailbox.arrived.set()
