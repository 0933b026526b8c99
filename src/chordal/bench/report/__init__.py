"""The report of a benchmark: `report.html`, one page that needs nothing else, and `report.md`.

Both show what the folder's files say and compute no figure of their own; the page carries the rows it
draws as JSON.
"""

from __future__ import annotations

import os
from pathlib import Path

from chordal.bench.report.content import read
from chordal.bench.report.markdown import to_markdown
from chordal.bench.report.page import to_html
from chordal.errors import InputError


def write(directory: str | os.PathLike[str]) -> list[Path]:
    """Write `report.html` and `report.md` into the folder of a benchmark, over those that are there.

    Args:
        directory: Holds conditions.json and results.jsonl; summary.json and runs.jsonl are read if there.

    Returns:
        The two paths, the page first.

    Raises:
        InputError: It is not the folder of a benchmark, a file is damaged, or it cannot be written.
    """
    content = read(directory)
    written = []
    for name, text in (("report.html", to_html(content)), ("report.md", to_markdown(content))):
        path = Path(directory) / name
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}.") from None
        written.append(path)
    return written
