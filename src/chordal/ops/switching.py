"""Which of two models writes on, by the entropy of what was written, and what that saves."""

from __future__ import annotations


def is_uncertain(entropy: float, *, was: bool, up: float, down: float) -> bool:
    """Say whether a text is uncertain, given whether it was.

    It becomes so at `up` and ceases to be at `down`; in between it stays what it was.

    Args:
        entropy: Mean of the last tokens, in bits.
        was: Whether it was uncertain.
        up: From which entropy on it is.
        down: Up to which entropy it is not, at most `up`.
    """
    return entropy >= up or (was and entropy > down)


def relative_cost(share: float, ratio: float) -> float:
    """Give the weights read for a text, relative to a large model that writes all of it.

    A token costs the parameters of the model that writes it: share + (1 - share) * ratio. What a model
    reads of the other's tokens is not in it.

    Args:
        share: Share of tokens that the large model writes.
        ratio: Parameters of the small model / parameters of the large one.
    """
    return share + (1 - share) * ratio
