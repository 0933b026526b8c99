"""First Finish Search: sample several answers side by side and give the one that is done first.

Source: A. Agarwal, A. Sengupta, T. Chakraborty, "First Finish Search: Efficient Test-Time Scaling in
Large Language Models" (arXiv 2505.18149). Its bet: of a reasoning model's answers, short ones are right
more often. `ops.finish` says when that holds, and how many samples to take.

Promise: approximate; short texts are preferred on purpose. Sample i is the text that its decoder gives
with the seed of the request plus i, so one sample equals plain decoding.
Cost: the passes of the winner, with as many rows each as there are samples. The prompt is fed and cached
once; the samples share a row of the cache.
Beyond it: samples are decoded by any exact decoder; the first several may vote; a finish may have to be
long enough or to hold an answer.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from chordal.decoders.branch import Branches
from chordal.decoders.decoder import Decoder, Decoding
from chordal.errors import InputError
from chordal.models.family import Family
from chordal.registry import make_decoder
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class FirstFinishConfig:
    """Settings of `first_finish`."""

    num_samples: int = 4
    """Samples (n), at least 1; one where the temperature is 0, since all would be the same."""
    num_finishers: int = 1
    """Of how many finishers the answers are compared, from 1 to num_samples; the commonest one wins."""
    answer: str = ""
    """Regular expression. A finish counts only if it is found; its last match, or the first group of it,
    is the answer that is compared. Empty: every finish counts, and the whole text is the answer."""
    min_tokens: int = 1
    """A finish with fewer tokens, the stop token included, does not count; at least 1."""
    decoder: str = "autoregressive"
    """The decoder of each sample, an exact one; it keeps its default settings."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_finishers <= self.num_samples:
            raise InputError(
                f"num_finishers must be at least 1 and at most num_samples; "
                f"got {self.num_finishers} and {self.num_samples}."
            )
        if self.min_tokens < 1:
            raise InputError(f"min_tokens must be at least 1; got {self.min_tokens}.")
        try:
            re.compile(self.answer)
        except re.error as error:
            raise InputError(f"answer must be a regular expression; got {self.answer!r}: {error}.") from None


class FirstFinish(Decoder):
    """Sample n texts; the shortest that finishes wins."""

    name = "first_finish"
    family = "autoregressive"
    promise = "approximate"
    exact_when = "num_samples 1, or temperature 0"
    needs = ("causal",)
    tells_logprobs = False
    chooses = True
    local_settings = ("answer",)
    paper = "arXiv 2505.18149"
    Config = FirstFinishConfig

    def __init__(self, config: FirstFinishConfig | None = None) -> None:
        super().__init__(config)
        self.inner = make_decoder(self.config.decoder)
        if self.inner.promise != "exact":
            raise InputError(f"decoder must be an exact one; {self.inner.name} is {self.inner.promise}.")
        self.needs_models, self.constrains = self.inner.needs_models, self.inner.constrains

    def check(self, family: Family) -> None:
        """Refuse a model that the samples cannot be decoded from."""
        super().check(family)
        self.inner.check(family)

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence; nothing is committed until the winner is known."""
        num = 1 if seq.law.is_greedy else self.config.num_samples
        samples = [_Sample(number, seq, self.inner) for number in range(num)]
        # The last token of the prompt is each sample's own: what follows it is drawn there.
        branches = Branches(num, seq.num_prompt - 1)

        # Race: all that may still win go on, one request each, in one pass.
        finishers: list[_Sample] = []
        while running := [sample for sample in samples if self._may_win(sample, finishers)]:
            placed = [branches.place(sample.number, sample.asked) for sample in running]
            items = tuple(itertools.chain.from_iterable(one.items for one in placed))
            readings = iter((yield items) if items else ())
            for sample, one in zip(running, placed, strict=True):
                sample.resume(one.answer(readings))
                if sample.seq.done:
                    sample.answer = self._answer(sample.seq)
            seq.undecided = sum(len(sample.seq.output) for sample in samples)
            counting = (sample for sample in samples if sample.answer is not None)
            finishers = sorted(counting, key=_place)[: self.config.num_finishers]

        # Vote: the commonest answer, of equals the one that was there first. If no finish counts, a text
        # that hit the limit is given, or else the first that ended.
        votes = Counter(sample.answer for sample in finishers)
        ranked = sorted(finishers, key=lambda sample: -votes[sample.answer])
        if not ranked:
            ranked = sorted(samples, key=lambda sample: (sample.seq.finish_reason == "stop", _place(sample)))
        elif self.config.num_finishers > 1:
            for sample in ranked:
                seq.offer(sample.seq.output, math.log(votes[sample.answer] / len(ranked)))
        winner = ranked[0].seq
        seq.stats.draft_tokens += winner.stats.draft_tokens
        seq.stats.accepted_tokens += winner.stats.accepted_tokens
        seq.append(winner.output)

    def _may_win(self, sample: _Sample, finishers: list[_Sample]) -> bool:
        """Whether a sample goes on and could still be among the first finishers.

        First is who has fewest tokens, not who took fewest passes: where a decoder commits several tokens
        at once, samples get ahead of each other.
        """
        if sample.seq.done or len(finishers) < self.config.num_finishers:
            return not sample.seq.done
        return (len(sample.seq.output) + 1, sample.number) < _place(finishers[-1])

    def _answer(self, seq: Sequence) -> str | None:
        """Give the answer of a text that ended; None if its finish does not count."""
        if seq.finish_reason != "stop" or len(seq.output) < self.config.min_tokens:
            return None
        if not self.config.answer:
            return seq.text.strip()
        *_, last = [None, *re.finditer(self.config.answer, seq.text)]
        if last is None:
            return None
        return (last[1] or "" if last.re.groups else last[0]).strip()


class _Sample:
    """One sample: a sequence of its own, its coroutine, what that asks, and the answer once it counts."""

    def __init__(self, number: int, seq: Sequence, decoder: Decoder) -> None:
        self.number = number
        self.seq = Sequence(
            prompt=seq.prompt,
            family=seq.family,
            stop=seq.stop,
            law=seq.law,
            seed=seq.seed + number,
            detokenize=seq.detokenize,
        )
        self.answer: str | None = None
        self._coroutine = decoder.decode(self.seq)
        self.asked: Any = next(self._coroutine)

    def resume(self, given: Any) -> None:
        """Hand on the readings and take the next request, if there is one."""
        try:
            self.asked = self._coroutine.send(given)
        except StopIteration:
            assert self.seq.done, "the decoder of a sample ended before its text did"


def _place(sample: _Sample) -> tuple[int, int]:
    """Give what finishers are ordered by: tokens, then number."""
    return len(sample.seq.output), sample.number
