"""`chordal trace`: replay what `generate --trace` wrote, here or in a browser."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chordal.cli.console import is_terminal, make_console, note
from chordal.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from chordal.cli.canvas import Canvas
    from chordal.trace import Trace, TracedEvent

EXAMPLES = """\b
Examples:
  chordal trace trace.jsonl
  chordal trace trace.jsonl --delay 0.5
"""

_KEYS = "any key: next | b or left: back | q: quit"
_BACK, _QUIT = ("b", "\x7f", "\x1b[D", "\x1bOD"), ("q", "\x03", "\x04", "\x1b")


def trace(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Written by chordal generate --trace.")],
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a page that replays it in a browser instead.")
    ] = None,
    delay: Annotated[
        float, typer.Option(metavar="S", min=0, help="Seconds to wait after a forward pass.")
    ] = 0.2,
    step: Annotated[bool, typer.Option("--step", help="Wait for a key after each forward pass.")] = False,
) -> None:
    """Replay a trace on the terminal, or write it as a page."""
    from chordal.trace import read_trace

    read = read_trace(file)
    if html is not None:
        _write_html(read, file, html)
        return
    console = make_console(sys.stdout)
    if is_terminal(sys.stdout) and (not step or sys.stdin.isatty()):
        _play(read, console, None if step else delay)
    elif step:
        raise InputError("--step waits for keys of a terminal; leave it out where there is none.")
    else:
        _print_lines(read)
        print()
    _print_result(read, console)


def _write_html(trace: Trace, source: str, path: str) -> None:
    from chordal.replay import replay_page

    if Path(path).exists() and Path(path).samefile(source):
        raise InputError(f"{path} holds the trace; write the page to another file.")
    try:
        Path(path).write_text(replay_page(trace), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}.") from None
    note(f"wrote {path}; open it in a browser")


def _play(trace: Trace, console: Console, delay: float | None) -> None:
    """Draw pass after pass; without a delay, wait for a key after each."""
    from rich.live import Live

    passes = trace.passes()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        at = 0
        while at < len(passes):
            canvas = _canvas(trace, passes[: at + 1])
            live.update(canvas.frame(console, _KEYS if delay is None else ""), refresh=True)
            if delay is not None:
                time.sleep(delay)
                at += 1
                continue
            key = typer.getchar()
            if key in _QUIT:
                return
            at = max(0, at - 1) if key in _BACK else at + 1


def _canvas(trace: Trace, passes: list[list[TracedEvent]]) -> Canvas:
    """Give the canvas as it is after some passes."""
    from chordal.cli.canvas import Canvas

    canvas = Canvas(trace.num_prompt, set(trace.header.get("special_tokens", [])))
    for events in passes:
        canvas.next_pass()
        for event in events:
            canvas.take(event)
    return canvas


def _print_lines(trace: Trace) -> None:
    """Print one line a forward pass: what was drafted, what became of it, what is new."""
    from chordal.trace import visible

    for events in trace.passes():
        others = "".join(f", {name} {count}" for name, count in events[0].forwards.items())
        parts = [f"forward {events[0].forward:>4}{others}"]
        for event in events:
            text = "".join(map(visible, event.texts))
            if event.kind == "draft":
                shape = " in a tree" if event.parents is not None else ""
                kept = "".join(visible(event.texts[index]) for index in event.kept)
                parts.append(f"kept {len(event.kept)} of {len(event.tokens)} drafted{shape}:{kept or ' -'}")
            elif event.kind == "guess":
                revised = f", {len(event.revised)} revised" if event.revised else ""
                parts.append(f"{len(event.tokens)} guessed{revised}:{text}")
            else:
                parts.append(f"{len(event.tokens)} committed:{text}")
        print(" | ".join(parts))


def _print_result(trace: Trace, console: Console) -> None:
    canvas, end = _canvas(trace, trace.passes()), trace.end
    stop = canvas.end
    if end is not None:
        stop = min(stop, trace.num_prompt + end["stats"]["committed_tokens"])
    if is_terminal(sys.stdout):
        console.print(canvas.text(stop))
    else:
        console.print(canvas.gloss(stop, console.width))
    console.print(canvas.status(None if end is None else end["stats"]), style="dim")
    if end is None:
        note("the trace has no end: the run was cut short")
