from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from chordal.ops.acceptance import (
    accept_by_ratio,
    accept_greedy,
    acceptance_ratio,
    expected_accepted,
    residual,
)

P = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
Q = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def laws(num, vocab, seed=0):
    """Random laws with some tokens of probability 0, as truncation leaves them."""
    rng = np.random.default_rng(seed)
    laws = rng.dirichlet(np.full(vocab, 0.5), num) * (rng.random((num, vocab)) < 0.8)
    laws[:, 0] += 1e-3
    return torch.from_numpy(laws / laws.sum(1, keepdims=True))


def committed(p, q, *, ratio=acceptance_ratio, instead=residual):
    """Give the exact law of the one token that a draft x ~ p of one token ends as."""
    law = torch.zeros(len(q), dtype=torch.float64)
    for token, chance in enumerate(p.tolist()):
        keeps = float(ratio(torch.tensor([token]), p[None], q[None])[0])
        law[token] += chance * keeps
        law += chance * (1 - keeps) * instead(p[None], q[None])[0]
    return law


def test_a_kept_or_replaced_token_has_exactly_the_law_of_the_target():
    for p, q in [(P, Q), *zip(laws(200, 4), laws(200, 4, seed=1), strict=True)]:
        torch.testing.assert_close(committed(p, q), q, rtol=0, atol=1e-12)


def test_a_token_that_was_taken_and_not_drawn_is_a_draft_of_probability_1():
    """The best token of p is kept with its probability under q, and else anything but it."""
    point = torch.nn.functional.one_hot(P.argmax(), 3).double()
    torch.testing.assert_close(committed(point, Q), Q, rtol=0, atol=1e-12)
    assert acceptance_ratio(torch.tensor([0]), point[None], Q[None]).tolist() == pytest.approx([0.3])
    torch.testing.assert_close(residual(point[None], Q[None])[0], torch.tensor([0, 0.5, 0.2]).double() / 0.7)
    # As the published code does it, with the probability it would have been drawn with: not q.
    keeps = float(acceptance_ratio(torch.tensor([0]), P[None], Q[None])[0])
    biased = keeps * point + (1 - keeps) * residual(P[None], Q[None])[0]
    torch.testing.assert_close(biased, torch.tensor([1 / 2, 1 / 3, 1 / 6]).double())


@pytest.mark.parametrize(
    "broken",
    [
        {"instead": lambda p, q: q},
        {"instead": lambda p, q: (q - p).abs() / (q - p).abs().sum()},
        {
            "ratio": lambda x, p, q: (
                p.gather(1, x[:, None])[:, 0].div(q.gather(1, x[:, None])[:, 0]).clamp(max=1)
            )
        },
        {"ratio": lambda x, p, q: torch.ones(1)},
        {"ratio": lambda x, p, q: acceptance_ratio(x, p, q, 0.5)},
    ],
    ids=["resampled from q", "absolute difference", "upside down", "naive", "a power below 1"],
)
def test_the_enumeration_notices_a_rule_that_is_wrong(broken):
    assert (committed(P, Q, **broken) - Q).abs().max() > 0.01


@pytest.mark.parametrize("vocab", [2, 3])
def test_a_draft_of_three_judged_from_left_to_right_has_the_joint_law_of_the_target(vocab):
    """Drafted independently, q given what is before; behind the first rejected token q goes on alone."""
    p = laws(3, vocab)
    q = {
        text: laws(1, vocab, seed=hash(text) % 1000)[0]
        for num in range(3)
        for text in itertools.product(range(vocab), repeat=num)
    }
    joint = np.zeros((vocab,) * 3)

    def go_on(text, chance):
        if len(text) == 3:
            joint[text] += chance
        else:
            for token, share in enumerate(q[text].tolist()):
                go_on((*text, token), chance * share)

    for draft in itertools.product(range(vocab), repeat=3):
        chance = float(np.prod([p[at, token] for at, token in enumerate(draft)]))
        target = torch.stack([q[draft[:at]] for at in range(3)])
        ratio = acceptance_ratio(torch.tensor(draft), p, target).tolist()
        instead = residual(p, target)
        for at in range(3):
            for token, share in enumerate(instead[at].tolist()):
                go_on((*draft[:at], token), chance * (1 - ratio[at]) * share)
            chance *= ratio[at]
        joint[draft] += chance

    for text in itertools.product(range(vocab), repeat=3):
        wanted = np.prod([q[text[:at]][token] for at, token in enumerate(text)])
        assert joint[text] == pytest.approx(wanted, abs=1e-12)


def test_equal_laws_keep_everything():
    p = laws(20, 5)
    for token in range(5):
        drawn = p[:, token] > 0
        ratio = acceptance_ratio(torch.full((20,), token), p, p)
        assert (ratio[drawn] == 1).all()
    # Nothing is left to replace with: q stands in, and no row is divided by 0.
    torch.testing.assert_close(residual(p, p), p)


def test_the_ratio_is_at_most_1_and_a_lower_power_keeps_more():
    draft = torch.tensor([0, 1, 2])
    p, q = P.expand(3, 3), Q.expand(3, 3)
    assert acceptance_ratio(draft, p, q).tolist() == pytest.approx([0.5, 1, 1])
    assert acceptance_ratio(draft, p, q, 0.5).tolist() == pytest.approx([0.5**0.5, 1, 1])
    assert acceptance_ratio(draft, p, q, 2.0).tolist() == pytest.approx([0.25, 1, 1])


def test_rows_do_not_depend_on_each_other():
    p, q, draft = laws(30, 6), laws(30, 6, seed=1), torch.arange(30) % 6
    ratio, left = acceptance_ratio(draft, p, q), residual(p, q)
    for row in range(30):
        alone = slice(row, row + 1)
        assert torch.equal(acceptance_ratio(draft[alone], p[alone], q[alone])[0], ratio[row])
        assert torch.equal(residual(p[alone], q[alone])[0], left[row])


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
