"""Turn committed tokens into text as they come, never half a character nor part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from chordal.forward import Ints

if TYPE_CHECKING:
    from chordal.sequence import Sequence

_REPLACEMENT = "\ufffd"
_MAX_WINDOW = 8  # tokens that are decoded again with what is new
_MIN_WINDOW = 4  # a character begins at one of the last four bytes
_MAX_BLANK = 16  # tokens without a text that are kept at the start, as the first blank is such a one
_MAX_HALF = 3  # U+FFFD that half a character may show as, one for each byte


class Detokenizer:
    """The text of tokens that keep coming, at a cost that does not grow with what came before.

    A short window of the last tokens is decoded with and without the new ones, and the difference is their
    text: what a token means may depend on the one before it, and decoding may drop a space at the start.
    Text that is certain never changes: where decoding all tokens at once would rewrite it, it stands. (Half a
    character makes some tokenizers forget the whole ones before it, others tidy up spaces.) Else the text is
    that of all tokens decoded at once.

    `DecodeStream` of tokenizers does not serve: it fails where text would be rewritten, gives no text of half
    a character at the end, and takes no detokenizer of one's own.

    Attributes:
        num_tokens: How many have come.
        num_certain: Characters that will not change.
    """

    def __init__(self, detokenize: Callable[[Ints], str]) -> None:
        self._detokenize = detokenize
        self.num_tokens = 0
        self._certain = ""
        self._pending = ""  # half a character
        self._window = np.zeros(0, np.int64)
        self._prefix = ""  # what the window decodes to, but for what is pending

    @property
    def num_certain(self) -> int:  # noqa: D102
        return len(self._certain)

    @property
    def text(self) -> str:
        """The text of all tokens; half a character at its end shows as U+FFFD."""
        return self._certain + self._pending

    def certain(self, start: int, end: int | None = None) -> str:
        """Give the characters `start <= at < end` of what is certain."""
        return self._certain[start:end]

    def since(self, start: int) -> str:
        """Give the text behind so many characters, which are certain."""
        return self._certain[start:] + self._pending

    def extend(self, tokens: Ints) -> None:
        """Add tokens; how they are cut into calls makes no difference unless spaces are tidied up."""
        if not len(tokens):
            return
        window = np.concatenate([self._window, tokens])
        seen = self._detokenize(window)
        if len(tokens) > 1 and _REPLACEMENT in seen[len(self._prefix) :]:
            for at in range(len(tokens)):
                self.extend(tokens[at : at + 1])
            return
        if not seen.startswith(self._prefix):  # rewritten
            self._certain += self._pending
            window, self._prefix, self._pending = tokens, "", ""
            seen = self._detokenize(window)
        self.num_tokens += len(tokens)
        is_same = seen == self._prefix + self._pending and (seen or len(window) > _MAX_BLANK)
        if is_same and not self._detokenize(tokens):
            return  # they have no text, so the window need not hold them
        new = seen[len(self._prefix) :]
        num_held = min(len(new) - len(new.rstrip(_REPLACEMENT)), _MAX_HALF)
        num_sure = len(new) - num_held
        self._certain, self._pending = self._certain + new[:num_sure], new[num_sure:]
        self._window, self._prefix = window, seen[: len(seen) - num_held]
        if len(window) > _MAX_WINDOW:
            self._shorten()

    def _shorten(self) -> None:
        """Let the window begin later, but before the last character that is certain."""
        seen = self._prefix + self._pending
        for num in range(_MIN_WINDOW, _MAX_WINDOW):
            tail = self._detokenize(self._window[-num:])
            # It may begin inside of a character, which changes nothing behind it.
            rest = tail if seen.endswith(tail) else tail.lstrip(_REPLACEMENT)
            if len(rest) > len(self._pending) and seen.endswith(rest):
                self._window, self._prefix = self._window[-num:], tail[: len(tail) - len(self._pending)]
                return


class TextStream:
    """Gives the new text of a sequence each time it is asked.

    Only the longest committed prefix counts, so text once given never changes. Bytes that may be the
    start of a character, and text that may be the start of a stop string, are held back until more
    is committed or the sequence ends.

    Args:
        seq: The sequence; it must have a detokenizer.
    """

    def __init__(self, seq: Sequence) -> None:
        self.seq = seq
        self._given = 0  # characters

    def take(self) -> str:
        """Take the text that has become certain since the last call."""
        if self.seq.done:
            new = self.seq.text[self._given :]
        else:
            reader = self.seq.reader
            longest = max(map(len, self.seq.stop.stop_strings), default=1)
            start = max(0, reader.num_certain - longest + 1)
            num_held = _num_held(reader.certain(start), self.seq.stop.stop_strings)
            new = reader.certain(self._given, reader.num_certain - num_held)
        self._given += len(new)
        return new


def _num_held(text: str, stop_strings: Iterable[str]) -> int:
    """Count the characters at the end of a text that a stop string may begin with."""
    held = 0
    for stop in stop_strings:
        at = text.find(stop[0])
        while at >= 0 and not stop.startswith(text[at:]):
            at = text.find(stop[0], at + 1)
        if at >= 0:
            held = max(held, len(text) - at)
    return held
