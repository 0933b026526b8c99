"""What a longer or shorter chain would have done to texts that are already known.

An exact decoder writes the same text whatever it drafts, so what became of the draft token of each position
can be played back with any length, at any batch, and without a model.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from chordal.forward import Ints
from chordal.planning.acceptance import NOT_DRAFTED, RIGHT, WRONG_AND_LAST
from chordal.planning.latency import Latency

# Texts are played round and round until there are this many for each row of the batch: rows stay full.
_ROUNDS = 32


@dataclass(frozen=True, slots=True)
class Replay:
    """Passes of a full batch, prefill not among them.

    Attributes:
        tokens: Tokens committed, all rows.
        passes: Verifications, all rows.
        seconds: What they took.
    """

    tokens: int
    passes: int
    seconds: float


@dataclass(slots=True)
class _Row:
    text: Ints
    at: int = 0
    to_draft: int = 0  # passes of the draft model before the next verification


def replay(
    texts: Seq[Ints],
    num_draft: int,
    batch: int,
    target: Latency,
    draft: Latency | None = None,
    host_s: float = 0.0,
) -> Replay:
    """Play texts back with chains of `num_draft` tokens.

    A tick runs one pass of the draft model if some row drafts and one of the target if some row verifies,
    as wide as its widest row; rows that wait are padding. A text that ends makes room for the next, behind
    its first pass, which is its prefill.

    Args:
        texts: What became of the draft token of each position, as `acceptance.outcomes` gives it.
        num_draft: Most tokens of a draft.
        batch: Rows.
        target: Seconds of the target's passes.
        draft: Seconds of the draft model's; None if drafts cost no pass.
        host_s: Seconds of a tick outside of the models.

    Returns:
        The sums; no passes if every text ends in its first.
    """

    def to_draft(row: _Row) -> int:
        return _verify(row, num_draft)[0] - 1 if draft is not None else 0

    queue = deque(itertools.islice(itertools.cycle(texts), max(len(texts), _ROUNDS * batch)))
    rows: list[_Row] = []
    tokens, passes, seconds = 0, 0, 0.0
    while True:
        while queue and len(rows) < batch:
            row = _Row(queue.popleft())
            _, row.at = _verify(row, num_draft)
            row.to_draft = to_draft(row)
            if row.at < len(row.text):
                rows.append(row)
        if len(rows) < batch:
            return Replay(tokens, passes, seconds)
        drafting = [row for row in rows if row.to_draft]
        verified = [(row, *_verify(row, num_draft)) for row in rows if not row.to_draft]
        for row in drafting:
            row.to_draft -= 1
        for row, _, kept in verified:
            row.at += kept
            row.to_draft = to_draft(row)
            tokens += kept
            passes += 1
        seconds += host_s
        if verified:
            seconds += target.seconds(max(width for _, width, _ in verified), batch)
        if draft is not None and drafting:
            seconds += draft.seconds(1, batch)
        rows = [row for row in rows if row.at < len(row.text)]


def _verify(row: _Row, num_draft: int) -> tuple[int, int]:
    """Give the positions that a verification feeds and the tokens it commits."""
    ahead = row.text[row.at :][:num_draft]
    is_right = ahead == RIGHT
    kept = len(ahead) if is_right.all() else int(np.argmin(is_right))
    # Behind a wrong token the draft went on, and behind the end of the text, too.
    width = 1 + num_draft
    if kept < len(ahead) and ahead[kept] in (NOT_DRAFTED, WRONG_AND_LAST):
        width = 1 + kept + int(ahead[kept] == WRONG_AND_LAST)
    return width, min(kept + 1, len(row.text) - row.at)
