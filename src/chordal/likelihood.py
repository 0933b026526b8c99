"""Log-likelihood of given texts, under any kind of model whose law of a text can be told.

Causal models: exact, by teacher forcing. One pass a context: its continuations are fed as a tree, so the
context and what they have in common are computed once.

Block-diffusion models: exact, the chain rule from left to right; all earlier blocks are clean and cached,
and of the block of a token the rest is masked. One pass a token, of one or two blocks.

Masked-diffusion models: "monte_carlo", LLaDA's estimate (Nie et al. 2025, arXiv 2502.09992, equation 6 and
Algorithm 3). With L tokens, of which l chosen at random are hidden, the mean of L / l times the sum of their
log-probabilities; a lower bound of the log-likelihood unless every order of unmasking gives the same one.
One pass a sample. Or "chain", the chain rule from left to right, exact for that order: one pass a token.
Both feed the whole text.

Departs from LLaDA's code: the mask token has no probability; counts of hidden tokens are drawn without
rounding; a single token, which has one way to be hidden, takes one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from chordal.cursor import Cursor
from chordal.decoders.decoder import Decoder, Decoding
from chordal.drafters.draft import Draft
from chordal.engine import Engine
from chordal.errors import DecodingError, InputError
from chordal.forward import Blocks, Forward, Ints, Logits, Together
from chordal.models.family import Family, Kind
from chordal.ops import tree
from chordal.ops.likelihood import mask_counts, token_logprobs
from chordal.ops.sampling import guide
from chordal.sequence import Sequence, StopRules, TokenLogprob

Method: TypeAlias = Literal["chain", "monte_carlo"]

_METHODS: dict[Kind, tuple[Method, ...]] = {
    "causal": ("chain",),
    "block": ("chain",),
    "masked": ("monte_carlo", "chain"),
}


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model says of a continuation.

    Attributes:
        logprob: Log-likelihood given the context, in nats; exact or an estimate, as the method has it.
        is_greedy: Whether greedy decoding would write it: from left to right, or for "monte_carlo" the most
            confident position first.
    """

    logprob: float
    is_greedy: bool


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """How to take a likelihood; the defaults are those of LLaDA's published evaluation."""

    method: Method | None = None
    """"chain" or "monte_carlo"; None is what is usual for the kind of model."""
    num_samples: int = 128
    """Passes of "monte_carlo" (n_mc), at least 1."""
    cfg_scale: float = 0.0
    """Classifier-free guidance of masked models, at least 0; above 0 a second copy runs without context."""
    check_greedy: bool = True
    """Whether "monte_carlo" finds out `is_greedy`, in up to one pass a token; else it is False."""
    seed: int = 0
    """Of what "monte_carlo" hides; the same for every continuation of one length."""

    def __post_init__(self) -> None:
        if self.method not in (None, *get_args(Method)):
            raise InputError(f"method must be one of {', '.join(get_args(Method))}; got {self.method!r}.")
        if self.num_samples < 1:
            raise InputError(f"num_samples must be at least 1; got {self.num_samples}.")
        if not 0 <= self.cfg_scale < float("inf"):
            raise InputError(f"cfg_scale must be a finite number of at least 0; got {self.cfg_scale}.")


def max_scored(family: Family, window: int) -> int:
    """Give the most tokens of a context with its continuation; a causal model never feeds the last one."""
    return window + 1 if family.kind == "causal" else window


def loglikelihoods(
    engine: Engine,
    texts: Seq[tuple[Ints, Seq[Ints]]],
    config: LikelihoodConfig | None = None,
    *,
    on_finish: Callable[[int, list[Likelihood]], None] | None = None,
) -> list[list[Likelihood]]:
    """Score continuations of contexts, batched.

    Args:
        engine: Has the model; must be idle.
        texts: Contexts, at least one token each, with their continuations, at least one token each. Those of
            one context should share it: a causal model then computes it once.
        config: How; None is what is usual for the kind of model.
        on_finish: Called with the number of a text and its scores as each is done.

    Returns:
        The scores of every continuation, in the order of `texts`.

    Raises:
        InputError: The model has no likelihood that can be told, or not by this method; a text is empty, too
            long or holds what is no token.
        ChordalError: A text could not be scored.
    """
    config = config or LikelihoodConfig()
    family, limit = engine.target.family, max_scored(engine.target.family, engine.target.window)
    method = _method(family, config)
    for context, continuations in texts:
        longest = max((len(one) for one in continuations), default=0)
        if not len(context) or not all(len(one) for one in continuations):
            raise InputError("a context and each continuation must have at least one token; got none.")
        if len(context) + longest > limit:
            raise InputError(
                f"context and continuation must have at most {limit} tokens together; got {len(context)} and "
                f"{longest}. Cut the context from the left."
            )
    work = [_Scoring(config, method, continuations) for _, continuations in texts]
    # Nothing is committed; the limit is only room.
    seqs = [Sequence(context, family, StopRules(max_new_tokens=1), seed=config.seed) for context, _ in texts]

    def finished(index: int) -> None:
        if (error := seqs[index].error) is not None:
            raise error
        if on_finish is not None:
            on_finish(index, work[index].found)

    engine.complete(list(zip(work, seqs, strict=True)), finished)
    return [one.found for one in work]


class _Scoring(Decoder):
    """Score the continuations of a prompt instead of writing one."""

    name = "likelihood"
    family = "autoregressive"
    promise = "exact"
    needs = tuple(_METHODS)
    paper = "-"
    Config = LikelihoodConfig

    def __init__(self, config: LikelihoodConfig, method: Method, continuations: Seq[Ints]) -> None:
        super().__init__(config)
        self.method, self.continuations = method, continuations
        self.found: list[Likelihood] = []

    def decode(self, seq: Sequence) -> Decoding:
        """Fill `found` and end the sequence without a token."""
        if seq.family.kind == "causal":
            self.found = yield from _causal(seq, self.continuations)
        else:
            score = _monte_carlo if self.method == "monte_carlo" else _chain
            for continuation in self.continuations:
                found = yield from score(seq, np.concatenate([seq.prompt, continuation]), self.config)
                self.found.append(found)
        if any(math.isnan(one.logprob) for one in self.found):
            raise DecodingError("the model gave logits that are not finite.")
        seq.finish("stop")


# Rows of logits that are held at once.
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class PromptLogprobsConfig:
    """Settings of `PromptLogprobs`."""

    num_top: int = 0
    """Most likely tokens told beside each, at least 0."""

    def __post_init__(self) -> None:
        if self.num_top < 0:
            raise InputError(f"num_top must be at least 0; got {self.num_top}.")


class PromptLogprobs(Decoder):
    """Read what a causal model gives every token of a prompt; nothing is written behind it.

    Of one sequence: `found` holds what was read, with None for the first token, which nothing predicts.

    Promise: exact. Cost: the prompt is fed once, 256 tokens a pass.
    """

    name = "prompt_logprobs"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    paper = "-"
    Config = PromptLogprobsConfig

    def __init__(self, config: PromptLogprobsConfig | None = None) -> None:
        super().__init__(config)
        self.found: list[TokenLogprob | None] = [None]

    def decode(self, seq: Sequence) -> Decoding:
        """Fill `found` and end the sequence without a token."""
        cursor = Cursor()
        # Nobody asks what follows the last token.
        for start in range(0, seq.num_prompt - 1, _ROWS_AT_ONCE):
            end = min(start + _ROWS_AT_ONCE, seq.num_prompt - 1)
            reading = yield cursor.feed(seq.prompt[:end], num_read=end - start).logits()
            following = seq.prompt[start + 1 : end + 1]
            logprobs, _ = token_logprobs(reading.logits, following)
            if not bool(logprobs.isfinite().all()):
                raise DecodingError("the model gave logits that are not finite.")
            top = reading.logits.topk(min(self.config.num_top, reading.logits.shape[1]), dim=1)
            top_logprobs = top.values - reading.logits.logsumexp(1, keepdim=True)
            rows = zip(
                following.tolist(),
                logprobs.tolist(),
                top.indices.tolist(),
                top_logprobs.tolist(),
                strict=True,
            )
            self.found += [
                TokenLogprob(token, logprob, list(zip(others, likeliest, strict=True)))
                for token, logprob, others, likeliest in rows
            ]
            seq.undecided += end - start  # that is progress
        seq.finish("stop")


# Asks for one pass after the other, and returns what they said.
_Scores: TypeAlias = Generator[Forward | tuple[Forward, ...], Any, Likelihood]
_Predicts: TypeAlias = Generator[Forward | tuple[Forward, ...], Any, Any]


def _causal(seq: Sequence, continuations: Seq[Ints]) -> Generator[Forward, Any, list[Likelihood]]:
    """Feed the context and the tree of its continuations: a row predicts the child."""
    # Nobody asks what follows a last token.
    tokens, parents, nodes = tree.merge([continuation[:-1] for continuation in continuations])
    reading = yield Cursor().feed(seq.prompt, Draft(tokens, parents)).logits()
    found = []
    for continuation, path in zip(continuations, nodes, strict=True):
        rows = np.append(0, path + 1)  # row 0 is the last of the context
        logprobs, is_top = token_logprobs(reading.logits[rows], continuation)
        found.append(Likelihood(float(logprobs.sum()), bool(is_top.all())))
    return found


def _chain(seq: Sequence, text: Ints, config: LikelihoodConfig) -> _Scores:
    """Predict one token after the other, each with those before it in sight and those behind it hidden."""
    logprob, is_greedy = 0.0, True
    for at in range(seq.num_prompt, len(text)):
        if seq.family.kind == "block":
            logits = yield from _predict_in_block(seq, text, at)
        else:
            hidden = np.arange(at, len(text))
            logits = yield from _predict(seq, _hide(seq, text, hidden), hidden[:1], config)
        logprobs, is_top = token_logprobs(logits, text[at : at + 1])
        logprob, is_greedy = logprob + float(logprobs), is_greedy and bool(is_top)
        seq.undecided += 1  # that is progress
    return Likelihood(logprob, is_greedy)


def _monte_carlo(seq: Sequence, text: Ints, config: LikelihoodConfig) -> _Scores:
    """Hide some of the continuation at random, predict all that is hidden, and average."""
    positions = np.arange(seq.num_prompt, len(text))
    num = len(positions)
    [offset] = seq.uniforms(positions[:1], "noise")
    counts = mask_counts(num, config.num_samples if num > 1 else 1, offset)
    total = 0.0
    for draw, count in enumerate(counts.tolist()):
        hidden = np.sort(positions[np.argsort(seq.uniforms(positions, "order", draw))[:count]])
        logits = yield from _predict(seq, _hide(seq, text, hidden), hidden, config)
        total += num / count * float(token_logprobs(logits, text[hidden])[0].sum())
        seq.undecided += 1
    is_greedy = config.check_greedy and (yield from _is_greedy(seq, text, config))
    return Likelihood(total / len(counts), is_greedy)


def _is_greedy(seq: Sequence, text: Ints, config: LikelihoodConfig) -> Generator[Any, Any, bool]:
    """Fill in the continuation, the most confident position first, until a token is another one."""
    hidden = np.arange(seq.num_prompt, len(text))
    while len(hidden):
        logits = yield from _predict(seq, _hide(seq, text, hidden), hidden, config)
        best = int((logits.amax(1) - logits.logsumexp(1)).argmax())
        if int(logits[best].argmax()) != text[hidden[best]]:
            return False
        hidden = np.delete(hidden, best)
        seq.undecided += 1
    return True


def _predict(seq: Sequence, tokens: Ints, targets: Ints, config: LikelihoodConfig) -> _Predicts:
    """Read the logits of some positions of a canvas, guided away from those without context if asked for."""
    positions = np.arange(len(tokens))
    read = Logits(targets - seq.family.shift)
    given = Forward(tokens, positions, Together(), read)
    if config.cfg_scale == 0:
        reading = yield given
        return reading.logits
    without = _hide(seq, tokens, positions[: seq.num_prompt])
    with_it, without_it = yield (given, Forward(without, positions, Together(), read))
    return guide(with_it.logits, without_it.logits, config.cfg_scale)


def _predict_in_block(seq: Sequence, text: Ints, at: int) -> _Predicts:
    """Read the logits of a position with the rest of its block hidden, over the clean blocks before it.

    The first pass of a block also stores the clean keys and values of the one before, which shifted models
    read from too.
    """
    length = seq.family.block_length
    assert length is not None, "a block model has a block length"
    block = at // length * length
    start = block
    if at == max(block, seq.num_prompt):
        start = max(0, block - length)
        if at == seq.num_prompt and start:
            cached = np.arange(start)
            yield Forward(text[:start], cached, Blocks(length), slots=cached)
    positions = np.arange(start, block + length)
    padded = np.pad(text, (0, max(0, block + length - len(text))))
    tokens = _hide(seq, padded, np.arange(at, block + length))[positions]
    row = np.array([at - seq.family.shift - start])
    reading = yield Forward(tokens, positions, Blocks(length), Logits(row), slots=positions)
    return reading.logits


def _hide(seq: Sequence, tokens: Ints, positions: Ints) -> Ints:
    assert seq.family.mask_id is not None, "models that are not causal have a mask token"
    hidden = tokens.copy()
    hidden[positions] = seq.family.mask_id
    return hidden


def _method(family: Family, config: LikelihoodConfig) -> Method:
    """Choose the method and refuse what a kind of model has not."""
    known = _METHODS.get(family.kind)
    if known is None:
        raise InputError(
            f"a {family.kind} model has no likelihood that can be told; got one. Score texts with a model of "
            f"kind {', '.join(_METHODS)}, or have this one generate."
        )
    method = config.method or known[0]
    if method not in known:
        raise InputError(
            f"the likelihood of a {family.kind} model is taken by {' or '.join(known)}; got {method}. Leave "
            f"the method out."
        )
    if config.cfg_scale > 0 and family.kind != "masked":
        raise InputError(
            f"only masked models are guided; this one is {family.kind}, got cfg_scale={config.cfg_scale}. "
            f"Leave it out."
        )
    return method
