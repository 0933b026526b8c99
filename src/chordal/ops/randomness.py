"""Random numbers keyed by what they are for, not by when they are drawn.

A draw depends on the request's seed, the absolute position, its purpose and a draw number, and on
nothing else. So a request gives the same output alone or in any batch, drafts that are redrawn
change nothing, and every decoder that samples the token of a position from the target's law draws
the same token for it.
"""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np
import numpy.typing as npt

Purpose = Literal["token", "draft", "order", "noise", "accept"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seed: int, purpose: Purpose, positions: npt.ArrayLike, draw: int = 0) -> npt.NDArray[np.float64]:
    """Give one number in [0, 1) for each position.

    Args:
        seed: Of the request, any int that fits in 64 bits.
        purpose: What the numbers decide; different purposes are independent.
        positions: Absolute positions, int `[r]`.
        draw: Number of the draw where a position is drawn more than once, e.g. the step.
    """
    key = _mix(np.array([seed & (2**64 - 1)], np.uint64))
    key = _mix(key ^ np.uint64(zlib.crc32(purpose.encode())))
    key = _mix(key + np.array([draw], np.uint64) * _GOLDEN)  # an array: scalars warn of overflow
    bits = _mix(key ^ _mix(np.asarray(positions, np.uint64)))
    # The top 53 bits fill a float64's mantissa, so 1.0 cannot occur.
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def gumbel(seed: int, positions: npt.ArrayLike, draw: int = 0) -> npt.NDArray[np.float64]:
    """Give one standard Gumbel variable for each position, for the order of commits."""
    return -np.log(-np.log(np.maximum(uniforms(seed, "order", positions, draw), 2.0**-54)))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64 bits so that every input bit reaches every output bit (splitmix64's finalizer)."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
