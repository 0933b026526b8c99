from __future__ import annotations

import numpy as np
import pytest

from chordal.bench.regression import compare_folders
from chordal.bench.results import VERSION, Folder
from chordal.errors import InputError

LABELS = ["plain", *(f"decoder{n}" for n in range(8))]
TASKS = ["one", "two", "three", "four"]
ROUNDS = 5
PROMPTS = 40
SHARED = {
    "version": VERSION, "model": "m", "weights": "w", "hardware": {}, "dtype": "float32", "threads": 1,
    "batch_size": 1, "sampling": {}, "versions": {}, "created": "",
}  # fmt: skip


def sample(index, right, text=""):
    counts = dict.fromkeys(
        ("prompt_tokens", "tokens", "forwards", "draft_forwards", "rows", "positions_fed", "draft_tokens"), 1
    )
    return {
        "index": index, "right": right, "score": float(right), "strict": right, **counts,
        "accepted_tokens": 0, "finish_reason": "stop", "error": None, "text_hash": f"{right}{text}",
    }  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    """Write the folder of a run; every time is 1 s with noise, times what `slow` gives for the decoder."""

    def make(name, seed=0, *, noise=0.02, slow=None, wrong=None, rounds=ROUNDS, hashes=None, labels=LABELS):
        rng = np.random.default_rng(seed)
        folder = Folder(tmp_path / name)
        folder.open(
            {
                **SHARED,
                "repeats": rounds,
                "tasks": [
                    {
                        "name": task,
                        "group": "g",
                        "num_prompts": PROMPTS,
                        "hash": (hashes or {}).get(task, task),
                    }
                    for task in TASKS
                ],
                "decoders": [
                    {"label": label, "decoder": label, "settings": {}, "promise": "exact"} for label in labels
                ],
            }
        )
        for round_ in range(rounds):
            for task in TASKS:
                load = rng.lognormal(0, 0.3)  # of the machine, the same for all of a block
                for label in labels:
                    factor = (slow or {}).get((label, task), (slow or {}).get(label, 1.0))
                    run = {
                        "label": label,
                        "task": task,
                        "round": round_,
                        "session": 0,
                        "num_prompts": PROMPTS,
                        "seconds": load * factor * rng.lognormal(0, noise),
                        "ttft_s": 0.1,
                        "peak_memory_bytes": None,
                    }
                    if round_ == 0:
                        bad = (wrong or {}).get(label, range(4))
                        run["samples"] = [sample(index, index not in bad) for index in range(PROMPTS)]
                    folder.add(run)
        return folder

    return make


def changed(found):
    return {
        (change.label, change.task): (change.speed, change.quality)
        for change in found.changes
        if change.speed not in (None, "same") or change.quality not in (None, "same")
    }


def test_a_decoder_a_tenth_slower_is_found_and_nothing_else(make_run):
    before = make_run("before", 1)
    after = make_run("after", 2, slow={"decoder3": 1.1})
    found = compare_folders(before, after)
    assert {label for label, _ in changed(found)} == {"decoder3"}
    assert changed(found)["decoder3", "all"] == ("slower", "same")
    assert found.is_worse


def test_a_slow_down_on_one_task_only_is_found_there(make_run):
    found = compare_folders(make_run("before", 1), make_run("after", 2, slow={("decoder3", "two"): 1.2}))
    assert changed(found)["decoder3", "two"] == ("slower", "same")
    assert ("decoder3", "one") not in changed(found)


def test_faster_is_no_regression(make_run):
    found = compare_folders(make_run("before", 1), make_run("after", 2, slow={"decoder3": 0.9}))
    assert changed(found)["decoder3", "all"] == ("faster", "same")
    assert not found.is_worse


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.15])
def test_noise_alone_is_not_found(make_run, noise):
    """Ten pairs of runs of 40 rows; a false alarm in any pair has a probability of 5% at most."""
    alarms = [
        compare_folders(
            make_run(f"before{seed}", 2 * seed, noise=noise),
            make_run(f"after{seed}", 2 * seed + 1, noise=noise),
        ).is_worse
        for seed in range(10)
    ]
    assert sum(alarms) <= 1


def test_a_change_inside_the_tolerance_does_not_count(make_run):
    before, after = (
        make_run("before", 1, noise=0.002),
        make_run("after", 2, noise=0.002, slow={"decoder3": 1.02}),
    )
    assert not changed(compare_folders(before, after))
    assert changed(compare_folders(before, after, tolerance=0.0))


def test_a_slower_machine_is_no_regression(make_run):
    found = compare_folders(make_run("before", 1), make_run("after", 2, slow=dict.fromkeys(LABELS, 3.0)))
    assert not found.is_worse
    assert any(note.startswith("plain decoding took +") for note in found.notes)


def test_worse_quality_on_the_same_prompts_is_found(make_run):
    found = compare_folders(make_run("before", 1), make_run("after", 2, wrong={"decoder5": range(20)}))
    assert changed(found)["decoder5", "all"] == ("same", "worse")
    assert found.is_worse
    [change] = [one for one in found.changes if (one.label, one.task) == ("decoder5", "all")]
    assert change.accuracy == (0.9, 0.5)
    assert change.num_texts_changed == 4 * 16


def test_a_prompt_more_or_less_right_is_noise(make_run):
    found = compare_folders(make_run("before", 1), make_run("after", 2, wrong={"decoder5": range(1, 6)}))
    assert not changed(found)


def test_other_prompts_are_not_compared(make_run):
    found = compare_folders(make_run("before", 1), make_run("after", 2, hashes={"two": "other"}))
    assert {change.task for change in found.changes} == {"one", "three", "four"}
    assert "two has other prompts now and is not compared." in found.notes


def test_what_only_one_of_them_has_is_named(make_run):
    found = compare_folders(make_run("before", 1), make_run("after", 2, labels=LABELS[:-1]))
    assert any(note.startswith("only before: decoder7 on all") for note in found.notes)
    assert "decoder7" not in {change.label for change in found.changes}


def test_a_single_round_judges_no_speed_and_says_so(make_run):
    found = compare_folders(
        make_run("before", 1, rounds=1), make_run("after", 2, rounds=1, slow={"decoder3": 2})
    )
    assert {change.speed for change in found.changes} == {None}
    assert any("--repeats" in note for note in found.notes)


def test_nothing_in_common_is_an_error(make_run):
    hashes = dict.fromkeys(TASKS, "other")
    with pytest.raises(InputError, match="in common"):
        compare_folders(make_run("before"), make_run("after", hashes=hashes))


def test_what_is_no_benchmark_is_refused(make_run, tmp_path):
    with pytest.raises(InputError, match="not the folder of a benchmark"):
        compare_folders(make_run("before"), Folder(tmp_path / "nothing"))
