from __future__ import annotations

import re

PROMPT = "copy: Ana Ben Cleo"
MASKED = ["--model", "tiny-mdm", "--max-new-tokens", 6, "--ignore-eos", "--watch", "--watch-delay", 0]
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_pipe_gets_each_token_above_the_number_of_its_forward_pass(run):
    shown = run("generate", PROMPT, *MASKED)
    assert shown.code == 0
    assert "\x1b" not in shown.out
    *_, numbers, status = shown.out.splitlines()
    assert sorted(map(int, numbers.split())) == [1, 2, 3, 4, 5, 6]
    assert status == "forward 6 | 6 tokens | 1.00 tokens/forward"


def test_numbers_stand_under_the_tokens_they_belong_to(run):
    tokens, numbers, _ = run("generate", PROMPT, *MASKED).out.splitlines()
    for start in [match.start() for match in re.finditer(r"\d+", numbers)]:
        assert tokens[start] != " "
        assert start == 0 or tokens[start - 1] == " "


def test_terminal_shows_the_canvas_fill_up(run, terminal):
    shown = ANSI.sub("", run("generate", PROMPT, *MASKED).out)
    # The result is printed once more behind the last frame.
    *frames, result, _ = shown.split("forward ")
    left = dict.fromkeys(frame.count("_") for frame in frames)
    assert list(left) == [5, 4, 3, 2, 1, 0]
    assert "_" not in result


def test_terminal_colours_tokens_by_forward_pass(run, terminal):
    assert len(set(re.findall(r"\x1b\[(3[1-6])m", run("generate", PROMPT, *MASKED).out))) > 2


def test_terminal_without_colours_still_gets_the_canvas(run, terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    shown = run("generate", PROMPT, *MASKED).out
    assert not re.search(r"\x1b\[3[1-6]m", shown)
    assert "forward 6 | 6 tokens" in shown


def test_drafts_are_shown_with_what_was_kept_of_them(run, terminal):
    lookup = ["--decoder", "prompt_lookup", "--max-new-tokens", 12, "--watch", "--watch-delay", 0]
    shown = ANSI.sub("", run("generate", "copy: " + "Ana Ben " * 6, *lookup).out)
    assert "draft" in shown
    assert "drafts kept" in shown


def test_of_a_draft_tree_the_kept_tokens_are_shown(run, terminal):
    watch = ["--max-new-tokens", 12, "--ignore-eos", "--watch", "--watch-delay", 0]
    shown = ANSI.sub(
        "", run("generate", "copy: Ana Ben", "--decoder", "rsd", "--draft", "tiny-ar", *watch).out
    )
    assert re.search(r"draft tree of \d+, kept: \S", shown)


def test_canvas_taller_than_the_terminal_is_cut_not_scrolled(run, terminal, monkeypatch):
    monkeypatch.setenv("LINES", "6")
    monkeypatch.setenv("COLUMNS", "20")
    args = ["--max-new-tokens", 60, "--ignore-eos", "--watch", "--watch-delay", 0]
    shown = run("generate", PROMPT, *args).out
    # Each redraw goes up by the height of the frame before it.
    heights = [len(up) for up in re.findall(r"(?:\x1b\[1A\x1b\[2K)+", shown)]
    assert heights
    assert max(heights) // len("\x1b[1A\x1b[2K") < 6
