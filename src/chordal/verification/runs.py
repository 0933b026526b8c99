"""Decode many texts, count them, and note what failed."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from chordal.decoders.decoder import Decoder
from chordal.generation import Model
from chordal.sequence import Sequence


class Runs:
    """Decodes many texts, counts them, and notes which prompts the decoder failed on.

    Args:
        model: The model.
        num_texts: Texts to come, as far as known.
        on_text: See `verify`.
    """

    def __init__(self, model: Model, num_texts: int, on_text: Callable[[int, int, str], None]) -> None:
        self.model, self.num_texts, self.on_text = model, num_texts, on_text
        self.num_done = 0
        self.errors: dict[int, str] = {}

    def run(self, decoder: Decoder, seqs: Seq[Sequence], words: str) -> None:
        """Decode sequences, as many at once as the engine has rows."""
        engine, waiting = self.model.engine, list(seqs)
        try:
            for seq in seqs:
                engine.submit(decoder, seq)
            while engine.has_work:
                engine.step()
                num_waiting = len(waiting)
                waiting = [seq for seq in waiting if not seq.done]
                self.num_done += num_waiting - len(waiting)
                self.on_text(self.num_done, max(self.num_done, self.num_texts), words)
        finally:
            for seq in waiting:
                engine.cancel(seq)

    def run_plain(self, decoder: Decoder, seqs: Seq[Sequence], words: str) -> None:
        """Decode sequences of which none may fail."""
        self.run(decoder, seqs, words)
        for seq in seqs:
            if seq.error is not None:
                raise seq.error

    def has_text(self, prompt: int, seq: Sequence) -> bool:
        """Whether a sequence ended without an error; else note it."""
        if seq.error is not None:
            self.errors.setdefault(prompt, f"{type(seq.error).__name__}: {seq.error}")
        return seq.error is None
