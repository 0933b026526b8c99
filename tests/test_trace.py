from __future__ import annotations

import pytest

from chordal.engine import Engine
from chordal.errors import InputError
from chordal.generation import Model, Request
from chordal.models.family import Family
from chordal.trace import Trace, TraceWriter, read_trace, token_texts

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
    commits = [event for event in trace.events if event["type"] == "commit"]
    assert [token for event in commits for token in event["tokens"]] == result.tokens
    assert trace.end == {
        "type": "end",
        "finish_reason": result.finish_reason,
        "text": result.text,
        "stats": result.stats,
    }


def test_drafts_say_how_many_tokens_were_kept(record):
    path, result = record(decoder="prompt_lookup", max_new_tokens=24, ignore_eos=True)
    drafts = [event for event in read_trace(path).events if event["type"] == "draft"]
    assert sum(len(draft["tokens"]) for draft in drafts) == result.stats["draft_tokens"] > 0
    assert sum(draft["num_accepted"] for draft in drafts) == result.stats["accepted_tokens"]


def test_a_draft_tree_says_where_each_token_hangs(tmp_path, make_model, tokenizer):
    from chordal.engine import Engine
    from chordal.generation import Model

    pair = {
        "target": make_model("llama", tokenizer=tokenizer),
        "draft": make_model("qwen3", tokenizer=tokenizer),
    }
    model, path = Model(Engine(pair)), tmp_path / "tree.jsonl"
    settings = {"decoder": "rsd", "max_new_tokens": 6}
    with path.open("w") as file:
        writer = TraceWriter(file, model, [5, 6, 7], Request(**settings))
        for _ in model.stream([5, 6, 7], listeners=[writer], **settings):
            pass
    drafts = [event for event in read_trace(path).events if event["type"] == "draft"]
    assert drafts[0]["parents"][:4] == [-1] * 4
    assert all(len(draft["parents"]) == len(draft["tokens"]) for draft in drafts)


def test_each_token_has_its_text(record):
    path, result = record(max_new_tokens=8, ignore_eos=True)
    texts = [text for event in read_trace(path).events for text in event["texts"]]
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


def test_token_keeps_the_blank_it_begins_with(tokenizer):
    tokens = tokenizer("Ana Ben\nCleo")["input_ids"]
    assert "".join(token_texts(tokenizer, tokens)) == " Ana Ben\nCleo"
    assert token_texts(tokenizer, [tokenizer.eos_token_id]) == [tokenizer.eos_token]
