from __future__ import annotations

import io

import pytest

from chordal.cli.console import is_terminal, make_console, open_output, progress
from chordal.errors import InputError


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_dumb_terminals_and_pipes_are_not_drawn_on(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert is_terminal(Terminal())
    assert not is_terminal(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(Terminal())


def test_colour_is_for_terminals_only(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for stream, coloured in ((Terminal(), True), (io.StringIO(), False)):
        make_console(stream).print("text", style="red")
        assert ("\x1b" in stream.getvalue()) == coloured


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    make_console(stream).print("text", style="red")
    assert stream.getvalue() == "text\n"


def test_progress_is_drawn_on_terminals_only(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for stream, drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        with progress(None, "prompts") as advance:
            advance(1)
            advance(2, "words", 2)
        assert bool(stream.getvalue()) == drawn


def test_opened_output_keeps_what_it_holds(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    open_output(str(path)).close()
    assert path.read_text() == "old"


def test_unwritable_output_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        open_output(str(tmp_path / "missing" / "out"))
    with pytest.raises(InputError, match="cannot write"):
        open_output(str(tmp_path))
