from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest

from chordal.bench.tasks import GROUPS, PARALLELBENCH, TASKS
from chordal.bench.theory import (
    accuracy_per_step,
    best_accuracy,
    bound,
    lost_bits,
    outcome_probabilities,
    random_order_accuracy,
    total_correlation,
)
from chordal.errors import InputError
from chordal.registry import make_decoder
from chordal.testing import ideal, simulate

ANSWERS = {
    "shuffle": ideal.shuffle,
    "replace_random": ideal.replace_random,
    "insert_random": ideal.insert_random,
    "remove_random": ideal.remove_random,
}
OPEN = pytest.mark.parametrize("operation", ANSWERS)


def one_pass(answers):
    return [range(answers.shape[1])]


def ordered_partitions(positions):
    """Every way to divide positions into passes."""
    if not positions:
        yield []
    for size in range(1, len(positions) + 1):
        for first in itertools.combinations(positions, size):
            for rest in ordered_partitions([p for p in positions if p not in first]):
                yield [first, *rest]


def brute_force(answers, passes):
    """The best accuracy of any policy, trying every set of positions in every state."""
    length = answers.shape[1]

    @functools.cache
    def best(known, left):
        agree = answers[[all(row[at] == token for at, token in known) for row in answers]]
        masked = [at for at in range(length) if at not in dict(known)]
        if not masked or left == 0:
            return float(not masked)
        found = 0.0
        for size in range(1, len(masked) + 1):
            for chosen in itertools.combinations(masked, size):
                total = 0.0
                for values in {tuple(row[list(chosen)].tolist()) for row in agree}:
                    law = math.prod(
                        float((agree[:, at] == token).mean())
                        for at, token in zip(chosen, values, strict=True)
                    )
                    total += law * best(known | frozenset(zip(chosen, values, strict=True)), left - 1)
                found = max(found, total)
        return found

    return best(frozenset(), passes)


@pytest.mark.parametrize(
    ("operation", "k", "wanted"),
    [
        ("shuffle", None, {3: 0.2222, 4: 0.0938, 5: 0.0384, 6: 0.0154}),
        ("shuffle", 2, {4: 0.375, 6: 0.3125, 8: 0.2734}),
        ("replace_random", None, {3: 0.4444, 4: 0.4219, 6: 0.4019}),
        ("replace_random", 2, {4: 0.6562, 6: 0.7335, 8: 0.7803, 10: 0.8121}),
        ("replace_random", 4, {8: 0.5823}),
        ("copy", 3, {4: 1.0, 15: 1.0}),
    ],
)
def test_closed_forms_give_the_known_values(operation, k, wanted):
    found = {n: accuracy_per_step(operation, n, k or n) for n in wanted}
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("operation", "k", "wanted"),
    [
        ("insert_random", None, {3: 0.1875, 4: 0.1229, 5: 0.0823, 6: 0.0560}),
        ("insert_random", 2, {3: 0.6302, 4: 0.6920, 5: 0.6837, 6: 0.7166}),
        ("remove_random", None, {3: 0.8889, 4: 0.7500, 5: 0.6144, 6: 0.4938}),
        ("remove_random", 2, {3: 0.8889, 4: 0.8958, 5: 0.8704, 6: 0.8743}),
    ],
)
def test_going_through_all_orders_gives_the_known_values(operation, k, wanted):
    found = {n: random_order_accuracy(ANSWERS[operation](n), k or n + 1) for n in wanted}
    assert found == pytest.approx(wanted, abs=6e-5)


@pytest.mark.parametrize("operation", ["shuffle", "replace_random"])
@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 2), (4, 4), (5, 2), (5, 3)])
def test_closed_forms_agree_with_going_through_all_orders(operation, n, k):
    assert accuracy_per_step(operation, n, k) == pytest.approx(
        random_order_accuracy(ANSWERS[operation](n), k)
    )


def test_total_correlation_has_the_known_values():
    assert total_correlation("insert_random", 3) == pytest.approx(2.623, abs=5e-4)
    assert total_correlation("insert_random", 6) == pytest.approx(4.880, abs=5e-4)
    assert total_correlation("remove_random", 3) == pytest.approx(0.252, abs=5e-4)
    assert total_correlation("remove_random", 6) == pytest.approx(1.552, abs=5e-4)
    assert total_correlation("replace_random", 1000) == pytest.approx(1 / math.log(2), abs=1e-3)
    assert total_correlation("replace_random", 1) == 0
    assert total_correlation("reverse", 6) == 0
    # Without the given order: 23 of 24 answers.
    answers = ideal.shuffle(4)[1:]
    assert lost_bits(answers, one_pass(answers)) == pytest.approx(3.460, abs=5e-4)
    assert outcome_probabilities(answers, one_pass(answers)).sum() == pytest.approx(0.0919, abs=5e-5)


@OPEN
@pytest.mark.parametrize("n", [2, 3, 5])
def test_one_pass_loses_the_total_correlation(operation, n):
    answers = ANSWERS[operation](n)
    assert lost_bits(answers, one_pass(answers)) == pytest.approx(total_correlation(operation, n))


@OPEN
def test_one_position_a_pass_loses_nothing(operation):
    answers = ANSWERS[operation](4)
    for order in itertools.permutations(range(answers.shape[1])):
        passes = [[position] for position in order]
        assert lost_bits(answers, passes) == pytest.approx(0, abs=1e-12)
        assert outcome_probabilities(answers, passes) == pytest.approx(
            np.full(len(answers), 1 / len(answers))
        )


@OPEN
def test_least_loss_never_grows_with_the_passes_and_bounds_the_accuracy(operation):
    answers = ANSWERS[operation](3)
    least = {}
    for passes in ordered_partitions(range(answers.shape[1])):
        bits = lost_bits(answers, passes)
        accuracy = outcome_probabilities(answers, passes).sum()
        assert accuracy >= 2**-bits - 1e-12
        if operation == "shuffle":
            assert accuracy == pytest.approx(2**-bits)
        least[len(passes)] = min(bits, least.get(len(passes), math.inf))
    assert all(least[more] <= least[fewer] + 1e-12 for fewer, more in itertools.pairwise(sorted(least)))


@OPEN
@pytest.mark.parametrize("n", [2, 3, 4])
def test_best_accuracy_is_that_of_trying_everything(operation, n):
    answers = ANSWERS[operation](n)
    for passes in range(1, n + 2) if n < 4 else (1, 2):
        assert best_accuracy(operation, n, passes) == pytest.approx(brute_force(answers, passes))


@OPEN
def test_best_accuracy_grows_with_the_passes_to_one(operation):
    accuracies = [best_accuracy(operation, 8, passes) for passes in range(1, 10)]
    assert all(a <= b for a, b in itertools.pairwise(accuracies))
    assert accuracies[0] < 0.5
    assert accuracies[-1] == pytest.approx(1)


def test_what_has_one_answer_needs_one_pass():
    assert best_accuracy("sort", 15, 1) == 1
    assert bound("sort").points == ((6.5, 1.0),)
    assert bound("pb_copy_n15", 80).points == ((80, 1.0),)


def test_decoding_the_ideal_model_reaches_what_is_computed():
    """400 runs with fixed seeds, within 3 standard deviations."""
    decoder = make_decoder("low_confidence", {"num_steps": 2, "order": "random"})
    wanted = random_order_accuracy(ideal.remove_random(5), 2)
    found = simulate(decoder, ideal.IdealModel(ideal.remove_random(5)), 400, temperature=1.0).accuracy
    assert abs(found - wanted) <= 3 * math.sqrt(wanted * (1 - wanted) / 400)


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(InputError, match="best_accuracy"):
        accuracy_per_step("insert_random", 4, 2)
    with pytest.raises(InputError, match="up to 10 places"):
        best_accuracy("insert_random", 15, 2)
    with pytest.raises(InputError, match="passes must be at least 1"):
        best_accuracy("shuffle", 3, 0)


def test_bound_is_the_best_mix_of_passes_over_the_lengths():
    """Lengths 3 to 6, one token an item and one more: 22 tokens in 4 prompts."""
    curve = bound("pb_shuffle")
    one_each = [math.factorial(n) / n**n for n in (3, 4, 5, 6)]
    assert curve.points[-1] == pytest.approx((22 / 4, sum(one_each) / 4))
    # All right takes one pass an item.
    assert curve.points[0] == pytest.approx((22 / 18, 1.0))
    # Any other choice of passes is worse.
    for passes in itertools.product(range(1, 4), range(1, 5), range(1, 6), range(1, 7)):
        accuracy = sum(best_accuracy("shuffle", n, T) for n, T in zip((3, 4, 5, 6), passes, strict=True)) / 4
        assert accuracy <= curve.at(22 / sum(passes)) + 1e-9


@pytest.mark.parametrize("task", ["shuffle", "replace_random", "insert_random", "pb_remove_random"])
def test_bound_falls_with_the_tokens_per_forward_and_scales_with_the_answer(task):
    curve = bound(task)
    tokens, accuracies = zip(*curve.points, strict=True)
    assert list(tokens) == sorted(tokens)
    assert list(accuracies) == sorted(accuracies, reverse=True)
    assert [curve.at(x) for x in tokens] == pytest.approx(accuracies)
    assert curve.at(1.0) == pytest.approx(1.0)
    longer = bound(task, 40.0)
    assert longer.points[-1][0] == 40.0
    assert longer.at(40.0) == curve.at(tokens[-1])


def test_every_list_task_has_a_bound_and_no_other_has_one():
    lists = {name for name, task in TASKS.items() if task.group == GROUPS[0]}
    assert {name for name in TASKS if bound(name) is not None} == lists
    unknown = {name for name in PARALLELBENCH if bound(name) is None}
    assert {name for name in unknown if name.endswith("_n15")} == {
        "pb_insert_random_n15",
        "pb_remove_random_n15",
    }
    assert len(unknown) == 9
