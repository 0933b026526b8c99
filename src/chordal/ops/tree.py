"""Draft trees as arrays: each node names its parent by number, -1 for a child of the root.

The root is the last committed token; it is no node. A parent stands before its children, and children
of one parent stand in the order in which they are offered. With parents (-1, 0, 0, 1, 2):

         root
          0
        1   2
        3   4
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from chordal.errors import InputError

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def chain(num: int) -> Ints:
    """Give the parents of a tree without branches."""
    return np.arange(-1, num - 1)


def parse(text: str) -> Ints:
    """Read a tree written as the child counts of its nodes, level by level: give the parents.

    2/2,1/1,0,0 is a root with two children, which have two and one; the first of these three has one.
    Nodes are numbered in the order of the text. Nothing, or 0, is no node at all.

    Raises:
        InputError: A level does not give one count, 0 or more, for each node of the level before.
    """
    parents: list[int] = []
    level = [-1]
    for number, counts in enumerate(text.split("/") if text else ()):
        told = counts.split(",")
        if not all(count.strip().isdecimal() for count in told) or len(told) != len(level):
            raise InputError(
                f"a tree must give the child counts of all nodes of a level, levels apart by /, as in 2/1,0; "
                f"level {number} has {len(level)} nodes, got {counts!r}."
            )
        below = [parent for parent, count in zip(level, told, strict=True) for _ in range(int(count))]
        level = list(range(len(parents), len(parents) + len(below)))
        parents += below
    return np.array(parents, np.int64)


def ranks(parents: Ints) -> Ints:
    """Count the siblings that stand before each node."""
    _check(parents)
    rank = np.zeros(len(parents), np.int64)
    num_seen = np.zeros(len(parents) + 1, np.int64)  # the last one is the root's
    for node, parent in enumerate(parents.tolist()):
        rank[node] = num_seen[parent]
        num_seen[parent] += 1
    return rank


def depths(parents: Ints) -> Ints:
    """Count the steps from the root to each node: 1 for its children."""
    _check(parents)
    depth = np.ones(len(parents), np.int64)
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            depth[node] = depth[parent] + 1
    return depth


def ancestors(parents: Ints) -> Bools:
    """Say which nodes lead to each node, itself included, bool `[n, n]`.

    Row 3 of the example above is x x . x . and row 4 is x . x . x

    Raises:
        ValueError: A parent does not stand before its child.
    """
    _check(parents)
    is_above = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            is_above[node] |= is_above[parent]
    return is_above


def children(parents: Ints, node: int) -> Ints:
    """List the children of a node, -1 for those of the root, in the order in which they are offered."""
    return np.flatnonzero(parents == node)


def follow(tokens: Ints, parents: Ints, wanted: Ints) -> Ints:
    """Walk down from the root along given tokens and list the nodes passed, as far as the tree goes.

    Args:
        tokens: Token of each node.
        parents: Its parent.
        wanted: The token wanted at depth 1, 2, ...
    """
    node, alive = -1, np.array([-1])
    for token in wanted.tolist():
        # Siblings drawn with replacement may be equal, and only one of them lead on.
        alive = np.flatnonzero((parents[:, None] == alive).any(1) & (tokens == token))
        if not len(alive):
            break
        node = int(alive[0])
    return path(parents, node)


def follow_drawn(tokens: Ints, parents: Ints, drawn: Ints) -> Ints:
    """Walk down from the root to the child that equals the token drawn at each node, and list the nodes.

    For drafts that were chosen and not drawn this keeps the law of what is drawn, whatever the tree:
    one token is drawn for each node, not for each path.

    Args:
        tokens: Token of each node, int `[n]`.
        parents: Its parent, int `[n]`.
        drawn: What the target drew at the root and behind each node, int `[1 + n]`; the last may be missing.
    """
    nodes: list[int] = []
    node = -1
    while node + 1 < len(drawn):
        equal = np.flatnonzero((parents == node) & (tokens == drawn[node + 1]))
        if not len(equal):
            break
        node = int(equal[0])
        nodes.append(node)
    return np.array(nodes, np.int64)


def path(parents: Ints, node: int) -> Ints:
    """List the nodes from the root's child down to a node; none for the root, -1."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = int(parents[node])
    return np.array(nodes[::-1], np.int64)


def merge(paths: Seq[Ints]) -> tuple[Ints, Ints, list[Ints]]:
    """Join paths from the root into one tree in which no siblings are equal.

    1 2 3, 1 4 and 1 2 become the tokens 1 2 3 4 with parents (-1, 0, 1, 0) and the nodes 0 1 2, 0 3, 0 1.

    Args:
        paths: Tokens from the root's child down; a path may be empty.

    Returns:
        Tokens, parents, and the nodes of each path.
    """
    tokens: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, int], int] = {}
    nodes: list[Ints] = []
    for tokens_of_path in paths:
        node, passed = -1, []
        for token in tokens_of_path.tolist():
            child = known.setdefault((node, token), len(tokens))
            if child == len(tokens):
                tokens.append(token)
                parents.append(node)
            node = child
            passed.append(node)
        nodes.append(np.array(passed, np.int64))
    return np.array(tokens, np.int64), np.array(parents, np.int64), nodes


def compaction(start: int, nodes: Ints) -> tuple[Ints, Ints] | None:
    """Say how the cached rows of a path come to stand behind each other: from which slots to which.

    Args:
        start: Slot of node 0; node i was written to `start + i`.
        nodes: A path; its k-th node belongs into `start + k`.

    Returns:
        Source and target slots, to be gathered first and then written; None if all stand right.
    """
    right = np.arange(len(nodes))
    moved = nodes != right
    return (start + nodes[moved], start + right[moved]) if moved.any() else None


def _check(parents: Ints) -> None:
    if (wrong := np.flatnonzero((parents < -1) | (parents >= np.arange(len(parents))))).size:
        node = int(wrong[0])
        raise ValueError(f"a parent must stand before its child; node {node} has parent {parents[node]}")
