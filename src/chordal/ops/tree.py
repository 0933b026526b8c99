"""Draft trees as arrays: each node names its parent by number, -1 for a child of the root.

The root is the last committed token; it is no node. A parent stands before its children, and children
of one parent stand in the order in which they are offered. With parents (-1, 0, 0, 1, 2):

         root
          0
        1   2
        3   4
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def chain(num: int) -> Ints:
    """Give the parents of a tree without branches."""
    return np.arange(-1, num - 1)


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
        alive = np.flatnonzero(np.isin(parents, alive) & (tokens == token))
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
        drawn: What the target drew at the root and behind each node, int `[1 + n]`.
    """
    nodes: list[int] = []
    while True:
        node = nodes[-1] if nodes else -1
        equal = np.flatnonzero((parents == node) & (tokens == drawn[node + 1]))
        if not len(equal):
            return np.array(nodes, np.int64)
        nodes.append(int(equal[0]))


def path(parents: Ints, node: int) -> Ints:
    """List the nodes from the root's child down to a node; none for the root, -1."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = int(parents[node])
    return np.array(nodes[::-1], np.int64)


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
