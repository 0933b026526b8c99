from __future__ import annotations

import io
import json
import re

import pytest

PROMPT = "copy: " + "Ana Ben " * 6
LOOKUP = ["--decoder", "prompt_lookup", "--max-new-tokens", 24, "--ignore-eos"]
MASKED = ["--model", "tiny-mdm", "--max-new-tokens", 6, "--ignore-eos"]
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def write_trace(run, tmp_path):
    """Write a trace and give its file with the result."""

    def write_trace(*args):
        path = tmp_path / "trace.jsonl"
        return path, run("generate", PROMPT, *args, "--json", "--trace", path).json

    return write_trace


def test_a_pipe_gets_one_line_a_forward_pass_and_the_result(run, write_trace):
    path, result = write_trace(*LOOKUP)
    shown = run("trace", path)
    assert shown.code == 0
    assert "\x1b" not in shown.out
    lines, _, gloss = shown.out.partition("\n\n")
    assert [int(line.split()[1]) for line in lines.splitlines()] == list(
        range(1, result["stats"]["forwards"] + 1)
    )
    kept = re.findall(r"kept (\d+) of (\d+) drafted", lines)
    stats = result["stats"]
    assert sum(int(one) for one, _ in kept) == stats["accepted_tokens"]
    assert sum(int(num) for _, num in kept) == stats["draft_tokens"] > 0
    assert f"{stats['accepted_tokens']} of {stats['draft_tokens']} drafts kept" in gloss


def test_a_terminal_sees_the_canvas_fill_up_again(run, write_trace, terminal):
    path, result = write_trace(*MASKED)
    shown = ANSI.sub("", run("trace", path, "--delay", 0).out)
    *frames, last, _ = shown.split("forward ")
    assert list(dict.fromkeys(frame.count("_") for frame in frames)) == [5, 4, 3, 2, 1, 0]
    assert result["text"] in " ".join(last.split())


def test_replay_shows_what_watching_showed(run, write_trace):
    path, _ = write_trace(*LOOKUP)
    watched = run("generate", PROMPT, *LOOKUP, "--watch", "--watch-delay", 0).out
    assert run("trace", path).out.endswith(watched)


def test_keys_step_on_and_back(run, write_trace, terminal, monkeypatch):
    path, _ = write_trace(*MASKED)
    keys = iter([" ", " ", "b", " ", "q"])
    monkeypatch.setattr("typer.getchar", lambda: next(keys))
    stdin = io.StringIO()
    stdin.isatty = lambda: True
    frames = ANSI.sub("", run("trace", path, "--step", stdin=stdin).out).split("q: quit")
    assert [frame.count("_") for frame in frames[:5]] == [5, 4, 3, 4, 3]


def test_a_terminal_sees_guesses_before_they_are_committed(run, tmp_path, terminal):
    header = {"type": "header", "prompt_tokens": [1]}
    events = [
        {"type": "commit", "forward": 1, "positions": [1], "tokens": [5], "texts": [" Ana"]},
        {"type": "guess", "forward": 2, "positions": [2], "tokens": [6], "texts": [" Ben"]},
        {"type": "commit", "forward": 3, "positions": [2], "tokens": [7], "texts": [" Cleo"], "revised": [0]},
    ]
    path = tmp_path / "guesses.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [header, *events]))
    shown = ANSI.sub("", run("trace", path, "--delay", 0).out)
    assert shown.index("Ana Ben") < shown.index("Ana Cleo")
    assert shown.count("Ben") == 1


def test_stepping_needs_a_terminal(run, write_trace):
    path, _ = write_trace(*MASKED)
    result = run("trace", path, "--step")
    assert result.code == 2
    assert "--step" in result.err


def test_html_holds_the_events_of_the_trace(run, write_trace, tmp_path):
    path, _ = write_trace(*LOOKUP)
    page = tmp_path / "page.html"
    shown = run("trace", path, "--html", page)
    assert (shown.code, shown.out) == (0, "")
    data = json.loads(re.search(r'id="trace">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    header, *events, end = [json.loads(line) for line in path.read_text().splitlines()]
    assert data["header"] == header
    assert [event for one in data["passes"] for event in one] == events
    assert data["end"] == end


@pytest.mark.browser
@pytest.mark.parametrize("args", [LOOKUP, MASKED], ids=["drafts", "canvas"])
def test_the_page_of_a_real_run_ends_with_its_text(run, write_trace, tmp_path, page, args):
    path, result = write_trace(*args)
    run("trace", path, "--html", tmp_path / "page.html")
    page.goto((tmp_path / "page.html").as_uri())
    for _ in range(result["stats"]["forwards"]):
        page.click("#next")
    assert page.is_disabled("#next")
    assert page.text_content("#canvas") == result["text"]


def test_a_trace_that_was_cut_short_is_replayed_and_said_so(run, write_trace):
    path, _ = write_trace(*LOOKUP)
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-2]))
    shown = run("trace", path)
    assert shown.code == 0
    assert "cut short" in shown.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none.jsonl"], "cannot read"),
        (["{path}", "--html", "{path}"], "another file"),
        (["{path}", "--html", "{path}/page.html"], "cannot write"),
    ],
)
def test_misuse_is_one_line(run, write_trace, args, message):
    path, _ = write_trace(*MASKED)
    result = run("trace", *(arg.format(path=path) for arg in args))
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert path.read_text().startswith('{"type": "header"')
