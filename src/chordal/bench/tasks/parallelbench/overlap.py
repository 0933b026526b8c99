"""How much two texts overlap: ROUGE-L and BLEU, of words in lower case."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Split a text into its words and numbers, in lower case, punctuation left out."""
    return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)?", text.lower())


def rouge_l(text: str, reference: str) -> float:
    """Compare by the longest common subsequence of words: its F1, from 0 to 1.

    With L its length, precision is L / words of the text and recall L / words of the reference. "the cat
    sat" against "the big cat sat down": L = 3, 2 x 3 / (3 + 5) = 0.75. Words are not stemmed.

    Source: Lin 2004, "ROUGE: A package for automatic evaluation of summaries", section 3.1.
    """
    ours, theirs = words(text), words(reference)
    if not ours or not theirs:
        return 0.0
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = row
        row = [0]
        for at, other in enumerate(theirs):
            row.append(before[at] + 1 if word == other else max(row[at], before[at + 1]))
    return 2 * row[-1] / (len(ours) + len(theirs))


def bleu(text: str, reference: str, *, max_n: int = 4) -> float:
    """Compare by shared runs of 1 to `max_n` words, from 0 to 1.

    BLEU = brevity x geometric mean over n of (runs of n words that the reference has too, each counted
    at most as often as there / runs of n words), brevity = min(1, exp(1 - reference words / words).
    Nothing is smoothed: where no run of some n is shared, it is 0.

    Source: Papineni et al. 2002, "BLEU: a method for automatic evaluation of machine translation".
    """
    ours, theirs = words(text), words(reference)
    total = 0.0
    for n in range(1, max_n + 1):
        runs = _runs(ours, n)
        shared = (runs & _runs(theirs, n)).total()
        if not shared:
            return 0.0
        total += math.log(shared / runs.total())
    return min(1.0, math.exp(1 - len(theirs) / len(ours))) * math.exp(total / max_n)


def _runs(items: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(items[at : at + n]) for at in range(len(items) - n + 1))
