"""Where a decoder's greedy text leaves that of plain decoding, and whether that is a tie or a bug.

At a divergence the model itself is asked, without any decoder. If it holds both tokens for as good as
the best one, up to what its own numbers vary by, it is a tie; else a bug.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from chordal.decoders.decoder import Decoder
from chordal.forward import Ints
from chordal.generation import Model, Prompt, Request
from chordal.ops.sampling import Law
from chordal.verification.reference import measure_noise, score
from chordal.verification.runs import Runs

# Each of the two computations may be off by the noise, in either direction.
_NOISES_A_TIE = 2
# Texts the noise is measured on, and new tokens of each.
_NOISE_TEXTS, _NOISE_TOKENS = 8, 64
# Divergences of a prompt, at most.
_MAX_DIVERGENCES = 8


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A place where the decoder committed another token than plain decoding did.

    Attributes:
        prompt: Index of the prompt, from 0.
        position: Index among the new tokens, from 0.
        plain_token: Plain decoding's token; None if its text had ended.
        token: The decoder's token; None if its text had ended.
        plain_text: Text of the one.
        text: Text of the other.
        gap: Logit of plain decoding's token above that of the decoder's, as the model computes them
            cold; None where that cannot be asked.
        shortfall: Logits by which the lesser of the two lies below the best token, likewise.
        is_tie: Whether the shortfall is within the tolerance.
    """

    prompt: int
    position: int
    plain_token: int | None
    token: int | None
    plain_text: str = ""
    text: str = ""
    gap: float | None = None
    shortfall: float | None = None
    is_tie: bool = False


@dataclass(frozen=True, kw_only=True)
class GreedyReport:
    """Both decoders at temperature 0.

    Attributes:
        num_prompts: Prompts decoded.
        num_tokens: Tokens of plain decoding's texts.
        num_same: Prompts whose text is the same.
        divergences: Each place where a text left plain decoding's, at most 8 of a prompt. Behind one, a
            causal model decodes again from plain decoding's text; of others only the first is known.
        noise: By how many logits the lead of one token over another changes with the shape of a pass;
            measured if some text diverged, else None.
        tolerance: Twice the noise: within it a divergence is a tie.
    """

    num_prompts: int
    num_tokens: int
    num_same: int
    divergences: tuple[Divergence, ...]
    noise: float | None = None
    tolerance: float | None = None

    @property
    def num_ties(self) -> int:
        """Divergences that are ties."""
        return sum(divergence.is_tie for divergence in self.divergences)

    @property
    def num_bugs(self) -> int:
        """Divergences that are not."""
        return len(self.divergences) - self.num_ties


def compare_greedy(
    runs: Runs, decoder: Decoder, plain: Decoder, prompts: Seq[Prompt], request: Request
) -> GreedyReport:
    """Compare the greedy texts of two decoders, token for token.

    A text is compared up to its first divergence. For a causal model the decoder then starts again behind
    it, from plain decoding's text, so that one divergence does not hide the others.

    Args:
        runs: Decodes.
        decoder: The decoder.
        plain: What it is compared with.
        prompts: As `Model.generate` takes them.
        request: Of every text; its temperature must be 0.
    """
    model = runs.model
    seqs = [model.sequence(prompt, request) for prompt in prompts]
    runs.run_plain(plain, seqs, "plain, greedy")
    given, texts = [seq.prompt for seq in seqs], [seq.output for seq in seqs]

    found: list[Divergence] = []
    todo = dict.fromkeys(range(len(prompts)), 0)  # where each prompt's comparison begins
    for _ in range(_MAX_DIVERGENCES):
        seqs = []
        for prompt, start in todo.items():
            if start == 0:
                seqs.append(model.sequence(prompts[prompt], request))
                continue
            # The texts differ from the divergence on: go on behind it in the plain one, to its end.
            rest = dataclasses.replace(request, max_new_tokens=len(texts[prompt]) - start, stop_strings=())
            seqs.append(model.sequence([*given[prompt], *texts[prompt][:start]], rest))
        runs.run(decoder, seqs, "greedy")
        following = {}
        for (prompt, start), seq in zip(todo.items(), seqs, strict=True):
            if not runs.has_text(prompt, seq):
                continue
            text, other = texts[prompt].tolist(), [*texts[prompt][:start].tolist(), *seq.output.tolist()]
            at = next((at for at, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
            if at is None:
                at = min(len(text), len(other))
            if at < max(len(text), len(other)):
                found.append(_divergence(model, prompt, at, text, other))
                if model.family.kind == "causal" and at + 1 < len(text):
                    following[prompt] = at + 1
        todo = following
        if not todo:
            break

    noise = tolerance = None
    if found and model.family.kind == "causal":
        law = Law(repetition_penalty=request.repetition_penalty)
        noise = _measure_noise(model, given, texts, found, law)
        tolerance = _NOISES_A_TIE * noise
        found = [_judge(model, given[one.prompt], texts[one.prompt], one, law, tolerance) for one in found]
    num_differing = len({one.prompt for one in found} | set(runs.errors))
    return GreedyReport(
        num_prompts=len(prompts),
        num_tokens=sum(map(len, texts)),
        num_same=len(prompts) - num_differing,
        divergences=tuple(sorted(found, key=lambda one: (one.prompt, one.position))),
        noise=noise,
        tolerance=tolerance,
    )


def _divergence(model: Model, prompt: int, at: int, plain: list[int], other: list[int]) -> Divergence:
    def show(token: int | None) -> str:
        if token is None or model.tokenizer is None:
            return ""
        return str(model.tokenizer.decode([token], skip_special_tokens=False))

    a, b = (tokens[at] if at < len(tokens) else None for tokens in (plain, other))
    return Divergence(prompt=prompt, position=at, plain_token=a, token=b, plain_text=show(a), text=show(b))


def _measure_noise(
    model: Model, given: Seq[Ints], texts: Seq[Ints], found: Seq[Divergence], law: Law
) -> float:
    """Measure the noise on some texts: those that diverged first, up to where they did or beyond."""
    firsts: dict[int, int] = {}
    for one in found:
        firsts.setdefault(one.prompt, one.position)
    for prompt in range(len(texts)):
        firsts.setdefault(prompt, 0)
    noise = 0.0
    for prompt, at in list(firsts.items())[:_NOISE_TEXTS]:
        end = min(max(at + 1, _NOISE_TOKENS), len(texts[prompt]))
        text = np.concatenate([given[prompt], texts[prompt][:end]])
        start = len(given[prompt]) + max(0, end - _NOISE_TOKENS)
        noise = max(noise, measure_noise(model.engine.target, text, start, law))
    return noise


def _judge(model: Model, given: Ints, text: Ints, one: Divergence, law: Law, tolerance: float) -> Divergence:
    """Ask the model for both tokens: a tie is one where both are as good as the best, within tolerance."""
    if one.plain_token is None or one.token is None:
        return one
    start = len(given) + one.position
    logits_V = score(model.engine.target, np.concatenate([given, text[: one.position + 1]]), start, law)[0]
    plain, other = float(logits_V[one.plain_token]), float(logits_V[one.token])
    shortfall = float(logits_V.max()) - min(plain, other)
    return dataclasses.replace(one, gap=plain - other, shortfall=shortfall, is_tie=shortfall <= tolerance)
