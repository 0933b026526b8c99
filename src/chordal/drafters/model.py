"""Draft with a smaller model, one token a forward pass."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from chordal.cursor import Cursor
from chordal.drafters.draft import Draft, Drafter, Drafting, Outcome
from chordal.forward import Ints
from chordal.ops import sampling, tree
from chordal.ops.acceptance import Offers, without_replacement
from chordal.ops.randomness import Purpose
from chordal.sequence import Sequence


class ModelDrafter(Drafter):
    """Let another model write on: a chain, with the laws its tokens were drawn from if they are wanted.

    What that model has cached is found by comparing tokens, so it may sit out rounds in which somebody
    else drafts. A draft ends behind a stop token. Scope: one sequence, with the model's cache row.

    Args:
        seq: The sequence; its law is also the draft's.
        model: Which of the engine's models.
        min_confidence: A draft ends behind the first token that had less probability; the token stays,
            for to drop it by what it is would bend the law.
        offers: Acceptance rule of the drawn tokens. None draws each with the random number of whoever
            verifies, who keeps it if it draws the same.
        purpose: Which random numbers those are; "token" are the target's.
        schedule: "constant" drafts as far as it may; "heuristic" two tokens further after a draft that was
            kept whole, one less far after any other, from `start` on.
        start: Where that begins, at least 1.
    """

    def __init__(
        self,
        seq: Sequence,
        *,
        model: str = "draft",
        min_confidence: float = 0.0,
        offers: Offers | None = without_replacement,
        purpose: Purpose = "token",
        schedule: Literal["constant", "heuristic"] = "constant",
        start: int = 5,
    ) -> None:
        self.seq, self.cursor = seq, Cursor(model)
        self.min_confidence, self.offers, self.purpose = min_confidence, offers, purpose
        self.is_adaptive, self.length = schedule == "heuristic", start

    def propose(self, text: Ints, budget: int) -> Drafting:
        """Write at most `budget` tokens behind a text."""
        tokens, confidences = list[int](), list[float]()
        laws: dict[int, Tensor] = {}
        for ahead in range(min(budget, self.length) if self.is_adaptive else budget):
            feed = self.cursor.feed(np.concatenate([text, np.array(tokens, np.int64)]))
            if self.seq.law.is_greedy or self.offers is None:
                scores = ("probs",) if self.min_confidence else ()
                reading = yield feed.sample(self.seq, purpose=self.purpose, scores=scores, of="law")
                token, confidence = (
                    int(reading.tokens[0]),
                    1.0 if reading.probs is None else float(reading.probs[0]),
                )
            else:
                reading = yield feed.logits()
                law_1V = feed.under_law(reading, self.seq)
                laws[ahead - 1] = law_1V[0].double().softmax(0)
                uniform = torch.from_numpy(self.seq.uniforms(feed.following, "draft")).to(law_1V.device)
                token = int(sampling.draw(law_1V, uniform))
                confidence = float(laws[ahead - 1][token])
            tokens.append(token)
            confidences.append(confidence)
            if token in self.seq.stop.eos_ids or confidence < self.min_confidence:
                break
        chain = tree.chain(len(tokens))
        if not laws or self.offers is None:
            known = np.array(confidences) if self.seq.wants_confidence else None
            return Draft(np.array(tokens, np.int64), chain, confidence=known)
        return Draft(np.array(tokens, np.int64), chain, laws, self.offers)

    def observe(self, outcome: Outcome) -> None:
        """Adapt the length to how much of a draft was kept."""
        if len(outcome.draft):
            is_whole = len(outcome.kept) == len(outcome.draft)
            self.length = self.length + 2 if is_whole else max(1, self.length - 1)
