"""The primitive: a request for one forward pass, and what comes back.

A decoder never calls a model. It yields a `Forward` (or a tuple of them, which may run at the same
time) and is sent a `Reading` (or a tuple). Three things that are often confused stay apart here:

- the order of the rows of a request, which only says how `read.rows` counts;
- `positions`: where a token stands in the text, which is all that rotary embeddings see;
- `slots`: where its keys and values go in the sequence's cache, which is all that attention sees.

Everything on this side is numpy on the host and has no batch dimension: q is the number of tokens
fed, r the number of rows read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from chordal.ops.experts import Routing
from chordal.ops.sampling import Law
from chordal.ops.tree import ancestors

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Score: TypeAlias = Literal["probs", "margin", "entropy", "gap"]


@dataclass(frozen=True, slots=True)
class Visible:
    """What each query may attend to: slots `start <= slot < end`, and fed rows marked in `own`.

    Attributes:
        start: First visible slot of each query, int `[q]`.
        end: One past the last visible slot of each query, int `[q]`.
        own: Rows of the same request each query also sees, bool `[q, q]`, or None for no others.
        hidden: Slots between `start` and `end` that no query sees all the same, int `[h]`.
        seen: Slots 0 to s - 1 that each query sees besides, wherever they are, bool `[q, s]`; branches
            that share a beginning are told apart by it.
    """

    start: Ints
    end: Ints
    own: Bools | None = None
    hidden: Ints | None = None
    seen: Bools | None = None


@dataclass(frozen=True, slots=True)
class Causal:
    """Each query sees every slot up to its own."""

    def visible(self, slots: Ints) -> Visible:  # noqa: D102
        return Visible(np.zeros_like(slots), slots + 1)


@dataclass(frozen=True, slots=True)
class Window:
    """Each query sees its own slot and the `size - 1` before it."""

    size: int

    def visible(self, slots: Ints) -> Visible:  # noqa: D102
        return Visible(np.maximum(slots - self.size + 1, 0), slots + 1)


@dataclass(frozen=True, slots=True)
class Full:
    """Each query sees the slots `0 <= slot < end` but those in `hidden`."""

    end: int
    hidden: Ints | None = None

    def visible(self, slots: Ints) -> Visible:  # noqa: D102
        return Visible(np.zeros_like(slots), np.full_like(slots, self.end), hidden=self.hidden)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Each query sees its own block of `length` slots, aligned to slot 0, and all blocks before."""

    length: int

    def visible(self, slots: Ints) -> Visible:  # noqa: D102
        return Visible(np.zeros_like(slots), (slots // self.length + 1) * self.length)


@dataclass(frozen=True, slots=True)
class Tree:
    """Each query sees the slots before `start` and, of the rows fed with it, its ancestors.

    `parents[i]` is the row of the parent of row i, -1 for a child of the cached prefix; a parent
    stands before its children. Rows 0-4 with parents (-1, 0, 0, 1, 2):

            0               sees  0 1 2 3 4
          1   2        row 3      x x . x .
          3   4        row 4      x . x . x
    """

    start: int
    parents: tuple[int, ...]

    def visible(self, slots: Ints) -> Visible:  # noqa: D102
        num = len(self.parents)
        own = ancestors(np.array(self.parents, np.int64))
        return Visible(np.zeros(num, np.int64), np.full(num, self.start, np.int64), own)


@dataclass(frozen=True, slots=True)
class Together:
    """The rows of the request see each other and nothing else, whatever the cache holds."""

    def visible(self, slots: Ints) -> Visible:  # noqa: D102
        none = np.zeros_like(slots)
        return Visible(none, none, np.ones((len(slots), len(slots)), dtype=bool))


Sees: TypeAlias = Causal | Window | Full | Blocks | Tree | Together | Visible


@dataclass(frozen=True, slots=True)
class Sample:
    """Read one token at each row, with the scores asked for. Reduced on the device for the batch.

    Attributes:
        rows: Which fed rows, int `[r]`.
        law: Distribution the tokens are drawn from; temperature 0 takes the most likely one.
        uniforms: One number in [0, 1) for each row, float `[r]`; needed unless the law is greedy.
        scores: Which of "probs", "margin", "entropy" and "gap" to bring back.
        of: Distribution the scores are of: "model" (softmax of adjusted logits, after bans), "law" (after
            temperature and truncation, where temperature 0 counts as 1) or "raw" (softmax of the logits
            as they are). The gap is always the model's.
        contexts: Tokens that precede each row, for laws that read them: `[r]` arrays, the prompt first.
        num_prompt: How many tokens of each context are the prompt's.
        banned: Token ids that are never chosen and have no probability.
        unscored: Token ids that may be chosen but score as if they had no probability.
        candidates: How many of the model's most likely tokens to bring back beside the chosen one.
        logprobs: Bring back the log-probability of the chosen token and of so many of the most likely ones,
            of the logits as they are; None brings none.
    """

    rows: Ints
    law: Law = field(default_factory=Law)
    uniforms: Floats | None = None
    scores: tuple[Score, ...] = ()
    of: Literal["model", "law", "raw"] = "model"
    contexts: tuple[Ints, ...] | None = None
    num_prompt: int = 0
    banned: tuple[int, ...] = ()
    unscored: tuple[int, ...] = ()
    candidates: int = 0
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TopK:
    """Read the k most likely tokens at each row, with the entropy and largest logit of the row."""

    rows: Ints
    k: int


@dataclass(frozen=True, slots=True)
class Logits:
    """Read the raw logits of each row, in float32 or wider and left on the device."""

    rows: Ints


@dataclass(frozen=True, slots=True)
class Hidden:
    """Read the hidden states of each row after the given layers, left on the device.

    Layer 0 is the embedding; layer n is the output of the n-th layer, the last one after the final
    norm, as transformers numbers `hidden_states`.
    """

    rows: Ints
    layers: tuple[int, ...]


Read: TypeAlias = Sample | TopK | Logits | Hidden


@dataclass(frozen=True, slots=True)
class Loops:
    """How a looped model runs a request: how often, and going on from where.

    What an earlier reading gave may be given back for the first rows; the rows behind them start fresh.
    Loops are counted from the last, so a pass sees of the cached tokens their last `count` loops, which
    they must have had.

    Attributes:
        count: How often the core is run, at least 1.
        states: States of the first rows from an earlier reading, device tensor `[n, D]`.
        noise: Share of each of these states that is replaced by a fresh one, float `[n]`; None for none.
        noise_keys: What those fresh states are drawn with, int `[n]`.
        embeds: Embeddings of the first rows from an earlier reading, device tensor `[m, D]`.
        momentum: Their share in the embeddings of this pass.
    """

    count: int
    states: Any = None
    noise: Floats | None = None
    noise_keys: Ints | None = None
    embeds: Any = None
    momentum: float = 0.0


@dataclass(frozen=True, slots=True)
class Forward:
    """Feed tokens at positions, let each see some slots, read something back.

    Attributes:
        tokens: Token ids, int `[q]`.
        positions: Logical positions, int `[q]`.
        sees: Attention spec; specs are in terms of slots.
        read: What to bring back; None only fills the cache.
        slots: Where keys and values go, int `[q]`. None reads the cache without changing it: the rows
            get slots of their own behind everything cached, so a spec must name them by row (`Tree`,
            `Together`, or `Visible` with `own`).
        model: Which of the engine's models.
        inject: Logits of an earlier reading of the same rows, device tensor `[q, V]`, for models that
            condition on them; others take no notice.
        loops: How a looped model runs it; None is its usual number of loops from fresh states. Others
            take no notice.
        routing: Experts that the rows of the request agree on, in every layer of a mixture of experts;
            None leaves each row its own. Other models refuse it.
        moves: Slots whose keys and values are read, and the slots they are then written to before the
            pass, int `[m]` each; accepted branches of a draft tree become a plain text by it.
        blend: Token ids, int `[q, k]`, and weights, float `[q, k]`: the model is fed the weighted sums of
            the embeddings of these tokens instead of `tokens`, which then only count. None feeds `tokens`.
    """

    tokens: Ints
    positions: Ints
    sees: Sees
    read: Read | None = None
    slots: Ints | None = None
    model: str = "target"
    inject: Any = None
    loops: Loops | None = None
    routing: Routing | None = None
    moves: tuple[Ints, Ints] | None = None
    blend: tuple[Ints, Floats] | None = None

    def __post_init__(self) -> None:
        num = len(self.tokens)
        if num == 0 or len(self.positions) != num or (self.slots is not None and len(self.slots) != num):
            raise ValueError(
                f"a forward needs at least one token and as many positions and slots as tokens; got "
                f"{num} tokens, {len(self.positions)} positions and "
                f"{'no' if self.slots is None else len(self.slots)} slots"
            )
        if self.slots is None and not isinstance(self.sees, (Tree, Together, Visible)):
            raise ValueError(
                f"a read-only forward needs a spec that names rows; got {type(self.sees).__name__}"
            )
        # A row outside would read padding, or a row of another sequence.
        rows = np.asarray([] if self.read is None else self.read.rows)
        if len(rows) and (rows.min() < 0 or rows.max() >= num):
            raise ValueError(
                f"a forward of {num} tokens has rows 0 to {num - 1}; got a read of rows {rows.tolist()}"
            )
        if self.blend is not None:
            shapes = [part.shape for part in self.blend]
            if shapes[0] != shapes[1] or shapes[0][:1] != (num,) or len(shapes[0]) != 2:
                raise ValueError(
                    f"a forward of {num} tokens needs blended tokens and weights of the same {num} rows; got "
                    f"shapes {shapes[0]} and {shapes[1]}"
                )
        if self.inject is not None and len(self.inject) != num:
            raise ValueError(f"a forward of {num} tokens needs as many injected rows; got {len(self.inject)}")


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of rows, in nats.

    Attributes:
        chosen: Of the token of each row, float `[r]`; NaN where it is not known.
        tokens: The most likely tokens of each row, the first first, int `[r, k]`.
        likeliest: Of these, float `[r, k]`.
    """

    chosen: Floats
    tokens: Ints
    likeliest: Floats

    def __getitem__(self, rows: Ints | slice) -> Logprobs:
        """Take some rows."""
        return Logprobs(self.chosen[rows], self.tokens[rows], self.likeliest[rows])


@dataclass(frozen=True, slots=True)
class Confidence:
    """How sure a model was of tokens where they were decided.

    Attributes:
        probs: Probability of each token, as its decoder scores it, float `[n]` with NaN where it is not
            known; None if none is.
        logprobs: Their log-probabilities, if the request asks for them.
    """

    probs: Floats | None = None
    logprobs: Logprobs | None = None

    def __getitem__(self, tokens: Ints | slice) -> Confidence:
        """Take some tokens."""
        probs = None if self.probs is None else self.probs[tokens]
        return Confidence(probs, None if self.logprobs is None else self.logprobs[tokens])


@dataclass(frozen=True, slots=True)
class Reading:
    """What a forward pass brought back; only what was asked for is set.

    Attributes:
        tokens: `Sample`: the chosen tokens, int `[r]`. `TopK`: the most likely ones, int `[r, k]`.
        probs: Probability of each of `tokens`, same shape.
        margin: Difference of the two largest probabilities, float `[r]`.
        entropy: In nats, float `[r]`.
        gap: Difference of the two largest logits, float `[r]`.
        max_logit: Largest raw logit, float `[r]`.
        logits: Tensor `[r, V]` on the device.
        hidden: Tensor `[r, layers, D]` on the device.
        states: With `loops`: the states of all fed rows, tensor `[q, D]` on the device.
        embeds: With `loops`: their embeddings behind the prelude, tensor `[q, D]` on the device.
        change: With `loops`: |new state - old state| / |new state| of all fed rows, float `[q]`.
        candidates: `Sample`: the most likely tokens of the raw logits, most likely first, int `[r, k]`.
        experts: Of a mixture of experts: which ones the fed rows used, bool `[layers, experts]`, asked
            for or not.
        logprobs: `Logprobs` of the rows.
    """

    # Any rather than optional: a decoder knows what it asked for.
    tokens: Any = None
    probs: Any = None
    margin: Any = None
    entropy: Any = None
    gap: Any = None
    max_logit: Any = None
    logits: Any = None
    hidden: Any = None
    states: Any = None
    embeds: Any = None
    change: Any = None
    candidates: Any = None
    experts: Any = None
    logprobs: Any = None

    def confidence(self, rows: Ints | slice = slice(None)) -> Confidence:
        """Say how sure the model was of the tokens of some rows, as far as it was asked for."""
        probs = None if self.probs is None else self.probs[rows]
        return Confidence(probs, None if self.logprobs is None else self.logprobs[rows])
