"""Which prompts of a batch share which prefix, and in what order they run (BatchLLM, arXiv 2412.03594).

All prompts are known, so the prefixes worth sharing are as well. Prompts form a tree by their tokens; each
prompt gets one prefix that it shares with others (one level of sharing), chosen so that the most tokens
are spared. A group is a prefix with the prompts that share it; its members run side by side, so that what
was computed of the prefix can be dropped when the last of them is done.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from chordal.forward import Ints


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Prompts that share a prefix.

    Attributes:
        num_shared: Length of the prefix; 0 if there is but one prompt, or nothing is shared.
        members: Numbers of the prompts, ascending.
    """

    num_shared: int
    members: tuple[int, ...]

    @property
    def num_spared(self) -> int:
        """Tokens that need not be computed: the prefix is, once."""
        return self.num_shared * (len(self.members) - 1)


@dataclass(eq=False)
class Node:
    """A place in the tree of prompts where they branch or end.

    Attributes:
        depth: Tokens up to here.
        members: Prompts that end here, or share no more than this with any other.
        children: The places behind.
    """

    depth: int
    members: list[int] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)


def group_prompts(prompts: Seq[Ints], lengths: Seq[int], *, unit: int = 1) -> list[PrefixGroup]:
    """Group prompts by shared prefixes, in the order that they should run.

    Groups that decode long for what they feed come first: their decoding then goes on while later groups
    are fed.

    Args:
        prompts: As far as they may be shared; the last token of a prompt must be fed by whoever reads it.
        lengths: Tokens expected to be generated for each; wrong ones make the order worse, nothing else.
        unit: Prefixes are shared in multiples of so many tokens, at least 1.

    Returns:
        Groups of all prompts, each in one.
    """
    groups = best_groups(prompt_tree(prompts, unit=unit))

    def weight(group: PrefixGroup) -> float:
        fed = sum(len(prompts[at]) for at in group.members) - group.num_spared
        return sum(lengths[at] for at in group.members) / max(fed, 1)

    return sorted(groups, key=lambda group: (-weight(group), group.members))


def prompt_tree(prompts: Seq[Ints], *, unit: int = 1) -> Node:
    """Make the tree of prompts, cut into units; its root is at depth 0."""
    keys = [_units(prompt, unit) for prompt in prompts]
    root = Node(0)
    path, before = [root], list[tuple[int, ...]]()
    # In order, a prompt leaves the path of the one before it where they differ.
    for member in sorted(range(len(prompts)), key=lambda at: (keys[at], at)):
        key = keys[member]
        shared = next((at for at, (a, b) in enumerate(zip(key, before, strict=False)) if a != b), None)
        shared = min(len(key), len(before)) if shared is None else shared
        last = None
        while path[-1].depth > shared:
            last = path.pop()
        if path[-1].depth < shared:
            assert last is not None, "a path reaches as far as its prompt"
            path[-1].children[-1] = Node(shared, [], [last])
            path.append(path[-1].children[-1])
        if len(key) > path[-1].depth:
            path[-1].children.append(Node(len(key)))
            path.append(path[-1].children[-1])
        path[-1].members.append(member)
        before = key
    _scale(root, unit)
    return root


def best_groups(root: Node) -> list[PrefixGroup]:
    """Give each prompt one prefix to share so that the most tokens are spared.

    A group costs its prefix once and spares it for each member, who is best off with the longest prefix
    that some group has. So what a subtree can spare depends on the longest such prefix above it alone:

        best(node, above) = max(sum of best(child, above), -depth + sum of best(child, depth))
        best(end of a prompt, above) = above

    Cost: nodes times depth of the tree in nodes.
    """
    # Children first; each node's table is by the node above that has a group, the root's being none.
    order, stack = list[tuple[Node, list[Node]]](), [(root, list[Node]())]
    while stack:
        node, above = stack.pop()
        order.append((node, above))
        stack += [(child, [*above, node]) for child in node.children]
    value: dict[tuple[Node, Node], int] = {}
    opens: dict[tuple[Node, Node], bool] = {}
    for node, above in reversed(order):
        own = -node.depth + _sum(node, node, value)
        for group in above or [root]:
            without = _sum(node, group, value)
            opens[node, group] = own > without
            value[node, group] = max(own, without)

    members: dict[Node, list[int]] = {}
    walk = [(root, root)]
    while walk:
        node, group = walk.pop()
        if node is not root and opens[node, group]:
            group = node
        members.setdefault(group, []).extend(node.members)
        walk += [(child, group) for child in node.children]
    alone = [PrefixGroup(0, (member,)) for member in members.pop(root, [])]
    return [PrefixGroup(group.depth, tuple(sorted(mine))) for group, mine in members.items()] + alone


def _sum(node: Node, group: Node, value: dict[tuple[Node, Node], int]) -> int:
    """What a subtree spares if its nearest group above, or at, its root is this one."""
    return group.depth * len(node.members) + sum(value[child, group] for child in node.children)


def _units(prompt: Ints, unit: int) -> list[tuple[int, ...]]:
    return [tuple(row) for row in prompt[: len(prompt) // unit * unit].reshape(-1, unit).tolist()]


def _scale(root: Node, unit: int) -> None:
    stack = [root]
    while stack:
        node = stack.pop()
        node.depth *= unit
        stack += node.children
