from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from chordal.models.family import Family
from chordal.sequence import Sequence, StopRules
from chordal.text import Detokenizer, TextStream

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


WORDS = [
    "\u2581",
    "\u2581the",
    "\u2581foo",
    "bar",
    "\u2581\u2581",
    "\u00e9",
    "\u2581\u65e5",
    "\u672c",
    ".",
    "\n",
    "END",
    "\u2581n",
]


def sentencepiece(*, metaspace):
    """Detokenize as Llama 2 does: a blank is part of a word, and what is no word is bytes.

    A run of bytes that is not valid, half a character at its end included, is nothing but U+FFFD.
    """
    vocab = {
        token: at for at, token in enumerate(["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *WORDS])
    }
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<s>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    start = decoders.Metaspace() if metaspace else decoders.Replace("\u2581", " ")
    strip = [] if metaspace else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([start, decoders.ByteFallback(), decoders.Fuse(), *strip])
    return lambda tokens: tokenizer.decode(tokens.tolist())


class Kind:
    """A way of reading tokens, and random texts in its tokens."""

    def __init__(self, detokenize, draw):
        self.detokenize, self.draw = detokenize, draw


@pytest.fixture(scope="module")
def kinds(tokenizer):
    """Byte-level pairs as in GPT-2, words of SentencePiece in two layouts, and plain bytes."""
    special = tokenizer.all_special_ids
    texts = [
        *TEXTS,
        "a\u0301e\u0308",
        "\U0001f1e9\U0001f1ea\U0001f3f4",
        "  two  blanks ",
        " ",
        "x = [1, 2]\n  y",
    ]

    def byte_level(rng, is_valid=False):
        pieces = [tokenizer(str(rng.choice(texts)))["input_ids"], [special[0]] * rng.integers(3)]
        raw = [] if is_valid else rng.integers(5, 261, rng.integers(12)).tolist()
        return [*pieces[0], *raw, *pieces[1], *(raw[:3] if rng.random() < 0.3 else []), *pieces[0][:5]]

    def words(rng, is_valid=True):
        tokens = []
        for _ in range(rng.integers(1, 8)):
            if rng.random() < 0.4:
                tokens += [
                    2 + byte
                    for byte in str(rng.choice(["\U0001f389", "\u8a9e", "q", "\u00fc\u00df"])).encode()
                ]
            else:
                tokens += [0] * rng.integers(2) + [258 + rng.integers(len(WORDS))] * rng.integers(1, 4)
            tokens += [] if is_valid or rng.random() < 0.7 else rng.integers(2, 258, 3).tolist()
        return tokens

    def raw(rng, is_valid=False):
        data = "".join(rng.choice(["a", "b", "\u00e9", "\U0001f389"], 4)).encode()
        return [*data, *([] if is_valid else rng.integers(1, 255, rng.integers(9)).tolist()), 0, *data[1:]]

    return {
        "byte-level": Kind(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), byte_level),
        "sentencepiece": Kind(sentencepiece(metaspace=False), words),
        "metaspace": Kind(sentencepiece(metaspace=True), words),
        "bytes": Kind(lambda ids: bytes(i for i in ids.tolist() if i).decode(errors="replace"), raw),
    }


SPOILING = ["sentencepiece", "metaspace"]
KINDS = ["byte-level", "sentencepiece", "metaspace", "bytes"]


def chunks(tokens, rng):
    """Cut tokens into spans of random lengths, most of them short."""
    tokens, at = np.array(tokens, np.int64), 0
    while at < len(tokens):
        width = int(rng.choice([1, 1, 1, 2, 3, 5, 20]))
        yield tokens[at : at + width]
        at += width


@pytest.mark.parametrize("name", KINDS)
def test_text_read_piece_by_piece_is_that_of_all_tokens_at_once(kinds, name):
    """Invalid bytes, half characters, runs of blanks and of special tokens, however they come."""
    kind, rng = kinds[name], np.random.default_rng(0)
    for _ in range(300):
        tokens = [token for _ in range(rng.integers(1, 5)) for token in kind.draw(rng)]
        reader, certain, num = Detokenizer(kind.detokenize), "", 0
        for chunk in chunks(tokens, rng):
            reader.extend(chunk)
            num += len(chunk)
            want = kind.detokenize(np.array(tokens[:num]))
            assert reader.text == want or (name in SPOILING and "\ufffd" in want)
            assert reader.certain(0).startswith(certain)
            certain = reader.certain(0)
            assert not reader.text[len(certain) :].rstrip("\ufffd") or reader.text.endswith("\ufffd")
        whole = kind.detokenize(np.array(tokens))
        assert (reader.num_tokens, reader.text) == (len(tokens), whole)
        assert whole.startswith(certain)
        assert reader.since(len(certain) // 2) == whole[len(certain) // 2 :]


@pytest.mark.parametrize("name", KINDS)
def test_reading_costs_the_same_for_every_token(kinds, name):
    kind, rng = kinds[name], np.random.default_rng(0)
    decoded = []

    def counting(tokens):
        decoded.append(len(tokens))
        return kind.detokenize(tokens)

    invalid, special = {"byte-level": (250, 0), "bytes": (255, 0)}.get(name, (257, 1))
    for draw in (lambda: kind.draw(rng), lambda: [invalid] * 50, lambda: [special] * 50):
        tokens = []
        while len(tokens) < 2000:
            tokens += draw()
        decoded.clear()
        reader = Detokenizer(counting)
        for token in tokens:
            reader.extend(np.array([token]))
        assert reader.text == kind.detokenize(np.array(tokens))
        assert sum(decoded) <= 20 * len(tokens)
        assert max(decoded) <= 24
        assert len(tokens) - 8 <= 2000 or len(reader.text) - reader.num_certain <= 12, (
            "what is held is bounded"
        )


def test_text_that_a_tokenizer_would_rewrite_stands():
    """As when spaces are tidied up; what was given cannot be taken back."""
    words = ["do", " n", "'t", " go", " ", "."]

    def detokenize(tokens):
        return "".join(words[token] for token in tokens).replace(" n't", "n't").replace(" .", ".")

    reader = Detokenizer(detokenize)
    for token in (0, 1, 2, 3, 4, 5, 0):
        before = reader.text
        reader.extend(np.array([token]))
        assert reader.text.startswith(before)
    assert reader.text == "do n't go .do"

    reader = Detokenizer(lambda ids: "".join("ab\ufffdc"[i] for i in ids).replace("ab\ufffdc", "d"))
    for token in range(4):
        reader.extend(np.array([token]))
    assert reader.text == "ab\ufffdc"


def test_characters_among_invalid_bytes_are_found():
    """Long runs in which every token leaves the text at what may be half a character, some of them two."""
    rng = np.random.default_rng(2)
    parts = ["🎉".encode(), "語".encode(), "é".encode(), b"\xff", b"\x80", b"\xf0\x9f", b"\xe8", b"\xc3"]

    def detokenize(tokens):
        data = b"".join(bytes([token]) if token < 256 else token.to_bytes(2) for token in tokens.tolist())
        return data.decode(errors="replace")

    for trial in range(300):
        data = b"".join(parts[at] for at in rng.integers(1 if trial % 3 else len(parts), size=20)) + b"a"
        at, tokens, reader = 0, [], Detokenizer(detokenize)
        while at < len(data):
            width = int(rng.integers(1, 3)) if trial % 2 or not at else 2
            tokens.append(int.from_bytes(data[at : at + width]))
            at += width
            reader.extend(np.array(tokens[-1:]))
            assert reader.text == detokenize(np.array(tokens))
            assert data.decode(errors="replace").startswith(reader.certain(0))
            assert len(reader.text) - reader.num_certain <= 16, "what is held is bounded"


def test_tokens_that_never_end_with_a_character_cost_the_same_too():
    decoded, data = [], "🎉".encode() * 1000

    def detokenize(tokens):
        decoded.append(len(tokens))
        return b"".join(data[2 * at - 1 : 2 * at + 1] for at in tokens).decode(errors="replace")

    reader = Detokenizer(detokenize)
    reader.extend(np.array([1]))
    for at in range(2, 2000):
        reader.extend(np.array([at]))
    assert reader.certain(0)[-100:] == "🎉" * 100
    assert max(decoded) <= 24


def test_only_the_first_blank_of_a_text_is_dropped(tokenizer):
    """However many tokens without a text stand between it and the next."""
    blank, name = tokenizer.convert_tokens_to_ids(["Ġ", "ĠZoe"])
    for num in range(40):
        tokens = np.array([blank, *[tokenizer.all_special_ids[0]] * num, name])
        reader = Detokenizer(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
        for token in tokens:
            reader.extend(np.array([token]))
        assert reader.text == " Zoe"


def test_half_a_character_spoils_no_whole_one_before_it():
    detokenize, reader = sentencepiece(metaspace=False), Detokenizer(sentencepiece(metaspace=False))
    tokens = np.array([2 + byte for byte in "é🎉".encode()])
    assert detokenize(tokens[:-1]) == "\ufffd" * 5
    reader.extend(tokens[:-1])
    assert (reader.text, reader.certain(0)) == ("é\ufffd\ufffd\ufffd", "é")
    reader.extend(tokens[-1:])
    assert reader.text == detokenize(tokens) == "é🎉"


def first_ending(kind, tokens, rules):
    """Find the end of a text by decoding it anew for every token: slow and plain."""
    for num in range(1, len(tokens) + 1):
        if tokens[num - 1] in rules.eos_ids:
            return num, tokens[num - 1], kind.detokenize(np.array(tokens[: num - 1], np.int64))
        text = kind.detokenize(np.array(tokens[:num], np.int64))
        hits = [(text.find(string), string) for string in rules.stop_strings if string in text]
        if hits:
            at, string = min(hits)
            return num, string, text[: at + (len(string) if rules.include_stop else 0)]
    return len(tokens), None, kind.detokenize(np.array(tokens, np.int64))


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_streams_end_where_a_text_decoded_anew_for_every_token_does(kinds, name, include_stop):
    kind, rng = kinds[name], np.random.default_rng(1)
    stopped = 0
    for trial in range(300):
        tokens = [
            token for _ in range(rng.integers(1, 4)) for token in kind.draw(rng, is_valid=trial % 2 == 0)
        ]
        if name in SPOILING:
            tokens = [token for token in tokens if token > 1]
        text = kind.detokenize(np.array(tokens)) or "x"
        at = rng.integers(len(text), size=3)
        stops = [text[i : i + rng.integers(1, 6)] for i in at] + ["END", text[-3:] + "x", "nowhere"]
        stops = tuple(str(stop) for stop in rng.choice([stop for stop in stops if stop], rng.integers(3)))
        ends = [token for token in tokens if name not in SPOILING or token >= 258]
        eos_ids = (int(rng.choice(ends)),) if ends and rng.random() < 0.2 else ()
        rules = StopRules(
            max_new_tokens=len(tokens) + 1,
            eos_ids=eos_ids,
            stop_strings=stops,
            include_stop=include_stop,
        )
        seq = Sequence(np.array([1]), Family(), rules, detokenize=kind.detokenize)
        stream, pieces = TextStream(seq), []
        for chunk in chunks(tokens, rng):
            seq.append(chunk)
            pieces.append(stream.take())
        seq.finish("cancelled")
        pieces.append(stream.take())
        assert "".join(pieces) == seq.text
        other = Sequence(np.array([1]), Family(), rules, detokenize=kind.detokenize)
        for token in tokens:
            other.append(np.array([token]))
        assert (other.text, other.output.tolist()) == (seq.text, seq.output.tolist())
        if name in SPOILING and trial % 2:
            continue  # decoded at once, a run of bytes is lost with an invalid one
        num, reason, want = first_ending(kind, tokens, rules)
        assert (len(seq.output), seq.stop_reason, seq.text) == (num, reason, want)
        stopped += reason is not None

        other = Sequence(np.array([1]), Family(), rules, detokenize=kind.detokenize)
        other.offer(np.array(tokens), 0.0)
        assert (other.alternatives[0].text, len(other.alternatives[0].tokens)) == (want, num)
    assert 50 < stopped < 280


def test_a_stop_string_that_stays_is_given_with_what_ended_it(make_sequence):
    seq = make_sequence(stop_strings=("END",))
    seq.stop = dataclasses.replace(seq.stop, include_stop=True)
    assert stream_all(seq, b"aENDb", 1) == ["a", "", "", "END", "", ""]


def test_what_is_held_back_for_stop_strings_is_what_one_of_them_may_begin_with(make_sequence):
    seq = make_sequence(max_new_tokens=20, stop_strings=("abcd", "cx", "bcy"))
    assert stream_all(seq, b"zabcabcc", 1) == ["z", "", "", "", "abc", "", "", "abc", "c"]


def test_searching_for_stop_strings_decodes_each_token_a_few_times(make_sequence):
    seq, decoded = make_sequence(max_new_tokens=3000, stop_strings=("never", "\n\n")), []
    plain = seq.detokenize
    seq.detokenize = lambda tokens: decoded.append(len(tokens)) or plain(tokens)
    stream = TextStream(seq)
    pieces = [*(seq.append(np.array([97 + at % 26])) or stream.take() for at in range(3000)), stream.take()]
    assert "".join(pieces) == seq.text
    assert len(seq.text) == 3000
    assert sum(decoded) < 12 * 3000
