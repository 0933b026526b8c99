"""Plain decoding of causal models: one token a forward pass, the reference every exact decoder meets.

Promise: exact, by definition. Cost: one forward pass a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chordal.decoders.decoder import Decoder, Decoding
from chordal.forward import Causal, Forward
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """No settings: temperature, truncation and stops belong to the request."""


class Autoregressive(Decoder):
    """Feed what is not yet cached, draw the next token, repeat."""

    name = "autoregressive"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    constrains = True
    paper = "-"
    Config = AutoregressiveConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence; the first pass feeds the prompt, each later one the newest token."""
        num_cached = 0
        while not seq.done:
            positions = np.arange(num_cached, seq.frontier)
            last, following = np.array([len(positions) - 1]), np.array([seq.frontier])
            contexts = (seq.committed,) if seq.law.reads_context else None

            reading = yield Forward(
                tokens=seq.committed[num_cached:],
                positions=positions,
                slots=positions,
                sees=Causal(),
                read=seq.sample(last, following, contexts=contexts),
            )

            num_cached = seq.frontier
            seq.append(reading.tokens, confidence=reading.confidence())
