"""What a causal model itself says of a text: its law at every token, and how exact its numbers are.

A text is scored cold: fed at once, into an empty cache. No decoder takes part, so what a decoder
committed can be judged by it. Every function takes a model with nothing cached and leaves it so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from chordal.forward import Causal, Floats, Forward, Ints, Logits
from chordal.models.runner import Runner
from chordal.ops.sampling import Law, under_law

# Logits held at a time where several texts are scored: 256 MB of float32.
_MAX_LOGITS = 2**26

# Shapes that decoding has: tokens a pass, rows a pass.
_SHAPES = ((1, 1), (1, 8), (8, 1), (8, 8))


def score(target: Runner, text: Ints, start: int, law: Law) -> Tensor:
    """Give the logits of each token from `start` on, behind a law, `[len(text) - start, V]`.

    Args:
        target: The model.
        text: Token ids, more than `start`; the last is only predicted.
        start: At least 1.
        law: Its temperature 0 counts as 1; tokens that it cuts have -inf.
    """
    [logits_TV] = _score_cold(target, [text], start, law)
    return logits_TV


def ranks(target: Runner, texts: Seq[Ints], start: int, law: Law) -> Iterator[Floats]:
    """Say where in its law each token of each text stands, float `[len(text) - start, 3]`.

    The columns are the probability of all likelier tokens, that of the token and its equals, and that
    of the most likely token. The first plus the second times a uniform number is uniform in [0, 1) and
    independent of all before it, if the text was drawn from the law.

    Args:
        target: The model.
        texts: Token ids of each; those of one length that follow one another run together.
        start: First token that counts, at least 1.
        law: What they are said to be drawn from; its temperature must be above 0.
    """
    for length, group in itertools.groupby(texts, len):
        same = list(group)
        most = max(1, min(target.max_rows, _MAX_LOGITS // (target.vocab_size * (length - start))))
        for first in range(0, len(same), most):
            yield from _ranks_together(target, same[first : first + most], start, law)


def measure_noise(target: Runner, text: Ints, start: int, law: Law) -> float:
    """Say by how many logits the lead of one token over another changes with how it is computed.

    At every token from `start` on, the lead of the most likely token over the next one is computed cold
    and in the shapes that decoding has: one token a pass and eight, alone and beside other texts. The
    largest change from cold is the noise of this model, type and device; at least what rounding the
    larger of the two to the model's type may change.

    Args:
        target: The model.
        text: Token ids, more than `start`.
        start: At least 1.
        law: Only its repetition penalty matters.
    """
    law = Law(repetition_penalty=law.repetition_penalty)
    cold_TV = score(target, text, start, law)
    top = cold_TV.topk(2, dim=1)
    # A short text may show no change by chance.
    noise = torch.finfo(target.dtype).eps * float(top.values.abs().max())
    for num_fed, num_rows in _SHAPES:
        logits_TV = _score_in_parts(target, text, start, law, num_fed, min(num_rows, target.max_rows))
        change_T2 = (logits_TV - cold_TV).gather(1, top.indices)
        noise = max(noise, float((change_T2[:, 0] - change_T2[:, 1]).abs().max()))
    return noise


def _ranks_together(target: Runner, texts: Seq[Ints], start: int, law: Law) -> Iterator[Floats]:
    for text, logits_TV in zip(texts, _score_cold(target, texts, start, law), strict=True):
        probs_TV = logits_TV.double().softmax(1)
        own_T1 = probs_TV.gather(1, torch.tensor(text[start:]).to(probs_TV.device)[:, None])
        likelier_T = (probs_TV * (probs_TV > own_T1)).sum(1)
        as_likely_T = (probs_TV * (probs_TV == own_T1)).sum(1)
        yield torch.stack([likelier_T, as_likely_T, probs_TV.amax(1)], 1).cpu().numpy()


def _score_cold(target: Runner, texts: Seq[Ints], start: int, law: Law) -> list[Tensor]:
    requests = []
    for row, text in enumerate(texts):
        at = np.arange(len(text) - 1)
        requests.append((row, Forward(text[:-1], at, Causal(), Logits(at[start - 1 :]), slots=at)))
    readings = target.run(requests)
    for row, _ in requests:
        target.free_row(row)
    return [_under(reading.logits, text, start, law) for reading, text in zip(readings, texts, strict=True)]


def _score_in_parts(target: Runner, text: Ints, start: int, law: Law, num_fed: int, num_rows: int) -> Tensor:
    """Score a text as decoding does: up to `start` at once, then a few tokens a pass."""
    # Beside other texts, so that whatever a pass takes from its whole batch changes too.
    rows = [np.roll(text, row) for row in range(num_rows)]
    ends = [start, *range(start + num_fed, len(text) - 1, num_fed)]
    if ends[-1] < len(text) - 1:
        ends.append(len(text) - 1)
    logits = []
    for begin, end in zip([0, *ends], ends, strict=False):
        at = np.arange(begin, end)
        read = Logits(np.flatnonzero(at >= start - 1))
        forwards = [Forward(mine[at], at, Causal(), read, slots=at) for mine in rows]
        logits.append(target.run(list(enumerate(forwards)))[0].logits)
    for row in range(num_rows):
        target.free_row(row)
    return _under(torch.cat(logits), text, start, law)


def _under(logits_TV: Tensor, text: Ints, start: int, law: Law) -> Tensor:
    return under_law(logits_TV, law, [text[:end] for end in range(start, len(text))], 0)
