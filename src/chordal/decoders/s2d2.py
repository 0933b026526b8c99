"""S2D2: a block-diffusion model drafts a block and verifies it token by token, as its own causal model.

Source: "S2D2" (arXiv 2603.25702). With blocks of one token a block-diffusion model is autoregressive. So
one pass drafts every masked position of the block, and another, if a route says that it is worth it,
gives the law of each drafted token of the first masked span given those before it; the span is then
accepted from left to right by speculative sampling. Drafts that are not verified go by the base rule.
Notation: p is the draft's law and q the verifier's, threshold is tau, verify_cost is c, min_score is
tau_score, ratio_power is gamma, causal_cache and causal_draft are cache_ver and draft_ver.

Promise: approximate. route=always with causal_cache has the law of decoding with blocks of one token,
greedy and sampled; route=never is the base decoder, `block_diffusion` with this threshold, or
`fast_dllm_v2` if logits are shifted.
Cost: one pass a step, two if it is verified. A draft feeds the block; a verification feeds it up to the
end of the span and, unless logits are shifted, the span's masks.

Departs from the published code: a greedy draft is kept where it is the verifier's most likely token,
where published code compares probabilities at temperature 1 and rejects at random; drafts always feed
the whole block; what no verified row sees is not fed; no span reaches behind the length limit; without
shifted logits a finished block is stored in the first pass of the next; the mask token is never committed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.fast_dllm_v2 import store
from chordal.errors import InputError
from chordal.forward import Blocks, Causal, Confidence, Floats, Forward, Ints, Logits, Visible
from chordal.ops import acceptance, sampling
from chordal.ops.unmask import above_threshold
from chordal.policies import route as routes
from chordal.policies.route import Draft, Estimate, Gain, Route
from chordal.sequence import UNCOMMITTED, Sequence
from chordal.stats import TARGET


@dataclass(frozen=True, kw_only=True)
class S2D2Config:
    """Settings of `s2d2`."""

    threshold: float = 0.85
    """Without verification, commit every position more confident than this (tau), at least one."""
    sub_block_length: int | None = None
    """Positions of a block that are drafted and committed together, at least 1; None is the block."""
    route: Literal["always", "never", "span", "score", "hysteresis", "bandit"] = "score"
    """When to verify: spans of min_span, scores of min_score, between two scores, or as rewards teach."""
    min_span: int = 8
    """For route=span: shortest span that is verified, at least 1."""
    estimate: Estimate = "entropy_decay"
    """For scores: how the chance that a token is kept is estimated from the draft."""
    estimate_at: float | None = None
    """Its parameter, at least 0; None is the published one."""
    verify_cost: float = 1.0
    """For scores: tokens that verification must gain (c), at least 0."""
    cost_per_confident: bool = True
    """Count that cost for each position above the threshold rather than once: dynamic, not static."""
    min_score: float = 0.0
    """For route=score: lowest score that is verified (tau_score)."""
    on_score: float = 1.0
    """For route=hysteresis: score above which verification begins."""
    off_score: float = -5.0
    """For route=hysteresis: score below which it ends; below on_score."""
    exploration: float = 1.0
    """For route=bandit: weight of what is not known yet (beta), at least 0."""
    ratio_power: float = 1.0
    """Keep a token with probability min(1, (q/p)^this) (gamma), above 0; below 1 keeps more."""
    causal_cache: bool = False
    """Store finished blocks as the verifier would, no token seeing those behind it."""
    causal_draft: bool = False
    """When drafting, let the known tokens before the first mask see no tokens behind them either."""

    def __post_init__(self) -> None:
        for name in ("threshold", "verify_cost", "exploration"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be at least 0; got {getattr(self, name)}.")
        if self.sub_block_length is not None and self.sub_block_length < 1:
            raise InputError(f"sub_block_length must be at least 1; got {self.sub_block_length}.")
        if self.min_span < 1:
            raise InputError(f"min_span must be at least 1; got {self.min_span}.")
        if self.estimate_at is not None and not self.estimate_at >= 0:
            raise InputError(f"estimate_at must be at least 0; got {self.estimate_at}.")
        if not self.off_score < self.on_score:
            raise InputError(
                f"off_score must be below on_score; got off_score={self.off_score}, on_score={self.on_score}."
            )
        if not 0 < self.ratio_power < float("inf"):
            raise InputError(f"ratio_power must be a finite number above 0; got {self.ratio_power}.")


class S2D2(Decoder):
    """Draft a block at once, verify its first masked span token by token where that pays."""

    name = "s2d2"
    family = "diffusion"
    promise = "approximate"
    exact_when = "route = always with causal_cache: blocks of one token"
    needs = ("block",)
    tells_logprobs = False
    paper = "arXiv 2603.25702"
    Config = S2D2Config

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: S2D2Config = self.config
        length = seq.family.block_length
        assert length is not None, "a block model has a block length"
        part = min(config.sub_block_length or length, length)
        sees = Causal() if config.causal_cache else Blocks(length)
        route = _make_route(config)

        end = -(-seq.limit // length) * length
        seq.open_canvas(end)
        num_stored = 0
        for start in range(seq.num_prompt // length * length, end, length):
            # Store what is finished: in a pass that also tells the first token, or in that of a draft.
            ahead: tuple[Forward, ...] = ()
            if seq.family.shift and start > 0:
                yield from store(seq, num_stored, start, sees)
            elif start > 0:
                new = np.arange(num_stored, start)
                ahead = (Forward(seq.tokens[new], new, sees, slots=new),)
            num_stored = start

            for at in range(start, start + length, part):
                while not seq.done and len(masked := seq.masked(at, min(at + part, start + length))):
                    yield from self._step(seq, start, masked, ahead, route)
                    ahead = ()
            if seq.done:
                return

    def _step(
        self, seq: Sequence, start: int, masked: Ints, ahead: tuple[Forward, ...], route: Route
    ) -> Decoding:
        """Draft the masked positions of a part, verify those that it begins with or not, commit some."""
        config: S2D2Config = self.config
        length = seq.family.block_length
        assert length is not None, "a block model has a block length"

        # Draft. The reading has no name: it holds the logits of the whole batch.
        pass_number = seq.stats.forwards.get(TARGET, 0)
        known = seq.tokens[np.flatnonzero(seq.committed_at[: seq.canvas_end] != UNCOMMITTED)]
        asked = _ask_draft(seq, start, length, masked, config.causal_draft)
        probs_NV, tokens, confidence = _draw(
            sampling.under_law(
                (yield (*ahead, asked))[-1].logits, seq.law, [known] * len(masked), seq.num_prompt
            ),
            seq,
            masked,
            pass_number,
        )

        # Route: is the first run of masks worth a pass? What is behind the length limit is not.
        span = masked[(masked - masked[0] == np.arange(len(masked))) & (masked < seq.limit)]
        num = len(span)
        above = float(np.nextafter(config.threshold, np.inf))
        num_confident = int((confidence >= above).sum())
        progress = float((seq.committed_at[start : start + length] > 0).mean())
        draft = Draft(probs_NV[:num], confidence[:num], num_confident, length, progress)
        if not route(draft):
            chosen = np.sort(above_threshold(confidence, above))
            seq.commit(masked[chosen], tokens[chosen], confidence=Confidence(confidence[chosen]))
            route.learn(len(chosen))
            return

        # Verify.
        pass_number = seq.stats.forwards.get(TARGET, 0)
        reading = yield _ask_verify(seq, start, span, tokens[:num])
        text = np.concatenate([seq.committed, tokens[:num]])
        laws_SV = sampling.under_law(
            reading.logits, seq.law, [text[:position] for position in span], seq.num_prompt
        )

        # Accept from left to right; the first rejected token is replaced.
        kept = _accept(seq, span, tokens[:num], probs_NV[:num], laws_SV, pass_number, config.ratio_power)
        verified = sampling.probs_of(laws_SV[: len(kept)].softmax(1), kept) if seq.wants_confidence else None
        seq.commit(
            span[: len(kept)],
            kept,
            confidence=None if verified is None else Confidence(verified),
            draft=tokens[:num],
            draft_confidence=confidence[:num],
        )
        route.learn(len(kept))


def _make_route(config: S2D2Config) -> Route:
    gain = Gain(config.estimate, config.estimate_at, config.verify_cost, config.cost_per_confident)
    if config.route == "span":
        return routes.LongSpan(config.min_span)
    if config.route == "score":
        return routes.Score(gain, config.min_score)
    if config.route == "hysteresis":
        return routes.Hysteresis(gain, config.on_score, config.off_score)
    if config.route == "bandit":
        return routes.Bandit(config.exploration)
    return routes.Constant(config.route == "always")


def _ask_draft(seq: Sequence, start: int, length: int, masked: Ints, is_causal: bool) -> Forward:
    """Ask for the masked positions of a block, over the cache of what is before it."""
    positions = np.arange(start, start + length)
    own = np.ones((length, length), bool)
    if is_causal:
        num_known = seq.frontier - start
        own[:num_known] = np.tri(num_known, length, dtype=bool)
    sees = Visible(np.zeros(length, np.int64), np.full(length, start), own)
    return Forward(seq.tokens[positions], positions, sees, Logits(masked - seq.family.shift - start))


def _ask_verify(seq: Sequence, start: int, span: Ints, draft: Ints) -> Forward:
    """Ask for each token of a span given those before it, over the cache of what is before its block.

    Rows and what they see of each other, for a block A B _ _ with the draft C D; with shifted logits
    the rows of B and C tell it, without them two masks that stand in the places of C and D:

                 A B C            A B C _ _
        A        x . .            x . . . .
        B        x x .            x x . . .
        C        x x x            x x x . .
        _                         x x . x .
        _                         x x x . x
    """
    filled = np.arange(start, span[-1])
    tokens = np.concatenate([seq.tokens[start : seq.frontier], draft[:-1]])
    own = np.tri(len(filled), dtype=bool)
    positions = filled
    rows = span - 1 - start
    if not seq.family.shift:
        num, rows = len(filled), len(filled) + np.arange(len(span))
        tokens = np.concatenate([tokens, np.full(len(span), seq.family.mask_id)])
        positions = np.concatenate([filled, span])
        own = np.eye(len(positions), dtype=bool)
        own[:, :num] |= np.concatenate([np.tri(num, dtype=bool), filled < span[:, None]])
    num_rows = len(positions)
    sees = Visible(np.zeros(num_rows, np.int64), np.full(num_rows, start), own)
    return Forward(tokens, positions, sees, Logits(rows))


def _draw(laws_NV: Tensor, seq: Sequence, positions: Ints, pass_number: int) -> tuple[Tensor, Ints, Floats]:
    """Give the probabilities of each position, a token drawn from them, and its probability."""
    probs_NV = laws_NV.softmax(1)
    tokens_N = laws_NV.argmax(1)
    if not seq.law.is_greedy:
        uniforms = seq.uniforms(positions, "token", pass_number)
        tokens_N = sampling.draw(laws_NV, torch.from_numpy(uniforms).to(laws_NV.device))
    confidence_N = probs_NV.gather(1, tokens_N[:, None])[:, 0]
    tokens, confidence = torch.stack([tokens_N.double(), confidence_N.double()]).cpu().numpy()
    return probs_NV, tokens.astype(np.int64), confidence


def _accept(
    seq: Sequence, span: Ints, draft: Ints, probs_SV: Tensor, laws_SV: Tensor, pass_number: int, power: float
) -> Ints:
    """Give the draft tokens that are kept, and one in place of the first that is not.

    Args:
        seq: The sequence.
        span: Where they stand.
        draft: The tokens.
        probs_SV: Probabilities p they were drawn with.
        laws_SV: Logits of the verifier's law q.
        pass_number: Number of the verifying pass.
        power: Of the acceptance ratio.
    """
    if seq.law.is_greedy:
        best: Ints = laws_SV.argmax(1).cpu().numpy()
        return best[: acceptance.accept_greedy(draft, best) + 1]
    target_SV, device = laws_SV.softmax(1), laws_SV.device
    rows_S, draft_S = torch.arange(len(draft), device=device), torch.from_numpy(draft).to(device)
    ratio_S = acceptance.acceptance_ratio(target_SV[rows_S, draft_S], probs_SV[rows_S, draft_S], power)
    # Another draw than the draft's: its pass was another.
    uniforms_S = torch.from_numpy(seq.uniforms(span, "token", pass_number)).to(device)
    instead_S = sampling.draw(acceptance.residual(target_SV, probs_SV).log(), uniforms_S)
    ratio, instead = torch.stack([ratio_S.double(), instead_S.double()]).cpu().numpy()
    num = acceptance.accept_by_ratio(ratio, seq.uniforms(span, "accept", pass_number))
    return np.concatenate([draft[:num], instead[num : num + 1].astype(np.int64)])
