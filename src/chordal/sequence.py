"""One request in progress: its tokens, what is committed, when it stops, who listens.

A decoder commits through its `Sequence` and through nothing else. The sequence alone decides where
the text ends: a stop token, a stop string or the length limit may fall inside a committed span, and
what lies behind it is neither shown nor counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from chordal.errors import DecodingError
from chordal.forward import Confidence, Floats, Ints, Logprobs, Sample
from chordal.models.family import Family
from chordal.ops import tree
from chordal.ops.randomness import Purpose, uniforms
from chordal.ops.sampling import Law
from chordal.stats import TARGET, Stats
from chordal.text import Detokenizer

FinishReason = Literal["stop", "length", "cancelled", "error"]
EventKind = Literal["commit", "draft", "guess"]
UNCOMMITTED = -1


@dataclass(frozen=True, kw_only=True)
class StopRules:
    """When a text ends.

    Attributes:
        max_new_tokens: Most tokens of the result, at least 1.
        eos_ids: Tokens that end it; the one that does is part of `tokens` but not of the text.
        stop_strings: Strings that end it; the text is cut before the first that occurs.
        include_stop: Cut the text behind the stop string instead.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    include_stop: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a sequence, for traces, streams and displays.

    Attributes:
        kind: "commit" for tokens that became final, "draft" for tokens that were proposed for
            verification, "guess" for all tokens that stand for now where nothing is final, in place of
            those of the guess before. A draft comes before what its forward pass commits, a guess behind it.
        forward: Number of the target's forward pass it came from, counted from 1; of what another model
            wrote, the last one before it, 0 if there was none.
        positions: Absolute positions, int `[n]`.
        tokens: Token ids, int `[n]`.
        confidence: Probability that each token had where it was decided, as the decoder read it, float `[n]`
            with NaN where it is not known; None if none is. Of a draft, its drafter's.
        kept: Of a draft, which of its tokens were kept, int `[a]`.
        parents: Of a draft with branches, the parent of each token; see `ops.tree`.
    """

    kind: EventKind
    forward: int
    positions: Ints
    tokens: Ints
    confidence: Floats | None = None
    kept: Ints | None = None
    parents: Ints | None = None

    @property
    def num_accepted(self) -> int:
        """Of a draft, how many of its tokens were kept."""
        return 0 if self.kept is None else len(self.kept)


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of several texts that a decoder found for a prompt, cut where it ends as the result is.

    Attributes:
        tokens: Token ids behind the prompt, the stop token included, int `[n]`.
        text: Their text, without the stop token or stop string.
        score: Its log-likelihood as the decoder defines it, in nats; higher is better.
        finish_reason: "stop" or "length"; None for a text that could go on.
    """

    tokens: Ints
    text: str
    score: float
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token in nats, where and when it was decided.

    Attributes:
        token: The token.
        logprob: What the model gave it, before penalties, temperature and truncation.
        top: The most likely tokens there and theirs, the first first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Ending:
    """Where and why a text ends: after so many tokens, and for a stop string after so many characters."""

    num_tokens: int
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    num_characters: int | None = None


# One whose attribute `wants_confidence` is true makes decoders read how sure the model was.
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
        undecided: Of a decoder that chooses among several texts: how many tokens they have together, so that
            they count as progress before any is committed.
        alternatives: Of a decoder that finds several texts: all of them, the best first, which is also the
            result.
        cache_salt: Only sequences of the same salt share the cache of what their prompts have in common.
        num_logprobs: How many alternatives to note beside the log-probability of each token; None notes none.
        logprobs: What was noted, by position.
    """

    prompt: Ints
    family: Family
    stop: StopRules
    law: Law = field(default_factory=Law)
    seed: int = 0
    detokenize: Callable[[Ints], str] | None = None
    listeners: list[Listener] = field(default_factory=list)
    num_logprobs: int | None = None
    cache_salt: str = ""

    stats: Stats = field(default_factory=Stats)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: Exception | None = None
    undecided: int = 0
    alternatives: list[Alternative] = field(default_factory=list)
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.num_prompt = self.frontier = self.canvas_end = len(self.prompt)
        # Room for the last block to be filled up; canvases that need more grow it.
        capacity = self.num_prompt + self.stop.max_new_tokens
        self.tokens: Ints = np.zeros(capacity, np.int64)
        self.tokens[: self.num_prompt] = self.prompt
        self.committed_at = np.full(capacity, UNCOMMITTED, np.int32)
        self.committed_at[: self.num_prompt] = 0
        self._ending: Ending | None = None
        self._reader: Detokenizer | None = None

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
        if self._ending is not None:
            return self.tokens[self.num_prompt :][: self._ending.num_tokens]
        return self.tokens[self.num_prompt : min(self.frontier, self.limit)]

    @property
    def text(self) -> str:
        """Text of the result so far, without the stop token and cut where a stop string says."""
        return self.reader.text[: self._ending.num_characters if self._ending else None]

    @property
    def reader(self) -> Detokenizer:
        """What turns the tokens of the result into text; it goes on from where it was."""
        self._reader = self._reader or self._new_reader()
        self._reader.extend(_without_stop(self.output, self._ending)[self._reader.num_tokens :])
        return self._reader

    @property
    def wants_confidence(self) -> bool:
        """Whether somebody listens who wants to know how confident the model was."""
        return any(getattr(listener, "wants_confidence", False) for listener in self.listeners)

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

    def append(
        self,
        tokens: Ints,
        *,
        confidence: Confidence | None = None,
        draft: Ints | None = None,
        parents: Ints | None = None,
        draft_confidence: Floats | None = None,
    ) -> None:
        """Commit a span right behind the frontier; what exceeds the length limit is dropped.

        Args:
            tokens: The span.
            confidence: How sure the model was of each token.
            draft: What had been proposed for it; counted here, as accepted as far as the span begins
                with it and the text does not end before.
            parents: Of a draft that is a tree, the parent of each token; see `ops.tree`.
            draft_confidence: Probability that the drafter gave each token of the draft, if it is known.
        """
        tokens = tokens[: self.limit - self.frontier]
        confidence = None if confidence is None else confidence[: len(tokens)]
        positions = np.arange(self.frontier, self.frontier + len(tokens))
        self.canvas_end = max(self.canvas_end, self.frontier + len(tokens))
        self.commit(
            positions,
            tokens,
            confidence=confidence,
            draft=draft,
            parents=parents,
            draft_confidence=draft_confidence,
        )

    def commit(
        self,
        positions: Ints,
        tokens: Ints,
        *,
        confidence: Confidence | None = None,
        draft: Ints | None = None,
        parents: Ints | None = None,
        draft_confidence: Floats | None = None,
    ) -> None:
        """Make tokens final, in any order and at any positions that are not yet committed.

        Args:
            positions: Where they stand.
            tokens: The tokens.
            confidence: As for `append`, and so are the rest.
            draft: What had been proposed for them.
            parents: Of a draft that is a tree.
            draft_confidence: Of a draft.

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
            num = self.stats.committed_tokens - committed_before
            self._count_draft(draft, parents, draft_confidence, tokens[:num], before)
        if confidence is not None and confidence.logprobs is not None:
            self._note_logprobs(positions, tokens, confidence.logprobs)
        self._emit("commit", positions, tokens, confidence.probs if confidence is not None else None)

    def guess(self, positions: Ints, tokens: Ints, confidence: Floats | None = None) -> None:
        """Tell listeners of every token that stands for now and may change, in place of earlier guesses."""
        if not self.done:
            self._emit("guess", positions, tokens, confidence)

    def offer(self, tokens: Ints, score: float) -> None:
        """Hand on one of several texts, the best first; what lies behind its end is cut.

        Args:
            tokens: Token ids behind the prompt.
            score: Log-likelihood in nats, as the decoder defines it.
        """
        reader = self._new_reader()
        ending = self._find_ending(tokens, 0, reader)
        tokens = tokens[: ending.num_tokens] if ending else tokens
        reader.extend(_without_stop(tokens, ending)[reader.num_tokens :])
        text = reader.text[: ending.num_characters if ending else None]
        reason = ending.finish_reason if ending else None
        self.alternatives.append(Alternative(tokens.copy(), text, score, reason))

    def ending(self, tokens: Ints, start: int = 0) -> Ending | None:
        """Find where a text ends, by the rules of this request; None if it goes on.

        Args:
            tokens: Token ids behind the prompt.
            start: Tokens of them that are known not to end it.
        """
        return self._find_ending(tokens, start, self._new_reader())

    def uniforms(self, positions: Ints, purpose: Purpose, draw: int = 0) -> Floats:
        """Give this request's random number for each position; see `ops.randomness`."""
        return uniforms(self.seed, purpose, positions, draw)

    def sample(
        self, rows: Ints, positions: Ints, draw: int = 0, *, purpose: Purpose = "token", **more: object
    ) -> Sample:
        """Ask for a token under this request's law at each row; `positions` are what the rows predict."""
        drawn = None if self.law.is_greedy else self.uniforms(positions, purpose, draw)
        more = {"num_prompt": self.num_prompt, "logprobs": self.num_logprobs, **more}
        read = Sample(rows, self.law, drawn, **more)  # type: ignore[arg-type]
        if self.wants_confidence and "probs" not in read.scores:
            read = replace(read, scores=(*read.scores, "probs"))
        return read

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End the sequence; the first reason stays."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
            self.stats.wall_s = time.perf_counter() - self.stats.started

    def _note_logprobs(self, positions: Ints, tokens: Ints, found: Logprobs) -> None:
        rows = zip(found.chosen.tolist(), found.tokens.tolist(), found.likeliest.tolist(), strict=True)
        for position, token, (chosen, others, likeliest) in zip(
            positions.tolist(), tokens.tolist(), rows, strict=True
        ):
            if not math.isnan(chosen):
                self.logprobs[position] = TokenLogprob(
                    token, chosen, list(zip(others, likeliest, strict=True))
                )

    def _count_draft(
        self, draft: Ints, parents: Ints | None, confidence: Floats | None, tokens: Ints, start: int
    ) -> None:
        """Count a draft for the tokens that were committed from `start` on."""
        depth = np.arange(len(draft)) if parents is None else tree.depths(parents) - 1
        kept = tree.follow(draft, tree.chain(len(draft)) if parents is None else parents, tokens)
        self.stats.draft_tokens += len(draft)
        self.stats.accepted_tokens += len(kept)
        self._emit("draft", start + depth, draft, confidence, kept, parents)

    def _check_stop(self, before: int) -> None:
        """End at the first stop condition inside what just became part of the committed prefix."""
        self._reader = self._reader or self._new_reader()
        output = self.committed[self.num_prompt :]
        ending = self._find_ending(output, before - self.num_prompt, self._reader)
        if ending is not None:
            self._ending, self.stop_reason = ending, ending.stop_reason
            self.finish(ending.finish_reason)

    def _new_reader(self) -> Detokenizer:
        return Detokenizer(self.detokenize or _no_text)

    def _find_ending(self, tokens: Ints, start: int, reader: Detokenizer) -> Ending | None:
        """See `ending`; the reader has read no more than the `start` tokens."""
        end = min(len(tokens), self.stop.max_new_tokens)
        is_limit = end == self.stop.max_new_tokens
        eos = None
        for at, token in enumerate(tokens[start:end].tolist(), start):
            if token in self.stop.eos_ids:
                end, eos = at, token
                break
        if found := self._find_stop_string(tokens, start, end, reader):
            return found
        if eos is not None:
            return Ending(end + 1, "stop", eos)
        return Ending(end, "length") if is_limit else None

    def _find_stop_string(self, tokens: Ints, start: int, end: int, reader: Detokenizer) -> Ending | None:
        """Find the earliest stop string; the tokens behind the one that completes it are dropped."""
        if not self.stop.stop_strings:
            return None
        longest = max(map(len, self.stop.stop_strings))
        reader.extend(tokens[reader.num_tokens : start])
        for num in range(start + 1, end + 1):
            # What was certain before has been searched.
            searched = max(0, reader.num_certain - longest + 1)
            reader.extend(tokens[num - 1 : num])
            text = reader.since(searched)
            hits = [(text.find(string), string) for string in self.stop.stop_strings if string in text]
            if hits:
                at, string = min(hits)
                num_characters = searched + at + (len(string) if self.stop.include_stop else 0)
                return Ending(num, "stop", string, num_characters)
        return None

    def _emit(
        self,
        kind: EventKind,
        positions: Ints,
        tokens: Ints,
        confidence: Floats | None = None,
        kept: Ints | None = None,
        parents: Ints | None = None,
    ) -> None:
        if self.listeners:
            forward = self.stats.forwards.get(TARGET, 0)
            event = Event(kind, forward, positions.copy(), tokens.copy(), confidence, kept, parents)
            for listener in self.listeners:
                listener(self, event)


def _without_stop(tokens: Ints, ending: Ending | None) -> Ints:
    """Leave out the token that ended a text."""
    return tokens[:-1] if ending is not None and isinstance(ending.stop_reason, int) else tokens


def _no_text(tokens: Ints) -> str:
    return ""
