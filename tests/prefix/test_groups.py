from __future__ import annotations

import itertools

import numpy as np
import pytest

from chordal.prefix.groups import best_groups, group_prompts, prompt_tree


def prompts_of(*texts, **repeats):
    """Prompts of letters, each standing for 10 tokens unless said otherwise."""
    return [np.concatenate([np.full(repeats.get(one, 10), ord(one)) for one in text]) for text in texts]


def common(prompts):
    """Tokens that all of some prompts begin with."""
    num = min(map(len, prompts))
    same = (np.stack([prompt[:num] for prompt in prompts]) == prompts[0][:num]).all(0)
    return num if same.all() else int(np.argmin(same))


def partitions(items):
    if not items:
        yield []
        return
    first, *rest = items
    for part in partitions(rest):
        for at in range(len(part)):
            yield [*part[:at], [first, *part[at]], *part[at + 1 :]]
        yield [[first], *part]


def spared(groups):
    return sum(group.num_spared for group in groups)


def test_the_worked_example_shares_ab_and_forks_where_c_is_long():
    texts = ("ABC1", "ABC2", "ABD")
    short = best_groups(prompt_tree(prompts_of(*texts)))
    assert [(group.num_shared, group.members) for group in short] == [(20, (0, 1, 2))]
    assert spared(short) == 40
    long = best_groups(prompt_tree(prompts_of(*texts, C=50)))
    assert sorted((group.num_shared, group.members) for group in long) == [(0, (2,)), (70, (0, 1))]
    assert spared(long) == 70


@pytest.mark.parametrize("unit", [1, 3])
def test_no_other_way_to_share_one_prefix_each_spares_more(unit):
    """Against all partitions of up to 7 prompts, in random trees."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        num = int(rng.integers(1, 8))
        prompts = [np.repeat(rng.integers(0, 2, rng.integers(0, 5)), rng.integers(1, 5)) for _ in range(num)]
        groups = best_groups(prompt_tree(prompts, unit=unit))
        best = max(
            sum((len(part) - 1) * (common([prompts[at] for at in part]) // unit * unit) for part in each)
            for each in partitions(list(range(num)))
        )
        assert spared(groups) == best
        assert sorted(itertools.chain(*(group.members for group in groups))) == list(range(num))
        for group in groups:
            assert group.num_shared <= common([prompts[at] for at in group.members])
            assert group.num_shared % unit == 0
            assert len(group.members) > 1 or group.num_shared == 0


def test_the_order_of_the_prompts_does_not_matter():
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 2, rng.integers(1, 12)) for _ in range(40)]
    want = spared(best_groups(prompt_tree(prompts)))
    for _ in range(5):
        order = rng.permutation(len(prompts))
        assert spared(best_groups(prompt_tree([prompts[at] for at in order]))) == want


def test_what_decodes_long_for_what_it_feeds_comes_first():
    prompts = prompts_of("A1", "B1", "A2", "C", "B2")
    groups = group_prompts(prompts, [10, 40, 10, 1, 40])
    assert [group.members for group in groups] == [(1, 4), (0, 2), (3,)]
    # 20 / 30 tokens against 30 / 10.
    groups = group_prompts(prompts, [10, 0, 10, 30, 0])
    assert [group.members for group in groups] == [(3,), (0, 2), (1, 4)]


def test_equal_and_empty_prompts_and_none():
    assert group_prompts([], []) == []
    [group] = group_prompts([np.arange(5)] * 3, [1, 1, 1])
    assert (group.num_shared, group.members) == (5, (0, 1, 2))
    groups = group_prompts([np.arange(0), np.arange(5), np.arange(0)], [1, 1, 1], unit=2)
    assert sorted(group.members for group in groups) == [(0,), (1,), (2,)]


def test_a_prompt_that_others_begin_with_shares_all_of_it():
    groups = group_prompts(prompts_of("AB", "ABC", "ABD"), [1, 1, 1])
    assert [(group.num_shared, group.members) for group in groups] == [(20, (0, 1, 2))]


def test_a_tree_as_deep_as_there_are_prompts():
    prompts = [np.zeros(length, np.int64) for length in range(1, 600)]
    groups = group_prompts(prompts, [1] * len(prompts))
    assert sorted(itertools.chain(*(group.members for group in groups))) == list(range(599))
    assert spared(groups) > sum(map(len, prompts)) / 2
