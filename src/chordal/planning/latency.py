"""How long a forward pass takes, by its width and the batch: measured, or from what the hardware can do."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from chordal.errors import InputError
from chordal.forward import Causal, Floats, Forward, Sample
from chordal.models.runner import Request, Runner

# Passes of one width in a row: on a CPU the first few behind wider ones are up to a third slower.
_WARM, _TIMED = 3, 3


class Latency(Protocol):
    """Says how long passes of one model take."""

    def seconds(self, width: float, batch: int) -> float:
        """Give the seconds of a pass that feeds `width` positions to each of `batch` rows."""
        ...


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Measured seconds of a pass.

    Attributes:
        widths: Positions fed to each row, ascending, int.
        batches: Rows, ascending, int.
        table: Seconds, `[batches, widths]`.
        contexts: Tokens that each row had cached, for each batch, int.
    """

    widths: tuple[int, ...]
    batches: tuple[int, ...]
    table: Floats
    contexts: tuple[int, ...]

    def seconds(self, width: float, batch: int) -> float:
        """Interpolate between widths and batches; beyond the widest, go on as between the last two.

        Raises:
            InputError: The batch lies outside those that were measured.
        """
        if not self.batches[0] <= batch <= self.batches[-1]:
            raise InputError(
                f"the batch must be from {self.batches[0]} to {self.batches[-1]}, as measured; got {batch}."
            )
        by_width = [float(np.interp(batch, self.batches, column)) for column in self.table.T]
        if width > self.widths[-1] and len(self.widths) > 1:
            slope = (by_width[-1] - by_width[-2]) / (self.widths[-1] - self.widths[-2])
            return by_width[-1] + max(slope, 0.0) * (width - self.widths[-1])
        return float(np.interp(width, self.widths, by_width))

    def to_dict(self) -> dict[str, Any]:
        """Give the table as plain values."""
        return {
            "widths": list(self.widths),
            "batches": list(self.batches),
            "seconds": self.table.tolist(),
            "contexts": list(self.contexts),
        }


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of a pass from what it moves and computes, whichever takes longer.

    max((weights + batch * context * cache of a token) / bandwidth, batch * width * operations / peak) +
    overhead: a table for hardware that is not at hand. It has no kernels, and so is a lower bound.

    Attributes:
        weight_bytes: Bytes of the weights that a pass reads.
        cache_bytes: Bytes of keys and values of one token, all layers.
        flops: Operations for one position; about twice the parameters.
        bandwidth: Bytes a second.
        peak: Operations a second.
        overhead_s: Seconds of a pass that neither explains.
        context: Tokens that each row has cached.
    """

    weight_bytes: float
    cache_bytes: float
    flops: float
    bandwidth: float
    peak: float
    overhead_s: float = 0.0
    context: int = 0

    def seconds(self, width: float, batch: int) -> float:
        """Give the seconds of a pass."""
        moved = (self.weight_bytes + batch * self.context * self.cache_bytes) / self.bandwidth
        return max(moved, batch * width * self.flops / self.peak) + self.overhead_s


def measure_latency(
    model: Runner,
    widths: Seq[int],
    batches: Seq[int],
    *,
    contexts: Seq[int],
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyTable:
    """Time passes of each width at each batch, warm, as verification runs them: causal, every row read.

    Widths take turns, so that a machine that slows down slows all of them down; the table has medians. More
    work cannot take less time: where it seems to, on a busy machine, neighbours share their mean.
    The rows that were used are free afterwards; no sequence may hold them.

    Args:
        model: What runs the passes.
        widths: Positions fed to each row, each at least 1.
        batches: Rows, ascending, each from 1 to what the model holds.
        contexts: Tokens cached in each row before, for each batch; less where the window has no room.
        repeats: Turns of each width, at least 1.
        clock: Gives the time in seconds.

    Raises:
        InputError: No room for a batch or a width.

    Cost: 1 + 6 * len(`widths`) * `repeats` passes a batch.
    """
    widths = sorted(set(widths))
    if (
        not widths
        or not batches
        or min(widths) < 1
        or not 1 <= min(batches) <= max(batches) <= model.max_rows
    ):
        raise InputError(
            f"widths must be at least 1 and batches from 1 to {model.max_rows}, the sequences that "
            f"{model.name} holds; got {widths} and {batches}."
        )
    if max(widths) >= model.window:
        raise InputError(
            f"a pass of {max(widths)} positions does not fit the window of {model.window} tokens of "
            f"{model.name}. Measure narrower ones."
        )
    contexts = [min(context, model.window - max(widths)) for context in contexts]
    table = np.zeros((len(batches), len(widths)))
    for place, (batch, context) in enumerate(zip(batches, contexts, strict=True)):
        try:
            if context:
                model.run([_request(model, row, 0, context, reads=False) for row in range(batch)])
            requests = {
                width: [_request(model, row, context, width) for row in range(batch)] for width in widths
            }
            times: dict[int, list[float]] = {width: [] for width in widths}
            for _, width in itertools.product(range(repeats), widths):
                for turn in range(_WARM + _TIMED):
                    started = clock()
                    model.run(requests[width])
                    if turn >= _WARM:
                        times[width].append(clock() - started)
            table[place] = rising([statistics.median(times[width]) for width in widths])
        finally:
            for row in range(batch):
                model.free_row(row)
    return LatencyTable(tuple(widths), tuple(batches), table, tuple(contexts))


def rising(values: Seq[float]) -> list[float]:
    """Give the closest values, in squares, that never fall: 3, 1, 5 become 2, 2, 5."""
    runs: list[list[float]] = []  # neighbours that share their mean
    for value in values:
        runs.append([value])
        while len(runs) > 1 and statistics.fmean(runs[-2]) > statistics.fmean(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    return [statistics.fmean(run) for run in runs for _ in run]


def _request(model: Runner, row: int, start: int, num: int, *, reads: bool = True) -> Request:
    positions = np.arange(start, start + num)
    tokens = positions % model.vocab_size
    read = Sample(np.arange(num)) if reads else None
    return row, Forward(tokens, positions, Causal(), read, slots=positions)
