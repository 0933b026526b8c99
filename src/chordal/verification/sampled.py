"""Whether the sampled texts of two decoders can be of one law: two tests of homogeneity."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from chordal.decoders.decoder import Decoder
from chordal.generation import Model, Prompt, Request
from chordal.ops.homogeneity import Homogeneity, branches, count, homogeneity
from chordal.sequence import Sequence
from chordal.verification.reference import ranks
from chordal.verification.runs import Runs

# A token that is nearly certain tells nothing.
_CERTAIN = 0.99
_NUM_BINS = 8


@dataclass(frozen=True, kw_only=True)
class SampledReport:
    """Both decoders at a temperature above 0, with independent seeds.

    Attributes:
        num_prompts: Prompts decoded.
        num_samples: Texts of each prompt and decoder.
        temperature: Of both.
        false_alarm: Chance that some test fails although the laws are the same; each has an even share.
        tests: By name. "branches" compares what follows each beginning that texts share; "ranks" where
            in the model's own law the tokens stand, anywhere in the text.
    """

    num_prompts: int
    num_samples: int
    temperature: float
    false_alarm: float
    tests: Mapping[str, Homogeneity]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the tests that tell the samples apart."""
        level = self.false_alarm / len(self.tests)
        return tuple(name for name, test in self.tests.items() if test.p_value < level)


def compare_sampled(
    runs: Runs,
    decoder: Decoder,
    plain: Decoder,
    prompts: Seq[Prompt],
    request: Request,
    num_samples: int,
    false_alarm: float,
) -> SampledReport:
    """Compare the sampled texts of two decoders; no two texts share a random number.

    Args:
        runs: Decodes.
        decoder: The decoder.
        plain: What it is compared with.
        prompts: As `Model.generate` takes them.
        request: Of every text; its temperature must be above 0.
        num_samples: Texts of each prompt and decoder.
        false_alarm: Chance that a test fails although the laws are the same.
    """
    model = runs.model
    both: list[list[tuple[int, Sequence]]] = [[], []]
    for index, samples in enumerate(both):
        for sample in range(num_samples):
            for prompt, text in enumerate(prompts):
                # No two texts share a seed, and so no random number.
                seed = (request.seed << 32) + (sample * len(prompts) + prompt) * 2 + index
                own = dataclasses.replace(request, seed=seed)
                samples.append((prompt, model.sequence(text, own)))
    runs.run(decoder, [seq for _, seq in both[0]], "sampled")
    runs.run_plain(plain, [seq for _, seq in both[1]], "plain, sampled")
    both = [[one for one in samples if runs.has_text(*one)] for samples in both]

    by_prompt = [
        [[tuple(seq.output.tolist()) for prompt, seq in samples if prompt == at] for samples in both]
        for at in range(len(prompts))
    ]
    tests = {"branches": homogeneity(table for texts in by_prompt for table in branches(texts))}
    if model.family.kind == "causal":
        rng = np.random.default_rng(request.seed % 2**63)
        tests["ranks"] = homogeneity(count([list(_bins(model, samples, rng)) for samples in both]))
    return SampledReport(
        num_prompts=len(prompts),
        num_samples=num_samples,
        temperature=request.temperature,
        false_alarm=false_alarm,
        tests=tests,
    )


def _bins(
    model: Model, samples: Seq[tuple[int, Sequence]], rng: np.random.Generator
) -> Iterator[tuple[tuple[int, int], int]]:
    """Say for each token where in its law it stands, one of eight bins, and in what context.

    Whatever a decoder does wrong, it does it more often where the law is flat, or where it is peaked,
    and perhaps depending on the draw before: those are the contexts.
    """
    by_prompt: dict[int, list[Sequence]] = {}
    for prompt, seq in samples:
        by_prompt.setdefault(prompt, []).append(seq)
    for seqs in by_prompt.values():
        start, law = seqs[0].num_prompt, seqs[0].law
        # Peaked laws give few texts: each is scored once.
        times = Counter(seq.tokens[: start + len(seq.output)].tobytes() for seq in seqs)
        texts = sorted((np.frombuffer(text, np.int64) for text in times), key=len)
        for text, ranks_T3 in zip(texts, ranks(model.engine.target, texts, start, law), strict=True):
            for _ in range(times[text.tobytes()]):
                above_T, own_T, top_T = ranks_T3.T
                uniform_T = above_T + own_T * rng.random(len(own_T))
                bin_T = np.minimum(uniform_T * _NUM_BINS, _NUM_BINS - 1).astype(int)
                before_T = np.append(-1, bin_T[:-1] * 2 // _NUM_BINS)
                for at in np.flatnonzero(top_T < _CERTAIN).tolist():
                    yield (int(top_T[at] * 4), int(before_T[at])), int(bin_T[at])
