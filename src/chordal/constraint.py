"""What a text must keep to while it is decoded."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]


class Constraint(Protocol):
    """Says which tokens may come next; a function of the text alone, so texts may be asked in any order."""

    def allowed(self, generated: Ints) -> Bools:
        """Tell which tokens may follow the generated ones, bool `[V]`.

        All may follow a text that already breaks the constraint, or that is over: rows of a draft behind a
        wrong token are read, but nothing comes of them.
        """
