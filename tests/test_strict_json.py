from __future__ import annotations

import json

from chordal.strict_json import dumps


def test_json_has_neither_nan_nor_infinity():
    text = dumps({"a": float("nan"), "b": [float("inf"), 1.5, None], "c": (-float("inf"), "x")})

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(text, parse_constant=refuse) == {
        "a": "nan",
        "b": ["inf", 1.5, None],
        "c": ["-inf", "x"],
    }


def test_text_of_any_language_stays_readable():
    assert dumps("\u4e2d") == '"\u4e2d"'
