"""Superposed Decoding: k drafts of a text from one forward pass a position.

The last tokens of the k drafts are fed as one, the sum of their embeddings weighted by how likely the
drafts are. What comes out is one law for all of them; n-gram tables tell which token fits which draft.

Promise: approximate; with one draft and alpha 0 it is greedy decoding. Nothing is drawn: it is a search.
Cost: one pass of one position for each position, whatever k, and one over all texts to rerank them;
beside it k table look-ups a position on the host.
Source: "Superposed Decoding: Multiple Generations from a Single Autoregressive Inference Pass"
(arXiv 2405.18400; RAIVNLab/SuperposedDecoding).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from chordal.decoders.decoder import Decoder, Decoding
from chordal.drafters.ngram_model import NgramModel
from chordal.errors import InputError
from chordal.forward import Causal, Forward, Ints, Logits, Reading, TopK, Tree
from chordal.ops.sampling import Law
from chordal.ops.superposition import blend_weights, draft_scores, interpolate, sharpen
from chordal.sequence import Sequence

# Of 2-grams to 6-grams, as published.
_NGRAM_WEIGHTS = np.array([0.01, 0.04, 0.15, 0.18, 0.12])


@dataclass(frozen=True, kw_only=True)
class SuperposedConfig:
    """Settings of `superposed`."""

    num_drafts: int = 3
    """Drafts (k), at least 1."""
    alpha: float = 0.54
    """Weight of the n-grams in the score of a token, from 0 to 1; the model has the rest."""
    temperature: float = 0.06
    """What the model's logits are divided by before they are mixed, above 0."""
    num_candidates: int | None = None
    """Most likely tokens that are scored at a position, at least num_drafts; None takes 3 for each draft."""
    ngrams: str | None = None
    """File of n-gram tables (NgramModel.save); None counts those of the prompt."""
    max_ngram: int = 6
    """Longest n-gram that is looked up, in tokens, from 2 to 6."""
    # Departs from the paper, which has 0: its tables are large enough to know nearly every context.
    backoff: float = 0.01
    """Weight of the model's own law in the n-gram mix, for contexts no table knows; from 0 to 0.5, which
    is what the n-grams leave."""
    rerank: bool = True
    """Whether a last pass over all texts orders them by what the model gives each alone (perplexity)."""
    restart_every: int | None = None
    """Positions after which the best draft alone is fed again and branches anew; None never does."""

    def __post_init__(self) -> None:
        if self.num_drafts < 1:
            raise InputError(f"num_drafts must be at least 1; got {self.num_drafts}.")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha must be from 0 to 1; got {self.alpha}.")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be a finite number above 0; got {self.temperature}.")
        if self.num_candidates is not None and self.num_candidates < self.num_drafts:
            raise InputError(
                f"num_candidates must be at least num_drafts; "
                f"got {self.num_candidates} and {self.num_drafts}."
            )
        if not 2 <= self.max_ngram <= 6:
            raise InputError(f"max_ngram must be from 2 to 6; got {self.max_ngram}.")
        if not 0 <= self.backoff <= 0.5:
            raise InputError(f"backoff must be from 0 to 0.5; got {self.backoff}.")
        if self.restart_every is not None and self.restart_every < 1:
            raise InputError(f"restart_every must be at least 1; got {self.restart_every}.")


@dataclass(frozen=True, slots=True)
class _Draft:
    """Tokens behind the prompt, and their log score."""

    tokens: Ints
    score: float


class Superposed(Decoder):
    """Feed the drafts as one, score what may follow each, keep the best."""

    name = "superposed"
    family = "autoregressive"
    promise = "approximate"
    exact_when = "num_drafts=1, alpha=0 (greedy)"
    needs = ("causal",)
    tells_logprobs = False
    samples = False
    local_settings = ("ngrams",)
    paper = "arXiv 2405.18400"
    Config = SuperposedConfig

    def __init__(self, config: SuperposedConfig | None = None) -> None:
        super().__init__(config)
        path = self.config.ngrams
        self._given = None if path is None else NgramModel.load(path)

    def check_law(self, law: Law) -> None:
        """Refuse penalties, which differ between texts that share one law here, and biases."""
        super().check_law(law)
        if law.adjusts:
            raise InputError(
                "superposed has one law for texts that differ, so it takes no penalty, logit_bias or "
                "constraint. Leave it out or use another decoder."
            )

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence; all drafts are offered as alternatives, the best is the result."""
        config: SuperposedConfig = self.config
        num_drafts, num_candidates = config.num_drafts, config.num_candidates or 3 * config.num_drafts
        alive, finished = [_Draft(seq.prompt[:0], 0.0)], list[_Draft]()
        tables, fed, start, blend = self._tables(seq.prompt), seq.prompt, 0, None

        while True:
            # Predict: one law for all drafts.
            positions = np.arange(start, start + len(fed))
            read = TopK(np.array([len(fed) - 1]), num_candidates)
            reading = yield Forward(fed, positions, Causal(), read, slots=positions, blend=blend)

            # Choose: the k best of all continuations go on, those of them that end are put by.
            alive, ended = self._extend(seq, alive, reading, tables)
            finished = sorted([*finished, *ended], key=lambda draft: -draft.score)[:num_drafts]
            # Scores only fall: where k texts that ended are better than those alive, none of these can win.
            if not alive or (len(finished) == num_drafts and finished[-1].score >= alive[0].score):
                break

            # Commit what every text that can still win begins with.
            shared = _common_prefix([draft.tokens for draft in [*alive, *finished]])
            if len(shared) > seq.frontier - seq.num_prompt:
                seq.append(shared[seq.frontier - seq.num_prompt :])

            # Restart: the best draft alone, its own tokens in place of what was cached for several.
            num = len(alive[0].tokens)
            if config.restart_every is not None and num % config.restart_every == 0:
                alive, blend = alive[:1], None
                fed = alive[0].tokens[-config.restart_every :]
                tables = self._tables(np.concatenate([seq.prompt, alive[0].tokens]))
            # Superpose: the weighted sum of the embeddings of the drafts' last tokens.
            else:
                fed = alive[0].tokens[-1:]
                last_D = np.array([draft.tokens[-1] for draft in alive])
                blend = last_D[None], blend_weights(np.array([draft.score for draft in alive]))[None]
            start = seq.num_prompt + num - len(fed)

        if config.rerank:
            finished = yield from _rerank(seq, finished)
        for draft in finished:
            seq.offer(draft.tokens, draft.score)
        seq.append(finished[0].tokens[seq.frontier - seq.num_prompt :])

    def _tables(self, text: Ints) -> NgramModel:
        """Give the tables of the settings, or else those of a text."""
        num_tables = self.config.max_ngram - 1
        if self._given is None:
            return NgramModel.count([text], max_ngram=num_tables + 1)
        return NgramModel(self._given.tables[:num_tables])

    def _extend(
        self, seq: Sequence, alive: list[_Draft], reading: Reading, tables: NgramModel
    ) -> tuple[list[_Draft], list[_Draft]]:
        """Give the best continuations that go on, and those among the k best that end.

        Departs from the paper: its code lets a text end that is among the 2k best, and then one draft is
        not greedy decoding.
        """
        config: SuperposedConfig = self.config
        is_possible = reading.probs[0] > 0
        tokens, probs_M = reading.tokens[0][is_possible], reading.probs[0][is_possible]
        log_probs_M = sharpen(probs_M, config.temperature)
        orders_DNM = np.stack(
            [tables.probs(np.concatenate([seq.prompt, draft.tokens]), tokens) for draft in alive]
        )
        weights_N = _NGRAM_WEIGHTS[: orders_DNM.shape[1]]
        ngrams_DM = interpolate(orders_DNM, weights_N, log_probs_M, config.backoff)
        scores_DM = draft_scores(log_probs_M, ngrams_DM, config.alpha)
        scores_DM = scores_DM + np.array([[draft.score] for draft in alive])

        longer, ended = list[_Draft](), list[_Draft]()
        best_first = np.argsort(-scores_DM, axis=None, kind="stable")
        for rank, at in enumerate(best_first.tolist()):
            score = float(scores_DM.flat[at])
            if score == -np.inf or (rank >= config.num_drafts and len(longer) == config.num_drafts):
                break
            parent, token = divmod(at, len(tokens))
            draft = _Draft(np.append(alive[parent].tokens, tokens[token]), score)
            if seq.ending(draft.tokens, len(draft.tokens) - 1) is None:
                longer.append(draft)
            elif rank < config.num_drafts:
                ended.append(draft)
        return longer[: config.num_drafts], ended


def _rerank(seq: Sequence, drafts: list[_Draft]) -> Generator[Forward, Any, list[_Draft]]:
    """Score each text by its mean log-likelihood a token, without superposition, and order them.

    The texts are branches behind the last token of the prompt, whose own slots still hold what they held:

        prompt  a b c   sees prompt a b
                a d     sees prompt a
    """
    lengths = [len(draft.tokens) for draft in drafts]
    inner = np.concatenate([np.arange(length - 1) for length in lengths])
    # Row 0 is the last token of the prompt; the first token of each branch is its child.
    parents = np.where(inner == 0, 0, np.arange(len(inner)))
    tokens = np.concatenate([seq.prompt[-1:], *(draft.tokens[:-1] for draft in drafts)])
    root = seq.num_prompt - 1
    reading = yield Forward(
        tokens,
        np.concatenate([[root], root + 1 + inner]),
        Tree(root, (-1, *parents.tolist())),
        Logits(np.arange(len(tokens))),
    )
    ends = np.cumsum([length - 1 for length in lengths])
    rows = np.concatenate(
        [np.r_[0, end - length + 2 : end + 1] for length, end in zip(lengths, ends, strict=True)]
    )
    logprobs_NV = reading.logits[rows].log_softmax(1)
    texts = torch.from_numpy(np.concatenate([draft.tokens for draft in drafts])).to(logprobs_NV.device)
    scores_N = logprobs_NV.gather(1, texts[:, None])[:, 0].double().cpu().numpy()
    means = [float(part.mean()) for part in np.split(scores_N, np.cumsum(lengths)[:-1])]
    scored = [_Draft(draft.tokens, mean) for draft, mean in zip(drafts, means, strict=True)]
    return sorted(scored, key=lambda draft: -draft.score)


def _common_prefix(texts: list[Ints]) -> Ints:
    """Give what all texts begin with."""
    num = min(map(len, texts))
    is_same = (np.stack([text[:num] for text in texts]) == texts[0][:num]).all(0)
    return texts[0][: num if is_same.all() else int(np.argmin(is_same))]
