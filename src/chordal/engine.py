"""The engine: owns the models, runs what the decoders ask for, counts, and alone ends sequences.

Each tick collects the pending requests of all live coroutines, packs those for the same model into
few forward passes, runs them and resumes every coroutine with its own readings. Sequences join and
leave at any tick; a coroutine that fails ends its own sequence and nobody else's.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from chordal.decoders.decoder import Decoder, Decoding, Part
from chordal.errors import DecodingError, InputError
from chordal.forward import Forward, Reading
from chordal.models.runner import Runner
from chordal.prefix.groups import PrefixGroup
from chordal.prefix.reuse import Asked, PrefixReuse, Share
from chordal.prefix.store import Hold
from chordal.sequence import Sequence
from chordal.stats import TARGET

# A forward pass costs about as much as this many tokens, however few it feeds: requests of unlike
# width share a pass as long as the padding costs less than a pass of their own.
_PASS_COST_TOKENS = 64

# Forward passes in a row that may commit nothing, beside twice the length of the result. Schedules
# may idle for a while; a loop that never decides must end.
_MAX_IDLE_PASSES = 1024


@dataclass(eq=False)
class _Branch:
    """One of the things that a coroutine waits for: a request, or a coroutine of its own.

    Attributes:
        forward: What it asks for next; None once it is done.
        coroutine: Makes the requests, if there are several one after the other.
        result: The reading, or what the coroutine returned.
    """

    forward: Forward | None = None
    coroutine: Part | None = None
    result: Any = None

    def resume(self, given: Any) -> None:
        """Go on with the reading of the last request, None at the start."""
        self.forward = None
        if self.coroutine is None:
            self.result = given
            return
        try:
            asked = self.coroutine.send(given)
        except StopIteration as stop:
            self.result = stop.value
            return
        if not isinstance(asked, Forward):
            raise DecodingError("a coroutine that runs beside others must ask for one forward at a time.")
        self.forward = asked


@dataclass(eq=False)
class _Run:
    """A sequence: its coroutine, what it is waiting for, and what of its prompt is shared."""

    seq: Sequence
    coroutine: Decoding
    share: Share
    submitted: float
    branches: list[_Branch] = field(default_factory=list)
    is_single: bool = True
    idle: int = 0
    progress: tuple[int, int, int] = (0, 0, 0)

    def close(self) -> None:
        """Close its coroutines."""
        for branch in self.branches:
            if branch.coroutine is not None:
                branch.coroutine.close()
        self.coroutine.close()


# A request on its way: whose it is, which of its branches, its cache row.
@dataclass(frozen=True, slots=True)
class _Ask:
    run: _Run
    branch: _Branch
    row: int
    forward: Forward


@dataclass(frozen=True, slots=True)
class _Answer:
    ask: _Ask
    reading: Reading | Exception


# What one model did in one go: its answers, and the seconds and sequences of each pass.
_Passes: TypeAlias = tuple[list[_Answer], list[tuple[float, set[int]]]]


class Engine:
    """Runs decoders on models, batched.

    Args:
        models: The target, or several by name with one named "target".
        concurrent: Run the models at the same time, each in a thread of its own. That pays on devices,
            or cores, that would idle otherwise, and for decoders that ask for several models at once.
        prefix_cache_bytes: Memory, beside that of live sequences, for what models computed of prompts, so
            that those which begin alike share it; see docs/prefix.md. 0 shares nothing.
        prefix_page_tokens: Prompts are shared in multiples of so many tokens, at least 1.

    Attributes:
        model_s: Seconds spent in forward passes so far.
        passes: Forward passes run so far, by model.
    """

    def __init__(
        self,
        models: Runner | Mapping[str, Runner],
        *,
        concurrent: bool = False,
        prefix_cache_bytes: int = 0,
        prefix_page_tokens: int = 16,
    ) -> None:
        self.models: dict[str, Runner] = dict(models) if isinstance(models, Mapping) else {TARGET: models}
        if TARGET not in self.models:
            raise InputError(
                f'an engine needs a model named "target"; got {", ".join(self.models) or "none"}.'
            )
        if prefix_cache_bytes < 0 or prefix_page_tokens < 1:
            raise InputError(
                f"a prefix cache needs at least 0 bytes and pages of at least 1 token; got "
                f"{prefix_cache_bytes} and {prefix_page_tokens}."
            )
        self.max_rows = min(model.max_rows for model in self.models.values())
        self.model_s = 0.0
        self.passes: dict[str, int] = dict.fromkeys(self.models, 0)
        self._live: list[_Run] = []  # the i-th has row i of every cache
        self._waiting: deque[_Run] = deque()
        self._threads = ThreadPoolExecutor(len(self.models)) if concurrent else None
        self._in_flight: dict[str, Future[_Passes]] = {}
        self._reuse: PrefixReuse | None = None
        if prefix_cache_bytes:
            self._reuse = PrefixReuse(self.models, prefix_cache_bytes, prefix_page_tokens)

    @property
    def target(self) -> Runner:
        """The model whose text is decoded."""
        return self.models[TARGET]

    @property
    def num_live(self) -> int:
        """How many sequences hold cache rows."""
        return len(self._live)

    @property
    def has_work(self) -> bool:
        """Whether some sequence is not done."""
        return bool(self._live or self._waiting)

    @property
    def prefix_unit(self) -> int | None:
        """Prompts share what the target computed in multiples of so many tokens; None if they do not."""
        return self._reuse.page_tokens(TARGET) if self._reuse else None

    @property
    def prefix_queries(self) -> int:
        """Prompt tokens of the target that were looked up among those computed before."""
        return self._reuse.num_queried if self._reuse else 0

    @property
    def prefix_hits(self) -> int:
        """Those of them that were found."""
        return self._reuse.num_hit if self._reuse else 0

    @property
    def prefix_bytes(self) -> int:
        """Memory of what is kept of prompts."""
        return self._reuse.store.num_bytes if self._reuse else 0

    def submit(self, decoder: Decoder, seq: Sequence, *, hold: Hold | None = None) -> Sequence:
        """Queue a sequence; it takes part from the next tick that has a free row.

        Args:
            decoder: Decodes it.
            seq: The sequence.
            hold: Keeps the prefix that it shares with its group; see `complete`.

        Raises:
            InputError: The decoder does not fit the model or its settings do not fit the sequence.
        """
        decoder.check(self.target.family)
        decoder.check_law(seq.law)
        decoder.check_models(self.models)
        run = _Run(seq, decoder.decode(seq), Share(seq, hold), time.perf_counter())
        self._resume(run)
        if isinstance(seq.error, InputError):
            raise seq.error
        if not seq.done:
            self._waiting.append(run)
        return seq

    def step(self) -> None:
        """Run one tick: every live sequence gets one round of what it asked for.

        With concurrent models a tick ends with the first model that is done, and the others go on.
        """
        if any(run.seq.done for run in self._live):
            self._drop_done()
        while self._waiting and len(self._live) < self.max_rows:
            self._join(self._waiting.popleft())
        self._drop_waiting()

        idle = [name for name in self.models if name not in self._in_flight]
        asked = {name: asks for name in idle if (asks := self._spare(name, self._asks(name)))}
        if self._threads is None:
            for name, asks in asked.items():
                self._take(name, _run_model(self.models[name], asks))
        else:
            for name, asks in asked.items():
                self._in_flight[name] = self._threads.submit(_run_model, self.models[name], asks)
            self._land(FIRST_COMPLETED)
        for run in self._live:
            if not run.seq.done and all(branch.forward is None for branch in run.branches):
                self._resume(run)
        self._drop_done()

    def run(self) -> None:
        """Tick until every sequence is done."""
        while self.has_work:
            self.step()

    def complete(
        self,
        work: Seq[tuple[Decoder, Sequence]],
        on_finish: Callable[[int], None] | None = None,
        *,
        groups: Seq[PrefixGroup] | None = None,
    ) -> None:
        """Submit sequences and tick until all of them are done.

        Args:
            work: Each with its decoder.
            on_finish: Called with the number of each as it is done, in the order they finish.
            groups: All of them in the order they are to run, those side by side that share a prefix: it is
                computed once, kept until the last of them is done, and then dropped. Nothing else of their
                prompts is kept. None runs them as they come.

        Raises:
            InputError: One cannot be decoded. Then, as with whatever `on_finish` raises, all are cancelled.
        """
        reuse, holds = self._reuse, dict[int, Hold]()
        for group in groups or ():
            holds |= dict.fromkeys(group.members, Hold(group.num_shared))
        num_open = Counter(holds.values())
        try:
            for index in holds or range(len(work)):
                self.submit(*work[index], hold=holds.get(index))
            open_ = list(range(len(work)))
            while open_:
                still_open = [index for index in open_ if not work[index][1].done]
                if reuse is not None and holds:
                    num_open.subtract(holds[index] for index in set(open_) - set(still_open))
                    for hold in [hold for hold, num in num_open.items() if num == 0]:
                        reuse.store.release(hold)
                        del num_open[hold]
                if on_finish is not None:
                    for index in sorted(set(open_) - set(still_open)):
                        on_finish(index)
                open_ = still_open
                if open_:
                    self.step()
        finally:
            for _, seq in work:
                self.cancel(seq)
            if reuse is not None:
                for hold in num_open:
                    reuse.store.release(hold)

    def cancel(self, seq: Sequence, error: Exception | None = None) -> None:
        """End a sequence now and free its rows; harmless if it is done.

        Args:
            seq: The sequence.
            error: Why, for its result.
        """
        seq.finish("cancelled", error)
        self._drop_done()

    def release(self) -> None:
        """Give back the memory of caches while no sequence is live; else, and the second time, do nothing.

        What is kept of prompts stays, within its bound.
        """
        if not self._live and not self._in_flight:
            for model in self.models.values():
                model.release()

    def _join(self, run: _Run) -> None:
        run.seq.stats.queue_s = time.perf_counter() - run.submitted
        self._live.append(run)

    def _asks(self, name: str) -> list[_Ask]:
        """List what live sequences ask of a model."""
        return [
            _Ask(run, branch, row, branch.forward)
            for row, run in enumerate(self._live)
            if not run.seq.done
            for branch in run.branches
            if branch.forward is not None and branch.forward.model == name
        ]

    def _spare(self, name: str, asks: Seq[_Ask]) -> Seq[_Ask]:
        """Leave out what the model holds already, and who waits for another to compute it."""
        if self._reuse is None:
            return asks
        left = [ask for ask in asks if name in ask.run.share.settled]
        if len(left) == len(asks):
            return asks
        by_row: dict[int, list[_Ask]] = {}
        for ask in asks:
            if name not in ask.run.share.settled:
                by_row.setdefault(ask.row, []).append(ask)
        asked = [_asked(mine) for mine in by_row.values()]
        for mine, planned in zip(by_row.values(), self._reuse.plan(name, asked), strict=True):
            for ask, forward in zip(mine, planned or (), strict=planned is not None):
                if forward is None:  # it would only fill the cache with what is there
                    self._hand_out(name, _Answer(ask, Reading()))
                else:
                    left.append(ask if forward is ask.forward else replace(ask, forward=forward))
        return left

    def _land(self, when: str) -> None:
        """Wait for models in flight and take what they bring."""
        wait(self._in_flight.values(), return_when=when)
        for name in [name for name, future in self._in_flight.items() if future.done()]:
            self._take(name, self._in_flight.pop(name).result())

    def _take(self, name: str, passes: _Passes) -> None:
        """Count what a model did and hand out its readings; a request that cannot run ends its sequence."""
        answers, timings = passes
        self.passes[name] += len(timings)
        for elapsed, rows in timings:
            self.model_s += elapsed
            for row in rows:
                self._live[row].seq.stats.model_s += elapsed
        by_run: dict[int, list[_Answer]] = {}
        for answer in answers:
            by_run.setdefault(id(answer.ask.run), []).append(answer)
        for mine in by_run.values():
            self._count(name, mine)
            is_run = not any(isinstance(answer.reading, Exception) for answer in mine)
            if self._reuse is not None and is_run and name not in mine[0].ask.run.share.settled:
                self._reuse.note(name, _asked([answer.ask for answer in mine]))
            for answer in mine:
                self._hand_out(name, answer)

    def _hand_out(self, name: str, answer: _Answer) -> None:
        ask, reading, seq = answer.ask, answer.reading, answer.ask.run.seq
        if isinstance(reading, Exception):
            seq.finish("error", reading)
            return
        if reading.max_logit is not None and not np.isfinite(reading.max_logit).all():
            model = self.models[name]
            seq.finish("error", DecodingError(f"{model.name} gave logits that are not finite."))
            model.free_row(ask.row, clear=True)
        if seq.done:
            return
        try:
            ask.branch.resume(reading)
            self._check_known(ask.run)
        except Exception as error:
            seq.finish("error", error)

    def _count(self, name: str, answers: Seq[_Answer]) -> None:
        """Count what one sequence asked of a model in a tick; see docs/metrics.md."""
        run = answers[0].ask.run
        stats, mine = run.seq.stats, [answer.ask.forward for answer in answers]
        fed = sum(len(forward.tokens) for forward in mine)
        stats.positions_fed[name] = stats.positions_fed.get(name, 0) + fed
        run.idle += 1
        if all(ask.read is None and int(ask.positions.max()) < run.seq.num_prompt for ask in mine):
            stats.prefills += name == TARGET
            return
        stats.forwards[name] = stats.forwards.get(name, 0) + 1
        if name == TARGET:
            stats.rows += len(mine)
            usual = run.seq.family.num_loops or 0
            stats.loops += max(usual if ask.loops is None else ask.loops.count for ask in mine)
            stats.experts += _num_experts([answer.reading for answer in answers])

    def _resume(self, run: _Run) -> None:
        """Let a coroutine go on to its next request; whatever it raises ends its own sequence only."""
        seq = run.seq
        if seq.done:
            return
        given: Any = tuple(branch.result for branch in run.branches)
        if run.is_single:
            given = given[0] if given else None
        try:
            asked = run.coroutine.send(given)
            run.is_single = isinstance(asked, Forward)
            run.branches = [_branch(one) for one in ((asked,) if isinstance(asked, Forward) else asked)]
            self._check_known(run)
        except StopIteration:
            if not seq.done:
                seq.finish("error", DecodingError("the decoder ended before its sequence was done."))
            return
        except Exception as error:
            seq.finish("error", error)
            return
        progress = seq.stats.committed_tokens, seq.frontier, seq.undecided
        run.idle, run.progress = run.idle if progress == run.progress else 0, progress
        if run.idle > _MAX_IDLE_PASSES + 2 * seq.stop.max_new_tokens:
            seq.finish("error", DecodingError(f"nothing was committed in {run.idle} forward passes."))

    def _check_known(self, run: _Run) -> None:
        asked = {branch.forward.model for branch in run.branches if branch.forward is not None}
        if unknown := asked - set(self.models):
            raise InputError(f"no model named {', '.join(sorted(unknown))} in this engine.")

    def _drop_waiting(self) -> None:
        for run in self._waiting:
            if run.seq.done:
                run.seq.stats.queue_s = time.perf_counter() - run.submitted
                run.close()
        self._waiting = deque(run for run in self._waiting if not run.seq.done)

    def _drop_done(self) -> None:
        """Close what is done; the last live sequence takes the freed row, so rows stay contiguous."""
        self._drop_waiting()
        if self._in_flight and any(run.seq.done for run in self._live):
            self._land(ALL_COMPLETED)  # no row may move under a model that runs
        for row in range(len(self._live) - 1, -1, -1):
            if self._live[row].seq.done:
                self._live[row].close()
                # What ended in the middle may have cached what no reading has shown to be finite.
                clear = self._live[row].seq.finish_reason in ("cancelled", "error")
                last = self._live.pop()
                for model in self.models.values():
                    if row < len(self._live):
                        model.move_row(len(self._live), row)
                    model.free_row(len(self._live), clear=clear)
                if row < len(self._live):
                    self._live[row] = last


def _branch(asked: Forward | Part) -> _Branch:
    if isinstance(asked, Forward):
        return _Branch(asked)
    branch = _Branch(coroutine=asked)
    branch.resume(None)
    return branch


def _asked(asks: Seq[_Ask]) -> Asked:
    return Asked(asks[0].run.share, asks[0].row, [ask.forward for ask in asks])


def _run_model(model: Runner, asks: Seq[_Ask]) -> _Passes:
    """Run requests in as few passes as pay; a sequence's that cannot run get the error in place of readings.

    A group that fails is run again, one sequence at a time: one has asked for what cannot be, or all
    together for more memory than there is.
    """
    answers: list[_Answer] = []
    timings: list[tuple[float, set[int]]] = []
    groups = [list(asks)] if model.packs else _group_by_width(asks)
    while groups:
        group = groups.pop(0)
        started = time.perf_counter()
        try:
            group = _move(model, group)
            readings = model.run([(ask.row, ask.forward) for ask in group])
        except Exception as error:
            # The tensors of a pass would live as long as its error does.
            traceback.clear_frames(error.__traceback__)
            by_row = {ask.row: [one for one in group if one.row == ask.row] for ask in group}
            if len(by_row) == 1:
                answers += [_Answer(ask, error) for ask in group]
            else:
                groups = [*by_row.values(), *groups]
            continue
        timings.append((time.perf_counter() - started, {ask.row for ask in group}))
        answers += [_Answer(ask, reading) for ask, reading in zip(group, readings, strict=True)]
    return answers, timings


def _move(model: Runner, asks: Seq[_Ask]) -> list[_Ask]:
    """Carry out the moves of requests, and give the requests without them: a second time would be wrong."""
    moves = [(ask.row, *ask.forward.moves) for ask in asks if ask.forward.moves is not None]
    if not moves:
        return list(asks)
    model.move_slots(moves)
    return [replace(ask, forward=replace(ask.forward, moves=None)) for ask in asks]


def _num_experts(readings: Seq[Reading | Exception]) -> float:
    """Count the distinct experts that the requests of a sequence used together, mean over layers."""
    used = [one.experts for one in readings if isinstance(one, Reading) and one.experts is not None]
    return float(np.logical_or.reduce(used).sum(1).mean()) if used else 0.0


def _group_by_width(asks: Seq[_Ask]) -> list[list[_Ask]]:
    """Split requests into passes so that padding never costs more than another pass.

    All requests of one row stay together, in order.
    """
    by_row: dict[int, list[_Ask]] = {}
    for ask in asks:
        by_row.setdefault(ask.row, []).append(ask)
    widths = {row: sum(len(ask.forward.tokens) for ask in mine) for row, mine in by_row.items()}
    groups: list[list[_Ask]] = []
    num_rows, width = 0, 0
    for row in sorted(by_row, key=lambda row: widths[row]):
        # Joining widens every row of the group so far.
        if groups and (widths[row] - width) * num_rows <= _PASS_COST_TOKENS:
            groups[-1] += by_row[row]
            num_rows += 1
        else:
            groups.append(list(by_row[row]))
            num_rows = 1
        width = widths[row]
    return groups
