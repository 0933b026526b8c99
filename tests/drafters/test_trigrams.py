from __future__ import annotations

import numpy as np
import pytest

from chordal.drafters.ngram_model import NgramModel
from chordal.drafters.trigrams import Search, TrigramDrafter, TrigramTable
from chordal.models.family import Family
from chordal.ops import tree
from chordal.sequence import Sequence, StopRules


def corpus(*texts):
    return NgramModel.count([np.array(text) for text in texts], max_ngram=3).tables[1]


def wide_corpus(num_tokens=40, length=20_000):
    """Nearly every pair has more successors than a table keeps."""
    return corpus(np.random.default_rng(0).integers(0, num_tokens, length))


def search(table, pair, depth=3, iterations=150, num_paths=24, max_nodes=64, seed=0):
    found = Search(table, pair, depth, 32.0, 8.0)
    found.run(iterations, num_paths, np.random.default_rng(seed).random(iterations * depth))
    return found.draft(num_paths, max_nodes)


def paths(draft):
    return [tuple(draft.tokens[tree.path(draft.parents, node)].tolist()) for node in range(len(draft))]


def drafter(table, **settings):
    seq = Sequence(prompt=np.array([1]), family=Family(), stop=StopRules(max_new_tokens=9))
    published = {
        "num_iterations": 150, "num_paths": 24, "max_nodes": 64, "exploration": 32.0,
        "exploration_base": 8.0, "window": 16, "learn_prompt": False,
    }  # fmt: skip
    return TrigramDrafter(seq, table, **{**published, **settings})


def test_scores_are_shares_of_the_corpus_raised_by_what_is_learnt():
    table = TrigramTable(corpus([1, 2, 3, 1, 2, 4, 1, 2, 3]))
    assert table.successors((1, 2)) == [(3, pytest.approx(2 / 3)), (4, pytest.approx(1 / 3))]
    table.learn(np.array([1, 2, 4]))
    assert table.successors((1, 2)) == [(3, pytest.approx(2 / 3)), (4, pytest.approx(1 / 3 + 0.04))]
    for _ in range(100):
        table.learn(np.array([1, 2, 4]))
    assert table.successors((1, 2)) == [(4, 3.0), (3, pytest.approx(2 / 3))]
    assert table.successors((2, 3)) == [(1, 1.0)]
    assert table.successors((9, 9)) == []


def test_an_empty_table_learns_every_trigram_and_nothing_of_two_tokens():
    table = TrigramTable()
    table.learn(np.array([5, 6]))
    table.learn(np.array([5, 6, 7, 5, 6, 7]))
    assert table.successors((5, 6)) == [(7, 0.08)]
    assert table.successors((6, 7)) == [(5, 0.04)]
    assert table.successors((7, 5)) == [(6, 0.04)]
    assert table.successors((5, 7)) == []


def test_of_equal_scores_the_smaller_token_comes_first():
    table = TrigramTable(corpus([1, 2, 9, 1, 2, 3, 1, 2, 5]))
    assert [token for token, _ in table.successors((1, 2))] == [3, 5, 9]


def test_a_pair_keeps_its_best_successors_and_a_new_one_replaces_the_weakest():
    table = TrigramTable(corpus([1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 4, 1, 2, 5]), num_successors=2)
    assert [token for token, _ in table.successors((1, 2))] == [3, 4]
    table.learn(np.array([1, 2, 6]))
    assert table.successors((1, 2)) == [(3, pytest.approx(0.4)), (6, 0.04)]


def test_the_pair_not_learnt_for_longest_is_forgotten_first():
    table = TrigramTable(corpus([3, 4, 9]), max_pairs=2)
    table.learn(np.array([1, 2, 9]))
    table.learn(np.array([3, 4, 9]))
    table.learn(np.array([1, 2, 9]))
    assert table.successors((3, 4)) == [(9, pytest.approx(1.04))]
    table.learn(np.array([5, 6, 9]))
    assert table.successors((1, 2)) == [(9, 0.08)]
    assert table.successors((5, 6)) == [(9, 0.04)]
    assert table.successors((3, 4)) == [(9, 1.0)]  # as in the corpus again


def test_a_draft_is_a_tree_of_what_the_table_allows():
    table = TrigramTable(wide_corpus())
    for pair in [(0, 1), (5, 5), (39, 2)]:
        draft = search(table, pair)
        assert 24 < len(draft) <= 47
        assert (draft.parents < np.arange(len(draft))).all()
        assert len(set(paths(draft))) == len(draft)
        assert max(map(len, paths(draft))) <= 4
        for path in paths(draft):
            text = [*pair, *path]
            for first, second, token in zip(text, text[1:], text[2:], strict=False):
                assert token in [known for known, _ in table.successors((first, second))]


def test_every_proposed_node_has_its_best_successor():
    table = TrigramTable(wide_corpus())
    found = set(paths(search(table, (3, 4))))
    visited = {path for path in found if any(other[:-1] == path for other in found)} | {()}
    for path in visited:
        pair = (3, 4, *path)[-2:]
        assert (*path, table.successors(pair)[0][0]) in found


def test_a_dominant_chain_is_the_path_visited_most():
    """Beside the chain 1 2 3 4 5 6, with score 1 each, every pair has 11 successors of little score."""
    table = TrigramTable(increment=0.01)
    for start in range(1, 5):
        for _ in range(100):
            table.learn(np.array([start, start + 1, start + 2]))
        for other in range(11):
            table.learn(np.array([start, start + 1, 20 + other]))
    draft = search(table, (1, 2))
    assert paths(draft)[:3] == [(3,), (3, 4), (3, 4, 5)]
    assert (3, 4, 5, 6) in paths(draft)


def test_two_equal_branches_are_both_proposed():
    table = TrigramTable(corpus([1, 2, 3, 8, 8, 1, 2, 4, 9, 9]))
    assert {(3, 8, 8), (4, 9, 9)} <= set(paths(search(table, (1, 2))))


@pytest.mark.parametrize("iterations", [20, 150])
def test_what_is_small_enough_is_proposed_whole(iterations):
    table = TrigramTable(corpus([1, 2, 3, 4], [1, 2, 5, 4], [2, 5, 6, 9]))
    assert set(paths(search(table, (1, 2), iterations=iterations))) == {
        (3,), (3, 4), (5,), (5, 4), (5, 6), (5, 6, 9),
    }  # fmt: skip


def test_limits_of_a_draft_are_kept_in_the_order_of_visits():
    table = TrigramTable(wide_corpus())
    whole = paths(search(table, (0, 1)))
    assert paths(search(table, (0, 1), max_nodes=5)) == whole[:5]
    assert paths(search(table, (0, 1), num_paths=4))[:3] == whole[:3]
    [only] = paths(search(table, (0, 1), num_paths=1))
    assert only == (table.successors((0, 1))[0][0],)
    assert max(map(len, paths(search(table, (0, 1), depth=1)))) == 2
    assert paths(search(table, (0, 1), depth=0)) == [only]
    assert paths(search(table, (99, 99))) == []


def test_visits_follow_the_published_formula():
    """One level: the rewards are 1 + score, and the child with the largest bound is visited next."""
    found = Search(TrigramTable(corpus([1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 4])), (1, 2), 1, 0.5, 8.0)
    found.run(60, 1, np.empty(0))
    scores, visits = np.array([0.75, 0.25]), np.array([1, 1])
    for num in range(2, 60):
        bound = 1 + scores + (0.5 + np.log((num + 9) / 8)) * scores * np.sqrt(num) / (1 + visits)
        visits[bound.argmax()] += 1
    assert found.visits == [60, *visits]
    assert 1 < visits[1] < visits[0]


def test_a_reward_counts_the_scores_to_the_end_of_the_path():
    found = Search(TrigramTable(corpus([1, 2, 3, 4, 5, 6])), (1, 2), 3, 32.0, 8.0)
    found.run(1, 24, np.zeros(3))
    assert (found.visits, found.rewards) == ([1, 1], [4.0, 4.0])  # 1 + 1 to node 3, and 1 for 4 and 5


def test_rollouts_follow_the_scores():
    """Behind 2 both 3 and 4 score the same; only what lies beyond makes 4 worth more visits."""
    table = TrigramTable(increment=0.1)
    for text in ([1, 2, 3], [1, 2, 4], [2, 3, 5], [2, 3, 6], *20 * [[2, 4, 7]], [3, 5, 8], [4, 7, 8]):
        table.learn(np.array(text))
    found = Search(table, (1, 2), 3, 0.0, 8.0)
    found.run(150, 1, np.random.default_rng(0).random(450))
    assert found.visits[0] == 150
    assert found.visits[2] > 100  # 4, the second child of the root


def test_the_last_tokens_are_learnt_at_each_step():
    table = TrigramTable()
    made = drafter(table, window=4)
    text = np.array([1, 2, 3, 4, 5, 6])
    made.propose(text, 4)
    assert [table.successors((at, at + 1)) for at in range(1, 5)] == [[], [], [(5, 0.04)], [(6, 0.04)]]
    made.propose(text, 4)
    assert table.successors((4, 5)) == [(6, 0.08)]
    untaught = TrigramTable()
    drafter(untaught, window=0).propose(text, 4)
    assert untaught.successors((4, 5)) == []


def test_a_prompt_can_be_learnt_whole():
    table, prompt = TrigramTable(), np.arange(30)
    seq = Sequence(prompt=prompt, family=Family(), stop=StopRules(max_new_tokens=9))
    TrigramDrafter(
        seq, table, num_iterations=5, num_paths=5, max_nodes=5, exploration=1.0, exploration_base=8.0,
        window=3, learn_prompt=True,
    )  # fmt: skip
    assert all(table.successors((at, at + 1)) == [(at + 2, 0.04)] for at in range(28))


def test_the_same_request_is_drafted_the_same_way():
    text = np.array([3, 4, 5, 0, 1])
    drafts = [drafter(TrigramTable(wide_corpus())).propose(text, 4) for _ in range(2)]
    assert paths(drafts[0]) == paths(drafts[1])


def test_a_text_of_one_token_has_no_draft():
    assert len(drafter(TrigramTable(wide_corpus())).propose(np.array([1]), 4)) == 0
