"""The page: a template, its style and its script in one file, with the content as JSON inside."""

from __future__ import annotations

import dataclasses

from chordal.bench.report.content import Content
from chordal.html_page import make_page


def to_html(content: Content) -> str:
    """Give the whole page as text."""
    title = f"Benchmark of {content.conditions['model']}"
    return make_page(__package__, "report", title=title, data=dataclasses.asdict(content))
