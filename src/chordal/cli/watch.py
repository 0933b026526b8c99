"""The live canvas of `generate --watch`: tokens where and when they are committed."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from chordal.cli.canvas import Canvas
from chordal.cli.console import is_terminal, make_console
from chordal.trace import Tracer

if TYPE_CHECKING:
    from chordal.generation import Generation
    from chordal.sequence import Event, Sequence


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

        self._delay, self._special = delay, set(tokenizer.all_special_ids)
        self._tracer = Tracer(tokenizer)
        self._canvas: Canvas | None = None
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
        if self._canvas is None:
            self._canvas, self._num_prompt = Canvas(seq.num_prompt, self._special), seq.num_prompt
        self._canvas.take(self._tracer(seq, event))
        if event.kind == "draft":
            return
        if self._live.is_started:
            if event.forward != self._forward and self._forward:
                time.sleep(self._delay)
            self._live.update(self._canvas.frame(self._console), refresh=True)
        self._canvas.next_pass()
        self._forward = event.forward

    def finish(self, result: Generation) -> None:
        """Print the result once more, to stay."""
        self._live.stop()
        if self._canvas is None:
            return
        end = self._num_prompt + len(result.tokens)
        if is_terminal(sys.stdout):
            self._console.print(self._canvas.text(end))
        else:
            self._console.print(self._canvas.gloss(end, self._console.width))
        self._console.print(self._canvas.status(result.stats), style="dim")
