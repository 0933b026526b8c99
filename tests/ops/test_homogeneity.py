from __future__ import annotations

import math

import numpy as np
import pytest

from chordal.ops.homogeneity import branches, chi_square_tail, count, homogeneity


def test_a_table_by_hand():
    # Expected 25, 15 in both rows; each cell is 5 off.
    found = homogeneity([np.array([[30, 10], [20, 20]])])
    assert found.statistic == pytest.approx(2 * (25 / 25 + 25 / 15) * 79 / 80)
    assert found.freedom == 1
    assert found.p_value == pytest.approx(math.erfc(math.sqrt(found.statistic / 2)))


def test_tables_add_up():
    tables = [np.array([[30, 10], [20, 20]]), np.array([[9, 9, 9], [9, 9, 9]])]
    both = homogeneity(tables)
    assert both.freedom == 3
    assert both.statistic == pytest.approx(homogeneity(tables[:1]).statistic)
    assert both.p_value == pytest.approx(chi_square_tail(both.statistic, 3))


@pytest.mark.parametrize(
    ("table", "freedom"),
    [
        ([[50, 1, 2, 3], [50, 3, 2, 1]], 1),  # three rare outcomes are enough together
        ([[50, 30, 1], [50, 30, 1]], 1),  # one is not, so it joins the next rarest
        ([[50, 1], [50, 1]], 0),
        ([[100, 20, 0], [5, 1, 2]], 0),  # the smaller row decides what is rare
        ([[40], [40]], 0),
        ([[40, 40], [0, 0]], 0),
        (np.zeros((2, 0), int), 0),
    ],
)
def test_rare_outcomes_are_put_together(table, freedom):
    found = homogeneity([np.array(table)])
    assert found.freedom == freedom
    assert 0 <= found.p_value <= 1
    if not freedom:
        assert (found.statistic, found.p_value) == (0, 1)


def test_samples_of_one_law_fail_as_often_as_they_should():
    """3,000 pairs of samples: p below .1 and .01 in 10% and 1%, up to 5 standard deviations."""
    rng = np.random.default_rng(0)
    laws = rng.dirichlet(np.ones(6), size=4)
    p_values = [homogeneity([rng.multinomial(60, law, size=2) for law in laws]).p_value for _ in range(3000)]
    for level, off in ((0.1, 0.0275), (0.01, 0.009)):
        assert abs(np.mean(np.array(p_values) < level) - level) < off


def test_samples_of_two_laws_are_told_apart():
    rng = np.random.default_rng(0)
    table = np.stack([rng.multinomial(500, [0.5, 0.3, 0.2]), rng.multinomial(500, [0.3, 0.5, 0.2])])
    assert homogeneity([table]).p_value < 1e-6


def test_tail_of_known_values():
    assert chi_square_tail(3.841459, 1) == pytest.approx(0.05, rel=1e-5)
    assert chi_square_tail(18.307038, 10) == pytest.approx(0.05, rel=1e-5)
    assert chi_square_tail(0, 3) == 1
    assert chi_square_tail(0, 0) == 1


def test_outcomes_are_counted_by_context():
    tables = count([[("a", 0), ("a", 1), ("b", 5)], [("a", 1), ("a", 1), ("c", 7)]])
    assert [table.tolist() for table in tables] == [[[1, 1], [0, 2]], [[1], [0]], [[0], [1]]]


def test_branches_count_what_follows_each_shared_beginning():
    both = [[(0, 1), (0, 2), (3,)] * 10, [(0, 1), (0, 1), (0, 2)] * 10]
    tables = [table.tolist() for table in branches(both)]
    assert tables == [[[20, 10], [30, 0]], [[10, 10], [20, 10]]]


def test_branches_end_where_few_texts_go_or_texts_end():
    assert branches([[(0, 1), (0, 2)], [(0, 1), (0, 2)]]) == []
    assert branches([[(0,)] * 50, [(0,)] * 50]) == []
    assert branches([[()] * 50, [()] * 50]) == []


def test_tokens_that_depend_on_each_other_are_told_apart_by_their_branches():
    """Each token alone has one law in both samples; pairs have not."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    both = [list(zip(first.tolist(), first.tolist(), strict=True)),
            list(zip(first.tolist(), second.tolist(), strict=True))]  # fmt: skip
    assert homogeneity(branches(both)).p_value < 1e-9
