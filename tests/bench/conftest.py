"""A model that is a function, on a clock of its own: what a benchmark must find is known beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from chordal.engine import Engine
from chordal.generation import Model
from chordal.models.family import Family
from chordal.testing import Alphabet, ToyModel


class Cycle(ToyModel):
    """Says a, b, c, d, a, ... by position; a pass takes a second, and more where `cost` says so."""

    tokenizer = Alphabet()
    fingerprint = "0123456789abcdef"

    def __init__(self, **more):
        super().__init__(Family(), 30, **more)
        self.now = 0.0
        self.cost = lambda requests: 1.0
        self.fails = lambda requests: False

    def logits(self, position, view):
        return 9.0 * np.eye(30)[(position + 1) % 4]

    def run(self, requests):
        if self.fails(requests):
            raise ValueError("planted")
        self.now += self.cost(requests)
        return super().run(requests)


@pytest.fixture
def make_cycle():
    """Give a new model; its clock is `model.engine.target.now`."""

    def make(**more):
        return Model(Engine(Cycle(**more)))

    return make
