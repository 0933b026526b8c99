from __future__ import annotations

import json

import pytest

from chordal.cli.bench import _command

QUICK = ["--num-prompts", 2, "--repeats", 1, "--max-new-tokens", 4]


@pytest.fixture
def bench(run, tmp_path):
    """Run the command into a folder."""

    def bench(*args, out="run"):
        return run("bench", "--tasks", "copy,reverse", "--out", tmp_path / out, *QUICK, *args)

    return bench


def test_table_shows_the_plain_decoder_first_and_the_folder_holds_everything(bench, tmp_path):
    result = bench("--decoders", "prompt_lookup")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines if "x [" in line] == ["autoregressive", "prompt_lookup"]
    assert "4 prompts of 2 tasks" in lines[-1]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "conditions.json", "runs.jsonl", "results.jsonl", "summary.json", "report.html", "report.md",
    }  # fmt: skip
    assert result.err.splitlines() == [f"Report: {tmp_path / 'run' / 'report.html'}"]


def test_json_is_the_conditions_and_the_rows(bench, tmp_path):
    document = bench("--decoders", "prompt_lookup", "--json").json
    assert document["conditions"]["model"] == "tiny-ar"
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert document["results"] == rows
    assert len(rows) == 2 * 3


def test_same_command_again_runs_nothing(bench, tmp_path):
    bench("--decoders", "prompt_lookup")
    before = (tmp_path / "run" / "runs.jsonl").read_bytes()
    assert bench("--decoders", "prompt_lookup").code == 0
    assert (tmp_path / "run" / "runs.jsonl").read_bytes() == before


def test_another_command_into_the_folder_is_refused(bench):
    bench("--decoders", "prompt_lookup")
    result = bench("--decoders", "prompt_lookup", "--temperature", 1)
    assert result.code == 2
    assert "sampling.temperature was 0.0 and is 1.0" in result.err


def test_all_decoders_that_fit_by_default(bench):
    decoders = bench("--model", "tiny-block", "--json").json["conditions"]["decoders"]
    assert decoders[0]["label"] == "block_diffusion"
    assert "freedave" in [decoder["label"] for decoder in decoders]


def test_prompt_files_are_run_ungraded_and_approximate_decoders_say_so(run, write_jsonl, tmp_path):
    path = write_jsonl("Ana", {"prompt": "Ben"})
    out = tmp_path / "run"
    args = ["--model", "tiny-mdm", "--decoders", "threshold:threshold=0.77", "--data", path, "--out", out]
    result = run("bench", *args, *QUICK)
    assert result.code == 0, result.err
    assert "accuracy" not in result.out
    assert "threshold with these settings is approximate" in result.err


def test_prompts_that_fail_are_listed(run, write_jsonl, tmp_path):
    path = write_jsonl("Ana", "Ana " * 500)
    out = tmp_path / "run"
    result = run(
        "bench", "--decoders", "prompt_lookup", "--data", path, "--out", out, "--batch-size", 2, *QUICK
    )
    assert result.code == 0, result.err
    failed = [line for line in result.err.splitlines() if line.startswith("Failed: ")]
    assert [line.split(" on ")[0] for line in failed] == ["Failed: autoregressive", "Failed: prompt_lookup"]
    assert "prompt 1: PromptError" in failed[0]
    assert result.out.splitlines()[1].split()[-1] == "failed"


def test_interruption_says_how_to_go_on(bench, monkeypatch, tmp_path):
    def interrupt(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("chordal.bench.runner.run_benchmark", interrupt)
    result = bench("--decoders", "prompt_lookup")
    assert result.code == 130
    assert result.err.strip() == f"Interrupted. The same command goes on with what is in {tmp_path / 'run'}."


def test_comparing_a_run_with_itself_finds_nothing(run, tmp_path):
    out = tmp_path / "run"
    given = ["--tasks", "copy", "--decoders", "prompt_lookup", "--num-prompts", 2, "--max-new-tokens", 4]
    run("bench", *given, "--repeats", 2, "--out", out)
    result = run("bench", "--compare", out, out)
    assert result.code == 0, result.err
    assert [line.split()[2] for line in result.out.splitlines() if line.startswith("prompt_lookup")] == [
        "same", "same",
    ]  # fmt: skip
    assert run("bench", "--compare", out, out, "--json").json["is_worse"] is False


def test_comparison_that_finds_a_regression_exits_1(run, tmp_path):
    for name, factor in (("before", 1.0), ("after", 1.5)):
        out = tmp_path / name
        given = ["--tasks", "copy", "--decoders", "prompt_lookup", "--num-prompts", 2, "--max-new-tokens", 4]
        run("bench", *given, "--repeats", 3, "--out", out)
        runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
        for one in runs:
            slower = factor if one["label"] == "prompt_lookup" else 1.0
            one["seconds"] = slower * (1 + 0.01 * one["round"])
        (out / "runs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in runs))
    result = run("bench", "--compare", tmp_path / "before", tmp_path / "after")
    assert result.code == 1, result.err
    assert "slower" in result.out
    assert run("bench", "--compare", tmp_path / "after", tmp_path / "before").code == 0


@pytest.mark.parametrize(("floor", "code", "word"), [(0.0, 0, "holds"), (1.0, 1, "is under")])
def test_guard_fails_below_its_floor(run, monkeypatch, floor, code, word):
    def grade_plain_right(rows, given):
        from chordal.bench.guard import Verdict

        return [Verdict("threshold", 0.5, given * 0.9)]

    monkeypatch.setattr("chordal.bench.guard.judge", grade_plain_right)
    result = run(
        "bench", "--guard", "--model", "tiny-mdm", "--decoders", "threshold", "--tasks", "copy",
        "--guard-floor", floor, *QUICK,
    )  # fmt: skip
    assert result.code == code, result.err
    assert f"Guard: threshold {word} the floor" in result.err
    assert "Report" not in result.err


def test_measured_decoders_need_no_word_in_generate(run, monkeypatch, tmp_path):
    monkeypatch.setenv("CHORDAL_STATE", str(tmp_path / "state"))
    monkeypatch.setattr("chordal.bench.guard._told", set())
    given = ["--model", "tiny-mdm", "--decoder", "threshold", "--max-new-tokens", 4]
    assert "never measured" in run("generate", "copy: Ana", *given).err
    monkeypatch.setattr("chordal.bench.guard._told", set())
    bench = ["--model", "tiny-mdm", "--decoders", "threshold", "--tasks", "copy", "--max-new-tokens", 4]
    run("bench", *bench, "--num-prompts", 20, "--repeats", 1, "--out", tmp_path / "run")
    assert run("generate", "copy: Ana", *given).err == ""


def test_token_of_the_hub_is_not_written_down():
    assert (
        _command(["bench", "--token", "hf_x", "--tasks", "a b"]) == "chordal bench --token ... --tasks 'a b'"
    )
    assert _command(["bench", "--token=hf_x"]) == "chordal bench --token=..."


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["--out"]),
        (["--out", "x", "--tasks", "sudok"], ["unknown task", "sudoku"]),
        (["--out", "x", "--decoders", "threshold"], ["needs a masked model"]),
        (["--out", "x", "--tensor-parallel"], ["--tensor-parallel"]),
        (["--guard"], ["--guard needs a decoder"]),
        (["--compare", "x", "y"], ["x is not the folder of a benchmark"]),
        (["--out", "x", "--data", "missing.jsonl"], ["missing.jsonl"]),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_2(run, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    result = run("bench", *args, *QUICK)
    assert (result.code, result.out) == (2, "")
    first, second = result.err.splitlines()
    assert all(word in first for word in words)
    assert second == "Try: chordal bench --help"
