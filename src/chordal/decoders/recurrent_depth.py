"""Diffusion forcing on a looped model: a wave of guesses is refined while it moves on.

Source: "Efficient Parallel Samplers for Recurrent-Depth Models" (arXiv 2510.14961). A pass runs a few
core loops for every position of the wave, each going on from its own state, draws all their tokens anew
and adds a position. Tokens are committed ("frozen") when the states that read them stop changing.
Notation: inner_recurrence is r', exit_threshold is epsilon, max_wavefront is W, noise is beta_t's scale,
momentum is eta.

Promise: approximate. With max_wavefront=1 and inner_recurrence the model's number of loops it is plain
decoding. Where the core is a contraction, freeze=prefix gets to plain decoding with very many loops as
exit_threshold falls, greedy and sampled.
Cost: inner_recurrence core loops a pass, of up to W positions each. Memory as in plain decoding.

Departs from the published code: it runs in batches; random numbers belong to positions, so that a sampled
wave settles too; stop tokens count from the first pass on; a full wave that stands still gives up its
first position after the usual number of loops, where it would stand for good; states and embeddings of a
position are compared and mixed with those of the same position, also after some were frozen; a token is
stable if it was not redrawn lately, whatever it was before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from chordal.decoders.decoder import Decoder, Decoding
from chordal.errors import InputError
from chordal.forward import Bools, Causal, Forward, Ints, Loops
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class RecurrentDepthConfig:
    """Settings of `recurrent_depth`; the defaults are the paper's."""

    inner_recurrence: int = 4
    """Core loops of a pass (r'), from 1 to num_loops."""
    exit_threshold: float = 0.03
    """Freeze where a pass changes a state by less than this share of it (epsilon), at least 0."""
    max_wavefront: int = 128
    """Most positions that are refined at once (W), at least 1."""
    freeze: Literal["last", "prefix", "fixed", "stability"] = "last"
    """What is frozen: all up to the last state below the threshold, the longest prefix of such states
    whose tokens were drawn again, one position when it has had num_loops, or all up to the last token
    that was drawn again in more than num_loops / inner_recurrence passes."""
    headway: int = 1
    """Positions that a pass adds, at least 1; all but the first begin with a random token."""
    momentum: float = 0.1
    """Share of a position's last embedding in the next one (eta), from 0 to below 1."""
    noise: float = 0.0
    """Share of a state that is replaced by noise, divided by 1 + its loops so far, from 0 to 1."""
    # 0 rather than the published code's 0.5: the paper's tables are without noise, which only costs.
    num_loops: int | None = None
    """Loops of the prompt, and of a position before it may be given up; None is the model's own."""

    def __post_init__(self) -> None:
        for name in ("inner_recurrence", "max_wavefront", "headway"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.num_loops is not None and self.num_loops < 1:
            raise InputError(f"num_loops must be at least 1; got {self.num_loops}.")
        if not self.exit_threshold >= 0:
            raise InputError(f"exit_threshold must be at least 0; got {self.exit_threshold}.")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be at least 0 and below 1; got {self.momentum}.")
        if not 0 <= self.noise <= 1:
            raise InputError(f"noise must be from 0 to 1; got {self.noise}.")


class RecurrentDepth(Decoder):
    """Refine a wave of guesses a few loops at a time, commit what has settled."""

    name = "recurrent_depth"
    family = "autoregressive"
    promise = "approximate"
    exact_when = "max_wavefront = 1, inner_recurrence = the model's loops"
    needs = ("looped",)
    paper = "arXiv 2510.14961"
    Config = RecurrentDepthConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence; the first pass gives the prompt all loops and draws the first token."""
        config: RecurrentDepthConfig = self.config
        num_loops = config.num_loops or seq.family.num_loops
        assert num_loops is not None, "a looped model has a number of loops"
        if config.inner_recurrence > num_loops:
            # The last loops of the prompt are what the wave sees of it; more would see nothing.
            raise InputError(
                f"inner_recurrence must be at most num_loops; got {config.inner_recurrence} and {num_loops}."
            )
        reading = yield feed_causal(seq, seq.prompt, 0, 1, Loops(num_loops))
        seq.append(reading.tokens, confidence=reading.confidence())

        # The wave begins with the last committed token, whose state predicts the first guess.
        #     text     p p p F ? ? ?        p in the cache for good, F committed, ? guesses
        #     wave           0 1 2 3        each with a state, the loops it had and the times it was redrawn
        start, tokens = seq.frontier - 1, seq.committed[-1:]
        states = embeds = None
        num_had, num_redrawn = np.zeros((2, 1), np.int64)
        step = 0
        while not seq.done:
            # Refine: r' loops for every position, from the state it has.
            going_on = np.arange(start, start + (0 if states is None else len(states)))
            noise = config.noise / (1 + num_had[: len(going_on)]) if config.noise and len(going_on) else None
            keys = (seq.uniforms(going_on, "noise", step) * 2**53).astype(np.int64)
            loops = Loops(config.inner_recurrence, states, noise, keys, embeds, config.momentum)
            wave = np.concatenate([seq.committed[:start], tokens])
            reading = yield feed_causal(seq, wave, start, len(tokens), loops)
            num_had = num_had + config.inner_recurrence

            # Redraw every guess, and draw one behind them.
            text = np.concatenate([tokens[:1], reading.tokens])
            is_redrawn = text[:-1] == tokens
            num_redrawn = np.where(is_redrawn, num_redrawn + 1, 0)

            # Freeze: the wave moves on by so many positions.
            num_frozen = 0
            if config.freeze == "last":
                num_frozen = _last(reading.change < config.exit_threshold)
            elif config.freeze == "prefix":
                num_frozen = _prefix(is_redrawn & (reading.change < config.exit_threshold))
            elif config.freeze == "stability":
                num_frozen = _last(num_redrawn > num_loops // config.inner_recurrence)
            is_full = len(tokens) == config.max_wavefront or start + len(tokens) == seq.limit
            if num_frozen == 0 and (is_full or config.freeze == "fixed"):
                num_frozen = int(num_had[0] >= num_loops)
            if num_frozen:
                seq.append(text[1 : num_frozen + 1], confidence=reading.confidence(slice(num_frozen)))

            # Move on: the last frozen position stays, for it predicts the next one.
            start += num_frozen
            room = min(config.max_wavefront, seq.limit - start)
            left = text[num_frozen + 1 :][: room - 1]
            probs = reading.confidence(slice(num_frozen, num_frozen + len(left))).probs
            seq.guess(start + 1 + np.arange(len(left)), left, probs)
            added = start + len(text) - num_frozen + np.arange(config.headway - 1)
            random = (seq.uniforms(added, "noise", step) * (seq.family.vocab_size or 1)).astype(np.int64)
            tokens = np.concatenate([text[num_frozen:], random])[:room]
            states, embeds = reading.states[num_frozen:], reading.embeds[num_frozen:]
            num_had, num_redrawn = (
                np.pad(counts[num_frozen:], (0, len(tokens) - len(counts[num_frozen:])))
                for counts in (num_had, num_redrawn)
            )
            step += 1


def feed_causal(seq: Sequence, text: Ints, start: int, num_read: int, loops: Loops | None) -> Forward:
    """Feed a text from `start` on and draw what follows the last `num_read` of its tokens."""
    positions = np.arange(start, len(text))
    rows = np.arange(len(positions) - num_read, len(positions))
    contexts = None
    if seq.law.reads_context:
        contexts = tuple(text[: position + 1] for position in positions[rows])
    read = seq.sample(rows, positions[rows] + 1, contexts=contexts)
    return Forward(text[start:], positions, Causal(), read, slots=positions, loops=loops)


def _last(is_settled: Bools) -> int:
    """Give the last settled position, 0 if there is none."""
    settled = np.flatnonzero(is_settled)
    return int(settled[-1]) if len(settled) else 0


def _prefix(is_settled: Bools) -> int:
    """Give the last position of the settled ones that the wave begins with, 0 if there is none."""
    num = len(is_settled) if is_settled.all() else int(np.argmin(is_settled))
    return max(num - 1, 0)
