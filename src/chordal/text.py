"""Turn committed tokens into text as they come, never half a character nor part of a stop string."""

from __future__ import annotations

from chordal.sequence import Sequence

_REPLACEMENT = "\ufffd"


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
        text = self.seq.text if self.seq.done else self._certain()
        new = text[self._given :]
        self._given += len(new)
        return new

    def _certain(self) -> str:
        text = self.seq.text
        # A character spread over tokens decodes to replacements at the end until it is complete.
        end = len(text.rstrip(_REPLACEMENT))
        for stop in self.seq.stop.stop_strings:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if stop.startswith(text[end - size : end]):
                    end -= size
                    break
        return text[: max(end, self._given)]
