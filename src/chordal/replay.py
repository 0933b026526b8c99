"""Replay a trace in a browser: one page that holds everything and asks for nothing."""

from __future__ import annotations

import html
from importlib import resources

from chordal import strict_json
from chordal.trace import Trace


def replay_page(trace: Trace) -> str:
    """Make the page: play, step and scrub through the forward passes of a trace.

    Whatever the trace holds is data there, never markup: it stands as JSON without < > & and is only ever
    set as text.
    """
    header = trace.header
    data = {
        "header": header,
        "passes": [[event.record() for event in events] for events in trace.passes()],
        "end": trace.end,
    }
    encoded = strict_json.dumps(data, ensure_ascii=True)
    for character in "<>&":
        encoded = encoded.replace(character, f"\\u{ord(character):04x}")
    title = html.escape(f"{header.get('decoder')} on {header.get('model')}")
    title = title.encode("ascii", "xmlcharrefreplace").decode()
    page = resources.files("chordal").joinpath("replay.html").read_text(encoding="utf-8")
    head, mark, tail = page.partition("{{trace}}")
    assert mark, "the page has a place for the trace"
    return head.replace("{{title}}", title) + encoded + tail
