"""Self-speculation on a looped model: few loops draft, all loops verify.

Source: "Efficient Parallel Samplers for Recurrent-Depth Models" (arXiv 2510.14961), as its baseline;
the idea is of "Scaling up Test-Time Compute with Latent Reasoning" (arXiv 2502.05171).

Promise: exact. Each verified position draws the token plain decoding would draw there, with the same
random number; a draft token stays as long as it equals that draw.
Cost: a round is up to `num_draft` passes of `draft_loops` loops and one of all loops, for 1 to
1 + `num_draft` tokens. All of them count as forward passes of the target; compare `loops` instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.recurrent_depth import feed_causal
from chordal.errors import InputError
from chordal.forward import Floats, Loops
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class LoopSpeculativeConfig:
    """Settings of `loop_speculative`."""

    num_draft: int = 8
    """Draft tokens of a round, at least 0; 0 is plain decoding."""
    draft_loops: int = 2
    """Core loops of a draft pass, at least 1."""

    def __post_init__(self) -> None:
        if self.num_draft < 0:
            raise InputError(f"num_draft must be at least 0; got {self.num_draft}.")
        if self.draft_loops < 1:
            raise InputError(f"draft_loops must be at least 1; got {self.draft_loops}.")


class LoopSpeculative(Decoder):
    """Draft with few loops, verify with all, keep the right prefix."""

    name = "loop_speculative"
    family = "autoregressive"
    promise = "exact"
    needs = ("looped",)
    constrains = True
    paper = "arXiv 2510.14961, 2502.05171"
    Config = LoopSpeculativeConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence; the first pass feeds the prompt and is not drafted for."""
        config: LoopSpeculativeConfig = self.config
        shallow = Loops(config.draft_loops)
        num_cached = 0
        while not seq.done:
            # Draft: what is written here, verification writes again.
            budget = min(config.num_draft, seq.limit - seq.frontier - 1) if num_cached else 0
            draft, known = np.empty(0, np.int64), list[Floats]()
            for _ in range(budget):
                text = np.concatenate([seq.committed, draft])
                reading = yield feed_causal(seq, text, len(text) - 1, 1, shallow)
                draft = np.append(draft, reading.tokens)
                known += [] if reading.probs is None else [reading.probs]

            # Verify: the rows of the last committed token and of every draft predict what follows them.
            text = np.concatenate([seq.committed, draft])
            reading = yield feed_causal(seq, text, num_cached, len(draft) + 1, None)

            # Accept the drafts that equal what was drawn, and the draw that follows them.
            is_kept = reading.tokens[:-1] == draft
            num_kept = len(draft) if is_kept.all() else int(np.argmin(is_kept))
            num_cached = seq.frontier + num_kept
            seq.append(
                reading.tokens[: num_kept + 1],
                confidence=reading.confidence(slice(num_kept + 1)),
                draft=draft,
                draft_confidence=np.concatenate(known) if known else None,
            )
