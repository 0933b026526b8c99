from __future__ import annotations

import numpy as np
import pytest

from chordal.text import TextStream

TEXTS = ["plain", "Grüße", "日本語、中文", "👩‍👩‍👧 🎉!", "mixed 語🎉é."]


def stream_all(seq, data, width):
    """Give the pieces a stream yields while bytes are committed `width` at a time, and at the end."""
    stream, pieces = TextStream(seq), []
    for start in range(0, len(data), width):
        seq.append(np.frombuffer(data[start : start + width], np.uint8).astype(np.int64))
        pieces.append(stream.take())
    seq.finish("length")
    return [*pieces, stream.take()]


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("text", TEXTS)
def test_characters_split_over_tokens_come_whole(make_sequence, text, width):
    data = text.encode()
    pieces = stream_all(make_sequence(max_new_tokens=len(data)), data, width)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte(make_sequence):
    assert stream_all(make_sequence(max_new_tokens=9), "a🎉b".encode(), 1) == ["a", "", "", "", "🎉", "b", ""]


def test_half_a_character_is_given_at_the_end_or_when_it_is_sure_to_be_none(make_sequence):
    half = "🎉".encode()[:2]
    assert stream_all(make_sequence(), b"a" + half, 1) == ["a", "", "", "\ufffd"]
    assert stream_all(make_sequence(), b"a" + half + b"b", 1) == ["a", "", "", "\ufffdb", ""]


def test_the_start_of_a_stop_string_is_held_back_and_given_if_it_goes_on_otherwise(make_sequence):
    seq = make_sequence(stop_strings=("END",))
    assert stream_all(seq, b"aENx", 1) == ["a", "", "", "ENx", ""]
    seq = make_sequence(stop_strings=("END",))
    assert stream_all(seq, b"aEEN", 1) == ["a", "", "E", "", "EN"]


def test_a_stop_string_is_never_given(make_sequence):
    for width in (1, 2, 3, 4, 7):
        seq = make_sequence(stop_strings=("END", "NO"))
        pieces = stream_all(seq, b"aENENDb", width)
        assert "".join(pieces) == seq.text == "aEN"


def test_a_stop_string_that_starts_with_half_a_character_is_held_back(make_sequence):
    seq = make_sequence(max_new_tokens=20, stop_strings=("é🎉",))
    pieces = stream_all(seq, "aé🎉".encode(), 1)
    assert "".join(pieces) == "a"


def test_a_stop_token_has_no_text(make_sequence):
    assert stream_all(make_sequence(), b"ab\0", 1) == ["a", "b", "", ""]


def test_only_the_committed_prefix_is_given(make_sequence):
    seq = make_sequence("ab", 4)
    seq.open_canvas(6)
    stream = TextStream(seq)
    assert stream.take() == ""
    seq.commit(np.array([3, 4]), np.array([ord("B"), ord("C")]))
    assert stream.take() == ""
    seq.commit(np.array([2]), np.array([ord("A")]))
    assert stream.take() == "ABC"
    assert stream.take() == ""
    seq.commit(np.array([5]), np.array([ord("D")]))
    assert (seq.done, stream.take()) == (True, "D")


def test_pieces_add_up_to_the_text_whatever_is_committed_when(make_sequence):
    """Random texts and stop strings over few characters, so that prefixes of stop strings abound."""
    rng = np.random.default_rng(0)
    letters = ["a", "b", "é", "🎉"]
    for _ in range(300):
        data = "".join(rng.choice(letters, 12)).encode()
        stops = tuple("".join(rng.choice(letters, rng.integers(1, 4))) for _ in range(rng.integers(0, 3)))
        seq = make_sequence(max_new_tokens=len(data), stop_strings=stops)
        pieces = stream_all(seq, data, int(rng.integers(1, 6)))
        assert "".join(pieces) == seq.text
        assert not any(stop in seq.text for stop in stops)
