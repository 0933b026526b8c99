"""One request in progress: its tokens, what is committed, when it stops, who listens.

A decoder commits through its `Sequence` and through nothing else. The sequence alone decides where
the text ends: a stop token, a stop string or the length limit may fall inside a committed span, and
what lies behind it is neither shown nor counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from chordal.errors import DecodingError
from chordal.forward import Floats, Ints, Sample
from chordal.models.family import Family
from chordal.ops.randomness import Purpose, uniforms
from chordal.ops.sampling import Law
from chordal.stats import TARGET, Stats

FinishReason = Literal["stop", "length", "cancelled", "error"]
UNCOMMITTED = -1


@dataclass(frozen=True, kw_only=True)
class StopRules:
    """When a text ends.

    Attributes:
        max_new_tokens: Most tokens of the result, at least 1.
        eos_ids: Tokens that end it; the one that does is part of `tokens` but not of the text.
        stop_strings: Strings that end it; the text is cut before the first that occurs.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a sequence, for traces, streams and displays.

    Attributes:
        kind: "commit" for tokens that became final, "draft" for tokens that were proposed for
            verification; a draft comes before what its forward pass commits.
        forward: Number of the target's forward pass it came from, counted from 1.
        positions: Absolute positions, int `[n]`.
        tokens: Token ids, int `[n]`.
        num_accepted: Of a draft, how many of its tokens were kept.
    """

    kind: Literal["commit", "draft"]
    forward: int
    positions: Ints
    tokens: Ints
    num_accepted: int = 0


Listener = Callable[["Sequence", Event], None]


@dataclass(eq=False)
class Sequence:
    """Prompt and canvas of one request.

    Attributes:
        tokens: Token ids by absolute position, int `[capacity]`; masked positions hold the mask id.
        committed_at: Forward pass that committed each position, 0 for the prompt, -1 for none.
        num_prompt: Length of the prompt.
        canvas_end: One past the last position in use: committed, or opened as a canvas.
        frontier: Length of the longest committed prefix.
        family: Facts of the target model: mask id, logit shift, block length.
        finish_reason: Why it ended, None while it goes on.
        stop_reason: The stop string or token id that ended it, if one did.
    """

    prompt: Ints
    family: Family
    stop: StopRules
    law: Law = field(default_factory=Law)
    seed: int = 0
    detokenize: Callable[[Ints], str] | None = None
    listeners: list[Listener] = field(default_factory=list)

    stats: Stats = field(default_factory=Stats)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.num_prompt = self.frontier = self.canvas_end = len(self.prompt)
        # Room for the last block to be filled up; canvases that need more grow it.
        capacity = self.num_prompt + self.stop.max_new_tokens
        self.tokens: Ints = np.zeros(capacity, np.int64)
        self.tokens[: self.num_prompt] = self.prompt
        self.committed_at = np.full(capacity, UNCOMMITTED, np.int32)
        self.committed_at[: self.num_prompt] = 0
        self._end: int | None = None
        self._text_end: int | None = None

    @property
    def limit(self) -> int:
        """One past the last position that can be part of the result."""
        return self.num_prompt + self.stop.max_new_tokens

    @property
    def done(self) -> bool:
        """Whether nothing more can become part of the result."""
        return self.finish_reason is not None

    @property
    def committed(self) -> Ints:
        """The longest committed prefix, prompt included."""
        return self.tokens[: self.frontier]

    @property
    def output(self) -> Ints:
        """Tokens of the result so far: the committed prefix behind the prompt, cut where it ends."""
        end = self._end if self._end is not None else min(self.frontier, self.limit)
        return self.tokens[self.num_prompt : end]

    @property
    def text(self) -> str:
        """Text of the result so far, without the stop token and cut before a stop string."""
        if self.detokenize is None:
            return ""
        if isinstance(self.stop_reason, int):
            return self.detokenize(self.output[:-1])
        return self.detokenize(self.output)[: self._text_end]

    def open_canvas(self, end: int) -> None:
        """Fill the positions from the frontier to `end` with the mask token, to be committed in any order."""
        if self.family.mask_id is None:
            raise DecodingError("a canvas needs a model with a mask token; this one has none.")
        if (extra := end - len(self.tokens)) > 0:
            self.tokens = np.pad(self.tokens, (0, extra))
            self.committed_at = np.pad(self.committed_at, (0, extra), constant_values=UNCOMMITTED)
        self.tokens[self.canvas_end : end] = self.family.mask_id
        self.canvas_end = max(self.canvas_end, end)

    def masked(self, start: int, end: int) -> Ints:
        """List the uncommitted positions of `start <= position < end`."""
        return start + np.flatnonzero(self.committed_at[start:end] == UNCOMMITTED)

    def append(self, tokens: Ints, *, draft: Ints | None = None) -> None:
        """Commit a span right behind the frontier; what exceeds the length limit is dropped.

        Args:
            tokens: The span.
            draft: What had been proposed for it; counted here, as accepted as far as the span begins
                with it and the text does not end before.
        """
        tokens = tokens[: self.limit - self.frontier]
        positions = np.arange(self.frontier, self.frontier + len(tokens))
        self.canvas_end = max(self.canvas_end, self.frontier + len(tokens))
        self.commit(positions, tokens, draft=draft)

    def commit(self, positions: Ints, tokens: Ints, *, draft: Ints | None = None) -> None:
        """Make tokens final, in any order and at any positions that are not yet committed.

        Raises:
            DecodingError: A position is already committed, or a token is the mask token; both would
                be a bug of the decoder.
        """
        if self.done:
            return
        if (self.committed_at[positions] != UNCOMMITTED).any():
            taken = positions[self.committed_at[positions] != UNCOMMITTED]
            raise DecodingError(f"positions {taken.tolist()} are already committed and cannot change.")
        if self.family.mask_id is not None and (tokens == self.family.mask_id).any():
            raise DecodingError("the mask token cannot be committed.")
        forward = self.stats.forwards.get(TARGET, 0)
        self.tokens[positions] = tokens
        self.committed_at[positions] = forward
        before = self.frontier
        while self.frontier < self.canvas_end and self.committed_at[self.frontier] != UNCOMMITTED:
            self.frontier += 1
        if self.frontier > before:
            self._check_stop(before)
        committed_before, self.stats.committed_tokens = self.stats.committed_tokens, len(self.output)
        if draft is not None and len(draft):
            self._count_draft(draft, tokens, before, self.stats.committed_tokens - committed_before)
        self._emit("commit", forward, positions, tokens)

    def uniforms(self, positions: Ints, purpose: Purpose, draw: int = 0) -> Floats:
        """Give this request's random number for each position; see `ops.randomness`."""
        return uniforms(self.seed, purpose, positions, draw)

    def sample(self, rows: Ints, positions: Ints, draw: int = 0, **more: object) -> Sample:
        """Ask for a token under this request's law at each row; `positions` are what the rows predict."""
        drawn = None if self.law.is_greedy else self.uniforms(positions, "token", draw)
        return Sample(rows, self.law, drawn, **more)  # type: ignore[arg-type]

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End the sequence; the first reason stays."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
            self.stats.wall_s = time.perf_counter() - self.stats.started

    def _count_draft(self, draft: Ints, tokens: Ints, start: int, num_committed: int) -> None:
        num = min(len(draft), len(tokens), num_committed)
        num_accepted = int((np.cumsum(draft[:num] != tokens[:num]) == 0).sum())
        self.stats.draft_tokens += len(draft)
        self.stats.accepted_tokens += num_accepted
        positions = np.arange(start, start + len(draft))
        self._emit("draft", self.stats.forwards.get(TARGET, 0), positions, draft, num_accepted)

    def _check_stop(self, before: int) -> None:
        """End at the first stop condition inside what just became part of the committed prefix."""
        end = min(self.frontier, self.limit)
        eos = None
        for at, token in enumerate(self.tokens[before:end].tolist(), before):
            if token in self.stop.eos_ids:
                end, eos = at + 1, token
                break
        found = self._find_stop_string(before, end)
        if found is not None:
            self._end, self._text_end, self.stop_reason = found
            self.finish("stop")
        elif eos is not None:
            self._end, self.stop_reason = end, eos
            self.finish("stop")
        elif end == self.limit:
            self._end = end
            self.finish("length")

    def _find_stop_string(self, before: int, end: int) -> tuple[int, int, str] | None:
        """Find the earliest stop string: token end, text end, string. Tokens after it are dropped."""
        if not self.stop.stop_strings or self.detokenize is None:
            return None
        for stop in range(before + 1, end + 1):
            text = self.detokenize(self.tokens[self.num_prompt : stop])
            hits = [(text.find(string), string) for string in self.stop.stop_strings if string in text]
            if hits:
                at, string = min(hits)
                return stop, at, string
        return None

    def _emit(
        self,
        kind: Literal["commit", "draft"],
        forward: int,
        positions: Ints,
        tokens: Ints,
        num_accepted: int = 0,
    ) -> None:
        if self.listeners:
            event = Event(kind, forward, positions.copy(), tokens.copy(), num_accepted)
            for listener in self.listeners:
                listener(self, event)
