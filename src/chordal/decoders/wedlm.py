"""WeDLM's decoding: masks under plain causal attention, known tokens fed first, a window that streams.

Source: WeDLM (arXiv 2512.22737). The rows of a pass stand in another order than the text: what is known
comes first, then the masks, and positions stay those of the text. So a mask sees every known token,
those behind it too, and the leading known rows are exactly what a causal prefill would cache.
Notation: window_length is W, entropy_threshold is tau, distance_penalty is lambda.

Promise: approximate. entropy_threshold=None commits one token a pass: the model's own slow reference.
The cache is exact.
Cost: one pass for one to W tokens. It feeds the W positions beyond the leading known ones and those of
these that are not yet cached; a token behind a gap is fed again until the gap is closed.

Departs from the published engine: a token is committed when it is filled, not when it is cached, so
decoding ends a pass earlier; nothing is filled behind the length limit, where published code fills
tokens that the last ones then see; the prompt is fed with the first masks, which is the same; the mask
token has no probability; temperature comes before truncation, as everywhere in Chordal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chordal.decoders.decoder import Decoder, Decoding
from chordal.errors import InputError
from chordal.forward import Causal, Forward
from chordal.ops.unmask import above_threshold
from chordal.sequence import UNCOMMITTED, Sequence


@dataclass(frozen=True, kw_only=True)
class WeDLMConfig:
    """Settings of `wedlm`; the defaults are the published engine's."""

    entropy_threshold: float | None = 0.4
    """Commit every position with less entropy (nats) than this (tau), at least 0; None is one a pass."""
    distance_penalty: float = 0.02
    """Added to the entropy for each position from the leftmost mask on (lambda), at least 0."""
    window_length: int = 16
    """Positions beyond the leading known ones that a pass feeds (W), at least 1."""

    def __post_init__(self) -> None:
        if self.entropy_threshold is not None and not self.entropy_threshold >= 0:
            raise InputError(f"entropy_threshold must be at least 0; got {self.entropy_threshold}.")
        if not 0 <= self.distance_penalty < float("inf"):
            raise InputError(
                f"distance_penalty must be a finite number of at least 0; got {self.distance_penalty}."
            )
        if self.window_length < 1:
            raise InputError(f"window_length must be at least 1; got {self.window_length}.")


class WeDLM(Decoder):
    """Fill a window of masks that moves on with the committed prefix."""

    name = "wedlm"
    family = "diffusion"
    promise = "approximate"
    exact_when = "entropy_threshold = none"
    needs = ("masked_causal",)
    paper = "arXiv 2512.22737"
    Config = WeDLMConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence; the first pass feeds the prompt too."""
        config: WeDLMConfig = self.config
        num_cached = 0
        while not seq.done:
            # Refill: W positions lie beyond the leading known ones.
            end = min(seq.frontier + config.window_length, seq.limit)
            seq.open_canvas(end)

            # Reorder: the known tokens that are not cached, then the masks.
            #     text    A B . . E .        A and B are leading, E stands behind a gap
            #     slot    A B E . . .        next to the cache; position 4 of the text is E's
            known = np.flatnonzero(seq.committed_at[:end] != UNCOMMITTED)
            masked = seq.masked(seq.frontier, end)
            positions = np.concatenate([known[num_cached:], masked])
            contexts = (seq.tokens[known],) * len(masked) if seq.law.reads_context else None

            # A position is drawn anew until it is committed, but no draw decides whether it is: one
            # random number a position does.
            reading = yield Forward(
                tokens=seq.tokens[positions],
                positions=positions,
                slots=num_cached + np.arange(len(positions)),
                sees=Causal(),
                read=seq.sample(
                    np.arange(len(known) - num_cached, len(positions)),
                    masked,
                    scores=("entropy",),
                    contexts=contexts,
                ),
            )

            # Cache: the leading rows saw the cache and each other only. The next pass overwrites the rest.
            num_cached = seq.frontier

            # Commit H + lambda d < tau, or the lowest; d is counted from the leftmost mask.
            penalized = reading.entropy + config.distance_penalty * (masked - masked[0])
            tau = -np.inf if config.entropy_threshold is None else config.entropy_threshold
            chosen = np.sort(above_threshold(-penalized, float(np.nextafter(-tau, np.inf))))
            seq.commit(masked[chosen], reading.tokens[chosen], confidence=reading.confidence(chosen))
