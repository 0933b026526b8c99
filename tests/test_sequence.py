from __future__ import annotations

import numpy as np
import pytest

from chordal.errors import DecodingError
from chordal.forward import Sample
from chordal.ops.randomness import uniforms
from chordal.ops.sampling import Law
from chordal.sequence import UNCOMMITTED


def ids(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


def result(seq):
    return seq.text, bytes(seq.output.tolist()).decode(), seq.finish_reason, seq.stop_reason


def append_all(seq, text, width):
    """Append a text `width` tokens at a time, as far as the sequence takes it."""
    tokens = ids(text)
    for start in range(0, len(tokens), width):
        seq.append(tokens[start : start + width])
    return seq


def test_a_new_sequence_holds_its_prompt_and_nothing_else(make_sequence):
    seq = make_sequence("abc", 5)
    assert (seq.num_prompt, seq.frontier, seq.canvas_end, seq.limit) == (3, 3, 3, 8)
    assert seq.committed.tolist() == seq.tokens[:3].tolist() == ids("abc").tolist()
    assert seq.committed_at.tolist() == [0, 0, 0, *[UNCOMMITTED] * 5]
    assert not seq.done
    assert result(seq) == ("", "", None, None)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(
    ("text", "rules", "expected"),
    [
        # Length, inside a span.
        ("abcdefghi", {}, ("abcdefgh", "abcdefgh", "length", None)),
        # A stop token: part of the tokens, not of the text.
        ("abc\0def", {}, ("abc", "abc\0", "stop", 0)),
        ("\0bcd", {}, ("", "\0", "stop", 0)),
        ("abcdefg\0i", {}, ("abcdefg", "abcdefg\0", "stop", 0)),
        ("abcdefgh\0", {}, ("abcdefgh", "abcdefgh", "length", None)),
        ("ab\1c\0d", {"eos_ids": (0, 1)}, ("ab", "ab\1", "stop", 1)),
        # A stop string: the tokens up to its last one, the text before its first character.
        ("abcdefg", {"stop_strings": ("cd",)}, ("ab", "abcd", "stop", "cd")),
        ("abcdefg", {"stop_strings": ("x", "abc")}, ("", "abc", "stop", "abc")),
        ("abcabd", {"stop_strings": ("abd",)}, ("abc", "abcabd", "stop", "abd")),
        ("aaab", {"stop_strings": ("aab",)}, ("a", "aaab", "stop", "aab")),
        ("abcdefgh", {"stop_strings": ("gh",)}, ("abcdef", "abcdefgh", "stop", "gh")),
        ("abcdefghi", {"stop_strings": ("hi",)}, ("abcdefgh", "abcdefgh", "length", None)),
        # Several conditions: the first that is met, whatever else the span holds.
        ("abcdefg", {"stop_strings": ("fg", "bc")}, ("a", "abc", "stop", "bc")),
        ("abcdefg", {"stop_strings": ("cde", "d")}, ("abc", "abcd", "stop", "d")),
        ("abcdefg", {"stop_strings": ("abcd", "cd")}, ("", "abcd", "stop", "abcd")),
        ("ab\0cd", {"stop_strings": ("cd",)}, ("ab", "ab\0", "stop", 0)),
        ("abcd\0", {"stop_strings": ("cd",)}, ("ab", "abcd", "stop", "cd")),
        ("abc\0", {"stop_strings": ("cd",)}, ("abc", "abc\0", "stop", 0)),
    ],
)
def test_text_ends_at_the_first_stop_condition_wherever_spans_are_cut(
    make_sequence, width, text, rules, expected
):
    assert result(append_all(make_sequence("ab", 8, **rules), text, width)) == expected


def test_what_the_prompt_ends_with_is_no_part_of_a_stop_string(make_sequence):
    seq = make_sequence("ab", 4, stop_strings=("bc",))
    seq.append(ids("cbc"))
    assert result(seq) == ("c", "cbc", "stop", "bc")


def test_a_stop_string_may_end_inside_a_token(make_sequence):
    """One token here is a whole character, so the text behind the stop string is part of its last token."""
    seq = make_sequence("ab", 4, stop_strings=("b",))
    seq.detokenize = lambda tokens: "".join("<abc>" for _ in tokens)
    seq.append(ids("xyz"))
    assert result(seq) == ("<a", "x", "stop", "b")


def test_without_stop_tokens_or_a_detokenizer_only_the_length_ends_it(make_sequence):
    seq = make_sequence("ab", 4, eos_ids=(), stop_strings=("c",))
    seq.detokenize = None
    seq.append(ids("c\0cc"))
    assert (seq.text, seq.finish_reason, seq.output.tolist()) == ("", "length", ids("c\0cc").tolist())


def test_out_of_order_commits_move_the_frontier_over_what_is_whole(make_sequence):
    seq = make_sequence("ab", 6)
    seq.open_canvas(8)
    assert seq.tokens.tolist() == [*ids("ab"), *[255] * 6]
    assert seq.masked(0, 8).tolist() == [2, 3, 4, 5, 6, 7]

    seq.stats.forwards["target"] = 1
    seq.commit(np.array([6, 3]), ids("EB"))
    assert (seq.frontier, seq.output.tolist(), seq.stats.committed_tokens) == (2, [], 0)
    assert seq.masked(2, 7).tolist() == [2, 4, 5]

    seq.stats.forwards["target"] = 2
    seq.commit(np.array([2]), ids("A"))
    assert (seq.frontier, seq.text, seq.stats.committed_tokens) == (4, "AB", 2)
    seq.commit(np.array([5, 4]), ids("DC"))
    assert (seq.frontier, seq.text, seq.stats.committed_tokens) == (7, "ABCDE", 5)
    assert seq.committed_at.tolist() == [0, 0, 2, 1, 2, 2, 1, UNCOMMITTED]
    assert not seq.done

    seq.commit(np.array([7]), ids("F"))
    assert result(seq) == ("ABCDEF", "ABCDEF", "length", None)


def test_a_stop_token_ends_the_text_once_everything_before_it_is_committed(make_sequence):
    seq = make_sequence("ab", 6)
    seq.open_canvas(8)
    seq.commit(np.array([4, 5]), ids("\0X"))
    assert not seq.done
    seq.commit(np.array([2]), ids("A"))
    assert not seq.done
    seq.commit(np.array([3]), ids("B"))
    assert result(seq) == ("AB", "AB\0", "stop", 0)
    assert seq.stats.committed_tokens == 3


def test_a_canvas_beyond_the_limit_is_cut_at_the_limit(make_sequence):
    seq = make_sequence("ab", 3)
    seq.open_canvas(8)
    assert len(seq.tokens) == len(seq.committed_at) == 8
    seq.commit(np.arange(5, 8), ids("XYZ"))
    assert not seq.done
    seq.commit(np.arange(2, 5), ids("ABC"))
    assert result(seq) == ("ABC", "ABC", "length", None)
    assert seq.stats.committed_tokens == 3


def test_opening_a_canvas_in_parts_keeps_what_is_committed(make_sequence):
    seq = make_sequence("ab", 6)
    seq.open_canvas(4)
    seq.commit(np.array([3]), ids("B"))
    seq.open_canvas(6)
    assert seq.tokens[:6].tolist() == [*ids("ab"), 255, *ids("B"), 255, 255]
    seq.open_canvas(3)
    assert seq.canvas_end == 6


def test_a_model_without_a_mask_token_has_no_canvas(make_sequence):
    with pytest.raises(DecodingError, match="a canvas needs a model with a mask token"):
        make_sequence(mask_id=None).open_canvas(4)


def test_a_position_is_committed_once(make_sequence):
    seq = make_sequence("ab", 6)
    seq.open_canvas(8)
    seq.commit(np.array([3, 4]), ids("XY"))
    with pytest.raises(DecodingError, match=r"positions \[4\] are already committed"):
        seq.commit(np.array([2, 4]), ids("PQ"))
    with pytest.raises(DecodingError, match=r"positions \[0\] are already committed"):
        seq.commit(np.array([0]), ids("P"))
    assert seq.tokens[:6].tolist() == [*ids("ab"), 255, *ids("XY"), 255]
    assert seq.frontier == 2


def test_the_mask_token_is_never_committed(make_sequence):
    seq = make_sequence("ab", 6)
    seq.open_canvas(8)
    with pytest.raises(DecodingError, match="the mask token cannot be committed"):
        seq.commit(np.array([2, 3]), np.array([65, 255]))
    assert seq.masked(2, 8).tolist() == [2, 3, 4, 5, 6, 7]


def test_commits_behind_the_end_change_nothing(make_sequence):
    events = []
    seq = make_sequence("ab", 6, listeners=[lambda seq, event: events.append(event)])
    seq.append(ids("A\0"))
    before = seq.tokens.copy(), seq.committed_at.copy(), result(seq), seq.stats.committed_tokens, len(events)
    seq.append(ids("BC"))
    seq.commit(np.array([5]), np.array([255]))
    assert np.array_equal(seq.tokens, before[0])
    assert np.array_equal(seq.committed_at, before[1])
    assert (result(seq), seq.stats.committed_tokens, len(events)) == before[2:]


def test_the_first_reason_to_finish_stays(make_sequence):
    seq, error = make_sequence(), ValueError("no")
    seq.finish("error", error)
    seq.finish("cancelled")
    assert (seq.finish_reason, seq.error) == ("error", error)
    assert seq.stats.wall_s > 0


def test_listeners_hear_every_commit_with_its_forward_pass(make_sequence):
    heard = []

    def listen(seq, event):
        heard.append(
            (event.kind, event.forward, event.positions.tolist(), event.tokens.tolist(), event.num_accepted)
        )

    seq = make_sequence("ab", 6, listeners=[listen])
    seq.open_canvas(8)
    seq.stats.forwards["target"] = 1
    seq.commit(np.array([5, 3]), ids("DB"))
    seq.stats.forwards["target"] = 2
    seq.commit(np.array([2]), ids("A"))
    seq.stats.forwards["target"] = 3
    seq.append(ids("C"), draft=ids(""))
    assert heard == [
        ("commit", 1, [5, 3], ids("DB").tolist(), 0),
        ("commit", 2, [2], ids("A").tolist(), 0),
        ("commit", 3, [4], ids("C").tolist(), 0),
    ]


def test_a_draft_is_heard_before_what_its_pass_commits(make_sequence):
    heard = []
    seq = make_sequence("ab", 6, listeners=[lambda seq, event: heard.append(event)])
    seq.append(ids("XC"), draft=ids("XYZ"))
    assert [(e.kind, e.positions.tolist(), e.num_accepted) for e in heard] == [
        ("draft", [2, 3, 4], 1),
        ("commit", [2, 3], 0),
    ]


def test_events_keep_what_they_were_given(make_sequence):
    events = []
    seq = make_sequence("ab", 6, listeners=[lambda seq, event: events.append(event)])
    tokens = ids("AB").copy()
    seq.append(tokens)
    tokens[:] = 0
    assert events[0].tokens.tolist() == ids("AB").tolist()


def test_drafts_are_counted_and_empty_ones_are_none(make_sequence):
    seq = make_sequence()
    for tokens, draft in (("XYC", "XYZ"), ("A", ""), ("B", "X")):
        seq.append(ids(tokens), draft=ids(draft))
    assert (seq.stats.draft_tokens, seq.stats.accepted_tokens) == (4, 2)


def test_draft_tokens_behind_the_end_of_the_text_are_not_accepted(make_sequence):
    """They were once counted as accepted although the result does not hold them."""
    seq = make_sequence(eos_ids=(int(ids("E")[0]),))
    seq.append(ids("AEBC"), draft=ids("AEB"))
    assert (seq.stats.committed_tokens, seq.stats.draft_tokens, seq.stats.accepted_tokens) == (2, 3, 2)


def test_random_numbers_are_keyed_by_the_seed_and_the_position(make_sequence):
    seq = make_sequence(seed=5)
    positions = np.array([4, 9])
    assert seq.uniforms(positions, "order", 3).tolist() == uniforms(5, "order", positions, 3).tolist()
    assert (
        seq.uniforms(positions, "order").tolist()
        != make_sequence(seed=6).uniforms(positions, "order").tolist()
    )


def test_a_read_carries_the_law_and_numbers_only_if_it_draws(make_sequence):
    rows, positions = np.array([0, 1]), np.array([7, 8])
    greedy = make_sequence().sample(rows, positions, banned=(3,))
    assert isinstance(greedy, Sample)
    assert (greedy.uniforms, greedy.banned) == (None, (3,))

    law = Law(temperature=0.7)
    sampled = make_sequence(law=law, seed=2).sample(rows, positions, 5)
    assert sampled.law is law
    assert sampled.uniforms.tolist() == uniforms(2, "token", positions, 5).tolist()


@pytest.mark.parametrize(
    ("text", "rules", "expected"),
    [
        ("abc", {}, ("abc", "abc", None)),
        ("abcdefghi", {}, ("abcdefgh", "abcdefgh", "length")),
        ("abc\0def", {}, ("abc", "abc\0", "stop")),
        ("abcdefg", {"stop_strings": ("cd",)}, ("ab", "abcd", "stop")),
        ("abcd\0", {"stop_strings": ("cd",)}, ("ab", "abcd", "stop")),
    ],
)
def test_an_alternative_ends_as_the_result_would(make_sequence, text, rules, expected):
    seq = make_sequence("ab", 8, **rules)
    seq.offer(ids(text), -1.5)
    [other] = seq.alternatives
    assert (other.text, bytes(other.tokens.tolist()).decode(), other.finish_reason) == expected
    assert other.score == -1.5
    assert result(seq) == ("", "", None, None), "an offer commits nothing"


def test_what_is_known_not_to_end_a_text_is_not_searched_again(make_sequence):
    seq = make_sequence("ab", 8)
    assert seq.ending(ids("a\0bc"), 2) is None
    assert seq.ending(ids("a\0bc"), 1).num_tokens == 2
