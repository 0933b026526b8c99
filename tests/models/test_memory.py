from __future__ import annotations

import ctypes

import numpy as np
import pytest

from chordal.models.memory import _TRIM_BYTES, Trimmer


class Library:
    def __init__(self):
        self.trims = 0

    def malloc_trim(self, pad):
        self.trims += 1


@pytest.fixture
def library(monkeypatch):
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    return library


def test_memory_is_given_back_once_enough_is_freed(library):
    trimmer = Trimmer()
    for _ in range(10):
        trimmer.count(_TRIM_BYTES // 4)
    assert library.trims == 2


def test_a_watched_weight_is_the_weight_and_counts_when_it_is_read(library):
    trimmer, weight = Trimmer(), np.arange(_TRIM_BYTES // 4, dtype=np.int64).reshape(2, -1)
    watched = trimmer.watch(weight)
    assert watched.shape == weight.shape
    assert library.trims == 0
    assert (watched[1:] == weight[1:]).all()
    assert library.trims == 0
    assert watched[...] is not None
    assert library.trims == 1


def test_another_c_library_is_no_failure(monkeypatch):
    def missing(name):
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    Trimmer().count(2 * _TRIM_BYTES)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    Trimmer().count(2 * _TRIM_BYTES)
