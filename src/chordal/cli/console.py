"""Standard streams: terminals told from pipes, files to write, notes, progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from chordal.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Wide enough for every table we print: lines that a program or a file reads are never wrapped.
_PIPE_WIDTH = 160


def is_terminal(stream: TextIO) -> bool:
    """Whether somebody watches a stream that can move its cursor and show colours."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def make_console(stream: TextIO) -> Console:
    """Make a rich console that draws in colour and moves the cursor on a terminal only."""
    from rich.console import Console

    watched = is_terminal(stream)
    return Console(
        file=stream,
        # Not left to rich, which lets environment variables turn colours on in a pipe.
        force_terminal=watched,
        width=None if watched else _PIPE_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


def make_table(
    columns: Mapping[str, Callable[[Any], str]], rows: Iterable[Any], *, words: Collection[str]
) -> Table:
    """Make a plain table; numbers stand on the right.

    Args:
        columns: What makes the cell of a row, by header.
        rows: What the cells are made of.
        words: Headers of columns that hold words, which stand on the left.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in columns:
        table.add_column(header, justify="left" if header in words else "right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def open_output(path: str) -> TextIO:
    """Open a file to write; what it holds stays until the caller truncates it.

    Raises:
        InputError: It cannot be written.
    """
    try:
        return Path(path).open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}.") from None


def note(message: str) -> None:
    """Print a line that is not part of the result."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(total: int | None, unit: str, *, shown: bool = True) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr if that is a terminal.

    Args:
        total: Units until the end, None if unknown.
        unit: What is counted.
        shown: Whether to show it at all.

    Yields:
        A function to call with how far it is and, optionally, a few words and a total known only now.
    """
    if not (shown and is_terminal(sys.stderr)):
        yield lambda done, words="", total=None: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit} {{task.fields[words]}}"),
        TimeRemainingColumn(),
        console=make_console(sys.stderr),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=total, words="")
        yield lambda done, words="", total=total: bar.update(task, completed=done, total=total, words=words)
