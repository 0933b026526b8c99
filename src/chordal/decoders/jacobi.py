"""Jacobi decoding and lookahead: the target refines guesses of its own while it verifies them.

Sources: "Accelerating Transformer Inference for Translation via Parallel Decoding" (arXiv 2305.10427), plain
Jacobi iteration, `ngram=2` and `num_branches=0`; "Break the Sequential Dependency of LLM Inference Using
Lookahead Decoding" (arXiv 2402.02057), the window of n-grams; "Fast and Accurate Causal Parallel Decoding
using Jacobi Forcing" (arXiv 2512.14681), rejection recycling. Blocks beyond the one that is verified, which
the last adds, pay with a model that was trained for them and are left out.

Promise: exact, as with any drafter of `speculate`.
Cost: no extra model; a pass feeds up to W (N - 1) positions of the window and G (N - 1) of n-grams.
"""

from __future__ import annotations

from dataclasses import dataclass

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.speculate import speculate
from chordal.drafters.jacobi import JacobiDrafter
from chordal.errors import InputError
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class JacobiConfig:
    """Settings of `jacobi`."""

    window: int = 7
    """Positions that are guessed side by side (W), the first of them behind the last token, at least 1."""
    ngram: int = 5
    """Length of the n-grams read off the window (N), at least 2; 2 is plain Jacobi iteration."""
    num_branches: int = 7
    """Most n-grams verified beside the window (G), at least 0."""
    recycle: int = 0
    """Earlier passes whose rejected guesses are tried again behind a token they hold, at least 0."""
    learn_text: bool = True
    """Whether n-grams of the prompt and the output are kept too; the published code does not by default, and
    edits then take half as many passes again."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.ngram < 2:
            raise InputError(
                f"window must be at least 1 and ngram at least 2; got {self.window} and {self.ngram}."
            )
        if self.num_branches < 0 or self.recycle < 0:
            raise InputError(
                f"num_branches and recycle must be at least 0; got {self.num_branches} and {self.recycle}."
            )


class Jacobi(Decoder):
    """Guess many tokens, keep the right ones, guess the others again from what the same pass drew."""

    name = "jacobi"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    constrains = True
    paper = "arXiv 2305.10427, 2402.02057"
    Config = JacobiConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: JacobiConfig = self.config
        drafter = JacobiDrafter(
            seq,
            window=config.window,
            ngram=config.ngram,
            num_branches=config.num_branches,
            recycle=config.recycle,
            learn_text=config.learn_text,
        )
        # The window reaches so far; a branch of an n-gram reaches N - 1.
        return speculate(seq, drafter, num_draft=max(config.window + config.ngram - 3, config.ngram - 1))
