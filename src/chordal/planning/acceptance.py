"""How often drafts are right, and how many tokens a pass commits for it.

Two quantities go by the name of acceptance rate. Here alpha is a probability, that a draft token is right
given that all before it were, and tau a count, the tokens that one verification commits, the token that it
draws itself included: a chain of g drafts has 1 <= tau <= g + 1.

Source: "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), equation 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from chordal.errors import InputError
from chordal.forward import Ints
from chordal.ops import tree
from chordal.sequence import Event

NOT_DRAFTED, WRONG, RIGHT = -1, 0, 1
WRONG_AND_LAST = 2
"""Wrong, and the drafter had no more: what stands behind other wrong tokens was drafted in vain."""

_BISECTIONS = 64


def expected_tokens(alpha: float, num_draft: int) -> float:
    """Give tau of a chain: 1 + alpha + ... + alpha^g.

    alpha = .8 and g = 4 give 1 + .8 + .64 + .512 + .4096 = 3.3616.

    Args:
        alpha: Chance that a draft token is right, from 0 to 1.
        num_draft: Length of the chain (g), at least 0.
    """
    return float(np.sum(alpha ** np.arange(num_draft + 1.0)))


def alpha_of(tau: float, num_draft: int) -> float:
    """Give the alpha at which a chain has this tau; bisection, as the polynomial only grows.

    Args:
        tau: Tokens a verification commits, from 1 to `num_draft` + 1.
        num_draft: Length of the chain (g), at least 1.

    Raises:
        InputError: No chain of this length has this tau.
    """
    if num_draft < 1 or not 1 <= tau <= num_draft + 1:
        raise InputError(
            f"tau must be from 1 to num_draft + 1, num_draft at least 1; got {tau} and {num_draft}. "
            "Count the token that verification draws itself."
        )
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, num_draft) < tau else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True, eq=False)
class Acceptance:
    """What is known of how often drafts are right.

    Attributes:
        per_rank: Chance that the drafter's r-th candidate is the right one, given that its parent was; the
            first is the alpha of a chain. They add up to at most 1.
        texts: Of measured chains: for each position of each text whether its draft token was `RIGHT`,
            `WRONG`, `WRONG_AND_LAST` or `NOT_DRAFTED`, int `[n]`. Richer than alpha: right ones come in runs.
    """

    per_rank: tuple[float, ...]
    texts: tuple[Ints, ...] = ()

    def __post_init__(self) -> None:
        ranks = np.asarray(self.per_rank, float)
        if not len(ranks) or (ranks < 0).any() or not ranks.sum() <= 1 + 1e-9:
            raise InputError(
                f"chances by rank must be at least 0 and add up to at most 1; got {list(self.per_rank)}."
            )

    @property
    def alpha(self) -> float:
        """Chance that the next token of a chain is right."""
        return self.per_rank[0]

    @classmethod
    def of_chains(cls, texts: Iterable[Ints]) -> Acceptance:
        """Estimate alpha from what became of drafts.

        The estimate of most likelihood for a geometric law whose drafts end before they fail, too: tokens
        that were right by tokens that were judged. What stands behind a wrong token was never judged.
        """
        kept = tuple(texts)
        right = sum(int((text == RIGHT).sum()) for text in kept)
        judged = sum(int((text != NOT_DRAFTED).sum()) for text in kept)
        return cls((right / max(1, judged),), kept)

    @classmethod
    def of_trees(cls, counts: Iterable[tuple[Ints, int]]) -> Acceptance:
        """Estimate the chances by rank from what `hits_by_rank` counted."""
        hits, nodes = zip(*counts, strict=True)
        return cls(tuple((np.sum(hits, 0) / max(1, sum(nodes))).tolist()))


def outcomes(events: Iterable[Event], num_prompt: int, length: int, num_draft: int) -> Ints:
    """Say of each position of a text whether the draft token for it was right.

    A chain drafter is asked at every position but the one behind a draft that was kept whole. There the
    draft would have gone on: right, if only `num_draft` ended it, else the drafter had no more.

    Args:
        events: Trace of one sequence that was decoded with chains of at most `num_draft` tokens.
        num_prompt: Length of its prompt.
        length: Tokens of its result.
        num_draft: Most tokens of a draft.

    Returns:
        `RIGHT`, `WRONG`, `WRONG_AND_LAST` or `NOT_DRAFTED` for each token of the result, int `[length]`.
    """
    text = np.full(length, NOT_DRAFTED, np.int64)
    for draft, committed in _passes(events):
        if draft is None:
            continue
        start = int(draft.positions[0]) - num_prompt
        num = min(len(draft.tokens), len(committed.tokens))
        is_equal = draft.tokens[:num] == committed.tokens[:num]
        kept = num if is_equal.all() else int(np.argmin(is_equal))
        text[start : start + kept] = RIGHT
        if kept < num:
            is_last = kept + 1 == len(draft.tokens) < num_draft
            text[start + kept : start + kept + 1] = WRONG_AND_LAST if is_last else WRONG
        elif kept == num_draft:
            text[start + kept : start + kept + 1] = RIGHT
    return text


def hits_by_rank(events: Iterable[Event], num_ranks: int, depth: int, end: int) -> tuple[Ints, int]:
    """Count which child was right at the nodes that verification came to, its first pass left out.

    Args:
        events: Trace of one sequence that was decoded with trees in which every node of the first `depth`
            levels, the root's among them, is to have `num_ranks` children; fewer, or no tree at all, means
            that the drafter knew none.
        num_ranks: Children of a node.
        depth: Levels of the tree.
        end: One past the last position that counts.

    Returns:
        How often the child of each rank was right, int `[num_ranks]`, and the number of nodes.
    """
    hits, num_nodes = np.zeros(num_ranks, np.int64), 0
    for draft, committed in itertools.islice(_passes(events), 1, None):
        wanted = committed.tokens[: max(0, end - int(committed.positions[0]))]
        node = -1
        for token in wanted[:depth]:
            num_nodes += 1
            if draft is None:
                break
            parents = tree.chain(len(draft.tokens)) if draft.parents is None else draft.parents
            offered = tree.children(parents, node)[:num_ranks]
            ranks = np.flatnonzero(draft.tokens[offered] == token)
            if not len(ranks):
                break
            hits[ranks[0]] += 1
            node = int(offered[ranks[0]])
    return hits, num_nodes


def _passes(events: Iterable[Event]) -> Iterator[tuple[Event | None, Event]]:
    """Give what each pass committed, with its draft if there was one."""
    draft: Event | None = None
    for event in events:
        if event.kind == "draft":
            draft = event
        elif event.kind == "commit":
            yield draft, event
            draft = None
