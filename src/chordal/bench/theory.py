"""What committing several tokens a pass must cost: the limits of ParallelBench's list operations.

An ideal model knows the exact law of every position given those committed; a pass then commits a set
of positions independently of each other. Where all of n distinct items are one token each, the best
possible accuracy of T passes is a small recursion, and that of one pass a closed form:

| operation | total correlation C, bits | accuracy of one pass |
|---|---|---|
| copy, reverse, sort, the three by index | 0 | 1 |
| replace random | (n - 1) (log2 n - log2(n - 1)) -> 1.44 | ((n - 1) / n)^(n - 1) -> 0.37 |
| shuffle, into any order | n log2 n - log2 n! | n! / n^n |
| insert random | a sum of n + 1 terms | 2^n n! / (n + 1)^(n + 1) |
| remove random | a sum of n terms | 2^(n - 1) (n - 1)! / n^(n - 1) |

These are limits on reaching *every* right answer equally often. A model that has one favourite answer
can be right in one pass, and a decoder that checks what it committed is not bound by them either.
Shuffling into the given order counts as right here, unlike in the tasks; for one pass over n = 4 that
makes .0938 of .0919.

Source: ParallelBench (arXiv 2510.04767), section 3; the forms for insert and remove, those of several
tokens a pass for replace, and the best schedules are our own.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from chordal.bench.tasks import list_ops
from chordal.bench.tasks.parallelbench import waiting_line
from chordal.errors import InputError
from chordal.forward import Floats, Ints

# The best schedule of insert and remove is found among all sets of positions, which double with each.
_MAX_SLOTS = 10


def outcome_probabilities(answers: Ints, passes: Sequence[Sequence[int]]) -> Floats:
    """Give the probability of each valid answer when the ideal model commits in given passes.

    q(y) = product over passes S and positions i in S of p(y_i | what earlier passes committed), where p is
    that of a valid answer drawn evenly. The rest, 1 - sum of q, goes to invalid ones.

    Args:
        answers: Every valid answer, int `[M, L]`.
        passes: The positions of each pass; together all of 0 to L - 1.

    Returns:
        Probabilities, `[M]`.
    """
    probabilities = np.ones(len(answers))
    known: list[int] = []
    for positions in passes:
        agree = (answers[:, None, known] == answers[None, :, known]).all(2)
        for position in positions:
            same = agree & (answers[:, None, position] == answers[None, :, position])
            probabilities *= same.sum(1) / agree.sum(1)
        known += positions
    return probabilities


def lost_bits(answers: Ints, passes: Sequence[Sequence[int]]) -> float:
    """Give L_T, the divergence in bits of what is decoded from the even law over the valid answers.

    L_T = -mean of log2(M q(y)). It is C for one pass and 0 for one position a pass. Accuracy is at least
    2^-L_T.
    """
    return float(-np.log2(len(answers) * outcome_probabilities(answers, passes)).mean())


def random_order_accuracy(answers: Ints, k: int) -> float:
    """Give the accuracy of k positions a pass in an order drawn evenly; the last pass takes the rest.

    Goes through every way to divide the positions: seconds from about 8 positions on.
    """
    length = answers.shape[1]
    accuracies = [outcome_probabilities(answers, passes).sum() for passes in _divide(range(length), k)]
    return float(np.mean(accuracies))


def _divide(positions: Sequence[int], k: int) -> Iterator[list[tuple[int, ...]]]:
    if not positions:
        yield []
        return
    for first in itertools.combinations(positions, min(k, len(positions))):
        rest = [position for position in positions if position not in first]
        for more in _divide(rest, k):
            yield [first, *more]


def total_correlation(operation: str, n: int) -> float:
    """Give C(Y|X) in bits, what one pass must lose: the sum of the positions' entropies less their joint one.

    Args:
        operation: One of ParallelBench's, e.g. "insert_random"; the given order counts as a shuffle.
        n: Items of the input list.
    """
    if operation == "shuffle":
        return n * math.log2(n) - math.log2(math.factorial(n))
    if operation == "replace_random":
        return (n - 1) * (math.log2(n) - math.log2(n - 1)) if n > 1 else 0.0
    if operation not in ("insert_random", "remove_random"):
        return 0.0
    m = n + operation.startswith("insert")
    here = 1 / m if operation.startswith("insert") else 1.0
    # Items in front of the slot are where they were, those behind it have moved.
    laws = [
        math.prod([here, *((m - 1 - j) / m for j in range(slot)), *((j + 1) / m for j in range(slot, m - 1))])
        for slot in range(m)
    ]
    return -math.fsum(math.log2(m * law) for law in laws) / m


def accuracy_per_step(operation: str, n: int, k: int) -> float:
    """Give the accuracy of k positions a pass, whichever they are: the closed forms.

    Args:
        operation: "copy" or another with one answer, "shuffle" or "replace_random".
        n: Items of the list.
        k: Positions a pass, at least 1; the last pass takes the rest.

    Raises:
        InputError: Of `insert_random` and `remove_random`, where it matters which positions; see
            `random_order_accuracy` and `best_accuracy`.
    """
    if operation in ("insert_random", "remove_random"):
        raise InputError(
            f"the accuracy of {operation} depends on which positions share a pass, so k = {k} does not "
            "decide it. Use random_order_accuracy or best_accuracy."
        )
    accuracy = 1.0
    if operation == "shuffle":
        for left in range(n, 0, -k):
            accuracy *= _distinct(left, min(k, left))
    elif operation == "replace_random":
        # From the last pass to the first: none of it replaced before, then exactly one.
        accuracy = 0.0
        for left in range(n % k or k, n + 1, k):
            size = min(k, left)
            accuracy = _one_replaced(left, size) + (1 - 1 / left) ** size * accuracy
    return accuracy


@functools.cache
def best_accuracy(operation: str, n: int, passes: int) -> float:
    """Give the highest accuracy that any choice of positions reaches in so many passes.

    The choice may depend on what was committed before. With r items left, s of them are committed:

        shuffle   A(r, T) = max_s  r! / (r - s)! r^s  A(r - s, T - 1)
        replace   A(r, T) = max_s  s/r (1 - 1/r)^(s-1) + (1 - 1/r)^s A(r - s, T - 1)

    For insert and remove an answer tells the place sought from the places in front and behind, so the
    state is how many places are left, and every set of positions between them is tried.

    Args:
        operation: One of ParallelBench's.
        n: Items of the input list; at most 9 for "insert_random" and 10 for "remove_random".
        passes: Most forward passes, at least 1.

    Raises:
        InputError: `n` is too large to try everything, or `passes` less than 1.
    """
    if passes < 1:
        raise InputError(f"passes must be at least 1; got {passes}.")
    if operation == "shuffle":
        return _best_shuffle(n, passes)
    if operation == "replace_random":
        return _best_replace(n, passes)
    if operation not in ("insert_random", "remove_random"):
        return 1.0
    slots = n + operation.startswith("insert")
    if slots > _MAX_SLOTS:
        raise InputError(f"the best schedule of {operation} is known up to {_MAX_SLOTS} places; got {slots}.")
    return _best_search(slots, passes, operation.startswith("insert"))


def _distinct(left: int, size: int) -> float:
    """Probability that draws of `left` items, each evenly, are all different."""
    ways: int = left**size
    return math.perm(left, size) / ways


def _one_replaced(left: int, size: int) -> float:
    """Probability that exactly one of `size` positions is replaced, each with 1 / left."""
    return size / left * (1 - 1 / left) ** (size - 1)


@functools.cache
def _best_shuffle(left: int, passes: int) -> float:
    if left <= 1:
        return 1.0
    sizes = range(1, left + 1) if passes > 1 else [left]
    return max(_distinct(left, size) * _best_shuffle(left - size, passes - 1) for size in sizes)


@functools.cache
def _best_replace(left: int, passes: int) -> float:
    if left <= 1:
        return float(left)
    sizes = range(1, left + 1) if passes > 1 else [left]
    return max(
        _one_replaced(left, size) + (1 - 1 / left) ** size * _best_replace(left - size, passes - 1)
        for size in sizes
    )


@functools.cache
def _best_search(slots: int, passes: int, is_insert: bool) -> float:
    """Try every set of positions; each says whether the slot lies in front, behind or, inserting, at it.

    remove, 4 slots:  0 | 1 | 2 | 3      insert, 4 slots:  0   1   2   3
    3 positions         0   1   2        4 positions       0   1   2   3
    """
    if slots == 1:
        return 1.0
    num_positions = slots if is_insert else slots - 1
    best = 0.0
    for size in range(1, num_positions + 1) if passes > 1 else [num_positions]:
        for chosen in itertools.combinations(range(num_positions), size):
            # Probability that the first i say "behind" and the others "in front".
            split = [
                math.prod((slots - 1 - j) / slots for j in chosen[:i])
                * math.prod((j + (not is_insert)) / slots for j in chosen[i:])
                for i in range(size + 1)
            ]
            edges = [-1, *chosen, num_positions]
            gaps = [b - a - is_insert for a, b in itertools.pairwise(edges)]
            accuracy = sum(
                law * _best_search(gap, passes - 1, is_insert)
                for law, gap in zip(split, gaps, strict=True)
                if gap
            )
            if is_insert:
                accuracy += (
                    sum(
                        math.prod((slots - 1 - j) / slots for j in chosen[:i])
                        * math.prod(j / slots for j in chosen[i + 1 :])
                        for i in range(size)
                    )
                    / slots
                )
            best = max(best, accuracy)
    return best


@dataclass(frozen=True)
class Bound:
    """The best accuracy at each parallelism: a curve that falls with it.

    Attributes:
        points: Tokens per forward and accuracy, by growing tokens per forward. Between two of them the
            passes of prompts are mixed: accuracy is linear in forward passes per token.
        form: How it was found, for the caption of a plot.
    """

    points: tuple[tuple[float, float], ...]
    form: str

    def at(self, tokens_per_forward: float) -> float:
        """Give the best accuracy at some tokens per forward; behind the last point it is that of the last."""
        passes, accuracy = zip(*((1 / x, y) for x, y in reversed(self.points)), strict=True)
        return float(np.interp(1 / tokens_per_forward, passes, accuracy))


def bound(task: str, tokens_per_answer: float | None = None) -> Bound | None:
    """Give the limit of a list task, for the mix of lengths that it has.

    Passes are spread over the lengths as serves mean accuracy best.

    Args:
        task: Name of a task, e.g. "shuffle" or "pb_insert_random".
        tokens_per_answer: Mean committed tokens of an answer, as measured: what is no choice (the pieces
            of a name behind its first, quotes, the end token) costs no pass of its own. None counts one
            token an item and one that ends the answer.

    Returns:
        None where the limit is not known: tasks that are no list operation, and inserting or removing
        in long lists.
    """
    operation = task.removeprefix("pb_").removesuffix("_n15")
    lengths: tuple[int, ...] = waiting_line.SIZES
    if not task.startswith("pb_"):
        lengths = tuple(range(list_ops.MIN_ITEMS, list_ops.MAX_ITEMS + 1))
    elif task.endswith("_n15"):
        lengths = waiting_line.LONG_SIZES
    is_search = operation in ("insert_random", "remove_random")
    if operation not in waiting_line.OPERATIONS or (is_search and max(lengths) >= _MAX_SLOTS):
        return None
    items = [n + operation.startswith("insert") - operation.startswith("remove") for n in lengths]
    tokens = tokens_per_answer or sum(items) / len(items) + 1
    if operation not in waiting_line.FREE:
        return Bound(((tokens, 1.0),), "one right answer: one pass is enough")

    # One pass each, then the steps of every length that gain most accuracy a pass.
    curves = [
        [best_accuracy(operation, n, passes) for passes in range(1, last + 1)]
        for n, last in zip(lengths, items, strict=True)
    ]
    passes, accuracy = float(len(lengths)), sum(curve[0] for curve in curves)
    points = [(passes, accuracy)]
    for gain, more in sorted(itertools.chain(*map(_steps, curves)), reverse=True):
        passes, accuracy = passes + more, accuracy + gain * more
        points.append((passes, accuracy))
    return Bound(
        tuple((tokens * len(lengths) / x, y / len(lengths)) for x, y in reversed(points)),
        "best choice of positions for each number of passes, ideal model, every right answer equally likely",
    )


def _steps(curve: Sequence[float]) -> Iterator[tuple[float, int]]:
    """Give the upper hull of accuracies of 1, 2, ... passes as gain per pass and passes."""
    at = 0
    while at < len(curve) - 1:
        gain, end = max(((curve[end] - curve[at]) / (end - at), end) for end in range(at + 1, len(curve)))
        if gain <= 0:
            return
        yield gain, end - at
        at = end
