from __future__ import annotations

import itertools

import numpy as np
import pytest

from chordal.errors import InputError
from chordal.planning.latency import LatencyTable, Roofline, measure_latency, rising

TABLE = LatencyTable((1, 4, 8), (1, 4), np.array([[1.0, 2.0, 4.0], [2.0, 5.0, 9.0]]), (16, 16))


def test_measured_seconds_are_those_of_the_passes(make_timed, clock):
    model = make_timed(slope=0.25).engine.target
    table = measure_latency(model, [4, 1, 2], [1, 3], contexts=[10, 20], repeats=3, clock=clock)
    assert table.widths == (1, 2, 4)
    assert table.table.tolist() == [[1.25, 1.5, 2.0], [1.75, 2.5, 4.0]]
    assert table.contexts == (10, 20)


def test_measuring_leaves_no_row_in_use(make_timed, clock):
    model = make_timed().engine.target
    measure_latency(model, [1, 2], [3], contexts=[5], repeats=1, clock=clock)
    assert model.rows_in_use == 0


def test_a_pass_that_fails_leaves_no_row_in_use(make_timed, clock, monkeypatch):
    model = make_timed().engine.target
    run = model.run

    def failing(requests):
        run(requests)
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "run", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        measure_latency(model, [1], [3], contexts=[5], clock=clock)
    assert model.rows_in_use == 0


def test_passes_behind_one_of_another_width_are_not_timed(make_timed, clock, monkeypatch):
    model = make_timed().engine.target
    run, widths = model.run, []

    def run_slowly_behind_another(requests):
        widths.append(len(requests[0][1].tokens))
        clock.now += 10 * (widths[-2:-1] != widths[-1:])
        return run(requests)

    monkeypatch.setattr(model, "run", run_slowly_behind_another)
    table = measure_latency(model, [1, 2], [1], contexts=[5], repeats=2, clock=clock)
    assert table.table.tolist() == [[1, 1]]
    assert [width for width, _ in itertools.groupby(widths)] == [5, 1, 2, 1, 2]


def test_the_context_gives_way_to_the_window(make_timed, clock):
    model = make_timed().engine.target
    assert measure_latency(model, [28], [1], contexts=[999], clock=clock).contexts == (100,)


@pytest.mark.parametrize(("widths", "batches"), [([], [1]), ([0], [1]), ([1], []), ([1], [0]), ([1], [9])])
def test_what_the_model_has_no_room_for_is_refused(make_timed, widths, batches):
    with pytest.raises(InputError, match="batches from 1 to 8"):
        measure_latency(make_timed().engine.target, widths, batches, contexts=[1])


def test_a_width_beyond_the_window_is_refused(make_timed):
    with pytest.raises(InputError, match="does not fit the window of 128"):
        measure_latency(make_timed().engine.target, [128], [1], contexts=[1])


def test_a_table_is_interpolated_in_width_and_batch():
    assert TABLE.seconds(4, 1) == 2
    assert TABLE.seconds(2.5, 1) == 1.5
    assert TABLE.seconds(1, 2) == pytest.approx(4 / 3)
    assert TABLE.seconds(6, 4) == 7


def test_beyond_the_widest_a_table_goes_on_as_it_ended():
    assert TABLE.seconds(12, 1) == 6


def test_a_batch_outside_of_the_table_is_refused():
    with pytest.raises(InputError, match="from 1 to 4, as measured; got 5"):
        TABLE.seconds(1, 5)


@pytest.mark.parametrize(
    ("values", "expected"), [([3, 1, 5], [2, 2, 5]), ([1, 2, 3], [1, 2, 3]), ([6, 4, 2], [4, 4, 4])]
)
def test_values_that_fall_share_their_mean(values, expected):
    assert rising(values) == expected


def test_a_roofline_takes_the_longer_of_moving_and_computing():
    roof = Roofline(
        weight_bytes=100, cache_bytes=1, flops=10, bandwidth=50, peak=20, context=25, overhead_s=1
    )
    assert roof.seconds(1, 2) == 1 + 3  # 150 bytes, 20 operations
    assert roof.seconds(8, 2) == 1 + 8  # 160 operations
