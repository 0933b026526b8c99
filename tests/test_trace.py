from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from chordal.engine import Engine
from chordal.errors import InputError
from chordal.forward import Causal, Forward, Full, Logits
from chordal.generation import Model, Request
from chordal.models.family import Family
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing.tiny import tiny_model
from chordal.trace import FORMAT, Trace, Tracer, TraceWriter, pieces, read_trace, token_texts

PROMPT = "copy: " + "Ana Ben " * 4


@pytest.fixture
def model(make_model, tokenizer):
    family = Family(eos_ids=(tokenizer.eos_token_id,))
    return Model(Engine(make_model("qwen3", family, tokenizer=tokenizer, vocab_size=len(tokenizer))))


@pytest.fixture
def record(model, tmp_path):
    """Write the trace of a request and give its path with the result."""

    def record(**settings):
        path = tmp_path / "trace.jsonl"
        with path.open("w", encoding="utf-8") as file:
            writer = TraceWriter(file, model, PROMPT, Request(**settings))
            *_, last = model.stream(PROMPT, listeners=[writer], **settings)
            writer.end(last.result)
        return path, last.result

    return record


def test_trace_reads_as_it_was_written(record, model):
    path, result = record(decoder="prompt_lookup", config={"num_draft": 4}, max_new_tokens=12)
    trace = read_trace(path)
    assert trace.header["decoder"] == "prompt_lookup"
    assert trace.header["config"]["num_draft"] == 4
    assert trace.header["prompt_tokens"] == model.encode(PROMPT).tolist()
    commits = [event for event in trace.events if event.kind == "commit"]
    assert [token for event in commits for token in event.tokens] == result.tokens
    assert trace.end["finish_reason"] == result.finish_reason
    assert trace.end["stats"] == result.stats
    assert "".join(trace.end["pieces"]) == trace.end["text"] == result.text


def test_drafts_say_how_many_tokens_were_kept(record):
    path, result = record(decoder="prompt_lookup", max_new_tokens=24, ignore_eos=True)
    drafts = [event for event in read_trace(path).events if event.kind == "draft"]
    assert sum(len(draft.tokens) for draft in drafts) == result.stats["draft_tokens"] > 0
    assert sum(len(draft.kept) for draft in drafts) == result.stats["accepted_tokens"]


@pytest.fixture
def record_tree(tmp_path, make_model, tokenizer):
    """Write the trace of a request with a draft tree and give its path with the result."""

    def record_tree(architecture="qwen3", **more):
        pair = {
            "target": make_model("llama", tokenizer=tokenizer),
            "draft": make_model(architecture, tokenizer=tokenizer),
        }
        model, path = Model(Engine(pair)), tmp_path / "tree.jsonl"
        settings = {"decoder": "rsd", "max_new_tokens": 12} | more
        with path.open("w") as file:
            writer = TraceWriter(file, model, [5, 6, 7], Request(**settings))
            *_, last = model.stream([5, 6, 7], listeners=[writer], **settings)
            writer.end(last.result)
        return path, last.result

    return record_tree


def drafts_with_commits(trace):
    return [(one, other) for one, other in itertools.pairwise(trace.events) if one.kind == "draft"]


def test_a_draft_tree_says_where_each_token_hangs(record_tree):
    trace = read_trace(record_tree()[0])
    drafts = [draft for draft, _ in drafts_with_commits(trace)]
    assert drafts[0].parents[:4] == [-1] * 4
    assert all(len(draft.parents) == len(draft.tokens) for draft in drafts)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_kept_nodes_of_a_tree_are_the_path_that_was_committed(record_tree, temperature):
    trace = read_trace(record_tree("llama", temperature=temperature)[0])
    pairs = drafts_with_commits(trace)
    assert any(draft.kept for draft, _ in pairs)
    for draft, commit in pairs:
        assert [draft.tokens[node] for node in draft.kept] == commit.tokens[: len(draft.kept)]
        assert [draft.parents[node] for node in draft.kept] == [-1, *draft.kept[:-1]][: len(draft.kept)]


def test_passes_of_other_models_are_counted_at_each_event(record_tree):
    path, result = record_tree()
    trace = read_trace(path)
    assert trace.header["models"] == {"target": "tiny", "draft": "tiny"}
    counts = [event.forwards["draft"] for event in trace.events]
    assert counts == sorted(counts)
    assert counts[-1] == result.stats["draft_forwards"]["draft"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_of_a_model_tell_how_sure_it_was(record_tree, temperature):
    for decoder in ("rsd", "draft_model"):
        trace = read_trace(record_tree(decoder=decoder, temperature=temperature)[0])
        for draft, _ in drafts_with_commits(trace):
            assert len(draft.confidence) == len(draft.tokens)
            assert all(0 < one <= 1 for one in draft.confidence)


@pytest.mark.parametrize("decoder", ["autoregressive", "prompt_lookup", "rsd", "draft_model", "pearl"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_confidence_of_a_token_is_its_probability(record_tree, make_model, decoder, temperature):
    path, result = record_tree(decoder=decoder, temperature=temperature)
    text = np.array([5, 6, 7, *result.tokens])
    positions = np.arange(len(text) - 1)
    read = Logits(positions[2:])
    ask = Forward(text[:-1], positions, Causal(), read, slots=positions)
    [reading] = make_model("llama").run([(0, ask)])
    probs = reading.logits.softmax(1)[np.arange(len(result.tokens)), result.tokens]
    commits = [event for event in read_trace(path).events if event.kind == "commit"]
    got = [one for event in commits for one in event.confidence]
    assert got == pytest.approx(probs.tolist(), abs=2e-5)


class Wanting:
    wants_confidence = True

    def __init__(self):
        self.heard = []

    def __call__(self, seq, event):
        self.heard.append(event)


def test_nobody_reads_scores_unless_a_trace_wants_them(make_sequence):
    rows = np.array([0])
    assert make_sequence().sample(rows, rows).scores == ()
    seq = make_sequence(listeners=[lambda seq, event: None])
    assert seq.sample(rows, rows, scores=("entropy",)).scores == ("entropy",)
    seq.listeners.append(Wanting())
    assert seq.sample(rows, rows, scores=("entropy",)).scores == ("entropy", "probs")
    assert seq.sample(rows, rows, scores=("probs",)).scores == ("probs",)


def test_guesses_that_change_are_revised(make_sequence, tokenizer):
    heard, tracer = [], Tracer(tokenizer)
    seq = make_sequence("ab", 6, listeners=[lambda seq, event: heard.append(tracer(seq, event))])
    seq.open_canvas(6)
    seq.guess(np.array([3, 4]), np.array([30, 40]), np.array([0.5, np.nan]))
    seq.guess(np.array([4, 5]), np.array([41, 50]))
    seq.commit(np.array([2, 3, 4, 5]), np.array([20, 31, 41, 51]))
    assert [event.revised for event in heard] == [[], [0], [3]]
    assert heard[0].confidence == [0.5, None]
    assert heard[1].record()["revised"] == [0]


def test_events_of_one_pass_stay_together(record):
    path, result = record(decoder="prompt_lookup", max_new_tokens=24, ignore_eos=True)
    passes = read_trace(path).passes()
    assert [events[0].forward for events in passes] == list(range(1, result.stats["forwards"] + 1))
    assert {tuple(event.kind for event in events) for events in passes} == {("commit",), ("draft", "commit")}


def test_each_token_has_its_text(record):
    path, result = record(max_new_tokens=8, ignore_eos=True)
    texts = [text for event in read_trace(path).events for text in event.texts]
    assert len(texts) == 8
    assert "".join(texts).lstrip(" ") == result.text


def test_trace_cut_short_has_no_end(record):
    path, _ = record(max_new_tokens=4)
    whole = read_trace(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert read_trace(path) == Trace(whole.header, whole.events, None)
    path.write_text("\n".join(lines[:-1])[:-10])
    assert read_trace(path).events == whole.events[:-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "line 1"),
        ('{"type": "commit"}\n', "one header"),
        ('{"type": "header"}\n{"type": "header"}\n', "one header"),
        ('{"type": "header"}\n5\n{"type": "end"}\n', "line 2"),
    ],
)
def test_file_that_is_no_trace_is_refused(tmp_path, text, message):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_trace(path)


def test_missing_trace_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_trace(tmp_path / "none")


HEADER = '{"type": "header", "prompt_tokens": [1, 2]}\n'


def test_a_trace_of_the_first_format_still_reads(tmp_path):
    """It had neither the nodes that were kept nor confidences."""
    path = tmp_path / "old.jsonl"
    path.write_text(
        HEADER + '{"type": "draft", "forward": 1, "positions": [2, 2, 3], "tokens": [7, 8, 9], "texts": '
        '["a", "b", "c"], "num_accepted": 2, "parents": [-1, -1, 1]}\n'
        '{"type": "commit", "forward": 1, "positions": [2, 3, 4], "tokens": [8, 9, 5], "texts": '
        '["b", "c", "d"]}\n'
        '{"type": "draft", "forward": 2, "positions": [5, 6], "tokens": [7, 8], "texts": ["a", "b"], '
        '"num_accepted": 1}\n'
        '{"type": "commit", "forward": 2, "positions": [5, 6], "tokens": [7, 9], "texts": ["a", "c"]}\n'
    )
    trace = read_trace(path)
    assert [event.kept for event in trace.events] == [[1, 2], [], [0], []]
    assert [len(events) for events in trace.passes()] == [2, 2]


def event(**changes):
    given = {"type": "commit", "forward": 1, "positions": [2], "tokens": [5], "texts": ["a"]} | changes
    return json.dumps({name: value for name, value in given.items() if value is not None}) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'{{"type": "header", "prompt_tokens": [], "format": {FORMAT + 1}}}\n', "line 1.*reads up to"),
        ('{"type": "header"}\n', "line 1.*prompt_tokens"),
        (HEADER + event(type="other"), "line 2.*its types are"),
        (HEADER + event() + event(positions=None), "line 3.*positions"),
        (HEADER + event(tokens=["<b>"]), "line 2.*list of integers"),
        (HEADER + event(tokens=[5, 6]), "line 2.*one length"),
        (HEADER + event(confidence=["high"]), "line 2.*numbers"),
        (HEADER + event(type="draft", kept=[1]), "line 2.*indices"),
        (HEADER + event(type="draft", parents=[0], kept=[]), "line 2.*before its child"),
        (HEADER + '{"type": "end", "text": "a"}\n', "line 2.*stats"),
        (HEADER + '{"type": "end"}\n' + event(), "line 3.*nothing may follow"),
    ],
)
def test_what_does_not_fit_the_format_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_trace(path)


def test_separators_inside_texts_do_not_end_a_line(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(HEADER + event(texts=["\u2028\x85"]).replace("\\u2028", "\u2028"), encoding="utf-8")
    assert read_trace(path).events[0].texts == ["\u2028\x85"]


def test_pieces_are_the_text_where_characters_spread_over_tokens(tokenizer):
    """Each such token alone reads as U+FFFD, so that texts of tokens are not the text."""
    text = "Ana \u4f60\U0001f600 Ben"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(tokens) > len(whole.split()) + 2
    split = pieces(tokenizer, tokens, whole)
    assert "".join(split) == whole
    assert len(split) == len(tokens)
    assert "\ufffd" not in "".join(split)


def test_pieces_end_where_a_stop_string_cut_the_text(tokenizer):
    tokens = tokenizer("Ana Ben Cleo", add_special_tokens=False)["input_ids"]
    split = pieces(tokenizer, tokens, "Ana B")
    assert "".join(split) == "Ana B"
    assert len(split) == len(tokens)
    assert pieces(tokenizer, tokens, "Cleo") is None


def test_token_keeps_the_blank_it_begins_with(tokenizer):
    tokens = tokenizer("Ana Ben\nCleo")["input_ids"]
    assert "".join(token_texts(tokenizer, tokens)) == " Ana Ben\nCleo"
    assert token_texts(tokenizer, [tokenizer.eos_token_id]) == [tokenizer.eos_token]


@pytest.mark.parametrize("commit", ["schedule", "threshold", "entropy", "local_leap"])
def test_the_confidence_of_a_token_is_its_probability_on_the_canvas_of_its_pass(commit):
    model, prompt, listen = tiny_model("masked"), np.arange(5, 11), Wanting()
    seq = Sequence(prompt, model.family, StopRules(max_new_tokens=12), listeners=[listen])
    settings = {"commit": commit, "feed": "whole"} | ({"threshold": 0.2} if commit == "threshold" else {})
    engine = Engine(model)
    engine.submit(make_decoder("denoise", settings), seq)
    engine.run()

    other = tiny_model("masked")
    canvas = np.concatenate([prompt, np.full(12, model.family.mask_id)])
    everything = np.arange(len(canvas))
    for event in listen.heard:
        rows = event.positions - model.family.shift
        ask = Forward(canvas, everything, Full(len(canvas)), Logits(rows), slots=everything)
        [reading] = other.run([(0, ask)])
        probs = reading.logits.softmax(1)[np.arange(len(rows)), event.tokens]
        assert event.confidence == pytest.approx(probs.numpy(), abs=1e-6)
        canvas[event.positions] = event.tokens
