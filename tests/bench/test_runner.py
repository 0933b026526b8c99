from __future__ import annotations

import json

import pytest

from chordal.bench.compare import Contender
from chordal.bench.results import Folder
from chordal.bench.runner import run_benchmark
from chordal.bench.tasks.task import Grade
from chordal.bench.tasks.workload import Workload
from chordal.errors import InputError

LOOKUP = Contender("prompt_lookup", {"num_draft": 3})
# Behind eight letters the model goes on with abcdabcd; drafts of three are always right.
GRADED = Workload(
    "graded",
    ["abcdabcd", "abcdabcd"],
    8,
    lambda i, text: Grade.of(text == ["abcdabcd", "x"][i]),
    "lists",
    "same",
)
PLAIN = Workload("speed", ["abcdabcd"], 8)


def bench(model, folder, *contenders, workloads=(GRADED, PLAIN), repeats=2, **more):
    target = model.engine.target
    run_benchmark(
        model,
        workloads,
        contenders or [LOOKUP],
        Folder(folder),
        repeats=repeats,
        clock=lambda: target.now,
        **more,
    )
    return Folder(folder).results()


def row(rows, label, task="all"):
    [found] = [row for row in rows if (row["label"], row["task"]) == (label, task)]
    return found


@pytest.fixture
def rows(make_cycle, tmp_path):
    return bench(make_cycle(max_rows=1), tmp_path / "run")


def test_every_decoder_has_a_row_for_each_task_and_one_over_all_the_plain_one_first(rows):
    assert [(row["label"], row["task"]) for row in rows] == [
        (label, task) for label in ("autoregressive", LOOKUP.label) for task in ("all", "graded", "speed")
    ]
    assert [row["is_baseline"] for row in rows] == [True] * 3 + [False] * 3


def test_figures_are_those_of_the_model(rows):
    plain, lookup = row(rows, "autoregressive", "graded"), row(rows, LOOKUP.label, "graded")
    # Two prompts of eight tokens: a pass for each, or for four.
    assert (plain["tokens"], plain["forwards"], plain["tokens_per_forward"]) == (16, 16, 1.0)
    assert (lookup["tokens"], lookup["forwards"], lookup["tokens_per_forward"]) == (16, 4, 4.0)
    assert (plain["seconds"]["rounds"], lookup["seconds"]["rounds"]) == ([16.0, 16.0], [4.0, 4.0])
    assert (plain["tokens_per_s"], lookup["tokens_per_s"]) == (1.0, 4.0)
    assert lookup["ratio"] == {"median": 4.0, "low": 4.0, "high": 4.0, "rounds": [4.0, 4.0]}
    assert plain["ratio"]["median"] == 1.0
    assert (lookup["acceptance_length"], lookup["acceptance_rate"]) == (4.0, 1.0)
    assert plain["acceptance_length"] is None
    assert (plain["ttft_s"], lookup["ttft_s"]) == (1.0, 1.0)
    assert (plain["prompt_tokens"], plain["positions_fed"]) == (16, 2 * (8 + 7))
    assert lookup["same_text"] == 1.0


def test_quality_is_of_graded_prompts_with_its_interval(rows):
    quality = row(rows, LOOKUP.label)["quality"]
    assert (quality["num_right"], quality["num_graded"], quality["value"]) == (1, 2, 0.5)
    assert quality["low"] < 0.5 < quality["high"]
    assert row(rows, LOOKUP.label, "speed")["quality"] is None


def test_row_over_all_tasks_adds_up(rows):
    total = row(rows, LOOKUP.label)
    parts = [row(rows, LOOKUP.label, task) for task in ("graded", "speed")]
    for name in ("tokens", "forwards", "num_prompts", "positions_fed"):
        assert total[name] == sum(part[name] for part in parts)
    assert total["seconds"]["rounds"] == [6.0, 6.0]
    assert total["ratio"]["median"] == 4.0


def test_first_token_is_timed_from_when_a_prompt_joins_not_from_when_it_was_queued(make_cycle, tmp_path):
    many = Workload("many", ["abcdabcd"] * 5, 8)
    one_by_one = bench(make_cycle(max_rows=1), tmp_path / "a", workloads=[many])
    batched = bench(make_cycle(max_rows=5), tmp_path / "b", workloads=[many])
    assert row(one_by_one, "autoregressive")["ttft_s"] == row(batched, "autoregressive")["ttft_s"] == 1.0
    assert row(one_by_one, "autoregressive")["seconds"]["median"] == 40.0
    assert row(batched, "autoregressive")["seconds"]["median"] == 8.0


def test_rounds_take_the_decoders_in_turn_and_back(make_cycle, tmp_path):
    bench(make_cycle(), tmp_path / "run", repeats=3)
    runs = Folder(tmp_path / "run").runs()
    lineup = ["autoregressive", LOOKUP.label]
    assert [(run["round"], run["task"], run["label"]) for run in runs] == [
        (round_, task, label)
        for round_, order in enumerate([lineup, lineup[::-1], lineup])
        for task in ("graded", "speed")
        for label in order
    ]
    assert all(("samples" in run) == (run["round"] == 0) for run in runs)


def test_a_machine_that_slows_down_changes_no_ratio(make_cycle, tmp_path):
    model = make_cycle()
    target = model.engine.target
    target.cost = lambda requests: 1.0 if target.now < 100 else 3.0
    rows = bench(model, tmp_path / "run", repeats=5)
    assert row(rows, LOOKUP.label)["ratio"]["median"] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("num_done", range(8))
def test_continued_after_an_interruption_is_the_same_as_never_interrupted(make_cycle, tmp_path, num_done):
    whole = bench(make_cycle(), tmp_path / "whole")

    def stop(done, total, words):
        if done == num_done and not words.startswith("warm-up"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(make_cycle(), tmp_path / "cut", on_run=stop)
    before = Folder(tmp_path / "cut").runs()
    assert len(before) == num_done
    continued = bench(make_cycle(), tmp_path / "cut")
    runs = Folder(tmp_path / "cut").runs()
    assert runs[:num_done] == before
    keys = [(run["label"], run["task"], run["round"]) for run in runs]
    # The plain decoder alone may run twice in a round: to stand beside the rest of it.
    assert {key for key in keys if keys.count(key) > 1} <= {key for key in keys if key[0] == "autoregressive"}
    assert len(set(keys)) == 8
    for one, other in zip(whole, continued, strict=True):
        # A run of a last round whose plain partner never ran has no ratio, and is not given another's.
        assert set(other["ratio"].pop("rounds")) <= set(one["ratio"].pop("rounds"))
        # The process that runs the tests is a real one.
        del one["peak_memory_bytes"], other["peak_memory_bytes"]
        assert one == other


def test_a_finished_run_is_not_run_again(make_cycle, tmp_path):
    bench(make_cycle(), tmp_path / "run")
    before = (tmp_path / "run" / "runs.jsonl").read_bytes()
    model = make_cycle()
    bench(model, tmp_path / "run")
    assert (tmp_path / "run" / "runs.jsonl").read_bytes() == before
    assert model.engine.target.now == 0.0


def test_a_ratio_never_pairs_two_processes(make_cycle, tmp_path):
    def stop(done, total, words):
        if done == 1 and not words.startswith("warm-up"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(make_cycle(), tmp_path / "run", on_run=stop)
    model = make_cycle()
    model.engine.target.cost = lambda requests: 10.0  # a machine ten times as slow
    rows = bench(model, tmp_path / "run")
    assert row(rows, LOOKUP.label, "graded")["ratio"]["rounds"] == [4.0, 4.0]
    assert row(rows, "autoregressive", "graded")["seconds"]["rounds"] == [8.0, 80.0]


def test_half_a_last_line_is_dropped_and_done_again(make_cycle, tmp_path):
    whole = bench(make_cycle(), tmp_path / "run")
    path = tmp_path / "run" / "runs.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert [row["seconds"] for row in bench(make_cycle(), tmp_path / "run")] == [
        row["seconds"] for row in whole
    ]
    assert path.read_bytes().splitlines(keepends=True)[:3] == lines[:3]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"repeats": 3}, "repeats was 2 and is 3"),
        ({"temperature": 0.5}, "sampling.temperature was 0.0 and is 0.5"),
        ({"workloads": [PLAIN]}, "tasks was [graded, speed] and is [speed]"),
        ({"workloads": [GRADED, Workload("speed", ["abcd"], 8)]}, "tasks[1].hash was"),
    ],
)
def test_another_run_is_not_mixed_into_the_folder(make_cycle, tmp_path, more, words):
    bench(make_cycle(), tmp_path / "run")
    with pytest.raises(InputError) as caught:
        bench(make_cycle(), tmp_path / "run", **more)
    assert words in str(caught.value)
    assert "--out" in str(caught.value)


def test_a_folder_of_other_files_is_refused(make_cycle, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        bench(make_cycle(), tmp_path)


def test_a_prompt_that_fails_is_wrong_and_counted_and_has_no_text(make_cycle, tmp_path):
    model = make_cycle(max_rows=1)
    drafts = lambda requests: any(len(forward.tokens) == 4 for _, forward in requests)  # noqa: E731
    model.engine.target.fails = drafts
    rows = bench(model, tmp_path / "run")
    failed = row(rows, LOOKUP.label, "graded")
    assert (failed["num_errors"], failed["num_prompts"], failed["same_text"]) == (2, 2, 0.0)
    assert (failed["quality"]["num_right"], failed["quality"]["num_graded"]) == (0, 2)
    assert (failed["tokens"], failed["tokens_per_s"]) == (0, 0.0)
    assert row(rows, "autoregressive", "graded")["num_errors"] == 0
    [run] = [
        run for run in Folder(tmp_path / "run").runs() if run["label"] == LOOKUP.label and "samples" in run
    ][:1]
    assert run["samples"][0]["error"] == "ValueError: planted"
    assert run["samples"][0]["text_hash"] is None


def test_a_prompt_that_does_not_fit_fails_alone(make_cycle, tmp_path):
    mixed = Workload("mixed", ["abcd" * 15, "abcdabcd"], 8)
    rows = bench(make_cycle(max_rows=2), tmp_path / "run", workloads=[mixed])
    assert row(rows, "autoregressive")["num_errors"] == 1
    assert row(rows, "autoregressive")["tokens"] == 8


@pytest.mark.parametrize(
    ("contender", "workload", "words"),
    [
        (Contender("threshold"), PLAIN, "needs a masked model"),
        (Contender("prompt_lookup", {"num_drft": 3}), PLAIN, "num_draft"),
        (LOOKUP, Workload("long", ["abcd" * 20], 8), "must leave room"),
    ],
)
def test_what_cannot_work_at_all_is_an_error_before_anything_ran(
    make_cycle, tmp_path, contender, workload, words
):
    with pytest.raises(InputError, match=words):
        bench(make_cycle(), tmp_path / "run", contender, workloads=[workload])
    assert not (tmp_path / "run" / "runs.jsonl").exists()


def test_two_tasks_of_one_name_are_refused(make_cycle, tmp_path):
    with pytest.raises(InputError, match="speed comes twice"):
        bench(make_cycle(), tmp_path / "run", workloads=[PLAIN, PLAIN])


def test_conditions_say_what_the_numbers_depend_on(make_cycle, tmp_path):
    bench(make_cycle(max_rows=3), tmp_path / "run", temperature=0.5, seed=7, command="chordal bench")
    conditions = json.loads((tmp_path / "run" / "conditions.json").read_text())
    assert (conditions["model"], conditions["batch_size"], conditions["repeats"]) == ("toy", 3, 2)
    assert (conditions["sampling"]["temperature"], conditions["seed"]) == (0.5, 7)
    assert conditions["hardware"]["cpu"]
    assert {"dtype", "threads", "versions", "commit", "weights", "draft"} <= conditions.keys()
    lookup = conditions["decoders"][1]
    assert lookup["settings"]["num_draft"] == 3
    assert len(lookup["settings"]) > 1, "all settings are there, those with defaults too"
    assert conditions["tasks"][0]["hash"] == GRADED.hash


def test_progress_is_told_of_every_run(make_cycle, tmp_path):
    told = []
    bench(make_cycle(), tmp_path / "run", on_run=lambda *args: told.append(args))
    counted = [args[:2] for args in told if not args[2].startswith("warm-up")]
    assert counted == [(done, 8) for done in range(9)]


def test_peak_memory_is_of_each_run(make_cycle, tmp_path):
    rows = bench(make_cycle(), tmp_path / "run")
    peak = row(rows, "autoregressive")["peak_memory_bytes"]
    assert peak is None or peak > 2**20
