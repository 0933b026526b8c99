"""N-gram tables: how often each token followed the last few."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from chordal.errors import InputError
from chordal.forward import Floats, Ints

_Keys: TypeAlias = npt.NDArray[np.uint64]

# An odd number with bits all over: keys of different contexts differ but for one chance in about 2^64.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class NgramTable:
    """What followed contexts of one length, sorted by context and then by token.

    Attributes:
        keys: Key of the context of each entry, uint64 `[e]`.
        tokens: Token that followed it, int32 `[e]`.
        counts: How often, int32 `[e]`.
    """

    keys: _Keys
    tokens: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]

    def followers(self, context: Ints) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Give the tokens that followed a context, the smallest first, and how often each did."""
        [key] = _keys(context[None])
        entries = slice(*(int(self.keys.searchsorted(key, side)) for side in ("left", "right")))
        return self.tokens[entries], self.counts[entries]

    def probs(self, context: Ints, tokens: Ints) -> Floats:
        """Give the share of each token among those that followed a context; 0 if it was never seen."""
        followers, counts = self.followers(context)
        if not len(followers):
            return np.zeros(len(tokens))
        at = np.minimum(followers.searchsorted(tokens), len(followers) - 1)
        shares: Floats = np.where(followers[at] == tokens, counts[at], 0) / counts.sum()
        return shares


@dataclass(frozen=True, slots=True)
class NgramModel:
    """Tables for contexts of 1 to N tokens, which is n-grams of 2 to N + 1.

    Nothing in it changes once it is counted. It knows token ids only: of one tokenizer.

    Attributes:
        tables: One for each length of context.
    """

    tables: tuple[NgramTable, ...]

    @classmethod
    def count(cls, texts: Iterable[Ints], *, max_ngram: int = 6, max_entries: int = 1_000_000) -> NgramModel:
        """Count the n-grams of texts; none reaches from one text into the next.

        Cost: a sort of all tokens for each length, and 16 bytes an entry that is kept.

        Args:
            texts: Token ids of each.
            max_ngram: Longest n-gram, at least 2.
            max_entries: Most n-grams that are kept of each length; the rarest are left out.

        Raises:
            InputError: `max_ngram` or `max_entries` is out of range.
        """
        if max_ngram < 2 or max_entries < 1:
            raise InputError(
                f"max_ngram must be at least 2 and max_entries at least 1; got {max_ngram} and {max_entries}."
            )
        kept = [np.asarray(text, np.int64) for text in texts]
        return cls(tuple(_count(kept, size, max_entries) for size in range(1, max_ngram)))

    def probs(self, tail: Ints, tokens: Ints) -> Floats:
        """Give what each table says of tokens behind a text, `[N, M]`; 0 where it never saw the context.

        Args:
            tail: The text, or at least its last N tokens.
            tokens: The tokens asked for, int `[M]`.
        """
        return np.stack(
            [
                table.probs(tail[-size:], tokens) if len(tail) >= size else np.zeros(len(tokens))
                for size, table in enumerate(self.tables, 1)
            ]
        )

    def save(self, path: str | Path) -> None:
        """Write the tables to a file (numpy's .npz)."""
        parts: dict[str, Any] = {}
        for size, table in enumerate(self.tables, 1):
            for name in ("keys", "tokens", "counts"):
                parts[f"{name}_{size}"] = getattr(table, name)
        with Path(path).open("wb") as file:
            np.savez(file, **parts)

    @classmethod
    def load(cls, path: str | Path) -> NgramModel:
        """Read what `save` wrote.

        Raises:
            InputError: There is no such file, or it holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as parts:
                sizes = range(1, len(parts.files) // 3 + 1)
                names = ("keys", "tokens", "counts")
                tables = [NgramTable(*(parts[f"{name}_{size}"] for name in names)) for size in sizes]
        except OSError as error:
            raise InputError(f"cannot read n-grams from {path}: {error.strerror or error}.") from None
        except (EOFError, KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile):
            tables = []
        if not tables:
            raise InputError(f"{path} must hold n-grams; write it with NgramModel.save.")
        return cls(tuple(tables))


def _count(texts: list[Ints], size: int, max_entries: int) -> NgramTable:
    """Count what followed contexts of a length."""
    windows = [np.lib.stride_tricks.sliding_window_view(text, size + 1) for text in texts if len(text) > size]
    if not windows:
        return NgramTable(np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.int32))
    keys = np.concatenate([_keys(window[:, :-1]) for window in windows])
    tokens = np.concatenate([window[:, -1] for window in windows]).astype(np.int32)
    order = np.lexsort((tokens, keys))
    keys, tokens = keys[order], tokens[order]
    starts = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]) | (tokens[1:] != tokens[:-1])])
    counts = np.diff(np.r_[starts, len(keys)]).astype(np.int32)
    if len(starts) > max_entries:
        frequent = np.sort(np.argsort(-counts, kind="stable")[:max_entries])
        starts, counts = starts[frequent], counts[frequent]
    return NgramTable(keys[starts], tokens[starts], counts)


def _keys(contexts_MN: Ints) -> _Keys:
    """Give the key of each context."""
    keys = np.zeros(len(contexts_MN), np.uint64)
    for at in range(contexts_MN.shape[1]):
        keys = (keys + contexts_MN[:, at].astype(np.uint64) + np.uint64(1)) * _FACTOR  # modulo 2^64
    return keys
