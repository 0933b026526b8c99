"""Whether sampled output follows the law it should: counts of continuations, and how likely they are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from chordal.decoders.decoder import Decoder
from chordal.engine import Engine
from chordal.forward import Floats, Ints
from chordal.ops.sampling import Law
from chordal.sequence import Sequence, StopRules
from chordal.testing.toys import ToyModel

# Below this many expected counts the chi-square law is a poor approximation.
_MIN_EXPECTED = 5


def sample_joint(
    decoder: Decoder, model: ToyModel, prompt: Ints, length: int, runs: int, law: Law
) -> npt.NDArray[np.int64]:
    """Decode one prompt under the seeds 0, 1, ... and count every continuation, `[V] * length`.

    The joint counts matter: draws that are right at each position can still depend on each other.

    Args:
        decoder: The decoder.
        model: A model of few tokens.
        prompt: The prompt.
        length: Tokens of each continuation.
        runs: How many.
        law: How tokens are drawn.
    """
    engine = Engine(model)
    stop = StopRules(max_new_tokens=length)
    seqs = [
        engine.submit(decoder, Sequence(prompt=prompt, family=model.family, stop=stop, law=law, seed=seed))
        for seed in range(runs)
    ]
    engine.run()
    counts = np.zeros([model.vocab_size] * length, np.int64)
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
    is_rare = expected < _MIN_EXPECTED
    seen = np.append(counts[~is_rare], counts[is_rare].sum())
    expected = np.append(expected[~is_rare], expected[is_rare].sum())
    seen, expected = seen[expected > 0], expected[expected > 0]
    distance = float(((seen - expected) ** 2 / expected).sum())
    freedom = len(seen) - 1
    return float(
        torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(distance / 2).double())
    )
