from __future__ import annotations

import numpy as np
import pytest

from chordal.errors import InputError
from chordal.ops import tree

#      root
#       0
#     1   2
#     3   4
PARENTS = np.array([-1, 0, 0, 1, 2])


def random_parents(rng, num):
    return np.array([int(rng.integers(-1, node)) for node in range(num)], np.int64)


def test_the_example_of_the_docstring():
    assert tree.depths(PARENTS).tolist() == [1, 2, 2, 3, 3]
    assert tree.ancestors(PARENTS).astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]
    assert tree.children(PARENTS, 0).tolist() == [1, 2]
    assert tree.children(PARENTS, -1).tolist() == [0]
    assert tree.path(PARENTS, 4).tolist() == [0, 2, 4]
    assert tree.path(PARENTS, -1).tolist() == []


def test_an_empty_tree_has_nothing_of_anything():
    none = np.empty(0, np.int64)
    assert tree.depths(none).shape == (0,)
    assert tree.ancestors(none).shape == (0, 0)
    assert tree.follow(none, none, np.array([1, 2])).tolist() == []
    assert tree.follow_drawn(none, none, np.array([1])).tolist() == []
    assert tree.compaction(5, none) is None


def test_ancestors_depths_and_paths_agree_on_random_trees():
    rng = np.random.default_rng(0)
    for num in range(1, 20):
        parents = random_parents(rng, num)
        for node in range(num):
            path = tree.path(parents, node)
            assert np.flatnonzero(tree.ancestors(parents)[node]).tolist() == sorted(path.tolist())
            assert tree.depths(parents)[node] == len(path)
            assert parents[path[0]] == -1
            assert parents[path[1:]].tolist() == path[:-1].tolist()


@pytest.mark.parametrize("parents", [[0], [-1, 1], [-2], [-1, 0, 3]])
def test_a_parent_must_stand_before_its_child(parents):
    for function in (tree.depths, tree.ancestors):
        with pytest.raises(ValueError, match="a parent must stand before its child; node"):
            function(np.array(parents))


def test_following_goes_as_far_as_the_tree_does():
    tokens = np.array([7, 8, 9, 1, 2])
    for wanted, nodes in (([7, 9, 2, 5], [0, 2, 4]), ([7, 8, 2], [0, 1]), ([8], []), ([], []), ([7], [0])):
        assert tree.follow(tokens, PARENTS, np.array(wanted, np.int64)).tolist() == nodes


def test_of_equal_siblings_the_one_that_leads_on_is_followed():
    tokens, parents = np.array([5, 5, 6]), np.array([-1, -1, 1])
    assert tree.follow(tokens, parents, np.array([5, 6])).tolist() == [1, 2]
    assert tree.follow(tokens, parents, np.array([5, 7])).tolist() == [0]


def test_what_is_drawn_at_each_node_says_where_the_walk_goes():
    tokens = np.array([7, 8, 9, 1, 2])
    # Drawn at the root and behind the nodes 0 to 4.
    assert tree.follow_drawn(tokens, PARENTS, np.array([7, 9, 1, 2, 0, 0])).tolist() == [0, 2, 4]
    assert tree.follow_drawn(tokens, PARENTS, np.array([7, 8, 2, 2, 0, 0])).tolist() == [0, 1]
    assert tree.follow_drawn(tokens, PARENTS, np.array([8, 8, 1, 2, 0, 0])).tolist() == []
    # Where nothing was drawn behind the last node, the walk ends there.
    assert tree.follow_drawn(np.array([7, 8]), tree.chain(2), np.array([7, 8])).tolist() == [0, 1]


def test_compaction_moves_a_path_behind_the_text():
    source, target = tree.compaction(10, np.array([0, 2, 4]))
    assert (source.tolist(), target.tolist()) == ([12, 14], [11, 12])
    assert tree.compaction(10, np.array([0, 1, 2])) is None


def test_a_tree_is_read_level_by_level():
    assert tree.parse("2/2,1/1,0,0").tolist() == [-1, -1, 0, 0, 1, 2]
    assert tree.parse(" 2 / 1, 0 ").tolist() == [-1, -1, 0]
    assert tree.parse("1/1/1").tolist() == tree.chain(3).tolist()
    assert tree.parse("3/0,0,0").tolist() == tree.parse("3").tolist() == [-1, -1, -1]
    assert tree.parse("").tolist() == tree.parse("0").tolist() == []


@pytest.mark.parametrize(
    "text", ["2/1", "2/1,1,1", "2,1", "a", "2/1,-1", "1.5", "2//1", "/", "0/1", "2/1,0/"]
)
def test_a_text_that_is_no_tree_is_refused(text):
    with pytest.raises(InputError, match=r"level \d has"):
        tree.parse(text)


def test_ranks_count_the_siblings_before_a_node():
    assert tree.ranks(PARENTS).tolist() == [0, 0, 1, 0, 0]
    assert tree.ranks(np.array([-1, -1, 0, -1, 0, 1, 0])).tolist() == [0, 1, 0, 2, 1, 0, 2]
    assert tree.ranks(np.empty(0, np.int64)).shape == (0,)


def test_merged_paths_share_what_they_begin_with():
    paths = [np.array(path, np.int64) for path in ([1, 2, 3], [1, 4], [], [1, 2])]
    tokens, parents, nodes = tree.merge(paths)
    assert tokens.tolist() == [1, 2, 3, 4]
    assert parents.tolist() == [-1, 0, 1, 0]
    assert [each.tolist() for each in nodes] == [[0, 1, 2], [0, 3], [], [0, 1]]


def test_every_merged_path_can_be_followed_and_no_siblings_are_equal():
    rng = np.random.default_rng(0)
    for _ in range(50):
        paths = [rng.integers(0, 3, rng.integers(0, 5)) for _ in range(6)]
        tokens, parents, nodes = tree.merge(paths)
        for path, passed in zip(paths, nodes, strict=True):
            assert tokens[passed].tolist() == path.tolist()
            assert tree.follow(tokens, parents, path).tolist() == passed.tolist()
        assert len(set(zip(tokens.tolist(), parents.tolist(), strict=True))) == len(tokens)
