from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chordal.bench import memory
from chordal.bench.memory import PeakMemory

BLOCK = 64 * 2**20


@pytest.fixture
def peak():
    runner = SimpleNamespace(device=torch.device("cpu"))
    return PeakMemory(SimpleNamespace(engine=SimpleNamespace(models={"target": runner})))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a stretch of time")
def test_peak_is_of_the_stretch_since_the_reset(peak):
    peak.reset()
    before = peak.read()
    block = np.ones(BLOCK, np.uint8)
    del block
    during = peak.read()
    assert during - before > BLOCK / 2
    peak.reset()
    assert during - peak.read() > BLOCK / 2


def test_where_it_cannot_be_told_there_is_no_figure(peak, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "nothing")
    peak.reset()
    assert peak.read() is None
