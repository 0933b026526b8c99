"""Whether sampled output follows the law it should.

Of whole decoders: counts of continuations, and how likely they are. Of a rule of acceptance: the law itself,
by adding up all that can happen at a node.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chordal.decoders.decoder import Decoder
from chordal.engine import Engine
from chordal.forward import Floats, Ints
from chordal.ops.acceptance import Offers
from chordal.ops.homogeneity import MIN_EXPECTED, chi_square_tail
from chordal.ops.sampling import Law
from chordal.sequence import Sequence, StopRules
from chordal.testing.toys import ToyModel


def sample_joint(
    decoder: Decoder,
    model: ToyModel | Mapping[str, ToyModel],
    prompt: Ints,
    length: int,
    runs: int,
    law: Law,
) -> npt.NDArray[np.int64]:
    """Decode one prompt under the seeds 0, 1, ... and count every continuation, `[V] * length`.

    The joint counts matter: draws that are right at each position can still depend on each other.

    Args:
        decoder: The decoder.
        model: A model of few tokens, or several by name, one of them "target".
        prompt: The prompt.
        length: Tokens of each continuation.
        runs: How many.
        law: How tokens are drawn.
    """
    engine = Engine(model)
    target: Any = engine.target
    stop = StopRules(max_new_tokens=length)
    seqs = [
        engine.submit(decoder, Sequence(prompt=prompt, family=target.family, stop=stop, law=law, seed=seed))
        for seed in range(runs)
    ]
    engine.run()
    counts = np.zeros([target.vocab_size] * length, np.int64)
    for seq in seqs:
        if seq.error is not None:
            raise seq.error
        counts[tuple(seq.output)] += 1
    return counts


def chi_square(counts: npt.NDArray[np.int64], probs: Floats) -> float:
    """Give the probability of counts at least as far from their law as these (Pearson's test).

    Cells that expect fewer than five counts are put together; a count in a cell of probability 0
    gives 0.

    Args:
        counts: How often each outcome occurred, any shape.
        probs: Its probability, same shape.
    """
    counts, expected = counts.ravel(), probs.ravel() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    is_rare = expected < MIN_EXPECTED
    seen = np.append(counts[~is_rare], counts[is_rare].sum())
    expected = np.append(expected[~is_rare], expected[is_rare].sum())
    seen, expected = seen[expected > 0], expected[expected > 0]
    distance = float(((seen - expected) ** 2 / expected).sum())
    return chi_square_tail(distance, len(seen) - 1)


def committed_law(
    offers: Offers, p_V: Tensor, q_V: Tensor, draws: Iterable[tuple[Ints, float]]
) -> tuple[Tensor, float]:
    """Give the exact law of the token that a rule commits at a node, and the chance that it is a child.

    The numbers that the chances are compared with are integrated over, so nothing is estimated.

    Args:
        offers: The rule.
        p_V: Law of the target, `[V]`; what is committed should have it.
        q_V: What the rule is told of how the children were drawn.
        draws: All ways the children may come out, each with its probability; see `ways_to_draw`.
    """
    law_V, accepted = torch.zeros_like(p_V, dtype=torch.float64), 0.0
    for children, weight in draws:
        owed_V = p_V
        for token, (chance, rest_V) in zip(children, offers(p_V, q_V, children), strict=True):
            law_V[token] += weight * chance
            accepted += weight * chance
            weight, owed_V = weight * (1 - chance), rest_V
        law_V += weight * owed_V
    return law_V, accepted


def ways_to_draw(q_V: Tensor, num: int, *, replace: bool) -> Iterator[tuple[Ints, float]]:
    """List all ordered draws of tokens from a law of few tokens, each with its probability.

    Without replacement there are at most as many as have a probability.
    """
    q = q_V.double().numpy()
    possible = np.flatnonzero(q)
    if replace:
        for tokens in itertools.product(possible, repeat=num):
            yield np.array(tokens, np.int64), float(q[list(tokens)].prod())
        return
    for tokens in itertools.permutations(possible, min(num, len(possible))):
        drawn = q[list(tokens)]
        # From the back, so that nothing is lost where one token has almost all.
        rest = sum(q[token] for token in possible if token not in tokens)
        left = rest + drawn[::-1].cumsum()[::-1]
        yield np.array(tokens, np.int64), float((drawn / left).prod())
