"""The engine: owns the models, runs what the decoders ask for, counts, and alone ends sequences.

Each tick collects the pending requests of all live coroutines, packs those for the same model into
few forward passes, runs them and resumes every coroutine with its own readings. Sequences join and
leave at any tick; a coroutine that fails ends its own sequence and nobody else's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from chordal.decoders.decoder import Decoder, Decoding
from chordal.errors import DecodingError, InputError
from chordal.forward import Forward, Reading
from chordal.models.runner import Runner
from chordal.sequence import Sequence
from chordal.stats import TARGET

# A forward pass costs about as much as this many tokens, however few it feeds: requests of unlike
# width share a pass as long as the padding costs less than a pass of their own.
_PASS_COST_TOKENS = 64

# Forward passes in a row that may commit nothing, beside twice the length of the result. Schedules
# may idle for a while; a loop that never decides must end.
_MAX_IDLE_PASSES = 1024


@dataclass(eq=False)
class _Run:
    """A live sequence: its coroutine and what it is waiting for."""

    seq: Sequence
    coroutine: Decoding
    pending: tuple[Forward, ...] = ()
    is_single: bool = True
    idle: int = 0
    readings: list[Reading | None] | None = None


class Engine:
    """Runs decoders on models, batched.

    Args:
        models: The target, or several by name with one named "target".

    Attributes:
        model_s: Seconds spent in forward passes so far.
        passes: Forward passes run so far, by model.
    """

    def __init__(self, models: Runner | Mapping[str, Runner]) -> None:
        self.models: dict[str, Runner] = dict(models) if isinstance(models, Mapping) else {TARGET: models}
        if TARGET not in self.models:
            raise InputError(
                f'an engine needs a model named "target"; got {", ".join(self.models) or "none"}.'
            )
        self.max_rows = min(model.max_rows for model in self.models.values())
        self.model_s = 0.0
        self.passes: dict[str, int] = dict.fromkeys(self.models, 0)
        self._live: list[_Run] = []  # the i-th has row i of every cache
        self._waiting: deque[_Run] = deque()

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

    def submit(self, decoder: Decoder, seq: Sequence) -> Sequence:
        """Queue a sequence; it takes part from the next tick that has a free row.

        Raises:
            InputError: The decoder does not fit the model or its settings do not fit the sequence.
        """
        decoder.check(self.target.family)
        run = _Run(seq, decoder.decode(seq))
        self._resume(run, None)
        if isinstance(seq.error, InputError):
            raise seq.error
        if not seq.done:
            self._waiting.append(run)
        return seq

    def step(self) -> None:
        """Run one tick: every live sequence gets one round of what it asked for."""
        while self._waiting and len(self._live) < self.max_rows:
            self._live.append(self._waiting.popleft())
        self._drop_done()

        for name, model in self.models.items():
            asked = [
                (row, index, forward)
                for row, run in enumerate(self._live)
                for index, forward in enumerate(run.pending)
                if forward.model == name
            ]
            for group in _group_by_width(asked):
                self._run_group(name, model, group)
        for run in self._live:
            self._count(run)
            given = tuple(run.readings or ())
            run.readings = None
            if not run.seq.done:  # or it may have no readings, because its request could not run
                self._resume(run, given[0] if run.is_single else given)
        self._drop_done()

    def run(self) -> None:
        """Tick until every sequence is done."""
        while self.has_work:
            self.step()

    def cancel(self, seq: Sequence) -> None:
        """End a sequence now and free its rows; harmless if it is done."""
        seq.finish("cancelled")
        self._drop_done()

    def _run_group(self, name: str, model: Runner, group: Seq[tuple[int, int, Forward]]) -> None:
        """Run one forward pass and hand out its readings; a request that cannot run ends its sequence."""
        started = time.perf_counter()
        try:
            readings = model.run([(row, forward) for row, _, forward in group])
        except Exception as error:  # one request asked for what cannot be: find out which
            if len(group) == 1:
                self._live[group[0][0]].seq.finish("error", error)
                return
            for one in group:
                self._run_group(name, model, [one])
            return
        elapsed = time.perf_counter() - started
        self.model_s += elapsed
        self.passes[name] += 1
        for row in {row for row, _, _ in group}:
            self._live[row].seq.stats.model_s += elapsed
        for (row, index, _), reading in zip(group, readings, strict=True):
            run = self._live[row]
            if reading.max_logit is not None and not np.isfinite(reading.max_logit).all():
                run.seq.finish("error", DecodingError(f"{model.name} gave logits that are not finite."))
                model.free_row(row, clear=True)
            if run.readings is None:
                run.readings = [None] * len(run.pending)
            run.readings[index] = reading

    def _count(self, run: _Run) -> None:
        """Count a tick of one sequence; see docs/metrics.md."""
        stats = run.seq.stats
        for name in {forward.model for forward in run.pending}:
            mine = [forward for forward in run.pending if forward.model == name]
            fed = sum(len(forward.tokens) for forward in mine)
            stats.positions_fed[name] = stats.positions_fed.get(name, 0) + fed
            is_prefill = all(
                forward.read is None and int(forward.positions.max()) < run.seq.num_prompt for forward in mine
            )
            if name == TARGET and is_prefill:
                stats.prefills += 1
                continue
            stats.forwards[name] = stats.forwards.get(name, 0) + 1
            if name == TARGET:
                stats.rows += len(mine)
                usual = run.seq.family.num_loops or 0
                stats.loops += max(usual if ask.loops is None else ask.loops.count for ask in mine)
                readings = run.readings or [None] * len(run.pending)  # where the request could not run
                given = zip(run.pending, readings, strict=True)
                stats.experts += _num_experts([reading for ask, reading in given if ask.model == name])

    def _resume(self, run: _Run, given: Any) -> None:
        """Let a coroutine go on to its next request; whatever it raises ends its own sequence only."""
        seq = run.seq
        if seq.done:
            return
        before = seq.stats.committed_tokens, seq.frontier
        try:
            asked = run.coroutine.send(given)
            run.is_single = isinstance(asked, Forward)
            run.pending = (asked,) if isinstance(asked, Forward) else tuple(asked)
            if unknown := {forward.model for forward in run.pending} - set(self.models):
                raise InputError(f"no model named {', '.join(sorted(unknown))} in this engine.")
        except StopIteration:
            if not seq.done:
                seq.finish("error", DecodingError("the decoder ended before its sequence was done."))
            return
        except Exception as error:
            seq.finish("error", error)
            return
        run.idle = run.idle + 1 if before == (seq.stats.committed_tokens, seq.frontier) else 0
        if run.idle > _MAX_IDLE_PASSES + 2 * seq.stop.max_new_tokens:
            seq.finish("error", DecodingError(f"nothing was committed in {run.idle} forward passes."))

    def _drop_done(self) -> None:
        """Close what is done; the last live sequence takes the freed row, so rows stay contiguous."""
        self._waiting = deque(run for run in self._waiting if not self._close_if_done(run))
        for row in range(len(self._live) - 1, -1, -1):
            if self._close_if_done(self._live[row]):
                # What ended in the middle may have cached what no reading has shown to be finite.
                clear = self._live[row].seq.finish_reason in ("cancelled", "error")
                last = self._live.pop()
                for model in self.models.values():
                    if row < len(self._live):
                        model.move_row(len(self._live), row)
                    model.free_row(len(self._live), clear=clear)
                if row < len(self._live):
                    self._live[row] = last

    def _close_if_done(self, run: _Run) -> bool:
        if run.seq.done:
            run.coroutine.close()
        return run.seq.done


def _num_experts(readings: Seq[Reading | None]) -> float:
    """Count the distinct experts that the requests of a sequence used together, mean over layers."""
    used = [reading.experts for reading in readings if reading is not None and reading.experts is not None]
    return float(np.logical_or.reduce(used).sum(1).mean()) if used else 0.0


def _group_by_width(asked: Seq[tuple[int, int, Forward]]) -> list[list[tuple[int, int, Forward]]]:
    """Split requests into passes so that padding never costs more than another pass.

    All requests of one row stay together, in order.
    """
    by_row: dict[int, list[tuple[int, int, Forward]]] = {}
    for one in asked:
        by_row.setdefault(one[0], []).append(one)
    widths = {row: sum(len(forward.tokens) for _, _, forward in mine) for row, mine in by_row.items()}
    groups: list[list[tuple[int, int, Forward]]] = []
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
