"""FreeDave: a masked model drafts its own next states, and its next pass verifies all of them.

Source: "Free Draft-and-Verification" (arXiv 2510.00294). Plain decoding repeats a rule: of the masked
positions of the first unfinished block commit the most confident, or with a threshold all that reach it
(FreeDave++). The pass that tells what the rule makes of a state also tells what it makes of that, and so
on, should no prediction change: these states are drafts. The next pass runs them all, each over the same
frozen cache and blind to the others, and they are kept as far as the rule leads from one to the next.
Notation: num_drafts is K, threshold is tau; D_0 .. D_{K-1} are drafts, T_j is what the rule makes of D_j.

Promise: approximate. With match=exact tokens and order are those of plain decoding with the same feed:
`threshold` or `block_diffusion` with this threshold, `low_confidence` or `block_diffusion` without one;
sampled too, with the same seed, but with a threshold in law only.
Cost: 1 + ceil((N - 1) / K) to N passes for a block of N tokens, each with up to K copies of what its
feed feeds. That pays as long as such a pass takes little longer than one without copies.

Departs from the published code: the last T_a is committed when it is known, and verified no more, so a
state without masks is never fed; models with shifted logits feed the token before the block instead of
committing its first token unseen; exact match is the default everywhere; sampled drafts are drawn with
the random numbers their verification uses, where published code draws anew and accepts by chance.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from chordal.decoders.decoder import Decoder, Decoding
from chordal.errors import InputError
from chordal.forward import (
    Blocks,
    Confidence,
    Floats,
    Forward,
    Full,
    Ints,
    Logits,
    Reading,
    Sample,
    Sees,
    Visible,
)
from chordal.models.reading import read_logits
from chordal.ops.unmask import above_threshold
from chordal.policies.feed import FeedName
from chordal.sequence import Sequence

Match: TypeAlias = Literal["exact", "subset"]


@dataclass(frozen=True, kw_only=True)
class FreeDaveConfig:
    """Settings of `freedave`."""

    num_drafts: int = 4
    """States that a pass runs, the one that is certain among them (K), at least 1; 1 is plain decoding."""
    threshold: float | None = None
    """Commit every position this confident (tau, FreeDave++), at least 0; None is one token a step."""
    match: Match = "exact"
    """Keep a draft that is what the rule leads to or, with "subset", could become it: more, not exact."""
    block_length: int | None = 32
    """Tokens of a block, at least 1; None takes the whole canvas as one. Block models have their own."""
    feed: FeedName = "whole"
    """What a pass recomputes: "prefix" and "dual" reuse approximate keys and values of masked models."""
    num_ahead: int = 0
    """Later blocks that drafts may reach (eager acceptance), at least 0; not with "prefix" and "dual"."""

    def __post_init__(self) -> None:
        for name, least in (("num_drafts", 1), ("threshold", 0), ("block_length", 1), ("num_ahead", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise InputError(f"{name} must be at least {least}; got {value}.")
        if self.num_ahead and self.feed != "whole":
            raise InputError(
                f"num_ahead must be 0 with feed={self.feed}, which caches everything anew for each block; "
                f"got {self.num_ahead}. Use num_ahead=0 or feed=whole."
            )


class FreeDave(Decoder):
    """Draft the next states, verify them all in one pass."""

    name = "freedave"
    family = "diffusion"
    promise = "approximate"
    exact_when = "no threshold, feed = whole"
    needs = ("masked", "block")
    tells_logprobs = False
    paper = "arXiv 2510.00294"
    Config = FreeDaveConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: FreeDaveConfig = self.config
        canvas = _open_canvas(seq, config)
        last = _State(
            seq.tokens[: canvas.end].copy(),
            seq.masked(seq.num_prompt, canvas.end),
            np.full(canvas.end, np.nan),
        )
        drafts = [last]
        while not seq.done:
            # Verify: one pass over all drafts. D_0 is certain.
            readings = yield canvas.ask(drafts, last)

            # Accept: from D_a hop to the furthest draft that agrees with T_a. The last T_a is certain too.
            at = 0
            while True:
                last, seen = drafts[at], _Seen(canvas.targets(drafts[at]), readings[at])
                following = canvas.follow(last, seen)
                agreeing = [
                    j for j in range(at + 1, len(drafts)) if drafts[j].agrees(following, config.match)
                ]
                reached = drafts[agreeing[-1]] if agreeing else following
                new = np.setdiff1d(last.masked, reached.masked)
                seq.commit(new, reached.tokens[new], confidence=Confidence(reached.probs[new]))
                if not agreeing:
                    break
                at = agreeing[-1]

            # Draft: that T_a, then what follows from each if the last predictions stay as they are.
            drafts = [following]
            while len(drafts) < config.num_drafts and canvas.predicts(seen, drafts[-1]):
                draft = canvas.follow(drafts[-1], seen)
                if not canvas.can_verify(draft, following):
                    break
                drafts.append(draft)


@dataclass(frozen=True, slots=True)
class _State:
    """A canvas on its way.

    Attributes:
        tokens: Of prompt and canvas, int `[end]`.
        masked: Positions that are still masked, ascending.
        probs: Probability of each token that was filled in, float `[end]`, else NaN.
    """

    tokens: Ints
    masked: Ints
    probs: Floats

    def fill(self, positions: Ints, tokens: Ints, probs: Floats) -> _State:
        filled, known = self.tokens.copy(), self.probs.copy()
        filled[positions], known[positions] = tokens, probs
        return _State(filled, np.setdiff1d(self.masked, positions), known)

    def agrees(self, target: _State, match: Match) -> bool:
        """Whether this is the target or, by subset, could become it."""
        is_same = self.tokens == target.tokens
        if match == "subset":
            is_same[self.masked] = True
        return bool(is_same.all())


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a pass predicts at some positions: tokens and confidence, or logits to draw them from."""

    positions: Ints
    reading: Reading


def _open_canvas(seq: Sequence, config: FreeDaveConfig) -> _Canvas:
    """Open the canvas: of a masked model with blocks from its start, of a block model from 0."""
    threshold = np.inf if config.threshold is None else config.threshold
    length = seq.family.block_length
    if seq.family.kind == "masked":
        length = config.block_length or seq.stop.max_new_tokens
        canvas = _Canvas(seq, config.feed, seq.num_prompt, length, seq.limit, config.num_ahead, threshold)
    else:
        assert length is not None, "a block model has a block length"
        if config.feed != "whole":
            raise InputError(
                f"feed={config.feed} is for masked models; a block model's cache is exact. Use feed=whole."
            )
        end = -(-seq.limit // length) * length
        # Above the threshold, not at it, as `block_diffusion` has it.
        above = float(np.nextafter(threshold, np.inf))
        canvas = _Canvas(seq, "block", 0, length, end, config.num_ahead, above)
    seq.open_canvas(canvas.end)
    return canvas


@dataclass
class _Canvas:
    """The blocks of one sequence, the rule that fills them, and what is cached for it.

    Attributes:
        seq: The sequence.
        feed: What a pass feeds; "block" for a block model.
        first: Where blocks are counted from.
        length: Tokens of a block.
        end: One past the last position.
        num_ahead: How many blocks behind its own the pass of a state predicts.
        threshold: Confidence that suffices.
    """

    seq: Sequence
    feed: FeedName | Literal["block"]
    first: int
    length: int
    end: int
    num_ahead: int
    threshold: float

    def __post_init__(self) -> None:
        self.sees = Blocks(self.length) if self.feed == "block" else Full(self.end)
        self.slots = np.arange(self.end)  # of each position
        self.opened: int | None = None  # start of the block that the cache is for

    def block(self, state: _State) -> tuple[int, int]:
        """Give the range of the first unfinished block."""
        start = int(state.masked[0]) - int(state.masked[0] - self.first) % self.length
        return start, min(start + self.length, self.end)

    def reach(self, state: _State) -> int:
        """Give one past the last position that the pass of a state predicts."""
        return min(self.block(state)[1] + self.num_ahead * self.length, self.end)

    def targets(self, state: _State) -> Ints:
        """List the positions that the pass of a state predicts."""
        return state.masked[state.masked < self.reach(state)]

    def candidates(self, state: _State) -> Ints:
        """List the positions that the rule chooses from."""
        return state.masked[state.masked < self.block(state)[1]]

    def predicts(self, seen: _Seen, state: _State) -> bool:
        """Whether the pass of an earlier state predicts all that the rule chooses from."""
        return len(state.masked) > 0 and bool(np.isin(self.candidates(state), seen.positions).all())

    def follow(self, state: _State, seen: _Seen) -> _State:
        """Apply the rule to a state, with the random numbers of its own step."""
        candidates, reading = self.candidates(state), seen.reading
        rows = np.searchsorted(seen.positions, candidates)
        if not self.seq.law.is_greedy:
            logits_RV, rows = reading.logits[rows], np.arange(len(rows))
            [reading] = read_logits(logits_RV, [self._sample(state, rows, candidates)])
        chosen = above_threshold(reading.probs[rows], self.threshold)
        at = rows[chosen]
        return state.fill(candidates[chosen], reading.tokens[at], reading.probs[at])

    def can_verify(self, draft: _State, base: _State) -> bool:
        """Whether the pass of a certain state can be that of a draft as well."""
        if not len(draft.masked) or self.block(draft)[0] >= self.reach(base):
            return False
        return not self._leaves_row_before(base, draft)

    def ask(self, drafts: Seq[_State], last: _State) -> tuple[Forward, ...]:
        """Make the requests of a pass, those of the drafts first; `last` is the state before them."""
        if self.feed != "whole" and self.block(drafts[0])[0] != self.opened:
            return self._fill(drafts[0]), *map(self._copy, drafts[1:])
        copies = tuple(map(self._copy, drafts))
        if not self._leaves_row_before(last, drafts[0]):
            return copies
        at = self._window(last)
        return *copies, Forward(last.tokens[at], at, self.sees, slots=self.slots[at])

    def _fill(self, state: _State) -> Forward:
        """Ask for the first pass of a block as plain decoding runs it, which fills the cache."""
        start, end = self.block(state)
        positions = np.arange(self.end)
        if self.feed == "block":
            positions = np.arange(self.opened or 0, self.reach(state))
        if self.feed == "dual":
            # What later passes feed comes last, so that all they only see is one range of slots:
            #     text  P P P F F C C L L       slots  P P P F L L F C C       F before C: if shifted
            before = max(start - self.seq.family.shift, 0)
            order = np.concatenate([positions[:before], positions[end:], positions[before:end]])
            self.slots[order] = positions
        self.opened = start
        return self._forward(state, positions, self.sees, self.slots[positions])

    def _copy(self, state: _State) -> Forward:
        """Ask for the pass of a state on rows of its own, over a cache that stays as it is."""
        positions = self._window(state)
        visible = self.sees.visible(positions)
        cached = np.full(len(positions), self.slots[positions[0]])
        own = positions < visible.end[:, None]
        return self._forward(state, positions, Visible(visible.start, cached, own), None)

    def _window(self, state: _State) -> Ints:
        """List what a later pass of a block feeds."""
        start = 0 if self.feed == "whole" else self.opened or 0
        end = self.end if self.feed in ("whole", "prefix") else self.reach(state)
        return np.arange(min(start, max(state.masked[0] - self.seq.family.shift, 0)), end)

    def _leaves_row_before(self, state: _State, later: _State) -> bool:
        """Whether the row before the block, which predicts its first token if shifted, is fed no more.

        With an approximate cache it is then seen as the last state that fed it left it, which is stored
        once that state is certain; no draft reaches beyond.
        """
        has_fed = self.seq.family.shift > 0 and state.masked[0] == self.block(state)[0]
        return self.feed in ("prefix", "dual") and has_fed and later.masked[0] != state.masked[0]

    def _forward(self, state: _State, positions: Ints, sees: Sees, slots: Ints | None) -> Forward:
        targets = self.targets(state)
        rows = np.maximum(targets - self.seq.family.shift, 0) - positions[0]
        read = self._sample(state, rows, targets) if self.seq.law.is_greedy else Logits(rows)
        return Forward(state.tokens[positions], positions, sees, read, slots)

    def _sample(self, state: _State, rows: Ints, positions: Ints) -> Sample:
        """Read tokens as the step of plain decoding from this state does."""
        return self.seq.sample(
            rows,
            positions,
            # The number of tokens behind the prompt: of the pass, if each pass commits one.
            draw=self.end - self.seq.num_prompt - len(state.masked),
            scores=("probs",),
            of="law" if self.feed == "block" else "model",
            contexts=(np.delete(state.tokens, state.masked),) * len(rows),
        )
