"""Input-guided aggressive decoding: draft the source that the output is an edit of, all of it at once.

Sources: Sun et al., "Instantaneous Grammatical Error Correction with Shallow Aggressive Decoding", ACL 2021;
Ge et al., "Lossless Acceleration for Seq2seq Generation with Aggressive Decoding" (arXiv 2205.10350), IAD.
Written for encoder-decoder models; here the source is a part of the prompt. Their second system, GAD, needs
a non-autoregressive drafter that was trained for it and is not here.

Promise: exact. Cost: no extra model; one wide forward pass for each stretch that is copied, a plain one
where the output has left the source.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Literal

from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.speculate import speculate
from chordal.drafters.source import SourceDrafter
from chordal.errors import InputError
from chordal.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class AggressiveConfig:
    """Settings of `aggressive`."""

    num_draft: int = 20
    """Most draft tokens of a forward pass, at least 0; 0 is plain decoding."""
    start: str | int | None = None
    """Where in the prompt the source begins: behind the first occurrence of a text, or at a token, counted
    from the end if negative. None takes all of it and does not expect the output to begin as it does."""
    end: str | int | None = None
    """Where the source ends: before the next occurrence of a text, or before a token, counted from the end if
    negative; None is the end of the prompt."""
    max_ngram: int = 3
    """Longest run of tokens by which the output joins the source again, at least 1."""
    match: Literal["unique", "next"] = "next"
    """Whether a run that the source holds several times leads nowhere, or to its next place behind what was
    copied last; next also takes a token that the source does not hold for one that was replaced."""

    def __post_init__(self) -> None:
        if self.num_draft < 0 or self.max_ngram < 1:
            raise InputError(
                f"num_draft must be at least 0 and max_ngram at least 1; "
                f"got {self.num_draft} and {self.max_ngram}."
            )
        if "" in (self.start, self.end):
            raise InputError("start and end must be texts that can be found; got an empty one. Leave it out.")


class Aggressive(Decoder):
    """Copy the source, keep what the model would have written, join it again behind each edit."""

    name = "aggressive"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    constrains = True
    paper = "Sun et al. 2021; arXiv 2205.10350"
    Config = AggressiveConfig

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: AggressiveConfig = self.config
        drafter = SourceDrafter(
            seq.prompt[_source(seq, config.start, config.end)],
            seq.num_prompt,
            max_ngram=config.max_ngram,
            match=config.match,
            from_start=config.start is not None,
        )
        return speculate(seq, drafter, num_draft=config.num_draft)


def _source(seq: Sequence, start: str | int | None, end: str | int | None) -> slice:
    """Find the source in the prompt; a text that is not there leaves out nothing.

    A token that a text cuts in two is part of the source.
    """
    first = start if isinstance(start, int) else None
    last = end if isinstance(end, int) else None
    if seq.detokenize is None or not (isinstance(start, str) or isinstance(end, str)):
        return slice(first, last)

    decode, num = seq.detokenize, seq.num_prompt
    text = decode(seq.prompt)

    def num_characters(num_tokens: int) -> int:
        return len(decode(seq.prompt[:num_tokens]))

    begin = 0 if first is None else num_characters(slice(first, None).indices(num)[0])
    if isinstance(start, str) and (at := text.find(start)) >= 0:
        begin = at + len(start)
        first = bisect.bisect_right(range(num + 1), begin, key=num_characters) - 1
    if isinstance(end, str) and (at := text.find(end, begin)) >= 0:
        last = bisect.bisect_left(range(num + 1), at, key=num_characters)
    return slice(first, last)
