"""Entropy Adaptive Decoding: a small model writes, a large one takes over while the text is uncertain.

Source: "Entropy Adaptive Decoding: Dynamic Model Switching for Efficient Inference" (arXiv 2502.06833).
Notation: threshold = tau, window = w, min_run = d_min.

Promise: approximate. Each token is drawn from the law of the model that writes it.
Cost: one pass of one model a token; after a switch that pass also feeds what the other model wrote.
Nothing is verified. The target may never run, so `forwards` may be 0.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

from chordal.cursor import Cursor
from chordal.decoders.decoder import Decoder, Decoding
from chordal.errors import InputError
from chordal.ops.switching import is_uncertain
from chordal.sequence import Sequence
from chordal.stats import TARGET


@dataclass(frozen=True, kw_only=True)
class EntropyAdaptiveConfig:
    """Settings of `entropy_adaptive`."""

    # The paper's thresholds are not known. Entropies, and so this number, belong to a pair of models.
    threshold: float = 0.5
    """Mean entropy in bits from which on the target writes (tau)."""
    threshold_down: float | None = None
    """Mean entropy in bits up to which the draft model writes, at most threshold; none: threshold."""
    window: int = 5
    """Tokens whose entropies are averaged (w), at least 1."""
    min_run: int = 10
    """Tokens a model writes before the other may take over (d_min), at least 1."""
    start: Literal["draft", "target"] = "draft"
    """Which model begins."""
    redo: bool = False
    """Whether the model that takes over draws again the token at which the switch was decided."""
    clear_window: bool = False
    """Whether the window is emptied at a switch."""

    def __post_init__(self) -> None:
        if self.threshold_down is not None and not self.threshold_down <= self.threshold:
            raise InputError(
                f"threshold_down must be at most threshold; got {self.threshold_down} and {self.threshold}."
            )
        if self.window < 1 or self.min_run < 1:
            raise InputError(f"window and min_run must be at least 1; got {self.window} and {self.min_run}.")


class EntropyAdaptive(Decoder):
    """Switch between two models by the rolling entropy of what they write."""

    name = "entropy_adaptive"
    family = "autoregressive"
    promise = "approximate"
    exact_when = 'start "target" and threshold 0'
    needs = ("causal",)
    constrains = True
    needs_models = ("draft",)
    paper = "arXiv 2502.06833"
    Config = EntropyAdaptiveConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence; a model first reads what the other wrote since it last ran."""
        config: EntropyAdaptiveConfig = self.config
        cursors = {name: Cursor(name) for name in (TARGET, "draft")}
        active, run = config.start, 0
        entropies: deque[float] = deque(maxlen=config.window)
        while not seq.done:
            # Write. The entropy is that of the raw logits: penalties and truncation would hide doubt.
            feed = cursors[active].feed(seq.committed)
            reading = yield feed.sample(seq, scores=("entropy",), of="raw")
            entropies.append(float(reading.entropy[0]) / math.log(2))

            # Decide who goes on: behind this token, or with this token, which is then not kept.
            following = active
            if run + (not config.redo) >= config.min_run:
                following = self._choose(sum(entropies) / len(entropies), active)
            is_switch = following != active
            if is_switch and config.redo:
                entropies.pop()
            else:
                seq.append(reading.tokens, confidence=reading.confidence())
                run += 1
            if is_switch:
                active, run = following, 0
                if config.clear_window:
                    entropies.clear()

    def _choose(self, entropy: float, active: Literal["draft", "target"]) -> Literal["draft", "target"]:
        config: EntropyAdaptiveConfig = self.config
        down = config.threshold if config.threshold_down is None else config.threshold_down
        was = active == TARGET
        return "target" if is_uncertain(entropy, was=was, up=config.threshold, down=down) else "draft"
