"""ADED: a table of trigrams stands in for the target, and a tree search in it drafts.

The table is learnt from a corpus or begins empty; at each step the last tokens of the text raise their
trigrams. Monte Carlo tree search walks it and proposes what it visited most.

Promise: exact. Cost: no extra model; one forward pass of 1 + n positions, n at most `max_nodes`, for 1 to
1 + `num_draft` tokens; the search costs host time at each step, see the page of the decoder.
Source: "Adaptive Draft-Verification for Efficient Large Language Model Decoding", 2024 (arXiv 2407.12021;
liuxukun2000/Adaptix).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.speculate import speculate
from chordal.drafters.ngram_model import NgramModel
from chordal.drafters.trigrams import TrigramDrafter, TrigramTable
from chordal.errors import InputError
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class ADEDConfig:
    """Settings of `aded`."""

    num_draft: int = 4
    """Longest path of a draft, at least 0; 0 is plain decoding. The last token of a path is not searched."""
    num_iterations: int = 150
    """Iterations of the search at each step, at least 1."""
    num_paths: int = 24
    """Most visited nodes that are proposed, the root among them, at least 1; each with its best successor."""
    max_nodes: int = 64
    """Most nodes of a draft, at least 1."""
    exploration: float = 32.0
    """Weight of a score against the mean reward in the search (c1), at least 0."""
    exploration_base: float = 8.0
    """Visits from which that weight grows, with their logarithm (c2), above 0."""
    window: int = 16
    """Last tokens that are learnt at each step, at least 0; below 3 nothing is."""
    increment: float = 0.04
    """What is added to the score of a trigram that is learnt, above 0."""
    max_score: float = 3.0
    """Largest score that can be learnt, above 0."""
    num_successors: int = 12
    """Successors kept for a pair of tokens, at least 1."""
    max_pairs: int = 100_000
    """Pairs that are kept beside the corpus, at least 1; the one not learnt for longest goes first."""
    # Departs from the paper, which learns the window only and has a large corpus instead.
    learn_prompt: bool = True
    """Whether all of the prompt is learnt once at the beginning, not its last tokens only."""
    corpus: str | None = None
    """File of n-grams of texts (NgramModel.save), of at least 3 tokens; None begins empty."""
    scope: Literal["request", "session"] = "request"
    """How long what is learnt lives: one request, or as long as the decoder."""

    def __post_init__(self) -> None:
        if self.num_draft < 0 or self.window < 0:
            raise InputError(
                f"num_draft and window must be at least 0; got {self.num_draft} and {self.window}."
            )
        if not 0 <= self.exploration < float("inf"):
            raise InputError(f"exploration must be a finite number of at least 0; got {self.exploration}.")
        for name in ("num_iterations", "num_paths", "max_nodes", "num_successors", "max_pairs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("exploration_base", "increment", "max_score"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be a finite number above 0; got {getattr(self, name)}.")


class ADED(Decoder):
    """Search a table of trigrams that follows the text."""

    name = "aded"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    constrains = True
    local_settings = ("corpus",)
    paper = "arXiv 2407.12021"
    Config = ADEDConfig

    def __init__(self, config: ADEDConfig | None = None) -> None:
        super().__init__(config)
        self.remembers = self.config.scope == "session"
        self._corpus = None
        if (path := self.config.corpus) is not None:
            tables = NgramModel.load(path).tables
            if len(tables) < 2:
                raise InputError(f"{path} must hold n-grams of 3 tokens; count it with max_ngram=3.")
            self._corpus = tables[1]
        self.reset()

    def reset(self) -> None:
        """Forget what was learnt in the session."""
        self._table = self._new_table()

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: ADEDConfig = self.config
        drafter = TrigramDrafter(
            seq,
            self._table if self.remembers else self._new_table(),
            num_iterations=config.num_iterations,
            num_paths=config.num_paths,
            max_nodes=config.max_nodes,
            exploration=config.exploration,
            exploration_base=config.exploration_base,
            window=config.window,
            learn_prompt=config.learn_prompt,
        )
        return speculate(seq, drafter, num_draft=config.num_draft)

    def _new_table(self) -> TrigramTable:
        config: ADEDConfig = self.config
        return TrigramTable(
            self._corpus,
            num_successors=config.num_successors,
            increment=config.increment,
            max_score=config.max_score,
            max_pairs=config.max_pairs,
        )
