"""DiffusionGemma's decoding: refine a canvas of random tokens, renoise what is not sure, repeat.

Source: DiffusionGemma (google/diffusiongemma-26B-A4B-it) in transformers; the acceptance rule is that of
arXiv 2505.24857. There is no mask token: noise is a uniformly random token, nothing of a canvas is final
before all of it is, and any position may change in any step. Each step also sees what the last one said
(self-conditioning).
Notation: num_steps is N, entropy_bound is gamma; step s of a canvas, from 1, has the temperature
t_min + (t_max - t_min) (N - s + 1) / N.

Promise: approximate; this is the model's own sampler, and temperature 1 is as published.
Cost: up to N passes for the canvas, each feeding its length L, and one that stores it before the next.

Departs from the published code: random numbers are keyed by position and step, not drawn in order;
a temperature of the request multiplies the schedule, and 0 proposes the most likely tokens (noise stays
random); a repetition penalty and truncation, where asked for, shape the law before anything is measured;
tokens beyond the length limit are dropped, though the last canvas is as long as the others.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chordal.decoders.decoder import Decoder, Decoding
from chordal.errors import InputError
from chordal.forward import Causal, Confidence, Floats, Forward, Ints, Logits, Visible
from chordal.ops import sampling
from chordal.ops.sampling import Law
from chordal.ops.unmask import nearly_independent
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class RenoiseConfig:
    """Settings of `renoise`; the defaults are the published ones."""

    num_steps: int = 48
    """Denoising passes of a canvas at most (N), at least 1."""
    entropy_bound: float = 0.1
    """Keep the surest tokens while the entropies (nats) before the last add up to this (gamma), above 0."""
    t_max: float = 0.8
    """Temperature of the first step, above t_min."""
    t_min: float = 0.4
    """Temperature that the last step comes close to, at least 0."""
    stability_threshold: int = 1
    """Steps before in which the most likely canvas must have been the same to stop early, at least 0."""
    confidence_threshold: float = 0.005
    """Mean entropy (nats) to stay below to stop early, at least 0; 0 always takes every step."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise InputError(f"num_steps must be at least 1; got {self.num_steps}.")
        if not self.entropy_bound > 0:
            raise InputError(f"entropy_bound must be above 0; got {self.entropy_bound}.")
        if not 0 <= self.t_min < self.t_max < float("inf"):
            raise InputError(
                f"t_min must be at least 0 and below a finite t_max; got {self.t_min} and {self.t_max}."
            )
        if self.stability_threshold < 0:
            raise InputError(f"stability_threshold must be at least 0; got {self.stability_threshold}.")
        if not self.confidence_threshold >= 0:
            raise InputError(f"confidence_threshold must be at least 0; got {self.confidence_threshold}.")


class Renoise(Decoder):
    """Denoise canvas after canvas behind a causal cache; uncertain positions become noise again."""

    name = "renoise"
    family = "diffusion"
    promise = "approximate"
    exact_when = "temperature = 1"
    needs = ("uniform",)
    tells_logprobs = False
    paper = "DiffusionGemma; arXiv 2505.24857"
    Config = RenoiseConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: RenoiseConfig = self.config
        length = seq.family.block_length
        assert length is not None, "a uniform model has a canvas length"
        rows, num_cached = np.arange(length), 0
        while not seq.done:
            # Encode what was committed since the last canvas: the prompt, or that canvas.
            start = seq.frontier
            new = np.arange(num_cached, start)
            yield Forward(seq.committed[num_cached:], new, Causal(), slots=new)
            num_cached = start

            # Start from noise. Every row sees the prefix and the whole canvas.
            positions = start + rows
            sees = Visible(
                np.zeros(length, np.int64), np.full(length, start), np.ones((length, length), bool)
            )
            canvas, said = _noise(seq, positions, 0), None
            before: deque[Ints] = deque(maxlen=config.stability_threshold)
            for step in range(1, config.num_steps + 1):
                # Predict, given what the last step said, under this step's temperature.
                share = (config.num_steps - step + 1) / config.num_steps
                temperature = config.t_min + (config.t_max - config.t_min) * share
                law = dataclasses.replace(seq.law, temperature=temperature * (seq.law.temperature or 1))
                uniforms = None if seq.law.is_greedy else seq.uniforms(positions, "token", step)
                # The reading has no name: it holds the logits of the whole batch.
                said, best, sure, proposed, confidence, entropy = _predict(
                    (yield Forward(canvas, positions, sees, Logits(rows), inject=said)).logits,
                    law,
                    seq.committed,
                    seq.num_prompt,
                    uniforms,
                )

                # Stop when the most likely canvas stays the same and is sure.
                is_stable = len(before) == config.stability_threshold and all(
                    np.array_equal(best, one) for one in before
                )
                before.append(best)
                if is_stable and entropy.mean() < config.confidence_threshold:
                    break

                # Accept what is sure, whatever it was before; all else is noise again.
                accepted = nearly_independent(entropy, config.entropy_bound)
                canvas = _noise(seq, positions, step)
                canvas[accepted] = proposed[accepted]
                seq.guess(positions[accepted], proposed[accepted], confidence[accepted])
            seq.append(best, confidence=Confidence(sure))


def _noise(seq: Sequence, positions: Ints, step: int) -> Ints:
    """Draw a token for each position, every one of the vocabulary as likely as the others."""
    assert seq.family.vocab_size is not None, "a uniform model has a vocabulary"
    return (seq.uniforms(positions, "noise", step) * seq.family.vocab_size).astype(np.int64)


def _predict(
    logits_QV: Tensor, law: Law, context: Ints, num_prompt: int, uniforms: Floats | None
) -> tuple[Tensor, Ints, Floats, Ints, Floats, Floats]:
    """Read a step: processed logits, the most likely and the proposed tokens, and their entropies.

    Either tokens come with their probabilities. Without uniforms the most likely ones are proposed.
    """
    said_QV = sampling.under_law(logits_QV, law, [context] * len(logits_QV), num_prompt)
    best_Q = said_QV.argmax(1)
    proposed_Q = best_Q
    if uniforms is not None:
        proposed_Q = sampling.draw(said_QV, torch.from_numpy(uniforms).to(said_QV.device))
    probs_QV = said_QV.softmax(1)
    entropy_Q = sampling.entropy(probs_QV)
    probs_2Q = (probs_QV.gather(1, tokens_Q[:, None])[:, 0] for tokens_Q in (best_Q, proposed_Q))
    rows = torch.stack([column.double() for column in (best_Q, proposed_Q, *probs_2Q, entropy_Q)])
    best, proposed, sure, confidence, entropy = rows.cpu().numpy()
    return said_QV, best.astype(np.int64), sure, proposed.astype(np.int64), confidence, entropy
