"""Replay a trace in a browser: one page that holds everything and asks for nothing."""

from __future__ import annotations

from chordal.html_page import make_page
from chordal.trace import Trace


def replay_page(trace: Trace) -> str:
    """Make the page: play, step and scrub through the forward passes of a trace.

    Whatever the trace holds is data there, never markup: it is only ever set as text.
    """
    header = trace.header
    data = {
        "header": header,
        "passes": [[event.record() for event in events] for events in trace.passes()],
        "end": trace.end,
    }
    title = f"{header.get('decoder')} on {header.get('model')} - Chordal trace"
    return make_page("chordal", "replay", title=title, data=data)
