from __future__ import annotations

import math

import pytest
import torch

from chordal.ops.credit import add_credit, update_credit

PAPER = {"fusion": 0.65, "decay": 0.7, "concavity": 0.2}
DINFER = {"fusion": 0.7, "decay": 0.8, "concavity": 0.2}


def slots(logits_TNV, *, fusion, decay, concavity, num_slots=8):
    """Run steps in slots; gives the credit `[N, V]` and the refined logits `[N, V]` of each."""
    num, vocab = logits_TNV[0].shape
    tokens, credit = torch.full((num, num_slots), -1), torch.zeros(num, num_slots)
    steps = []
    for logits in logits_TNV:
        tokens, credit = update_credit(tokens, credit, logits, decay=decay, concavity=concavity)
        dense = torch.zeros(num, vocab + 1).scatter_add(1, tokens % (vocab + 1), credit)
        steps.append((dense[:, :vocab], add_credit(logits, tokens, credit, fusion)))
    return steps


def dense(logits_TNV, *, fusion, decay, concavity):
    """The paper's equations, with a credit for every token of the vocabulary."""
    credit = torch.zeros_like(logits_TNV[0])
    steps = []
    for logits in logits_TNV:
        p = logits.softmax(1)
        best = p.argmax(1)
        credit = credit * decay
        for n, v in enumerate(best.tolist()):
            credit[n, v] += p[n, v] ** concavity
        steps.append((credit, logits + fusion * torch.log(1 + credit)))
    return steps


def two(*probs):
    """Steps of one position over A and B, given the probability of A in each."""
    return [torch.tensor([[p, 1 - p]]).log() for p in probs]


def near(*values):
    return pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize(
    ("probs", "constants", "credit_a", "credit_b", "refined"),
    [
        ((0.6,) * 4, PAPER, (0.9029, 1.5349, 1.9773, 2.2870), (0,) * 4, (0.6950, 0.7330, 0.7530, 0.7648)),
        (
            (0.6, 0.4, 0.7),
            PAPER,
            (0.9029, 0.6320, 1.3736),
            (0, 0.9029, 0.6320),
            (0.6950, 0.3763, 0.7485),
        ),
        ((0.6,) * 3, DINFER, (0.9029, 1.6252, 2.2030), (0,) * 3, (0.7018, 0.7467, 0.7721)),
    ],
)
def test_credit_follows_sequences_worked_by_hand(probs, constants, credit_a, credit_b, refined):
    steps = slots(two(*probs), **constants)
    assert tuple(float(credit[0, 0]) for credit, _ in steps) == near(*credit_a)
    assert tuple(float(credit[0, 1]) for credit, _ in steps) == near(*credit_b)
    assert tuple(float(logits.softmax(1)[0, 0]) for _, logits in steps) == near(*refined)


@pytest.mark.parametrize(("visits", "p"), [(1, 0.853), (2, 0.827), (3, 0.812), (60, 0.781)])
def test_a_token_that_stays_the_most_likely_reaches_ninety_percent_sooner_each_step(visits, p):
    [*_, (_, refined)] = slots(two(*[p] * visits), **PAPER)
    assert float(refined.softmax(1)[0, 0]) == pytest.approx(0.9, abs=1e-3)


def random_steps(num_steps=6, num=40, vocab=12, scale=2.0):
    gen = torch.Generator().manual_seed(0)
    return [scale * torch.randn(num, vocab, generator=gen) for _ in range(num_steps)]


@pytest.mark.parametrize("constants", [PAPER, DINFER, {"fusion": 2.0, "decay": 1.0, "concavity": 0.7}])
def test_slots_equal_the_dense_form_while_they_suffice(constants):
    steps = random_steps()
    for (credit, refined), (wanted_credit, wanted) in zip(
        slots(steps, **constants), dense(steps, **constants), strict=True
    ):
        torch.testing.assert_close(credit, wanted_credit, rtol=0, atol=1e-5)
        torch.testing.assert_close(refined, wanted, rtol=0, atol=1e-5)


def test_permuting_the_vocabulary_permutes_the_result():
    steps, order = random_steps(), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for (credit, refined), (permuted_credit, permuted) in zip(
        slots(steps, **PAPER), slots([step[:, order] for step in steps], **PAPER), strict=True
    ):
        torch.testing.assert_close(credit[:, order], permuted_credit)
        torch.testing.assert_close(refined[:, order], permuted)


def test_a_row_does_not_depend_on_the_others_or_on_a_constant():
    steps = random_steps()
    whole = slots(steps, **PAPER)
    alone = slots([step[[7]] for step in steps], **PAPER)
    shifted = slots([step + 100 for step in steps], **PAPER)
    for (_, refined), (_, one), (_, other) in zip(whole, alone, shifted, strict=True):
        assert torch.equal(refined[[7]], one)
        torch.testing.assert_close(refined + 100, other, rtol=0, atol=1e-4)


def test_no_weight_changes_nothing():
    steps = random_steps()
    for (_, refined), logits in zip(slots(steps, **PAPER | {"fusion": 0.0}), steps, strict=True):
        assert torch.equal(refined, logits)


def test_credit_overrides_the_most_likely_token_and_only_for_one_that_has_credit():
    [*_, (_, refined)] = slots(two(*[0.6] * 5, 0.48), **PAPER)
    assert refined.argmax(1).tolist() == [0]
    steps = random_steps(20, vocab=3, scale=0.05)
    num_overridden = 0
    for logits, (credit, refined) in zip(steps, slots(steps, **PAPER, num_slots=16), strict=True):
        best = refined.argmax(1)
        assert (credit.gather(1, best[:, None]) > 0).all()
        num_overridden += int((best != logits.argmax(1)).sum())
    assert num_overridden > 50, num_overridden


def test_the_poorest_slot_makes_room_and_nothing_of_it_is_left():
    """A, B, B, C in two slots: C takes the place of A, which has decayed while B was credited twice."""
    steps = [torch.tensor([[0.0, 0.0, 0.0]]).index_fill(1, torch.tensor([v]), 50.0) for v in (0, 1, 1, 2)]
    credit = [one[0].tolist() for one, _ in slots(steps, **PAPER, num_slots=2)]
    assert credit == [near(1, 0, 0), near(0.7, 1, 0), near(0.49, 1.7, 0), near(0, 1.19, 1)]


def test_a_token_without_probability_stays_so_and_what_is_given_is_unchanged():
    logits = torch.tensor([[-math.inf, 1.0, 2.0]])
    tokens, credit = torch.full((1, 2), -1), torch.zeros(1, 2)
    given = [one.clone() for one in (logits, tokens, credit)]
    tokens_after, credit_after = update_credit(tokens, credit, logits, decay=0.7, concavity=0.2)
    refined = add_credit(logits, tokens_after, credit_after, 0.65)
    assert refined[0, 0] == -math.inf
    assert refined[0, 1] == 1
    assert refined[0, 2] > 2
    assert all(torch.equal(one, other) for one, other in zip((logits, tokens, credit), given, strict=True))


def test_no_rows_are_no_error():
    tokens, credit = torch.full((0, 8), -1), torch.zeros(0, 8)
    tokens, credit = update_credit(tokens, credit, torch.zeros(0, 5), decay=0.7, concavity=0.2)
    assert add_credit(torch.zeros(0, 5), tokens, credit, 0.65).shape == (0, 5)
