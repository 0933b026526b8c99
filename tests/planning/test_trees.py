from __future__ import annotations

import functools
import itertools

import pytest

from chordal.ops import tree
from chordal.planning.trees import best_trees, even_tree, even_trees, expected_tokens, num_nodes, tree_text


def all_trees(num, max_width, max_depth):
    """Give what every tree of `num` nodes, its root among them, commits, as functions of the chances."""

    @functools.cache
    def grow(num, depth):
        if num == 1:
            return ((),)
        if not depth:
            return ()
        found = []
        for width in range(1, max_width + 1):
            for sizes in itertools.product(range(1, num), repeat=width):
                if sum(sizes) == num - 1:
                    found += itertools.product(*(grow(size, depth - 1) for size in sizes))
        return tuple(found)

    return grow(num, max_depth)


def value(tree, per_rank):
    return 1 + sum(chance * value(child, per_rank) for chance, child in zip(per_rank, tree, strict=False))


@pytest.mark.parametrize("max_depth", [2, 6])
@pytest.mark.parametrize(
    "per_rank", [(0.6, 0.2, 0.1), (0.4, 0.4), (0.3, 0.3, 0.3), (0.9, 0.05), (0.1, 0.5, 0.3), (0.5, 0.0, 0.3)]
)
def test_no_tree_commits_more_than_the_best(per_rank, max_depth):
    best = best_trees(per_rank, 6, max_depth)
    for num in range(1, 8):
        values = [value(tree, per_rank) for tree in all_trees(num, len(per_rank), max_depth)]
        if values:
            assert num_nodes(best[num - 1]) == num - 1
            assert expected_tokens(best[num - 1], per_rank) == pytest.approx(max(values))
        else:
            assert len(best) < num


def test_where_only_the_first_rank_is_ever_right_the_best_tree_is_a_chain():
    for num, found in enumerate(best_trees((0.9, 0.0, 0.0), 6, 8)):
        assert found == ((1,),) * num


def test_where_all_ranks_are_equal_the_best_tree_is_balanced():
    trees = best_trees((0.4, 0.4), 14, 8)
    assert trees[2] == ((2,),)
    assert trees[6] == ((2,), (2, 2))
    assert trees[14] == ((2,), (2, 2), (2, 2, 2, 2))


def test_trees_end_where_depth_and_ranks_leave_no_room():
    assert [num_nodes(found) for found in best_trees((0.5, 0.2), 64, 2)] == list(range(7))


def test_tokens_of_a_tree_are_the_chances_of_its_paths():
    assert expected_tokens(((2,), (1, 0)), (0.6, 0.2)) == pytest.approx(1 + 0.6 + 0.2 + 0.6 * 0.6)
    assert expected_tokens((), (0.6,)) == 1


def test_a_tree_is_written_level_by_level():
    assert tree_text(((3,), (2, 1, 0), (1, 0, 0))) == "3/2,1,0/1,0,0"


def test_decoders_read_what_is_written():
    for num, best in enumerate(best_trees((0.5, 0.2, 0.1), 12, 4)):
        parents = tree.parse(tree_text(best))
        assert len(parents) == num
        assert tree.depths(parents).max(initial=0) == len(best)


def test_even_trees_are_all_that_narrow_with_depth():
    expected = {
        widths
        for depth in (1, 2, 3)
        for widths in itertools.product((1, 2, 3), repeat=depth)
        if list(widths) == sorted(widths, reverse=True) and num_nodes(even_tree(widths)) <= 8
    }
    found = list(even_trees(3, 8, 3))
    assert set(found) == expected
    assert len(found) == len(expected)
    assert (2, 2) in expected
    assert even_tree((2, 2)) == ((2,), (2, 2))
