"""An arena without a model: how fast and how good each decoder is, is a function of its settings."""

from __future__ import annotations

import random

import pytest

from chordal.bench.compare import Contender
from chordal.tuning.arena import Output, Run

TOKENS = tuple(range(10))


class FakeArena:
    """Takes as long as it is told to, on a clock of its own.

    Args:
        speed: Tokens a second of a contender, the plain decoder's being 100.
        same: How many prompts of ten get the plain decoder's text; fewer make a contender approximate.
        noise: Runs take up to this share longer or shorter.
        stop_after: Runs until somebody presses Ctrl-C.
    """

    plain = Contender("autoregressive")

    def __init__(self, speed, same=None, *, num_prompts=20, batch_size=1, noise=0.0, stop_after=None):
        self.speed, self.same = speed, same or (lambda contender: 10)
        self.num_prompts, self.batch_size = num_prompts, batch_size
        self.noise, self.stop_after = noise, stop_after
        self.rng, self.now, self.calls = random.Random(0), 0.0, []

    def clock(self):
        return self.now

    def run(self, contender, start, end):
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((contender.label, start, end))
        is_plain = contender == self.plain
        seconds = 10 * (end - start) / (100 if is_plain else self.speed(contender))
        seconds *= 1 + self.noise * self.rng.uniform(-1, 1)
        self.now += seconds
        same = 10 if is_plain else self.same(contender)
        outputs = [
            Output(TOKENS if place % 10 < same else (-1, *TOKENS[1:]), 10, 10 if is_plain else 5)
            for place in range(start, end)
        ]
        return Run(seconds, outputs, "exact" if is_plain or self.same(contender) == 10 else "approximate")


@pytest.fixture
def make_arena():
    return FakeArena
