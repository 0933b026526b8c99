"""A model whose passes take a known time of a clock that nothing else moves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from chordal.engine import Engine
from chordal.generation import Model
from chordal.testing.tiny import Alphabet
from chordal.testing.toys import TableModel


class Clock:
    """Tells the time; passes move it on."""

    now = 0.0

    def __call__(self):
        return self.now


class TimedModel(TableModel):
    """A toy whose pass takes 1 + `slope` * positions, those of the widest row for every row of the batch."""

    tokenizer = Alphabet()

    def __init__(self, clock, slope=0.0, **settings):
        super().__init__(**settings)
        self.clock, self.slope = clock, slope
        self.seen = []  # width and rows of each pass

    def run(self, requests):
        width = max(len(forward.tokens) for _, forward in requests)
        self.seen.append((width, len(requests)))
        self.clock.now += 1 + self.slope * width * len(requests)
        return super().run(requests)

    @property
    def rows_in_use(self):
        return sum(map(bool, self._used))


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("chordal.engine.time", SimpleNamespace(perf_counter=clock))
    return clock


@pytest.fixture
def make_timed(clock):
    """Give a model by the cost of a position, and how many sequences it holds."""

    def make(slope=0.0, max_rows=8, **settings):
        settings = {"vocab_size": 6, "window": 128, "seed": 3, "spread": 3.0, **settings}
        return Model(Engine(TimedModel(clock, slope, max_rows=max_rows, **settings)))

    return make
