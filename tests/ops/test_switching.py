from __future__ import annotations

import pytest

from chordal.ops.switching import is_uncertain, relative_cost


def test_one_bound_decides_both_ways():
    assert [is_uncertain(h, was=was, up=1.0, down=1.0) for h in (0.9, 1.0, 1.1) for was in (False, True)] == [
        *(False, False),
        *(True, True),
        *(True, True),
    ]


def test_between_two_bounds_nothing_changes():
    levels = (0.4, 0.5, 0.7, 0.9, 1.0)
    assert [is_uncertain(h, was=False, up=1.0, down=0.5) for h in levels] == [
        False,
        False,
        False,
        False,
        True,
    ]
    assert [is_uncertain(h, was=True, up=1.0, down=0.5) for h in levels] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("share", "ratio", "cost"), [(0.43, 3 / 11, 0.585), (0.25, 1.5 / 14, 0.330), (1, 0.1, 1), (0, 0.1, 0.1)]
)
def test_costs_are_those_of_the_paper(share, ratio, cost):
    assert relative_cost(share, ratio) == pytest.approx(cost, abs=5e-4)
