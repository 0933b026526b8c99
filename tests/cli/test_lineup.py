from __future__ import annotations

import pytest

from chordal.bench.compare import Contender
from chordal.cli.lineup import parse_decoders
from chordal.errors import InputError


def test_label_of_a_row_can_be_given_back():
    contender = Contender("b", {"x": 1, "y": None})
    assert parse_decoders(contender.label) == [contender]


def test_items_without_colon_are_settings_of_the_decoder_before():
    assert parse_decoders("a,b:x=1,y=none,c:z=text, d ") == [
        Contender("a"),
        Contender("b", {"x": 1, "y": None}),
        Contender("c", {"z": "text"}),
        Contender("d"),
    ]


@pytest.mark.parametrize("text", ["", ",", "a:", "a:x", "x=1:y"])
def test_decoders_that_cannot_be_read_are_refused(text):
    with pytest.raises(InputError):
        parse_decoders(text)
