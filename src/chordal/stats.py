"""The counters of a request, each defined in docs/metrics.md and counted nowhere else."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

TARGET = "target"


@dataclass
class Stats:
    """What one request used and what it got.

    Attributes:
        forwards: Sequential forward passes of each model; prefill is not among them.
        prefills: Forward passes of the target that fed nothing but prompt and read nothing.
        rows: Requests fed to the target, more than `forwards` where several ran at once.
        loops: Core loops of a looped target in those `forwards`, one after the other; 0 for other models.
        experts: Distinct experts that a target with a mixture of experts used in each of those `forwards`,
            mean over its layers, summed; 0 for other models.
        positions_fed: Token positions fed to each model, prefill included.
        committed_tokens: Tokens of the result, its stop token included, nothing after it.
        draft_tokens: Tokens proposed for verification.
        accepted_tokens: Those of them that were kept.
        model_s: Seconds of the forward passes this request took part in, not divided by the batch.
        wall_s: Seconds from the start of the request to its end.
        cached_tokens: Tokens of the prompt that the target was not fed, for it had their keys and values.
        queue_s: Seconds from when the request was submitted to when it joined the batch.
    """

    forwards: dict[str, int] = field(default_factory=dict)
    prefills: int = 0
    rows: int = 0
    loops: int = 0
    experts: float = 0.0
    positions_fed: dict[str, int] = field(default_factory=dict)
    committed_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    model_s: float = 0.0
    wall_s: float = 0.0
    cached_tokens: int = 0
    queue_s: float = 0.0
    started: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def tokens_per_forward(self) -> float:
        """Committed tokens divided by forward passes of the target, prefill excluded."""
        forwards = self.forwards.get(TARGET, 0)
        return self.committed_tokens / forwards if forwards else 0.0

    @property
    def experts_per_forward(self) -> float:
        """Distinct experts of a layer that a forward pass of the target used for this request."""
        forwards = self.forwards.get(TARGET, 0)
        return self.experts / forwards if forwards else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Give the counters as plain values under the names of the command line's JSON."""
        drafts = {name: count for name, count in self.forwards.items() if name != TARGET}
        return {
            "forwards": self.forwards.get(TARGET, 0),
            "prefills": self.prefills,
            "rows": self.rows,
            "loops": self.loops,
            "experts": round(self.experts, 4),
            "experts_per_forward": round(self.experts_per_forward, 4),
            "committed_tokens": self.committed_tokens,
            "tokens_per_forward": round(self.tokens_per_forward, 4),
            "positions_fed": self.positions_fed.get(TARGET, 0),
            "cached_tokens": self.cached_tokens,
            "draft_tokens": self.draft_tokens,
            "accepted_tokens": self.accepted_tokens,
            "draft_forwards": drafts,
            "model_s": round(self.model_s, 6),
            "wall_s": round(self.wall_s, 6),
            "queue_s": round(self.queue_s, 6),
        }
