"""Draft and verify at the same time: the draft model runs on while the target checks its last tokens.

Source: "Parallel Speculative Decoding with Adaptive Draft Length" (PEARL, arXiv 2408.11850). Each position
has random numbers of its own, which the published code has not for the token behind a pre-verified one.

Promise: exact.
Cost: a round takes as long as the slower of one target pass and `num_draft` draft passes, if the engine runs
its models concurrently; else their sum. It commits 1 to `num_draft` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from chordal.cursor import Cursor
from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.speculate import accept
from chordal.drafters.draft import NO_DRAFT, Draft
from chordal.drafters.model import ModelDrafter
from chordal.errors import InputError
from chordal.ops import tree
from chordal.ops.acceptance import without_replacement
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class PEARLConfig:
    """Settings of `pearl`."""

    num_draft: int = 4
    """Draft tokens of a round, at least 1; best is as many draft passes as one pass of the target takes."""
    acceptance: Literal["ratio", "follow"] = "ratio"
    """How sampled drafts are judged: rejection sampling by the ratio of both models' probabilities, or the
    target's own draw with the random number of the draft."""

    def __post_init__(self) -> None:
        if self.num_draft < 1:
            raise InputError(f"num_draft must be at least 1; got {self.num_draft}.")


class PEARL(Decoder):
    """Never let one model wait for the other while drafts are good."""

    name = "pearl"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    constrains = True
    needs_models = ("draft",)
    paper = "arXiv 2408.11850"
    Config = PEARLConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence.

        `ahead` are draft tokens that no target pass has seen yet. Without them a round is the paper's
        pre-verify: the target's one row judges the first token of the new draft. With them it is its
        post-verify: their rows judge all of them and that token too.
        """
        config: PEARLConfig = self.config
        offers = without_replacement if config.acceptance == "ratio" else None
        drafter, target = ModelDrafter(seq, offers=offers), Cursor()
        ahead = NO_DRAFT
        while not seq.done:
            # Both at once: the target reads what follows each token of `ahead`, the draft model writes on.
            text = np.concatenate([seq.committed, ahead.tokens])
            room = seq.limit - len(text)
            feed = target.feed(seq.committed, ahead)
            is_judged = offers is not None and not seq.law.is_greedy
            verify = feed.logits() if is_judged else feed.sample(seq)
            if room > 0:
                reading, fresh = yield verify, drafter.propose(text, min(config.num_draft, room))
            else:
                reading, fresh = (yield verify), NO_DRAFT

            # Judge what was ahead and the first token of the new draft.
            judged = _join(ahead, _slice(fresh, 0, 1))
            kept, tokens, confidence = accept(seq, feed, judged, reading)
            # Without a draw of the target's own, all that was judged is right.
            ahead = _slice(fresh, 1, len(fresh)) if len(tokens) == len(kept) else NO_DRAFT
            seq.append(tokens, confidence=confidence, draft=judged.tokens)


def _slice(draft: Draft, start: int, end: int) -> Draft:
    """Take some tokens of a chain, with the laws they were drawn from."""
    tokens = draft.tokens[start:end]
    laws = draft.laws and {
        node - start: draft.laws[node] for node in range(start - 1, start - 1 + len(tokens))
    }
    return Draft(tokens, tree.chain(len(tokens)), laws, draft.offers)


def _join(first: Draft, second: Draft) -> Draft:
    """Put a chain behind a chain."""
    tokens = np.concatenate([first.tokens, second.tokens])
    laws = {**(first.laws or {}), **{node + len(first): law for node, law in (second.laws or {}).items()}}
    return Draft(tokens, tree.chain(len(tokens)), laws or None)
