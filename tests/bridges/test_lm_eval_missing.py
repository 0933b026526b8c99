from __future__ import annotations

import importlib
import sys

import pytest

from chordal.errors import InputError


def test_without_the_harness_the_bridge_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "chordal.bridges.lm_eval", raising=False)
    with pytest.raises(InputError, match=r"pip install 'chordal\[lm-eval\]'"):
        importlib.import_module("chordal.bridges.lm_eval")
