from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from chordal.errors import InputError
from chordal.ops import acceptance, tree
from chordal.ops.acceptance import (
    accept_by_ratio,
    accept_greedy,
    acceptance_ratio,
    expected_accepted,
    k_seq,
    k_seq_rho,
    lenient,
    overlap,
    residual,
    typical,
    with_replacement,
    without_replacement,
)
from chordal.testing import committed_law, ways_to_draw

# p is the target's law and q the draft's.
P, Q = torch.tensor([[0.3, 0.5, 0.2], [0.6, 0.3, 0.1]], dtype=torch.float64)
P3, Q3 = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]], dtype=torch.float64)
P4, Q4 = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)

# Each rule, and whether its children are drawn with replacement.
RULES = {"without": (without_replacement, False), "with": (with_replacement, True), "k_seq": (k_seq, True)}


def laws(num, vocab, seed=0):
    """Random laws with some tokens of probability 0, as truncation leaves them."""
    rng = np.random.default_rng(seed)
    laws = rng.dirichlet(np.full(vocab, 0.5), num) * (rng.random((num, vocab)) < 0.8)
    laws[:, 0] += 1e-3
    return torch.from_numpy(laws / laws.sum(1, keepdims=True))


def pairs(num, vocab, seed=0):
    return zip(laws(num, vocab, seed), laws(num, vocab, seed + 1), strict=True)


def committed(p, q, *, ratio=acceptance_ratio, instead=residual):
    """Give the exact law of the one token that a draft x ~ q of one token ends as."""
    law = torch.zeros(len(p), dtype=torch.float64)
    for token, chance in enumerate(q.tolist()):
        keeps = float(ratio(p[token], q[token]))
        law[token] += chance * keeps
        law += chance * (1 - keeps) * instead(p, q)
    return law


def node(rule, p, q, num, *, replace):
    """Give the exact law a rule commits with `num` children drawn from q, and the chance of a child."""
    return committed_law(rule, p, q, ways_to_draw(q, num, replace=replace))


def error(rule, p, q, num, *, replace):
    return float((node(rule, p, q, num, replace=replace)[0] - p).abs().max())


# A chain.


def test_a_kept_or_replaced_token_has_exactly_the_law_of_the_target():
    for p, q in [(P, Q), *pairs(200, 4)]:
        torch.testing.assert_close(committed(p, q), p, rtol=0, atol=1e-12)


def test_a_token_that_was_taken_and_not_drawn_is_a_draft_of_probability_1():
    """The best token of q is kept with its probability under p, and else anything but it."""
    point = torch.nn.functional.one_hot(Q.argmax(), 3).double()
    torch.testing.assert_close(committed(P, point), P, rtol=0, atol=1e-12)
    assert acceptance_ratio(P[0], point[0]) == pytest.approx(0.3)
    torch.testing.assert_close(residual(P, point), torch.tensor([0, 0.5, 0.2]).double() / 0.7)
    # As the published code does it, with the probability it would have been drawn with: not p.
    keeps = float(acceptance_ratio(P[0], Q[0]))
    biased = keeps * point + (1 - keeps) * residual(P, Q)
    torch.testing.assert_close(biased, torch.tensor([1 / 2, 1 / 3, 1 / 6]).double())


@pytest.mark.parametrize(
    "broken",
    [
        {"instead": lambda p, q: p},
        {"instead": lambda p, q: (p - q).abs() / (p - q).abs().sum()},
        {"ratio": lambda p, q: (q / p).clamp(max=1)},
        {"ratio": lambda p, q: 1},
        {"ratio": lambda p, q: acceptance_ratio(p, q, 0.5)},
    ],
    ids=["resampled from p", "absolute difference", "upside down", "naive", "a power below 1"],
)
def test_the_enumeration_notices_a_rule_that_is_wrong(broken):
    assert (committed(P, Q, **broken) - P).abs().max() > 0.01


@pytest.mark.parametrize("vocab", [2, 3])
def test_a_draft_of_three_judged_from_left_to_right_has_the_joint_law_of_the_target(vocab):
    """Drafted independently, p given what is before; behind the first rejected token p goes on alone."""
    q = laws(3, vocab)
    p = {
        text: laws(1, vocab, seed=hash(text) % 1000)[0]
        for num in range(3)
        for text in itertools.product(range(vocab), repeat=num)
    }
    joint = np.zeros((vocab,) * 3)

    def go_on(text, chance):
        if len(text) == 3:
            joint[text] += chance
        else:
            for token, share in enumerate(p[text].tolist()):
                go_on((*text, token), chance * share)

    for draft in itertools.product(range(vocab), repeat=3):
        chance = float(np.prod([q[at, token] for at, token in enumerate(draft)]))
        target = torch.stack([p[draft[:at]] for at in range(3)])
        rows, tokens = torch.arange(3), torch.tensor(draft)
        ratio = acceptance_ratio(target[rows, tokens], q[rows, tokens]).tolist()
        instead = residual(target, q)
        for at in range(3):
            for token, share in enumerate(instead[at].tolist()):
                go_on((*draft[:at], token), chance * (1 - ratio[at]) * share)
            chance *= ratio[at]
        joint[draft] += chance

    for text in itertools.product(range(vocab), repeat=3):
        wanted = np.prod([p[text[:at]][token] for at, token in enumerate(text)])
        assert joint[text] == pytest.approx(wanted, abs=1e-12)


def test_equal_laws_keep_everything():
    p = laws(20, 5)
    assert (acceptance_ratio(p, p)[p > 0] == 1).all()
    # Nothing is left to replace with: p stands in, and no row is divided by 0.
    torch.testing.assert_close(residual(p, p), p)


def test_the_ratio_is_at_most_1_and_a_lower_power_keeps_more():
    assert acceptance_ratio(P, Q).tolist() == pytest.approx([0.5, 1, 1])
    assert acceptance_ratio(P, Q, 0.5).tolist() == pytest.approx([0.5**0.5, 1, 1])
    assert acceptance_ratio(P, Q, 2.0).tolist() == pytest.approx([0.25, 1, 1])


def test_what_the_draft_cannot_draw_is_not_kept():
    zero = torch.zeros(2)
    assert acceptance_ratio(torch.tensor([0.5, 0.0]), zero).tolist() == [0, 0]


def test_ratios_and_residuals_are_not_rounded_to_the_type_of_the_model():
    p, q = torch.tensor([3e-5, 1 - 3e-5]).half(), torch.tensor([6e-5, 1 - 6e-5]).half()
    assert acceptance_ratio(p[0], q[0]) == float(p[0]) / float(q[0])
    assert residual(p, q).dtype == torch.float64


def test_rows_do_not_depend_on_each_other():
    p, q = laws(30, 6), laws(30, 6, seed=1)
    left, alpha = residual(p, q), overlap(p, q)
    for row in range(30):
        assert torch.equal(residual(p[row], q[row]), left[row])
        assert torch.equal(overlap(p[row], q[row]), alpha[row])


def test_the_overlap_is_the_chance_that_a_draft_of_one_token_is_kept():
    assert overlap(P4, Q4) == pytest.approx(0.6, abs=1e-12)
    for p, q in pairs(20, 5):
        keeps = acceptance_ratio(p, q)
        assert overlap(p, q) == pytest.approx(float((q * keeps).sum()), abs=1e-12)


@pytest.mark.parametrize(
    ("draft", "best", "num"),
    [([], [], 0), ([4], [4], 1), ([4], [5], 0), ([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 7, 3], 1)],
)
def test_greedy_keeps_the_leading_tokens_that_are_the_best(draft, best, num):
    assert accept_greedy(np.array(draft, np.int64), np.array(best, np.int64)) == num


@pytest.mark.parametrize(
    ("ratio", "uniforms", "num"),
    [
        ([], [], 0),
        ([1.0, 1.0], [0.999, 0.0], 2),
        ([0.5, 1.0], [0.5, 0.1], 0),
        ([0.9, 0.2, 1.0], [0.8, 0.3, 0.1], 1),
    ],
)
def test_a_number_keeps_a_token_if_it_is_below_the_ratio(ratio, uniforms, num):
    assert accept_by_ratio(np.array(ratio), np.array(uniforms)) == num


def test_the_expected_number_is_a_sum_of_products():
    assert expected_accepted(np.array([0.9, 0.8, 0.5])) == pytest.approx(1.98)
    assert expected_accepted(np.array([])) == 0
    chances, mean = [0.7, 0.2, 0.9], 0.0
    for kept in itertools.product([0, 1], repeat=3):
        weight = np.prod([c if k else 1 - c for c, k in zip(chances, kept, strict=True)])
        mean += weight * (kept.index(0) if 0 in kept else 3)
    assert expected_accepted(np.array(chances)) == pytest.approx(mean)


# A node of a tree.


@pytest.mark.parametrize(
    ("name", "p", "q", "num", "accepted"),
    [
        ("without", P4, Q4, 1, 0.6),
        ("without", P4, Q4, 2, 107 / 140),
        ("without", P4, Q4, 3, 0.840298),
        ("without", P4, Q4, 4, 1.0),
        ("with", P4, Q4, 1, 0.6),
        ("with", P4, Q4, 2, 0.72),
        ("with", P4, Q4, 3, 0.768),
        ("k_seq", P4, Q4, 1, 0.6),
        ("k_seq", P4, Q4, 2, 0.75),
        ("k_seq", P4, Q4, 3, 0.79395),
        ("without", P3, Q3, 1, 0.7),
        ("without", P3, Q3, 2, 283 / 350),
        ("with", P3, Q3, 2, 0.76),
    ],
)
def test_published_acceptance(name, p, q, num, accepted):
    rule, replace = RULES[name]
    law, chance = node(rule, p, q, num, replace=replace)
    torch.testing.assert_close(law, p, rtol=0, atol=1e-12)
    assert chance == pytest.approx(accepted, abs=1e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("vocab", "num"), [(3, 0), (3, 2), (3, 4), (4, 3), (5, 2)])
def test_a_rule_commits_exactly_the_law_of_the_target(name, vocab, num):
    """Any p and q, tokens without probability in either, more children than q has tokens."""
    rule, replace = RULES[name]
    for p, q in pairs(6, vocab):
        assert error(rule, p, q, num, replace=replace) < 1e-12


@pytest.mark.parametrize("name", RULES)
def test_more_children_are_accepted_more_often(name):
    rule, replace = RULES[name]
    for p, q in pairs(6, 4):
        chances = [node(rule, p, q, num, replace=replace)[1] for num in range(4)]
        assert chances[1] == pytest.approx(float(overlap(p, q)), abs=1e-12)
        assert (np.diff(chances) > -1e-9).all()


@pytest.mark.parametrize("name", RULES)
def test_equal_laws_accept_the_first_child_and_disjoint_ones_none(name):
    rule, replace = RULES[name]
    p, q = torch.tensor([[0.25, 0.75, 0, 0], [0, 0, 0.5, 0.5]], dtype=torch.float64)
    assert next(rule(P4, P4, np.array([2, 1])))[0] == pytest.approx(1, abs=1e-11)
    assert error(rule, P4, P4, 2, replace=replace) < 1e-11
    law, accepted = node(rule, p, q, 2, replace=replace)
    assert accepted == 0
    assert torch.equal(law, p)


@pytest.mark.parametrize("name", RULES)
def test_a_target_without_choice_accepts_the_child_that_is_its_token_and_no_other(name):
    point = torch.tensor([0, 1, 0, 0]).double()
    rule, replace = RULES[name]
    assert error(rule, point, Q4, 3, replace=replace) < 1e-15
    if name != "k_seq":  # whose ratio is the same for all children, so below 1
        assert [chance for chance, _ in rule(point, Q4, np.array([0, 1]))] == [0, 1]


@pytest.mark.parametrize("name", RULES)
def test_a_child_that_its_law_cannot_draw_is_not_accepted_and_changes_nothing(name):
    rule, q = RULES[name][0], torch.tensor([0.5, 0.5, 0, 0]).double()
    (chance, rest) = next(rule(P4, q, np.array([3])))
    assert chance == 0
    if name != "k_seq":
        assert torch.equal(rest, P4)


def test_a_child_is_accepted_at_most_once_if_none_is_drawn_twice():
    (_, owed), (chance, rest) = without_replacement(P4, Q4, np.array([0, 0]))
    assert chance == 0
    assert torch.equal(owed, rest)


def test_what_is_drawn_again_is_no_child_and_so_may_be_drawn_independently():
    """Fewer are accepted than with a rule that counts it as a second child."""
    for p, q in pairs(6, 4):
        law, accepted = node(without_replacement, p, q, 3, replace=True)
        torch.testing.assert_close(law, p, rtol=0, atol=1e-12)
        assert accepted <= node(with_replacement, p, q, 3, replace=True)[1] + 1e-12


def test_whoever_has_all_children_of_the_draft_accepts_one():
    p, q = torch.tensor([[0.5, 0.1, 0, 0.4], [0.2, 0.5, 0, 0.3]], dtype=torch.float64)
    law, accepted = node(without_replacement, p, q, 4, replace=False)
    torch.testing.assert_close(law, p, rtol=0, atol=1e-12)
    assert accepted == pytest.approx(1, abs=1e-12)


def test_the_laws_owed_are_the_residuals_worked_by_hand():
    """Child 0 of q = .4, .3, .2, .1 leaves 0, 0, 1/4, 3/4 of p and 0, 1/2, 1/3, 1/6 of q."""
    (first, owed), (second, rest) = without_replacement(P4, Q4, np.array([0, 2]))
    assert first == pytest.approx(1 / 4)
    assert owed.tolist() == pytest.approx([0, 0, 1 / 4, 3 / 4])
    assert second == pytest.approx((1 / 4) / (1 / 3))
    assert rest.tolist() == pytest.approx([0, 0, 0, 1])


def test_the_ratio_of_k_seq_is_the_smallest_that_is_valid():
    for num, rho in [(1, 1), (2, 1.5), (3, 1.9395)]:
        assert k_seq_rho(P4, Q4, num) == pytest.approx(rho, abs=1e-4)
    for p, q in pairs(20, 5):
        rho = k_seq_rho(p, q, 3)
        assert 1 <= rho <= 3

        def surplus(rho, p=p, q=q):
            beta = overlap(p / rho, q)
            return float(1 - (1 - beta) ** 3 - rho * beta)

        assert surplus(rho) <= 1e-12
        assert rho < 1 + 1e-6 or surplus(rho - 1e-6) > 0


def test_children_of_several_drafters_each_have_a_law_of_their_own():
    """A drawn child, a chosen one, one drawn from another law: in any of these orders."""
    for at, (p, q) in enumerate(pairs(8, 4)):
        chosen = torch.nn.functional.one_hot(torch.tensor(at % 4), 4).double()
        for own in itertools.permutations([q, chosen, Q4]):
            draws = [
                (np.array(children), float(np.prod([law[x] for law, x in zip(own, children, strict=True)])))
                for children in itertools.product(range(4), repeat=3)
            ]
            law, _ = committed_law(with_replacement, p, torch.stack(own), draws)
            torch.testing.assert_close(law, p, rtol=0, atol=1e-12)


BROKEN = {
    "last drawn is offered first": (without_replacement, False, True),
    "a rejected token stays in q": (with_replacement, False, False),
    "naive": (lambda p, q, children: ((1.0, p) for _ in children), True, False),
    "all judged by p": (
        lambda p, q, children: ((float(acceptance_ratio(p[x], q[x])), residual(p, q)) for x in children),
        True,
        False,
    ),
    "replaced from p": (
        lambda p, q, children: ((chance, p) for chance, _ in with_replacement(p, q, children)),
        True,
        False,
    ),
    "lenient": (lenient(without_replacement, 0.5), False, False),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_enumeration_notices_a_rule_of_a_node_that_is_wrong(name):
    rule, replace, is_reversed = BROKEN[name]
    draws = ways_to_draw(Q4, 2, replace=replace)
    if is_reversed:
        draws = ((children[::-1], chance) for children, chance in draws)
    assert (committed_law(rule, P4, Q4, draws)[0] - P4).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "part", "broken"),
    [
        ("k_seq", "k_seq_rho", lambda p, q, num: torch.tensor(1.0)),
        ("k_seq", "_num_tried", lambda beta, num: torch.tensor(1.0)),
        ("without", "residual", lambda p, q: (p - q).clamp(min=0)),
        ("without", "_normalize", lambda law: law.double()),
        ("with", "residual", lambda p, q: p),
    ],
    ids=["rho too small", "one child is meant", "p is not scaled up", "q is not scaled up", "p is kept"],
)
def test_the_enumeration_notices_a_rule_with_a_wrong_part(name, part, broken, monkeypatch):
    rule, replace = RULES[name]
    monkeypatch.setattr(acceptance, part, broken)
    assert error(rule, P4, Q4, 3, replace=replace) > 1e-3


@pytest.mark.parametrize("name", RULES)
def test_laws_that_do_not_quite_add_up_to_1_do_no_harm(name):
    """As a softmax in half precision leaves them, for the whole vocabulary of a model."""
    rule, replace = RULES[name]
    assert error(rule, P4 * (1 + 1e-3), Q4 * (1 - 1e-3), 2, replace=replace) < 2e-3
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 50_000, generator=generator).softmax(1).half()
    children = q.float().topk(3).indices.numpy()
    for chance, rest in rule(p, q, children):
        assert 0 <= chance <= 1
        assert rest.dtype == torch.float64
        assert rest.min() >= 0
        assert rest.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_the_laws_that_are_given_stay_as_they_are(name):
    p, q, children = P4.clone(), Q4.clone(), np.array([0, 1])
    list(RULES[name][0](p, q, children))
    assert torch.equal(p, P4)
    assert torch.equal(q, Q4)


# Chosen children: one y ~ p, and on to the child that equals it.


def follow(p, children):
    """Give the law of what is committed, and the chance of a child, by all that may be drawn at a node."""
    law, accepted = torch.zeros_like(p), 0.0
    for drawn, chance in enumerate(p.tolist()):
        behind = np.zeros(len(children), np.int64)
        kept = tree.follow_drawn(children, np.full(len(children), -1), np.append(drawn, behind + 99))
        law[children[kept[0]] if len(kept) else drawn] += chance
        accepted += chance * len(kept)
    return law, accepted


@pytest.mark.parametrize(("children", "accepted"), [([], 0), ([0, 1], 0.3), ([0, 1, 0, 0], 0.3), ([3], 0.4)])
def test_one_token_for_a_node_follows_the_law_whatever_the_children(children, accepted):
    children = np.array(children, np.int64)
    law, chance = follow(P4, children)
    assert torch.equal(law, P4)
    assert chance == pytest.approx(accepted)
    # It is the rule of drawn children for laws of one token: rejected ones are not tried again.
    points = torch.nn.functional.one_hot(torch.from_numpy(children), 4).double()
    law, chance = committed_law(with_replacement, P4, points, [(children, 1.0)])
    torch.testing.assert_close(law, P4, rtol=0, atol=1e-12)
    assert chance == pytest.approx(accepted)


def test_drawn_children_are_followed_less_often_than_accepted():
    chance = sum(weight * follow(P4, children)[1] for children, weight in ways_to_draw(Q4, 2, replace=True))
    assert chance == pytest.approx(0.35)


def test_a_token_for_each_path_is_noticed():
    """Drawn anew for the second child, and once more for what is committed if it is not either."""

    def anew(p, q, children):
        return ((float(p[token]), p) for token in children)

    law, _ = committed_law(anew, P4, Q4, [(np.array([2, 3]), 1.0)])
    assert (law - P4).abs().max() > 0.01


# Approximate ones.


@pytest.mark.parametrize("name", RULES)
def test_leniency_raises_a_probability_by_no_more_than_it_says(name):
    rule, replace = RULES[name]
    for p, q in pairs(6, 4):
        strict, loose = (node(lenient(rule, by), p, q, 2, replace=replace) for by in (1.0, 0.4))
        torch.testing.assert_close(strict[0], p, rtol=0, atol=1e-12)
        assert loose[1] >= strict[1] - 1e-12
        assert loose[0].sum() == pytest.approx(1)
        assert (loose[0] <= p / 0.4 + 1e-12).all()


@pytest.mark.parametrize("lenience", [0.0, -1.0, 1.5, float("nan")])
def test_leniency_outside_its_range_is_refused(lenience):
    with pytest.raises(InputError, match=r"lenience must be above 0 and at most 1; got"):
        lenient(k_seq, lenience)


def test_typical_tokens_are_those_above_a_threshold_that_falls_with_entropy():
    """Flat over four tokens: exp(-H) is 1/4, so .3 / 4 = .075 is asked for; a sharp law asks for .09."""
    flat, sharp = torch.full((4,), 0.25).double(), torch.tensor([0.85, 0.1, 0.03, 0.02]).double()
    over_40 = torch.full((40,), 1 / 40).double()
    assert typical(flat.expand(4, 4), np.arange(4)).all()
    assert typical(sharp.expand(4, 4), np.arange(4)).tolist() == [True, True, False, False]
    assert typical(over_40[None], np.array([7])).all()  # .025 is above .3 / 40
    assert not typical(over_40[None], np.array([7]), delta=1.1).any()  # but not above 1.1 / 40
    # At temperature 0 what is left is the greedy rule.
    point = torch.tensor([0, 0, 1.0, 0])
    assert typical(point.expand(4, 4), np.arange(4)).tolist() == [False, False, True, False]


def test_typical_takes_its_numbers_in_their_order():
    """The lower one is the probability that is always enough; published helpers name them both ways."""
    law = torch.tensor([[0.9, 0.1]])
    assert typical(law, np.array([1])).tolist() == [True]
    assert typical(law, np.array([1]), 0.3, 0.09).tolist() == [True]
    assert typical(law, np.array([1]), 0.3, 0.3).tolist() == [False]
