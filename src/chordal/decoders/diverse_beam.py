"""Beam search, plain and diverse: groups of beams, each put off the tokens that those before it choose.

Source: Vijayakumar et al., "Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models",
2016 (arXiv 1610.02424), with its Hamming dissimilarity; what ends, and when, as in transformers' beam
search. Notation: num_beams is B, num_groups is G, diversity is lambda; a group has B' = B / G beams.

Promise: approximate, since it looks for likely texts and not for the most likely next token; one beam is
plain greedy decoding. With one group it is beam search, and gives the texts and scores of transformers'
`generate(num_beams=B)` with the same length_penalty and early_stopping.
Cost: a pass for each token of the longest text, over one position for each different text of all groups.
The texts are a tree in a single cache row: each token has a slot of its own, a beam sees the slots of its
own text, and those that no beam sees are used again. So nothing is ever copied, and a row holds at most
num_beams slots for each new token, mostly far fewer, as beams share their beginnings.

Departs from the paper: B' beams of a group go on even if some of the best B' pairs end, as in
transformers; a group that can no longer improve stops. All groups choose in the same pass: the paper's
schedule, where each runs one token behind the one before it, gives the same texts in G - 1 more passes.
The other dissimilarities that it tries (n-grams, cumulative, embeddings) are left out.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from chordal.decoders.decoder import Decoder, Decoding
from chordal.errors import InputError
from chordal.forward import Bools, Causal, Floats, Forward, Ints, Logits, Visible
from chordal.ops.sampling import adjust
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class DiverseBeamConfig:
    """Settings of `diverse_beam`."""

    num_beams: int = 2
    """Beams of all groups together (B), at least 1."""
    num_groups: int = 2
    """Groups they are split into (G), a divisor of num_beams; 1 is plain beam search."""
    diversity: float = 0.5
    """What a token loses each time an earlier group chose it in this step (lambda), in nats, at least 0."""
    length_penalty: float = 0.0
    """Scores of ended texts are divided by length ** length_penalty; above 0 it favours long texts."""
    early_stopping: bool | Literal["never"] = False
    """When a group of B' ended texts stops: at once (true), or when none of its beams scores better than
    the worst of these at its present length (false) or at the best length it can have (never)."""
    penalize_eos: bool = True
    """Whether stop tokens are put off like others, which makes later groups longer."""

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise InputError(f"num_beams must be at least 1; got {self.num_beams}.")
        if self.num_groups < 1 or self.num_beams % self.num_groups:
            raise InputError(
                f"num_groups must be at least 1 and divide num_beams; got {self.num_groups} groups of "
                f"{self.num_beams} beams. Use num_groups=1 for plain beam search."
            )
        if not 0 <= self.diversity < float("inf"):
            raise InputError(f"diversity must be a finite number of at least 0; got {self.diversity}.")
        if not abs(self.length_penalty) < float("inf"):
            raise InputError(f"length_penalty must be a finite number; got {self.length_penalty}.")


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A text of the search.

    Attributes:
        tokens: Behind the prompt.
        score: Its log-likelihood, in nats.
        penalized: That, less what diversity took off: what its group goes by.
        group: Which one, from 0.
    """

    tokens: tuple[int, ...]
    score: float
    penalized: float
    group: int


class DiverseBeam(Decoder):
    """Keep the most likely texts in every group, and the groups apart."""

    name = "diverse_beam"
    family = "autoregressive"
    promise = "approximate"
    exact_when = "num_beams = 1, num_groups = 1: autoregressive"
    needs = ("causal",)
    constrains = True
    tells_logprobs = False
    samples = False
    paper = "arXiv 1610.02424"
    Config = DiverseBeamConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence; the likeliest text of all groups is the result, all are alternatives."""
        found = yield from search(seq, self.config)
        for one in found:
            seq.offer(np.array(one.tokens), one.score)
        seq.append(np.array(found[0].tokens[seq.frontier - seq.num_prompt :]))


def search(seq: Sequence, config: DiverseBeamConfig) -> Generator[Forward, Any, list[Hypothesis]]:
    """Search the texts of a sequence, and commit what all that are left begin with as soon as they do.

    Returns:
        What each group kept, by log-likelihood / length ** length_penalty, the best first. The penalized
        score, which the groups went by, only compares texts of one group: later ones always have less.
    """
    groups = [_Group(number, seq, config) for number in range(config.num_groups)]
    # Enough of a row, though earlier groups choose up to two tokens a beam and every stop token ends it.
    num_candidates = 2 * config.num_beams + len(seq.stop.eos_ids)
    prompt = np.arange(seq.num_prompt)
    forward = Forward(seq.prompt, prompt, Causal(), Logits(prompt[-1:]), slots=prompt)
    texts: list[tuple[int, ...]] = [()]
    seen = np.ones((1, seq.num_prompt), dtype=bool)
    while True:
        # Score: log p(v | text) for every text, once, whichever groups it is in.
        reading = yield forward
        scored = _likeliest(reading.logits, seq, texts, num_candidates)
        rows = {text: row for row, text in enumerate(texts)}

        # Choose: group after group, put off the tokens that earlier groups choose in this very step.
        chosen: list[int] = []
        for group in groups:
            chosen += group.choose(rows, *scored, np.array(chosen, np.int64))
        texts = list(dict.fromkeys(one.tokens for group in groups for one in group.running))
        if not texts:
            break

        # Commit: the result is an ended text, or goes on from a running one.
        certain = _common_prefix([*texts, *(one.tokens for group in groups for one in group.ended)])
        if fresh := certain[seq.frontier - seq.num_prompt :]:
            seq.append(np.array(fresh))

        # Feed: the last token of each text, which sees what its parent saw and itself.
        seen, slots = _place(seen[[rows[text[:-1]] for text in texts]])
        each = np.arange(len(texts))
        forward = Forward(
            tokens=np.array([text[-1] for text in texts]),
            positions=np.full(len(texts), seq.num_prompt + len(texts[0]) - 1),
            slots=slots,
            sees=Visible(np.zeros_like(each), np.zeros_like(each), seen=seen),
            read=Logits(each),
        )

    kept = [one for group in groups for one in group.ended]
    return sorted(kept, key=lambda one: _normalized(one.score, len(one.tokens), config), reverse=True)


@dataclass(eq=False)
class _Group:
    """Beams that compete with each other; none are running once the group has stopped."""

    number: int
    seq: Sequence
    config: DiverseBeamConfig
    ended: list[Hypothesis] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.running = [Hypothesis((), 0.0, 0.0, self.number)]
        self.width = self.config.num_beams // self.config.num_groups

    def choose(
        self, rows: Mapping[tuple[int, ...], int], tokens_NK: Ints, logprobs_NK: Floats, taken: Ints
    ) -> list[int]:
        """Take the best continuations and give their last tokens, as far as they put later groups off.

        Args:
            rows: Of the texts.
            tokens_NK: Candidates to follow each text, the most likely first.
            logprobs_NK: Their log-probabilities.
            taken: Tokens that earlier groups chose in this step.
        """
        if not self.running:
            return []
        # score(y v) = score(y) + log p(v | y) - lambda * (times that earlier groups chose v)
        at = [rows[one.tokens] for one in self.running]
        tokens_BK, logprobs_BK = tokens_NK[at], logprobs_NK[at]
        num_taken_BK = (tokens_BK[..., None] == taken).sum(-1)
        before_B1 = np.array([[one.penalized] for one in self.running])
        scores_BK = before_B1 + logprobs_BK - self.config.diversity * num_taken_BK

        # Those that end count among the best B' pairs only; the others are there to keep B' beams.
        num_pairs = max(2, 1 + len(self.seq.stop.eos_ids)) * self.width
        best = np.argsort(-scores_BK, axis=None, kind="stable")[:num_pairs]
        ended, running = [], []
        for rank, (beam, k) in enumerate(zip(*np.unravel_index(best, scores_BK.shape), strict=True)):
            parent = self.running[beam]
            tokens = (*parent.tokens, int(tokens_BK[beam, k]))
            score = parent.score + float(logprobs_BK[beam, k])
            one = Hypothesis(tokens, score, float(scores_BK[beam, k]), self.number)
            if self.seq.ending(np.array(tokens), len(parent.tokens)) is None:
                running.append(one)
            elif rank < self.width:
                ended.append(one)

        everything = sorted([*self.ended, *ended], key=self._rank, reverse=True)
        self.ended, self.running = everything[: self.width], running[: self.width]
        if not self._can_improve():
            self.running = []
        # Texts that stop at the length limit or at a stop string have chosen their last token as well.
        chosen = [one.tokens[-1] for one in [*ended, *self.running]]
        is_exempt = () if self.config.penalize_eos else self.seq.stop.eos_ids
        return [token for token in chosen if token not in is_exempt]

    def _can_improve(self) -> bool:
        """Whether a running beam may still take a place among the ended texts."""
        if not self.running or len(self.ended) < self.width:
            return True
        if self.config.early_stopping is True:
            return False
        best, length = self.running[0], len(self.running[0].tokens)
        if self.config.early_stopping == "never" and self.config.length_penalty > 0:
            length = self.seq.stop.max_new_tokens
        hoped = _normalized(best.penalized, length, self.config)
        return hoped > self._rank(self.ended[-1])

    def _rank(self, one: Hypothesis) -> float:
        return _normalized(one.penalized, len(one.tokens), self.config)


def _normalized(score: float, length: int, config: DiverseBeamConfig) -> float:
    return float(score / length**config.length_penalty)


def _common_prefix(texts: Seq[tuple[int, ...]]) -> tuple[int, ...]:
    # What the first and the last in order have in common, all between them have.
    first, last = min(texts), max(texts)
    differs = (at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(differs, len(first))]


def _likeliest(
    logits_NV: Tensor, seq: Sequence, texts: Seq[tuple[int, ...]], num: int
) -> tuple[Ints, Floats]:
    """Give the most likely tokens to follow each text and their log-probabilities, with one transfer.

    What the request adjusts counts, as in plain decoding, for every text by itself.
    """
    contexts = [np.append(seq.prompt, np.array(text, np.int64)) for text in texts]
    logprobs_NV = adjust(logits_NV, seq.law, contexts, seq.num_prompt).log_softmax(1)
    top = logprobs_NV.topk(min(num, logprobs_NV.shape[1]), dim=1)
    tokens_NK, logprobs_NK = torch.stack([top.indices.double(), top.values.double()]).cpu().numpy()
    return tokens_NK.astype(np.int64), logprobs_NK


def _place(seen_QS: Bools) -> tuple[Bools, Ints]:
    """Give each query a slot that none of them sees, and let it see that one too.

    A branch that no beam goes on from is seen by none, so its slots come first:

        seen 1 1 . 1 .      slot 2      1 1 x 1 . .
             1 1 . . 1      slot 5      1 1 . . 1 x
    """
    num = len(seen_QS)
    free = np.flatnonzero(~seen_QS.any(0))
    if num > len(free):
        seen_QS = np.pad(seen_QS, ((0, 0), (0, num - len(free))))
        free = np.flatnonzero(~seen_QS.any(0))
    slots = free[:num]
    seen_QS[np.arange(num), slots] = True
    return seen_QS, slots
