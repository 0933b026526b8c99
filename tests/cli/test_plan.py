from __future__ import annotations

import dataclasses
import json

import pytest

from chordal.cli.plan import _check_line
from chordal.planning.plan import Check

QUICK = ["--num-prompts", 2, "--max-new-tokens", 12, "--max-draft", 3, "--repeats", 1]


@pytest.fixture
def laws(tmp_path):
    """Write a file of points of tau = 1 + .1 ln tokens for drafts of 4, and the draft to predict."""

    def write(**change):
        rows = [{"tokens": 10.0**power, "tau": 1 + 0.23026 * power} for power in range(5, 10)]
        path = tmp_path / "law.json"
        path.write_text(json.dumps({"num_draft": 4, "rows": rows, "draft": {"tokens": 1e8}, **change}))
        return path

    return write


def test_a_plan_shows_costs_options_reason_and_check(run):
    shown = run("plan", "--tasks", "copy", "--batch-sizes", "1,2", *QUICK)
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[0].split() == "ms a pass of width 1 2 4".split()
    assert [line.split()[:3] for line in lines[1:3]] == [["target,", "batch", "1"], ["target,", "batch", "2"]]
    for word in ("off", "num_draft=1", "chosen", "Predicted", "measured"):
        assert word in shown.out
    assert shown.out.count(" times as fast as plain decoding") == 2
    assert lines[-1].startswith("tiny-ar, 2 prompts, float32 on cpu")


def test_json_and_file_hold_the_same_plan(run, tmp_path):
    path = tmp_path / "plan.json"
    shown = run("plan", "--tasks", "copy", "--batch-sizes", "1,2", "--json", "--out", path, *QUICK)
    assert shown.code == 0, shown.err
    document = shown.json
    assert document == json.loads(path.read_text())
    assert list(document)[:3] == ["decoder", "settings", "reason"]
    assert [rung["batch"] for rung in document["ladder"]] == [1, 2]
    assert document["decoder"] == document["ladder"][0]["decoder"]
    assert document["table"]["target"]["widths"] == [1, 2, 4]
    assert len(document["acceptance"]["per_rank"]) == 1


def test_a_plan_is_what_generate_and_compare_take(run, tmp_path):
    path = tmp_path / "plan.json"
    run("plan", "--tasks", "copy", "--out", path, *QUICK)
    plan = json.loads(path.read_text())
    result = run("generate", "copy: Ana Ben", "--config", path, "--max-new-tokens", 4, "--json").json
    assert result["decoder"] == plan["decoder"]
    assert plan["settings"].items() <= result["config"].items()


def test_own_prompts_take_the_place_of_tasks(run, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "copy: Ana Ben"}\n{"prompt": "reverse: Cleo Dan"}\n{"prompt": "copy: Dan"}\n')
    shown = run("plan", "--data", data, *QUICK)
    assert shown.code == 0, shown.err
    assert shown.out.splitlines()[-1].startswith("tiny-ar, 3 prompts")


def test_a_law_takes_the_place_of_a_measurement(run, laws):
    shown = run("plan", "--tasks", "copy", "--law", laws(), "--json", *QUICK)
    assert shown.code == 0, shown.err
    assert "R^2 1.0000" in shown.err
    [alpha] = shown.json["acceptance"]["per_rank"]
    assert sum(alpha**power for power in range(5)) == pytest.approx(1 + 0.23026 * 8)


@pytest.mark.parametrize("change", [{"num_draft": "many"}, {"rows": [{"tau": 2}]}, {"draft": 3}, {"rows": 1}])
def test_a_law_that_cannot_be_read_is_refused(run, laws, change):
    shown = run("plan", "--law", laws(**change))
    assert shown.code == 2
    assert 'must be JSON with "num_draft", "rows" and "draft"' in shown.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--batch-sizes", "1,x"], "--batch-sizes must be whole numbers"),
        (["--batch-sizes", "0"], "--batch-sizes must be whole numbers"),
        (["--decoder", "threshold"], "nothing is known to plan for threshold"),
        (["--set", "num_draft=3"], "num_draft is what the plan chooses"),
        (["--set", "nothing=3"], "unknown prompt_lookup setting"),
        (["--tasks", "nothing"], "unknown task"),
        (["--margin", "-1"], "--margin"),
        (["--law", "nothing.json"], "cannot read nothing.json"),
    ],
)
def test_what_cannot_be_planned_is_misuse(run, args, words):
    shown = run("plan", *args)
    assert (shown.code, shown.out) == (2, "")
    assert words in shown.err


def test_a_misfit_is_printed_beyond_a_tenth():
    def line(misfit):
        check = Check(tokens_per_s=90.0, plain_tokens_per_s=60.0, ratio=1.5, misfit=misfit)
        predicted = {"tokens_per_s": 100.0, "ratio": 2.0}
        return _check_line({"predicted": predicted, "measured": dataclasses.asdict(check)})

    assert line(-0.09) == "Predicted 100 tokens/s, 2.00x; measured 90, 1.50x plain decoding, 60."
    assert "Misfit: the measured speed is -11% off, its ratio -25%" in line(-0.11)
    assert "+12% off" in line(0.12)
