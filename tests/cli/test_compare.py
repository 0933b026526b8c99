from __future__ import annotations

import dataclasses

import pytest

from chordal.bench import demo
from chordal.registry import decoder_class, decoder_names

QUICK = ["--num-prompts", 2, "--repeats", 1, "--max-new-tokens", 4]


def test_plain_decoder_is_the_first_row(run):
    result = run("compare", "--decoders", "prompt_lookup", "--tasks", "copy", *QUICK)
    assert result.code == 0, result.err
    above, header, plain, other = result.out.splitlines()[:4]
    assert above.split() == ["tokens/"]
    assert header.split() == [
        "decoder", "promise", "accuracy", "forward", "forwards", "tokens/s", "ratio",
    ]  # fmt: skip
    assert plain.split()[:2] == ["autoregressive", "exact"]
    assert plain.split()[-1] == "1.00x"
    assert other.split()[:2] == ["prompt_lookup", "exact"]


def test_numbers_are_right_aligned(run):
    _, header, *rows = run("compare", "--tasks", "copy", *QUICK).out.splitlines()[:4]
    assert len({len(line.rstrip()) for line in (header, *rows)}) == 1


def test_several_tasks_show_an_accuracy_each(run):
    shown = run("compare", "--tasks", "sudoku,lists", *QUICK).out
    headers = [line.split()[3:] for line in shown.splitlines() if line.startswith("accuracy by task")]
    assert headers[0][0] == "sudoku"
    assert len([name for header in headers for name in header]) == 11


@pytest.mark.parametrize("draft", [[], ["--draft", "tiny-ar"]])
def test_all_decoders_that_have_their_models_are_compared(run, draft):
    result = run("compare", "--tasks", "copy", "--num-prompts", 1, "--repeats", 1, *draft, "--json")
    assert result.code == 0, result.err
    report = result.json
    classes = {name: decoder_class(name) for name in decoder_names()}
    models = {"draft"} if draft else set()
    assert [row["decoder"] for row in report["rows"]] == [
        name
        for name, cls in classes.items()
        if cls.family == "autoregressive" and cls.needs == ("causal",) and set(cls.needs_models) <= models
    ]


def test_json_says_what_the_numbers_depend_on(run):
    report = run("compare", "--tasks", "copy,latin", "--batch-size", 2, *QUICK, "--json").json
    assert report["prompts"] == {"copy": 2, "latin": 2}
    assert (report["model"], report["batch_size"], report["repeats"]) == ("tiny-ar", 2, 1)
    assert {"device", "dtype", "threads", "machine", "versions"} <= report.keys()
    assert {"promise", "accuracy", "tokens_per_forward", "forwards", "tokens_per_s", "ratio"} <= report[
        "rows"
    ][0].keys()


def test_all_decoders_that_fit_are_compared_by_default(run):
    rows = run("compare", "--model", "tiny-mdm", "--tasks", "copy", *QUICK, "--json").json["rows"]
    fitting = run("inspect", "tiny-mdm", "--json").json["decoders"]
    assert [row["decoder"] for row in rows] == fitting
    assert {"low_confidence", "threshold"} < set(fitting)
    assert "autoregressive" not in fitting


def test_own_prompts_show_agreement_where_nobody_can_grade(run, write_jsonl):
    path = write_jsonl("Ana", {"prompt": "Ben"})
    result = run("compare", "--data", path, "--repeats", 1, "--max-new-tokens", 4)
    above, header, _, other = result.out.splitlines()[:4]
    assert above.split() == ["same", "tokens/"]
    assert header.split()[2] == "text"
    assert "100.0%" in other


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--tasks", "sudok"], ["unknown task", "sudoku"]),
        (["--decoders", "prompt_lokup"], ["unknown decoder", "prompt_lookup"]),
        (["--decoders", "threshold"], ["needs a masked model"]),
        (["--decoders", "prompt_lookup:num_drft=3"], ["num_draft"]),
        (["--decoders", "prompt_lookup:num_draft=-3"], ["num_draft must be at least 0"]),
        (["--model", "tiny-arr"], ["unknown model", "tiny-ar"]),
        (["--data", "missing.jsonl"], ["cannot read missing.jsonl"]),
        (["--data", "x", "--tasks", "copy"], ["--data and --tasks"]),
        (["--temperature", "-1"], ["temperature"]),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_2(run, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    result = run("compare", *args, *QUICK)
    assert (result.code, result.out) == (2, "")
    first, second = result.err.splitlines()
    assert all(word in first for word in words)
    assert second == "Try: chordal compare --help"


def test_bad_line_of_own_prompts_is_named(run, write_jsonl):
    path = write_jsonl("Ana", b"{")
    result = run("compare", "--data", path)
    assert result.code == 2
    assert result.err.startswith(f"Error: {path}, line 2: not JSON")


@pytest.fixture
def quick_demo(monkeypatch):
    less = {"num_prompts": 1, "repeats": 1}
    scenes = tuple(dataclasses.replace(scene, tasks=scene.tasks[-2:], **less) for scene in demo.DEMO)
    monkeypatch.setattr(demo, "DEMO", scenes)
    return scenes


def test_demo_shows_a_table_and_a_sentence_for_each_kind_of_model(run, quick_demo):
    result = run("compare", "--demo")
    assert result.code == 0, result.err
    for scene in quick_demo:
        assert scene.title in result.out
        assert all(contender.label in result.out for contender in scene.contenders)
        assert scene.note[:60] in result.out


def test_demo_gives_json_too(run, quick_demo):
    reports = run("compare", "--demo", "--json").json
    assert [report["model"] for report in reports] == ["tiny-ar", "tiny-mdm", "tiny-block"]
    assert all(report["rows"][0]["ratio"] == 1.0 for report in reports)


def test_demo_without_bundled_models_is_one_clear_line(run, monkeypatch, tmp_path):
    monkeypatch.setattr("chordal.models.checkpoint.zoo_dir", lambda: tmp_path)
    result = run("compare", "--demo")
    assert (result.code, result.out) == (2, "")
    assert "tiny-ar and tiny-block and tiny-mdm" in result.err.splitlines()[0]
