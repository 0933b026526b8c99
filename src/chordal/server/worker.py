"""The engine thread: every served model ticks in it, requests join and leave at any tick.

The event loop submits jobs and takes updates; everything between is done in one thread, so engines
and sequences need no locks. What both sides touch is little: the queue, and a mailbox per request.

    event loop                      engine thread
    submit -> queue   ------------> start what has room, tick every engine with work
    Ticket <- mailbox <------------ leave text, tokens, results; wake each loop once a tick
    Ticket.cancel     ------------> end its jobs before the next tick
"""

from __future__ import annotations

import asyncio
import faulthandler
import itertools
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from chordal.engine import Engine
from chordal.errors import ChordalError, InputError
from chordal.generation import Generation, Job, Model
from chordal.sequence import Event, Listener, Sequence, TokenLogprob
from chordal.server.mailbox import Mailbox, Ticket, Update, announce
from chordal.text import TextStream

State = Literal["loading", "ready", "draining", "dead"]

# Exit code of a process whose forward pass hangs: EX_SOFTWARE of sysexits.h.
EXIT_HUNG = 70

_RELEASE_AFTER_S = 1.0  # of idleness
_JOIN_S = 10.0
_MAX_RETRY_AFTER_S = 60
_WARM_UP_TOKENS = 8
_UNAVAILABLE = {
    "loading": "the models are loading; try again soon.",
    "draining": "the server is shutting down and takes no new requests.",
    "dead": "the engine died and the server is ending.",
}

_log = logging.getLogger("chordal.server")


class UnavailableError(ChordalError):
    """No work is taken: the models are loading, the server ends, or its engine died."""


class QueueFullError(ChordalError):
    """As many sequences wait as may.

    Attributes:
        retry_after_s: When there may be room, in whole seconds, at least 1.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many requests wait already; try again in {retry_after_s} s.")
        self.retry_after_s = retry_after_s


class Observer(Protocol):
    """Is told what happens, for metrics. Called on the engine thread, `rejected` on the caller's."""

    def admitted(self, job: Job) -> None:
        """A job was queued."""

    def rejected(self, reason: str) -> None:
        """A request was not: "queue_full" or "unavailable"."""

    def started(self, job: Job, queue_s: float) -> None:
        """A job left the queue after so many seconds; one that is cancelled before never does."""

    def first_token(self, job: Job, seconds: float) -> None:
        """The first tokens of a job are committed, so many seconds after it was submitted."""

    def tokens(self, job: Job, num: int, seconds_since_last: float) -> None:
        """More tokens are committed, so many seconds after those before; not told of the first ones."""

    def drafted(self, job: Job, event: Event) -> None:
        """A draft was verified."""

    def finished(self, job: Job, result: Generation, seconds: float) -> None:
        """A job is done, however it ended, so many seconds after it was submitted."""

    def ticked(self, num_running: int, num_waiting: int) -> None:
        """A tick is over."""


@dataclass(eq=False)
class _Task:
    """A job in the worker.

    Attributes:
        job: The job.
        index: Its number in the request.
        mailbox: Where its updates go.
        submitted: When it came, on the monotonic clock.
        deadline: When it must be done.
        timeout_s: How long after `submitted` that is.
        stream: Makes its text; None if only the result is wanted.
        listeners: Those of the worker among the sequence's.
        events: What happened since the last update.
        queue_s: Seconds it waited before it started.
        num_given: Tokens that went into updates.
        num_seen: Tokens that were counted.
        last_seen: When the last of them came.
        is_answered: Its result is in the mailbox.
    """

    job: Job
    index: int
    mailbox: Mailbox
    submitted: float
    deadline: float
    timeout_s: float | None
    stream: TextStream | None = None
    listeners: list[Listener] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    queue_s: float = 0.0
    num_given: int = 0
    num_seen: int = 0
    last_seen: float = 0.0
    is_answered: bool = False

    def logprobs(self, num: int) -> list[TokenLogprob | None]:
        """Give what is known of the next tokens to be given."""
        seq = self.job.seq
        if seq.num_logprobs is None:
            return []
        start = seq.num_prompt + self.num_given
        return [seq.logprobs.get(position) for position in range(start, start + num)]

    def expire(self) -> None:
        """End it because its time is over."""
        self.job.cancel(TimeoutError(f"the request was not done within {self.timeout_s:g} s."))


class _Recorder:
    """Keeps every event for the next update."""

    wants_confidence = True

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def __call__(self, seq: Sequence, event: Event) -> None:
        self._events.append(event)


class _Lane:
    """The jobs of one engine, first come, first served: those that wait and those that run.

    They wait here and not in the engine: what never started has made no coroutine and holds no state of
    a drafter, and a full engine of one model keeps no job of another waiting.
    """

    def __init__(self, engine: Engine, max_running: int) -> None:
        self.engine = engine
        self.limit = min(max_running, engine.max_rows)
        self.waiting: deque[_Task] = deque()
        self.running: list[_Task] = []

    def overhang(self, more: int = 0) -> int:
        """Count those that would wait beyond the next tick, `more` included."""
        return max(0, len(self.waiting) + len(self.running) + more - self.limit)


class _Told:
    """An observer whose errors change nothing; the first is logged."""

    def __init__(self, observer: Observer | None) -> None:
        self._observer = observer
        self._is_logged = False

    def __bool__(self) -> bool:
        return self._observer is not None

    def tell(self, name: str, *given: Any) -> None:
        if self._observer is None:
            return
        try:
            getattr(self._observer, name)(*given)
        except Exception:
            if not self._is_logged:
                self._is_logged = True
                _log.exception("an observer failed; later failures are not logged")


class Worker(threading.Thread):
    """Decodes what is submitted, for every served model, in one thread.

    Every model runs up to `max_running` sequences at once, whatever the others do.

    Args:
        load: Gives the models by the names they are served under; called in the thread.
        max_queue: Sequences that may wait beyond those that run, at least 0.
        max_running: Sequences of one engine at once; its own `max_rows` is a limit, too.
        watchdog_s: A tick longer than this calls `on_hang`; None: none is too long.
        observer: Is told what happens.
        on_ready: Called, in the thread, when the models are there.
        on_death: Called, in the thread, with what killed it, after everybody who waits was answered.
        on_hang: Called, in a thread of the watchdog, when a tick takes too long. The default writes the
            stacks of all threads to stderr and ends the process with `EXIT_HUNG`.

    Attributes:
        state: "loading", "ready", "draining" (nothing new is taken, also after the end) or "dead".
        error: What killed it.
        models: The served models by name; empty while they load.
    """

    def __init__(
        self,
        load: Callable[[], Mapping[str, Model]],
        *,
        max_queue: int,
        max_running: int,
        watchdog_s: float | None,
        observer: Observer | None = None,
        on_ready: Callable[[], None] | None = None,
        on_death: Callable[[BaseException], None] | None = None,
        on_hang: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(name="chordal-engine", daemon=True)
        self.state: State = "loading"
        self.error: BaseException | None = None
        self.models: Mapping[str, Model] = {}
        self._load, self._max_queue, self._max_running = load, max_queue, max_running
        self._observer = _Told(observer)
        self._on_ready, self._on_death, self._on_hang = on_ready, on_death, on_hang or _exit_hung
        self._watchdog_s = watchdog_s

        self._changed = threading.Condition()  # guards what follows
        self._lanes: dict[int, _Lane] = {}  # by id of the engine
        self._admitted: list[_Task] = []  # not yet told to the observer
        self._next_deadline = math.inf  # no deadline is before
        self._finish_times: deque[float] = deque(maxlen=64)
        self._is_ending = False

        self._has_cancels = False
        self._tick_started: float | None = None
        self._is_over = threading.Event()

    @property
    def num_running(self) -> int:
        """How many sequences are being decoded."""
        with self._changed:
            return sum(len(lane.running) for lane in self._lanes.values())

    @property
    def num_waiting(self) -> int:
        """How many sequences wait for their first tick."""
        with self._changed:
            return sum(len(lane.waiting) for lane in self._lanes.values())

    @property
    def num_unfinished(self) -> int:
        """How many sequences run or wait; the sum of the two above may miss one that starts in between."""
        with self._changed:
            return self.num_running + self.num_waiting

    def check_room(self, model: Model, num: int = 1) -> None:
        """Check that so many jobs for a model would be taken now; costs nothing, from any thread.

        Raises:
            UnavailableError: Nothing is taken.
            QueueFullError: Too many wait.
            InputError: So many never fit together.
        """
        with self._changed:
            self._check_room({id(model.engine): num})

    def turn_away(self, num: int = 1) -> QueueFullError:
        """Count a call that finds so many too many before it, and give the error for it; from any thread."""
        self._observer.tell("rejected", "queue_full")
        return QueueFullError(self._retry_after_s(num))

    def submit(
        self, jobs: Seq[Job], *, timeout_s: float | None, stream: bool = True, events: bool = False
    ) -> Ticket:
        """Queue the jobs of a request, all or none; called in the event loop that takes the updates.

        Args:
            jobs: At least one, of served models, not started.
            timeout_s: What is not done so many seconds from now is cancelled with a `TimeoutError`.
            stream: Whether there are updates before the last of each job.
            events: Whether updates have events.

        Raises:
            UnavailableError: Nothing is taken.
            QueueFullError: Too many wait.
            InputError: So many never fit together.
        """
        mailbox = Mailbox(asyncio.get_running_loop(), len(jobs))
        now = time.monotonic()
        deadline = math.inf if timeout_s is None else now + timeout_s
        tasks = [_Task(job, index, mailbox, now, deadline, timeout_s) for index, job in enumerate(jobs)]
        wanted: dict[int, int] = {}
        for task in tasks:
            wanted[id(task.job.model.engine)] = wanted.get(id(task.job.model.engine), 0) + 1
            if stream:
                task.stream = TextStream(task.job.seq)
            if events:
                task.listeners.append(_Recorder(task.events))
            if self._observer:
                task.listeners.append(self._watch(task.job))
        with self._changed:
            self._check_room(wanted)
            for task in tasks:
                self._lanes[id(task.job.model.engine)].waiting.append(task)
            self._admitted += tasks
            self._next_deadline = min(self._next_deadline, deadline)
            self._changed.notify_all()
        return Ticket(mailbox, self._note_cancel)

    def drain(self) -> None:
        """Take nothing new; what was submitted goes on."""
        with self._changed:
            if self.state != "dead":
                self.state = "draining"

    def stop(self, timeout_s: float) -> None:
        """Take nothing new, wait until all is done, cancel what is not by then, and end the thread.

        A thread that still loads is left to itself: nothing can interrupt it.
        """
        is_loading = self.state == "loading"
        self.drain()
        with self._changed:
            self._changed.wait_for(lambda: self.state == "dead" or not self._has_tasks(), timeout_s)
            self._is_ending = True
            self._changed.notify_all()
        if not is_loading and self.is_alive():
            self.join(_JOIN_S)

    def run(self) -> None:
        """Load, then tick until the end; whatever escapes kills the thread, never in silence."""
        try:
            self._prepare()
            if self._watchdog_s is not None:
                threading.Thread(target=self._watch_ticks, name="chordal-watchdog", daemon=True).start()
            while self._wait():
                self._tick_started = time.monotonic()
                self._tick()
                self._tick_started = None
            self._end(UnavailableError("the server is shutting down; the request was cut off."))
        except BaseException as error:
            self._die(error)
        finally:
            self._tick_started = None
            self._is_over.set()

    def _prepare(self) -> None:
        """Load the models and run each once, so that the first request does not wait for it."""
        models = self._load()
        for model in {id(model): model for model in models.values()}.values():
            token = 1 if model.family.mask_id == 0 else 0
            [result] = model.generate([[token]], max_new_tokens=min(_WARM_UP_TOKENS, _room(model)))
            if result.error is not None:
                raise result.error
        with self._changed:
            self.models = models
            for model in models.values():
                self._lanes.setdefault(id(model.engine), _Lane(model.engine, self._max_running))
            if self.state == "loading":
                self.state = "ready"
        if self._on_ready is not None and self.state == "ready":
            self._on_ready()

    def _check_room(self, wanted: Mapping[int, int]) -> None:
        """Check that so many jobs of each engine would be taken now."""
        if (why := _UNAVAILABLE.get(self.state)) is not None:
            self._observer.tell("rejected", "unavailable")
            raise UnavailableError(why)
        lanes = self._lanes
        if (alone := sum(max(0, num - lanes[key].limit) for key, num in wanted.items())) > self._max_queue:
            raise InputError(
                f"a request may ask for no more texts than this server runs and queues; "
                f"got {alone - self._max_queue} too many."
            )
        overhang = sum(lane.overhang(wanted.get(key, 0)) for key, lane in lanes.items())
        # What would start at the next tick does not wait, however long the queues of other models are.
        if overhang > self._max_queue and any(lanes[key].overhang(num) for key, num in wanted.items()):
            raise self.turn_away(overhang - self._max_queue)

    def _retry_after_s(self, num: int) -> int:
        """Estimate when so many sequences are done, from how fast the last ones were."""
        times = self._finish_times
        if len(times) < 2:
            return 1
        # Up to now, not to the last: a server that got slow counts as slow.
        each_s = (time.monotonic() - times[0]) / (len(times) - 1)
        return min(max(1, math.ceil(num * each_s)), _MAX_RETRY_AFTER_S)

    def _watch(self, job: Job) -> Listener:
        def listen(seq: Sequence, event: Event) -> None:
            if event.kind == "draft":
                self._observer.tell("drafted", job, event)

        return listen

    def _note_cancel(self) -> None:
        self._has_cancels = True

    def _has_tasks(self) -> bool:
        return any(lane.waiting or lane.running for lane in self._lanes.values())

    def _wait(self) -> bool:
        """Sleep until there is work.

        A deadline or a ticket that is cancelled needs no wake-up: either has a job that is not done, and as
        long as there is one the thread ticks.

        Returns:
            Whether there is; False at the end.
        """
        if not self._wait_for_work(_RELEASE_AFTER_S):
            for lane in self._lanes.values():
                if (release := getattr(lane.engine, "release", None)) is not None:
                    release()
            self._wait_for_work(None)
        return not self._is_ending

    def _wait_for_work(self, timeout_s: float | None) -> bool:
        with self._changed:
            if not self._has_tasks():
                self._changed.notify_all()  # whoever waits for the end of all work
            return self._changed.wait_for(lambda: self._is_ending or self._has_tasks(), timeout_s)

    def _tick(self) -> None:
        """Drop what is cancelled or too late, start what has room, tick the engines, deliver."""
        now = time.monotonic()
        # Before the look: what is cancelled from now on is for the next tick.
        if has_cancels := self._has_cancels:
            self._has_cancels = False
        with self._changed:
            tasks = [task for lane in self._lanes.values() for task in (*lane.running, *lane.waiting)]
        if has_cancels:
            for task in tasks:
                if task.mailbox.is_cancelled:
                    task.job.cancel()
        if now >= self._next_deadline:
            for task in tasks:
                if now >= task.deadline:
                    task.expire()
        self._start()
        for lane in self._lanes.values():
            if lane.engine.has_work:
                lane.engine.step()
        self._deliver()
        self._observer.tell("ticked", self.num_running, self.num_waiting)

    def _start(self) -> None:
        """Hand jobs to engines that have room."""
        started: list[_Task] = []
        with self._changed:
            # Together with the queue: nobody may be told of a start before its admission.
            admitted, self._admitted = self._admitted, []
            for lane in self._lanes.values():
                room = lane.limit - sum(not task.job.seq.done for task in lane.running)
                waiting, lane.waiting = lane.waiting, deque()
                for task in waiting:
                    # What ended while it waited stays until its end is delivered.
                    if task.job.seq.done or not room:
                        lane.waiting.append(task)
                        continue
                    lane.running.append(task)
                    started.append(task)
                    room -= 1
        now = time.monotonic()
        for task in admitted:
            self._observer.tell("admitted", task.job)
        for task in started:
            job = task.job
            task.queue_s = now - task.submitted
            self._observer.tell("started", job, task.queue_s)
            job.seq.listeners += task.listeners
            try:
                job.start()
            except Exception as error:
                job.seq.finish("error", error)

    def _deliver(self) -> None:
        """Leave what is new in the mailboxes and wake their loops, each once."""
        now = time.monotonic()
        called: dict[asyncio.AbstractEventLoop, list[Mailbox]] = {}
        for lane in self._lanes.values():
            with self._changed:
                tasks = [*lane.running, *(task for task in lane.waiting if task.job.seq.done)]
            for task in tasks:
                if self._update(task, now):
                    called.setdefault(task.mailbox.loop, []).append(task.mailbox)
            done = [task for task in tasks if task.job.seq.done]
            if not done:
                continue
            with self._changed:
                lane.running = [task for task in lane.running if not task.job.seq.done]
                lane.waiting = deque(task for task in lane.waiting if not task.job.seq.done)
                self._finish_times.extend(now for task in done if task.job.seq.finish_reason != "cancelled")
                self._next_deadline = self._earliest_deadline()
        self._call(called)

    def _earliest_deadline(self) -> float:
        lanes = self._lanes.values()
        tasks = itertools.chain.from_iterable((*lane.running, *lane.waiting) for lane in lanes)
        return min((task.deadline for task in tasks), default=math.inf)

    def _update(self, task: _Task, now: float) -> bool:
        """Leave what is new of a task; whether its loop must be woken."""
        seq = task.job.seq
        if task.is_answered:
            return False
        num = len(seq.output)
        if num > task.num_seen:
            if not task.num_seen:
                self._observer.tell("first_token", task.job, now - task.submitted)
            else:
                self._observer.tell("tokens", task.job, num - task.num_seen, now - task.last_seen)
            task.num_seen, task.last_seen = num, now
        if not seq.done and task.stream is None:
            return False
        text = ""
        try:
            text = task.stream.take() if task.stream is not None else ""
        except Exception as error:  # a tokenizer that fails is the end of this text alone
            seq.finish("error", error)
            task.job.cancel()
        result = _result(task.job) if seq.done else None
        if result is not None and task.stream is None:
            text = result.text
        tokens = seq.output[task.num_given :]
        if not text and not len(tokens) and not task.events and result is None:
            return False
        if result is not None:
            for listener in task.listeners:
                if listener in seq.listeners:
                    seq.listeners.remove(listener)  # it holds the job, which holds the sequence
            # Whoever has the answer finds it counted.
            self._observer.tell("finished", task.job, result, now - task.submitted)
        update = Update(
            index=task.index,
            text=text,
            tokens=tokens,
            start=task.num_given,
            logprobs=task.logprobs(len(tokens)),
            events=list(task.events),
            queue_s=task.queue_s,
            result=result,
        )
        must_call = task.mailbox.put(update)
        task.is_answered = result is not None
        task.num_given += len(tokens)
        task.events.clear()
        return must_call

    def _call(self, called: Mapping[asyncio.AbstractEventLoop, list[Mailbox]]) -> None:
        for loop, mailboxes in called.items():
            try:
                loop.call_soon_threadsafe(announce, mailboxes)
            except RuntimeError:  # the loop is closed: nobody is left to read
                for mailbox in mailboxes:
                    mailbox.is_cancelled = True
                self._has_cancels = True

    def _end(self, error: Exception, *, is_dead: bool = False) -> None:
        """Cancel everything there is and answer it.

        Args:
            error: Why, for the results.
            is_dead: Leave the engines alone: one of them failed.
        """
        with self._changed:
            admitted, self._admitted = self._admitted, []
            for lane in self._lanes.values():
                lane.running += lane.waiting
                lane.waiting.clear()
            tasks = [task for lane in self._lanes.values() for task in lane.running]
        for task in admitted:
            self._observer.tell("admitted", task.job)
        for task in tasks:
            if is_dead:
                task.job.seq.finish("cancelled", error)
            else:
                task.job.cancel(error)
        self._deliver()
        self._observer.tell("ticked", 0, 0)

    def _die(self, error: BaseException) -> None:
        """Answer everybody who waits, then say that it is over."""
        with self._changed:
            was_loading = not self.models
            self.state, self.error = "dead", error
            self._changed.notify_all()
        if not was_loading:
            _log.critical("the engine thread died", exc_info=error)
        try:
            self._end(UnavailableError(f"the engine died: {type(error).__name__}."), is_dead=True)
        finally:
            if self._on_death is not None:
                self._on_death(error)

    def _watch_ticks(self) -> None:
        """Notice a tick that takes too long; the thread of the watchdog."""
        assert self._watchdog_s is not None
        while not self._is_over.wait(self._watchdog_s / 4):
            started = self._tick_started
            if started is not None and time.monotonic() - started > self._watchdog_s:
                self._on_hang()
                return


def _room(model: Model) -> int:
    return model.engine.target.window - 1


def _result(job: Job) -> Generation:
    """Give a job's result, also if its tokens cannot be turned into text."""
    try:
        return job.result()
    except Exception as error:
        job.seq.error = job.seq.error or error
        return Generation(
            prompt=job.prompt,
            text="",
            tokens=job.seq.output.tolist(),
            finish_reason="error",
            stop_reason=None,
            model=job.model.name,
            decoder=job.decoder.name,
            promise=job.decoder.promise,
            stats=job.seq.stats.to_dict(),
            error=job.seq.error,
            num_prompt=job.seq.num_prompt,
        )


def _exit_hung() -> None:
    """Show where every thread stands and end the process: nothing can interrupt a forward pass."""
    print("chordal: a forward pass hangs; giving up.", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(EXIT_HUNG)
