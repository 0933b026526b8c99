from __future__ import annotations

import json

import pytest

from chordal.decoders.autoregressive import Autoregressive
from chordal.decoders.prompt_lookup import PromptLookup

QUICK = ["--num-prompts", 1, "--max-new-tokens", 6, "--num-samples", 20]
GREEDY = ["--num-prompts", 1, "--max-new-tokens", 12, "--num-samples", 0]


@pytest.fixture
def broken(monkeypatch):
    """Make prompt_lookup forget the penalty that plain decoding keeps to, and fail on long prompts."""

    def decode(self, seq):
        if seq.num_prompt > 60:
            raise RuntimeError("too long for me")
        object.__setattr__(seq.law, "repetition_penalty", 1.0)
        yield from Autoregressive().decode(seq)

    monkeypatch.setattr(PromptLookup, "decode", decode)


def test_an_exact_decoder_is_said_to_be_so_and_the_exit_code_is_0(run):
    result = run("verify", "--decoder", "prompt_lookup", "--set", "num_draft=4", *QUICK)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "prompt_lookup (num_draft=4) against autoregressive"
    assert lines[2] == "greedy: 24 tokens, 4 of 4 texts the same"
    assert lines[4] == "sampled: 20 texts of each prompt by each decoder, temperature 1"
    assert lines[5] == "A test fails below p = 0.0005; the chance of a false alarm is 0.001."
    assert [line.split()[0] for line in lines[7:10]] == ["test", "branches", "ranks"]
    assert lines[11] == "Exact here: nothing tells it from plain decoding."
    assert lines[12].startswith("tiny-ar, 4 prompts, 16 texts at once, float32 on ")


def test_a_decoder_that_is_not_exact_has_its_divergences_shown_and_exit_code_1(run, broken):
    args = ["--repetition-penalty", 5, "--tasks", "copy", *GREEDY, "--temperature", 0]
    result = run("verify", "--decoder", "prompt_lookup", *args)
    assert result.code == 1
    lines = result.out.splitlines()
    assert "0 of 1 texts the same, 0 ties, " in lines[2]
    assert lines[3].startswith("A tie: both tokens within ")
    assert lines[5].split() == ["prompt", "position", "autoregressive", "prompt_lookup", "gap"]
    assert lines[6].startswith('0: "copy')
    assert lines[6].rstrip().endswith("bug")
    assert "Not exact, although the decoder promises it." in lines
    assert not any(line.startswith("sampled") for line in lines)


def test_a_prompt_that_the_decoder_fails_on_is_named(run, broken, write_jsonl):
    path = write_jsonl("Ana", "Ben " * 70)
    result = run("verify", "--decoder", "prompt_lookup", "--data", path, *GREEDY)
    assert result.code == 1
    assert "prompt 1 failed: RuntimeError: too long for me" in result.out


def test_an_approximate_decoder_is_told_from_its_reference(run):
    args = ["--model", "tiny-mdm", "--decoder", "threshold", "--tasks", "copy", *GREEDY]
    result = run("verify", *args, "--set", "threshold=0")
    assert result.code == 1
    assert "against low_confidence" in result.out
    assert "differs" in result.out
    assert "Not exact; the decoder promises no more than an approximation." in result.out
    assert run("verify", *args, "--set", "threshold=2").code == 0
    result = run("verify", *args, "--set", "threshold=2", "--plain-set", "num_steps=2")
    assert "against low_confidence (num_steps=2)" in result.out


def test_the_report_is_one_json_document_on_stdout_or_in_a_file(run, tmp_path, write_jsonl):
    path, out = write_jsonl("Ana", {"prompt": [5, 6, 7]}), tmp_path / "report.json"
    args = ["--decoder", "prompt_lookup", "--data", path, "--max-new-tokens", 6, "--num-samples", 20]
    report = run("verify", *args, "--json").json
    assert report["is_exact"]
    assert (report["decoder"], report["plain"], report["promise"]) == (
        "prompt_lookup", "autoregressive", "exact",
    )  # fmt: skip
    assert report["prompts"] == ["Ana", [5, 6, 7]]
    assert report["greedy"]["num_same"] == 2
    assert (report["sampled"]["num_samples"], report["sampled"]["false_alarm"]) == (20, 0.001)
    assert {"model", "dtype", "device", "versions", "batch_size"} <= report["setup"].keys()
    assert report["request"]["max_new_tokens"] == 6
    out.write_text("what was there before, " * 2000)
    result = run("verify", *args, "--out", out)
    assert "Exact here" in result.out
    assert json.loads(out.read_text()) == report


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["no decoder to verify", "--decoder"]),
        (["--decoder", "prompt_lokup"], ["unknown decoder", "prompt_lookup"]),
        (["--decoder", "prompt_lookup", "--set", "num_drft=3"], ["num_draft"]),
        (["--decoder", "prompt_lookup", "--plain-set", "x=3"], ["autoregressive setting", "x"]),
        (["--decoder", "threshold"], ["needs a masked model"]),
        (["--decoder", "prompt_lookup", "--num-samples", "3"], ["num_samples must be 0 or at least 20"]),
        (["--decoder", "prompt_lookup", "--false-alarm", "2"], ["false_alarm"]),
        (["--decoder", "prompt_lookup", "--temperature", "-1"], ["temperature"]),
        (["--decoder", "prompt_lookup", "--tasks", "sudok"], ["unknown task", "sudoku"]),
        (["--decoder", "prompt_lookup", "--data", "missing.jsonl"], ["cannot read missing.jsonl"]),
        (["--decoder", "prompt_lookup", "--data", "x", "--tasks", "copy"], ["--data and --tasks"]),
        (["--decoder", "prompt_lookup", "--out", "no/such"], ["cannot write no/such"]),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_2(run, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    result = run("verify", *args)
    assert (result.code, result.out) == (2, "")
    first, second = result.err.splitlines()
    assert all(word in first for word in words)
    assert second == "Try: chordal verify --help"
