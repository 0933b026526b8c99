"""The best draft tree for each number of nodes, given how often each rank is right.

A tree is written as the child counts of its nodes, level by level in level order: ((2,), (1, 0)) is a root
with two children, of which the first has one child. As text, for the settings of decoders: 2/1,0.

Source: Sequoia (arXiv 2402.12374), its dynamic program.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import TypeAlias

import numpy as np

from chordal.forward import Floats

Tree: TypeAlias = tuple[tuple[int, ...], ...]


def num_nodes(tree: Tree) -> int:
    """Count the nodes of a tree, its root not among them."""
    return sum(map(sum, tree))


def tree_text(tree: Tree) -> str:
    """Write a tree as the text that decoders take."""
    return "/".join(",".join(map(str, counts)) for counts in tree)


def expected_tokens(tree: Tree, per_rank: Seq[float]) -> float:
    """Give the tokens one verification commits: 1 + the chance of each node that its whole path is right.

    With chances .6 and .2 the tree 2/1,0 gives 1 + .6 + .2 + .6 * .6 = 2.16.
    """
    chances, tokens = [1.0], 1.0
    for counts in tree:
        children = zip(chances, counts, strict=True)
        chances = [
            chance * (per_rank[rank] if rank < len(per_rank) else 0.0)
            for chance, count in children
            for rank in range(count)
        ]
        tokens += sum(chances)
    return tokens


def best_trees(per_rank: Seq[float], max_nodes: int, max_depth: int) -> list[Tree]:
    """Find the tree that commits most for each number of nodes.

    best[l, n], the most that a node with n - 1 nodes below it in at most l levels can give, is 1 + the best
    of its children, and b children with m nodes share them so that the last has y: forest[b, m] is the
    largest forest[b - 1, m - y] + a_b best[l - 1, y].

    Args:
        per_rank: Chance that the child of each rank is the right one (a_b), at least one.
        max_nodes: Most nodes, the root not among them.
        max_depth: Most levels.

    Returns:
        Trees of 0, 1, ... nodes, as far as that many fit into `max_depth` levels.

    Cost: `max_depth` * len(`per_rank`) * `max_nodes`^2 steps.
    """
    size = max_nodes + 1
    best: Floats = np.full(size + 1, -np.inf)
    best[1] = 1.0
    shares = []  # of each level: how many nodes the last of b children has, [b, m]
    num_children = []  # of each level: children of a node with n nodes in its subtree, [n]
    for _ in range(max_depth):
        forest = np.full((len(per_rank) + 1, size), -np.inf)
        forest[0, 0] = 0.0
        share = np.zeros((len(per_rank) + 1, size), np.int64)
        for rank, chance in enumerate(per_rank, 1):
            # A chance of 0 times an impossible subtree is impossible, not nothing.
            gains = np.where(np.isfinite(best), chance * np.where(np.isfinite(best), best, 0.0), -np.inf)
            for num in range(rank, size):
                totals = forest[rank - 1, num - 1 :: -1][:num] + gains[1 : num + 1]
                share[rank, num] = 1 + int(np.argmax(totals))
                forest[rank, num] = totals.max()
        shares.append(share)
        num_children.append(np.append(0, forest.argmax(0)))
        best = np.append(-np.inf, 1.0 + forest.max(0))
    trees = []
    for num in range(1, size + 1):
        if not np.isfinite(best[num]):
            break
        trees.append(_unfold(num, shares, num_children))
    return trees


def even_trees(max_width: int, max_nodes: int, max_depth: int) -> Iterator[tuple[int, ...]]:
    """List the trees in which all nodes of a level have as many children, as these counts.

    Counts that grow with depth are left out: they spend nodes where fewer paths are right.
    """
    open_: list[tuple[tuple[int, ...], int, int]] = [((), 1, 0)] if max_depth else []
    while open_:
        widths, level, num = open_.pop()
        for width in range(1, (widths[-1] if widths else max_width) + 1):
            if num + level * width > max_nodes:
                break
            yield (*widths, width)
            if len(widths) + 1 < max_depth:
                open_.append(((*widths, width), level * width, num + level * width))


def even_tree(widths: Seq[int]) -> Tree:
    """Give the tree in which every node of level i has `widths[i]` children."""
    levels, num = [], 1
    for width in widths:
        levels.append((width,) * num)
        num *= width
    return tuple(levels)


def _unfold(size: int, shares: Seq[np.ndarray], num_children: Seq[np.ndarray]) -> Tree:
    """Read the tree of a node with `size` nodes in its subtree out of the tables, the deepest level last."""
    tree, level = [], [size]
    for share, count in zip(reversed(shares), reversed(num_children), strict=True):
        below, counts = [], []
        for num in level:
            left, sizes = num - 1, []
            for rank in range(int(count[num]), 0, -1):
                sizes.append(int(share[rank, left]))
                left -= sizes[-1]
            below += sizes[::-1]
            counts.append(len(sizes))
        if not below:
            break
        tree.append(tuple(counts))
        level = below
    return tuple(tree)
