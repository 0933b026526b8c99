"""Draft with a model that is itself sped up by drafts."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from chordal.cursor import Cursor, Feed
from chordal.drafters.draft import NO_DRAFT, Draft, Drafter, Drafting
from chordal.forward import Forward, Ints, Reading
from chordal.ops import sampling, tree
from chordal.sequence import Sequence


class HierarchyDrafter(Drafter):
    """Let a model write at least so many tokens, several in a pass where another drafter guesses them.

    What it proposes is the model's own text, whatever the other one guesses: the most likely tokens, or
    those that its law gives with random numbers of their own. Scope: one sequence, with the model's cache
    row.

    Args:
        seq: The sequence; its law is also the model's.
        drafter: Who drafts for the model. It must go by the text alone: it is not told what became of its
            drafts, as lengths that depend on draws which are thrown away would bend the law.
        model: Which of the engine's models.
        min_draft: Tokens from which a draft is long enough, at least 1.
        num_draft: Longest path of a draft for the model, at least 0.
        acceptance: "ratio" keeps the laws that tokens are drawn from, for the ratio rule; "follow" draws them
            with the random numbers of the target.
    """

    def __init__(
        self,
        seq: Sequence,
        drafter: Drafter,
        *,
        model: str = "middle",
        min_draft: int = 6,
        num_draft: int = 10,
        acceptance: Literal["ratio", "follow"] = "ratio",
    ) -> None:
        self.seq, self.drafter, self.cursor = seq, drafter, Cursor(model)
        self.min_draft, self.num_draft = min_draft, num_draft
        self.keeps_laws = acceptance == "ratio" and not seq.law.is_greedy

    def propose(self, text: Ints, budget: int) -> Drafting:
        """Write `min_draft` to `min_draft` + `num_draft` tokens, at most `budget`, or up to a stop token."""
        tokens, is_ended = NO_DRAFT.tokens, False
        laws: dict[int, Tensor] = {}
        while len(tokens) < min(self.min_draft, budget) and not is_ended:
            # Guess. The model adds a token of its own to what it keeps.
            grown = np.concatenate([text, tokens])
            guess = yield from self.drafter.ask(grown, min(self.num_draft, budget - len(tokens) - 1))

            # Draw one token at the root and behind each guess, and follow what is drawn.
            drawn, law_NV = yield from self._draw(self.cursor.feed(grown, guess))
            kept = tree.follow_drawn(guess.tokens, guess.parents, drawn)
            rows = np.append(0, 1 + kept)
            ends = np.flatnonzero(np.isin(drawn[rows], self.seq.stop.eos_ids))
            if is_ended := len(ends) > 0:
                rows = rows[: ends[0] + 1]

            if law_NV is not None:
                laws |= {len(tokens) - 1 + at: law_NV[row] for at, row in enumerate(rows)}
            tokens = np.append(tokens, drawn[rows])
        return Draft(tokens, tree.chain(len(tokens)), laws or None)

    def _draw(self, feed: Feed) -> Generator[Forward, Reading, tuple[Ints, Tensor | None]]:
        """Draw a token at each row, and give the laws they are from if those are kept."""
        if not self.keeps_laws:
            reading = yield feed.sample(self.seq)
            return reading.tokens, None
        reading = yield feed.logits()
        scores_NV = feed.under_law(reading, self.seq)
        uniforms = torch.from_numpy(self.seq.uniforms(feed.following, "draft")).to(scores_NV.device)
        return sampling.draw(scores_NV, uniforms).cpu().numpy(), scores_NV.double().softmax(1)
