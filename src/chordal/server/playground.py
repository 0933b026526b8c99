"""The playground: one page that watches decoders at work through the server that gave it."""

from __future__ import annotations

from functools import cache

import chordal
from chordal.html_page import make_page

_RENAME = """rename result to count:
def merge(step, flag):
    left = key + step
    flag = step + result
    return step"""
_INSERT = """after line 4 add key = node - 7
def merge(node, key):
    start = 15
    result = 14
    key = start - 15
    check(left)
    return left"""
_PROBLEM = (
    "Sam has 45 apples. Sam loses 20. Sam shares them equally with others, 5 in all. Sam buys 11 more. "
    "How many apples now?"
)

# What the bundled models were trained for, with the canvas that fits it.
_EXAMPLES = [
    {"name": "Rename in code", "prompt": _RENAME, "max_tokens": 64},
    {"name": "Insert a line of code", "prompt": _INSERT, "max_tokens": 64},
    {"name": "Word problem", "prompt": _PROBLEM, "max_tokens": 48},
    {"name": "Reverse a list", "prompt": "reverse: Ana Ben Cleo Dan", "max_tokens": 12},
    {"name": "Shuffle a list", "prompt": "shuffle: Uma Amy Finn Leo Paul Eva", "max_tokens": 12},
    {"name": "Sudoku", "prompt": "sudoku:\n3 0 0 0\n0 4 3 2\n2 3 0 4\n0 1 0 0", "max_tokens": 20},
    {"name": "Latin square", "prompt": "latin square: C D E S", "max_tokens": 20},
]


@cache
def playground_page() -> str:
    """Make the page; it asks the server that it came from for models, decoders and texts, and no other.

    Whatever the server and its models write is only ever set as text.
    """
    data = {"version": chordal.__version__, "examples": _EXAMPLES}
    return make_page("chordal.server", "playground", title="Chordal playground", data=data, asks_server=True)
