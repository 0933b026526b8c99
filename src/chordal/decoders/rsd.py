"""Recursive speculative decoding: a draft model's tree, its children drawn without replacement.

Source: "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without Replacement"
(arXiv 2402.14160), RSD-C and RSD-S; stochastic beam search (arXiv 1903.06059). For comparison, as in the
paper, trees of independent draws: multi-step rejection (SpecInfer, arXiv 2305.09781) and K-SEQ (SpecTr, arXiv
2310.15141).

Promise: exact. At temperature 0 the tree holds the draft model's most likely tokens.
Cost: a round is one pass of the draft model a level and one of the target over the whole tree. The draft's
law at every inner node is kept until the round ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from chordal.cursor import Cursor, Feed
from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.speculate import speculate
from chordal.drafters.draft import NO_DRAFT, Draft, Drafter, Drafting
from chordal.errors import InputError
from chordal.forward import Ints, Reading
from chordal.ops import sampling
from chordal.ops.acceptance import Offers, k_seq, with_replacement, without_replacement
from chordal.ops.perturb import condition_on_maximum, gumbel_noise
from chordal.sequence import Sequence

# Rows of noise that one position may use; a level of a tree is never this wide.
_MAX_WIDTH = 1 << 16

_OFFERS: dict[str, Offers] = {
    "recursive": without_replacement,
    "independent": with_replacement,
    "k_seq": k_seq,
}


@dataclass(frozen=True, kw_only=True)
class RSDConfig:
    """Settings of `rsd`."""

    tree: Literal["beam", "constant"] = "beam"
    """How it grows: a beam keeps the best `beam_width` nodes of each level (RSD-S); constant gives each node
    of a level as many children as `widths` says (RSD-C)."""
    beam_width: int = 4
    """Nodes of a level of a beam, at least 1."""
    depth: int = 4
    """Levels of a beam, at least 0; 0 is plain decoding."""
    widths: str = "3,2,1,1"
    """Children of each node, level by level, of a constant tree."""
    rule: Literal["recursive", "independent", "k_seq"] = "recursive"
    """How children are drawn and judged: without replacement; independently, one after the other or by K-SEQ,
    which need a constant tree."""

    def __post_init__(self) -> None:
        if self.beam_width < 1 or self.depth < 0:
            raise InputError(
                f"beam_width must be at least 1 and depth at least 0; got {self.beam_width} and {self.depth}."
            )
        if not all(width.strip().isdecimal() and int(width) > 0 for width in self.widths.split(",")):
            raise InputError(f"widths must be whole numbers above 0 such as 3,2,1; got {self.widths!r}.")
        if np.prod(self.level_widths) >= _MAX_WIDTH or self.beam_width >= _MAX_WIDTH:
            raise InputError(f"a level of the tree must have fewer than {_MAX_WIDTH} nodes; got more.")
        if self.tree == "beam" and self.rule != "recursive":
            raise InputError(f"rule={self.rule} needs tree=constant; a beam is drawn without replacement.")

    @property
    def level_widths(self) -> list[int]:
        """Children of a node of each level, of a constant tree."""
        return [int(width) for width in self.widths.split(",")]


class RSD(Decoder):
    """Draft a tree without drawing a token twice, judge it recursively."""

    name = "rsd"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    constrains = True
    needs_models = ("draft",)
    local_settings = ("widths",)
    paper = "arXiv 2402.14160"
    Config = RSDConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: RSDConfig = self.config
        depth = config.depth if config.tree == "beam" else len(config.level_widths)
        return speculate(seq, TreeDrafter(seq, config), num_draft=depth)


class TreeDrafter(Drafter):
    """Grow a tree level by level from the laws of a draft model.

    Args:
        seq: The sequence; its law is also the draft's.
        config: How the tree grows.
    """

    def __init__(self, seq: Sequence, config: RSDConfig) -> None:
        self.seq, self.config, self.cursor = seq, config, Cursor("draft")

    def propose(self, text: Ints, budget: int) -> Drafting:
        """Grow a tree of at most `budget` levels."""
        config, is_greedy = self.config, self.seq.law.is_greedy
        laws: dict[int, Tensor] = {}
        draft, level = NO_DRAFT, np.array([-1])
        feed = self.cursor.feed(text)
        scores = _Scores()
        num_levels = config.depth if config.tree == "beam" else len(config.level_widths)
        for number in range(min(budget, num_levels)):
            reading = yield feed.logits()
            log_NV = self._log_law(feed, reading)
            laws |= zip(level.tolist(), log_NV.exp(), strict=True)
            if config.tree == "beam":
                parents, tokens, scores = self._widen_beam(log_NV, scores, feed)
            else:
                parents, tokens = self._branch(log_NV, config.level_widths[number], feed)
            if not len(tokens):
                break
            start = len(draft)
            draft = Draft(
                np.concatenate([draft.tokens, tokens]), np.concatenate([draft.parents, level[parents]])
            )
            level = np.arange(start, len(draft))
            if number + 1 < min(budget, num_levels):
                feed = self.cursor.grow(draft)
        drawn = Draft(draft.tokens, draft.parents, laws, _OFFERS[config.rule])
        if not is_greedy:
            return drawn
        known = drawn.known_confidence() if self.seq.wants_confidence else None
        return Draft(draft.tokens, draft.parents, confidence=known)

    def _log_law(self, feed: Feed, reading: Reading) -> Tensor:
        return feed.under_law(reading, self.seq).double().log_softmax(1)

    def _noise(self, feed: Feed, like_NV: Tensor) -> Tensor:
        """Draw one Gumbel variable for each token behind each node, none at temperature 0."""
        if self.seq.law.is_greedy:
            return torch.zeros_like(like_NV)
        ids = np.arange(like_NV.shape[1])
        keys = [int(position) * _MAX_WIDTH + number for number, position in enumerate(feed.following)]
        uniforms_NV = np.stack([self.seq.uniforms(ids, "draft", key) for key in keys])
        return gumbel_noise(torch.from_numpy(uniforms_NV).to(like_NV.device))

    def _branch(self, log_NV: Tensor, width: int, feed: Feed) -> tuple[Ints, Ints]:
        """Give each node its children: number of the parent in its level and token of each."""
        if self.config.rule == "recursive" or self.seq.law.is_greedy:
            top = (log_NV + self._noise(feed, log_NV)).topk(min(width, log_NV.shape[1]), dim=1)
            parents, ranks = np.nonzero(torch.isfinite(top.values).cpu().numpy())
            return parents, top.indices.cpu().numpy()[parents, ranks]
        keys = [int(position) * _MAX_WIDTH + number for number, position in enumerate(feed.following)]
        uniforms = np.concatenate([self.seq.uniforms(np.arange(width), "draft", key) for key in keys])
        rows_NV = log_NV.repeat_interleave(width, 0)
        tokens: Ints = sampling.draw(rows_NV, torch.from_numpy(uniforms).to(log_NV.device)).cpu().numpy()
        return np.repeat(np.arange(len(log_NV)), width), tokens

    def _widen_beam(self, log_NV: Tensor, scores: _Scores, feed: Feed) -> tuple[Ints, Ints, _Scores]:
        """Give the best children of all nodes of a level together, best first."""
        path_NV = log_NV if scores.path_N is None else scores.path_N[:, None] + log_NV
        perturbed_NV = path_NV + self._noise(feed, log_NV)
        if scores.perturbed_N is not None and not self.seq.law.is_greedy:
            perturbed_NV = condition_on_maximum(perturbed_NV, scores.perturbed_N)
        top = perturbed_NV.flatten().topk(min(self.config.beam_width, perturbed_NV.numel()))
        at_W = top.indices[torch.isfinite(top.values)]
        parents_W, tokens_W = at_W // log_NV.shape[1], at_W % log_NV.shape[1]
        best = _Scores(path_NV.flatten()[at_W], perturbed_NV.flatten()[at_W])
        return parents_W.cpu().numpy(), tokens_W.cpu().numpy(), best


@dataclass(frozen=True)
class _Scores:
    """Log-probability of each node's path, and that plus noise; None for the root, which has 0."""

    path_N: Tensor | None = None
    perturbed_N: Tensor | None = None
