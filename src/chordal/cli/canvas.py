"""A text as it is decoded, drawn for the terminal: for `generate --watch` and `trace`."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

from chordal.trace import TracedEvent, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Neighbouring forward passes differ, and no terminal shows one of these on its own background.
_PALETTE = ("cyan", "yellow", "green", "magenta", "blue", "red")
_MASKED = " _"
_FRAME_ROWS = 3  # status, draft, cursor


class Canvas:
    """What is known of a text at a moment: committed tokens, guesses, the last draft, counters.

    Args:
        num_prompt: Length of the prompt.
        special_tokens: Ids of tokens that are no text.

    Attributes:
        end: One past the last position in use.
    """

    def __init__(self, num_prompt: int, special_tokens: Container[int]) -> None:
        self.end = self._num_prompt = num_prompt
        self._special = special_tokens
        self._committed: dict[int, tuple[str, int, bool]] = {}  # text, forward, whether it is special
        self._guessed: dict[int, str] = {}
        self._draft: TracedEvent | None = None
        self._forward = self._num_draft = self._num_kept = 0

    def take(self, event: TracedEvent) -> None:
        """Take an event in."""
        self._forward = event.forward
        self.end = max(self.end, event.canvas_end or 0)
        if event.kind == "draft":
            self._draft = event
            self._num_draft += len(event.tokens)
            self._num_kept += len(event.kept)
            return
        if event.kind == "guess":
            self._guessed = dict(zip(event.positions, event.texts, strict=True))
            return
        for position, token, text in zip(event.positions, event.tokens, event.texts, strict=True):
            self._committed[position] = text, event.forward, token in self._special
            self._guessed.pop(position, None)
        self.end = max([self.end, *(position + 1 for position in event.positions)])

    def next_pass(self) -> None:
        """Forget the draft: the events that follow are of another forward pass."""
        self._draft = None

    def frame(self, console: Console, note: str = "") -> Text:
        """Draw the canvas, the counters, the draft of this pass and a note, cut to the terminal's height."""
        from rich.text import Text

        # What does not fit is cut above, where autoregressive text no longer changes.
        end = max([self.end, *(position + 1 for position in self._guessed)])
        lines = self.text(end).wrap(console, console.width)
        rows = max(1, console.height - _FRAME_ROWS - bool(note))
        below = [Text(self.status(), "dim")]
        if self._draft is not None:
            below.append(_draft_line(self._draft))
        if note:
            below.append(Text(note, "dim"))
        for line in below:
            line.truncate(console.width, overflow="ellipsis")
        return Text("\n").join([*lines[-rows:], *below])

    def text(self, end: int) -> Text:
        """Draw what stands at the positions before `end`, coloured by forward pass, guesses dim."""
        from rich.text import Text

        canvas = Text()
        for position in range(self._num_prompt, end):
            text, style = self._guessed.get(position, _MASKED), "dim italic"
            if position in self._committed:
                text, forward, is_special = self._committed[position]
                style = "dim" if is_special else _PALETTE[forward % len(_PALETTE)]
            # The blank that a token begins with parts it from the one before.
            canvas.append(text.removeprefix(" ") if position == self._num_prompt else text, style)
        return canvas

    def gloss(self, end: int, width: int) -> str:
        """Write each token before `end` above the number of its forward pass, wrapped together."""
        rows: list[str] = []
        above, below = "", ""
        for position in range(self._num_prompt, end):
            text, number = _MASKED.strip(), ""
            if position in self._committed:
                text, forward, _ = self._committed[position]
                text, number = visible(text.strip(" ")), str(forward)
            column = max(len(text), len(number)) + 1
            if above and len(above) + column > width:
                rows += [above.rstrip(), below.rstrip()]
                above, below = "", ""
            above, below = above + text.ljust(column), below + number.ljust(column)
        return "\n".join([*rows, above.rstrip(), below.rstrip()])

    def status(self, stats: Mapping[str, Any] | None = None) -> str:
        """Write the counters: those of a result, or else of what has been taken in so far."""
        stats = stats or {
            "forwards": self._forward,
            "committed_tokens": len(self._committed),
            "draft_tokens": self._num_draft,
            "accepted_tokens": self._num_kept,
        }
        tokens, forwards = stats["committed_tokens"], stats["forwards"]
        parts = [
            f"forward {forwards}",
            f"{tokens} tokens",
            f"{tokens / forwards if forwards else 0:.2f} tokens/forward",
        ]
        if stats["draft_tokens"]:
            parts.append(f"{stats['accepted_tokens']} of {stats['draft_tokens']} drafts kept")
        return " | ".join(parts)


def _draft_line(draft: TracedEvent) -> Text:
    """Write a draft: what was kept plainly, what was rejected struck out and left out of a tree."""
    from rich.text import Text

    kept = "".join(visible(draft.texts[index]) for index in draft.kept)
    if draft.parents is not None:
        return Text.assemble((f"draft tree of {len(draft.tokens)}, kept: ", "dim"), kept or "-")
    rejected = "".join(map(visible, draft.texts[len(draft.kept) :]))
    return Text.assemble(("draft ", "dim"), kept, (rejected, "dim strike"))
