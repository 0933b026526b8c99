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


def make_page(package: str, name: str, *, title: str, data: Any, asks_server: bool = False) -> str:
    """Fill NAME.html of a package with NAME.css and NAME.js, behind what all pages share, and data.

    The template has {{title}}, {{policy}}, {{style}}, {{script}} and {{data}}, each once: the last three
    stand alone inside a style element, a script element and one of type application/json. The policy is
    that the page asks the network for nothing and that no script but this one runs, whatever the data hold.

    Args:
        package: Where the three files are, e.g. `__package__`.
        name: Their name without the ending.
        title: Any text.
        data: Plain values; numbers that are not finite become text.
        asks_server: Let the script ask the server that the page came from, and no other, and give the page an
            icon, which without one browsers would ask for.
    """
    template, style, script = (
        (resources.files(package) / f"{name}.{ending}").read_text(encoding="utf-8")
        for ending in ("html", "css", "js")
    )
    shared_style, shared_script = (
        resources.files("chordal").joinpath(f"html_page.{ending}").read_text(encoding="utf-8")
        for ending in ("css", "js")
    )
    script = shared_script + script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        # A lone surrogate, which a text from a file may hold, has no other form.
        "title": html.escape(title).encode("ascii", "xmlcharrefreplace").decode(),
        "policy": "; ".join(
            [
                "default-src 'none'",
                "style-src 'unsafe-inline'",
                f"script-src 'sha256-{digest}'",
                *(["connect-src 'self'", "img-src data:"] if asks_server else []),
                "base-uri 'none'",
                "form-action 'none'",
            ]
        ),
        "style": shared_style + style,
        "script": script,
        "data": strict_json.dumps(data, ensure_ascii=True).translate(_ESCAPED),
    }
    # All at once: what a part holds is never taken for a mark.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)
