"""Draft and verify: propose several tokens, check them in one forward pass, keep the right prefix.

Promise: exact. Each verified position draws the token plain decoding would draw there, with the same
random number; a draft token stays as long as it equals that draw. Greedy text is identical, sampled
text has the target's law (rule C of the literature: for a deterministic draft, one y ~ p a node and
follow the child that equals it), and with keyed randomness even the same tokens as plain decoding.

Cost: one forward pass of 1 to 1 + `num_draft` positions for 1 to 1 + `num_draft` tokens.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from chordal.decoders.decoder import Decoding
from chordal.forward import Causal, Forward, Ints
from chordal.sequence import Sequence


class Drafter(Protocol):
    """Proposes what may come next; one instance serves one sequence."""

    def propose(self, committed: Ints, budget: int) -> Ints:
        """Propose at most `budget` tokens to follow the committed ones; none is a valid answer."""
        ...


def speculate(seq: Sequence, drafter: Drafter, *, num_draft: int) -> Decoding:
    """Decode one sequence with a deterministic drafter.

    Between steps the cache holds every committed token but the last, the root, which is fed next
    together with the draft. Slots of rejected tokens are not visible until they are written again.

    Args:
        seq: The sequence.
        drafter: Its drafter.
        num_draft: Most tokens of one draft; 0 is plain decoding.
    """
    num_cached = 0
    while not seq.done:
        # Draft. The last token of the result never needs a draft behind it.
        budget = min(num_draft, seq.limit - seq.frontier - 1)
        draft = drafter.propose(seq.committed, budget)[:budget] if budget > 0 else np.empty(0, np.int64)

        # Verify: the rows of the root and of every draft token each predict the position behind them.
        tokens = np.concatenate([seq.committed[num_cached:], draft])
        positions = np.arange(num_cached, num_cached + len(tokens))
        rows = np.arange(len(tokens) - len(draft) - 1, len(tokens))
        contexts = None
        if seq.law.repetition_penalty != 1:
            whole = np.concatenate([seq.committed, draft])
            contexts = tuple(whole[: seq.frontier + ahead] for ahead in range(len(draft) + 1))
        reading = yield Forward(
            tokens=tokens,
            positions=positions,
            slots=positions,
            sees=Causal(),
            read=seq.sample(rows, positions[rows] + 1, contexts=contexts),
        )

        # Accept the drafts that equal what was drawn, and the draw that follows them.
        drawn = reading.tokens
        is_kept = drawn[:-1] == draft
        num_kept = len(draft) if is_kept.all() else int(np.argmin(is_kept))
        num_cached = seq.frontier + num_kept
        seq.append(drawn[: num_kept + 1], draft=draft)
