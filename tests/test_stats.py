from __future__ import annotations

import json

from chordal.stats import Stats


def test_tokens_per_forward_counts_the_forwards_of_the_target_alone():
    stats = Stats(forwards={"target": 4, "draft": 20}, prefills=3, rows=8, committed_tokens=10)
    assert stats.tokens_per_forward == 2.5


def test_nothing_run_is_no_tokens_per_forward():
    assert Stats().tokens_per_forward == 0
    assert Stats(forwards={"draft": 5}).tokens_per_forward == 0
    assert Stats().experts_per_forward == 0


def test_counters_are_plain_json_under_the_names_of_the_command_line():
    stats = Stats(
        forwards={"target": 3, "draft": 7},
        prefills=1,
        rows=4,
        loops=24,
        experts=12.5,
        positions_fed={"target": 30, "draft": 14},
        committed_tokens=10,
        draft_tokens=9,
        accepted_tokens=6,
        model_s=0.12345678,
        wall_s=0.5,
        cached_tokens=8,
        queue_s=0.25,
    )
    assert json.loads(json.dumps(stats.to_dict())) == {
        "forwards": 3,
        "prefills": 1,
        "rows": 4,
        "loops": 24,
        "experts": 12.5,
        "experts_per_forward": 4.1667,
        "committed_tokens": 10,
        "tokens_per_forward": 3.3333,
        "positions_fed": 30,
        "cached_tokens": 8,
        "draft_tokens": 9,
        "accepted_tokens": 6,
        "draft_forwards": {"draft": 7},
        "model_s": 0.123457,
        "wall_s": 0.5,
        "queue_s": 0.25,
    }


def test_counters_of_two_requests_are_apart():
    one, two = Stats(), Stats()
    one.forwards["target"] = 1
    one.positions_fed["target"] = 1
    assert two.forwards == two.positions_fed == {}
