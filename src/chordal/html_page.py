"""Self-contained HTML pages: one file that holds its style, its script and its data, and fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from importlib import resources
from typing import Any

from chordal import strict_json

# In a script element "</script>" and "<!--" end or change what follows, wherever they stand.
_ESCAPED = str.maketrans({"<": r"\u003c", ">": r"\u003e", "&": r"\u0026"})


def make_page(package: str, name: str, *, title: str, data: Any) -> str:
    """Fill NAME.html of a package with NAME.css, NAME.js and data.

    The template has {{title}}, {{policy}}, {{style}}, {{script}} and {{data}}, each once: the last three
    stand alone inside a style element, a script element and one of type application/json. The policy is
    that the page asks the network for nothing and that no script but NAME.js runs, whatever the data hold.

    Args:
        package: Where the three files are, e.g. `__package__`.
        name: Their name without the ending.
        title: Any text.
        data: Plain values; numbers that are not finite become text.
    """
    template, style, script = (
        (resources.files(package) / f"{name}.{ending}").read_text(encoding="utf-8")
        for ending in ("html", "css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        # A lone surrogate, which a text from a file may hold, has no other form.
        "title": html.escape(title).encode("ascii", "xmlcharrefreplace").decode(),
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "style": style,
        "script": script,
        "data": strict_json.dumps(data, ensure_ascii=True).translate(_ESCAPED),
    }
    # All at once: what a part holds is never taken for a mark.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)
