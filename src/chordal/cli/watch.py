"""The live canvas of `generate --watch`: tokens where and when they are committed."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from chordal.cli.console import is_terminal, make_console
from chordal.trace import token_texts

if TYPE_CHECKING:
    from rich.text import Text

    from chordal.generation import Generation
    from chordal.sequence import Event, Sequence

# Neighbouring forward passes differ, and no terminal shows one of these on its own background.
_PALETTE = ("cyan", "yellow", "green", "magenta", "blue", "red")
_MASKED = " _"
_FRAME_ROWS = 3  # status, draft, cursor


class CanvasView:
    """Shows a sequence as it is decoded; a listener of `Model.stream` and a context manager.

    On a terminal the canvas is redrawn at each forward pass. Elsewhere nothing is drawn until
    `finish` prints every token above the number of the forward pass that committed it.

    Args:
        tokenizer: Of the model.
        delay: Seconds to wait after each forward pass; small models are too fast to watch.
    """

    def __init__(self, tokenizer: Any, delay: float) -> None:
        from rich.live import Live

        self._tokenizer, self._delay = tokenizer, delay
        self._special = set(tokenizer.all_special_ids)
        self._texts: dict[int, str] = {}
        self._draft: Event | None = None
        self._forward = 0
        self._console = make_console(sys.stdout)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> CanvasView:
        if is_terminal(sys.stdout):
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, seq: Sequence, event: Event) -> None:
        """Take an event in, and draw it."""
        if event.kind == "draft":
            self._draft = event
            return
        texts = token_texts(self._tokenizer, event.tokens.tolist())
        self._texts.update(zip(event.positions.tolist(), texts, strict=True))
        if self._live.is_started:
            if event.forward != self._forward and self._forward:
                time.sleep(self._delay)
            self._live.update(self._frame(seq), refresh=True)
        self._forward, self._draft, self._seq = event.forward, None, seq

    def finish(self, result: Generation) -> None:
        """Print the result once more, to stay."""
        self._live.stop()
        end = self._seq.num_prompt + len(result.tokens)
        if is_terminal(sys.stdout):
            self._console.print(self._canvas(self._seq, end))
        else:
            self._console.print(self._gloss(end))
        self._console.print(_status(result.stats), style="dim")

    def _frame(self, seq: Sequence) -> Text:
        """Draw the canvas, the last draft and the counters, cut to the height of the terminal."""
        from rich.text import Text

        canvas = self._canvas(seq, seq.canvas_end)
        # What does not fit is cut above, where autoregressive text no longer changes.
        lines = canvas.wrap(self._console, self._console.width)
        rows = max(1, self._console.height - _FRAME_ROWS)
        # Every position counts here; the result counts those up to its end.
        counters = {**seq.stats.to_dict(), "committed_tokens": len(self._texts)}
        below = [Text(_status(counters), "dim")]
        if self._draft is not None:
            below.append(self._draft_line(seq, self._draft))
        for line in below:
            line.truncate(self._console.width, overflow="ellipsis")
        return Text("\n").join([*lines[-rows:], *below])

    def _canvas(self, seq: Sequence, end: int) -> Text:
        from rich.text import Text

        canvas = Text()
        for position in range(seq.num_prompt, end):
            text = self._texts.get(position, _MASKED)
            is_text = position in self._texts and seq.tokens[position] not in self._special
            style = _PALETTE[seq.committed_at[position] % len(_PALETTE)] if is_text else "dim"
            # The blank that a token begins with parts it from the one before.
            canvas.append(text.removeprefix(" ") if position == seq.num_prompt else text, style)
        return canvas

    def _draft_line(self, seq: Sequence, draft: Event) -> Text:
        """Write a draft: what was kept plainly, what was rejected struck out and left out of a tree."""
        from rich.text import Text

        if draft.parents is not None:
            start = int(draft.positions[0])
            kept = seq.tokens[start : start + draft.num_accepted].tolist()
            label = f"draft tree of {len(draft.tokens)}, kept: "
            return Text.assemble(
                (label, "dim"), "".join(map(_visible, token_texts(self._tokenizer, kept))) or "-"
            )
        texts = [_visible(text) for text in token_texts(self._tokenizer, draft.tokens.tolist())]
        kept, rejected = "".join(texts[: draft.num_accepted]), "".join(texts[draft.num_accepted :])
        return Text.assemble(("draft ", "dim"), kept, (rejected, "dim strike"))

    def _gloss(self, end: int) -> Text:
        """Write each token above the number of its forward pass, wrapped together."""
        from rich.text import Text

        rows: list[str] = []
        above, below = "", ""
        for position in range(self._seq.num_prompt, end):
            text, forward = _visible(self._texts[position].strip(" ")), str(self._seq.committed_at[position])
            width = max(len(text), len(forward)) + 1
            if above and len(above) + width > self._console.width:
                rows += [above.rstrip(), below.rstrip()]
                above, below = "", ""
            above, below = above + text.ljust(width), below + forward.ljust(width)
        return Text("\n".join([*rows, above.rstrip(), below.rstrip()]))


def _visible(text: str) -> str:
    return text.replace("\n", "\\n").replace("\t", "\\t")


def _status(stats: dict[str, Any]) -> str:
    tokens, forwards = stats["committed_tokens"], stats["forwards"]
    parts = [
        f"forward {forwards}",
        f"{tokens} tokens",
        f"{tokens / forwards if forwards else 0:.2f} tokens/forward",
    ]
    if stats["draft_tokens"]:
        parts.append(f"{stats['accepted_tokens']} of {stats['draft_tokens']} drafts kept")
    return " | ".join(parts)
