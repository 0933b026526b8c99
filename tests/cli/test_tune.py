from __future__ import annotations

import pytest
import yaml

QUICK = ["--tasks", "copy", "--num-prompts", 3, "--max-new-tokens", 6, "--repeats", 1]
FEW = [*QUICK, "--trials", 2, "--decoders", "prompt_lookup", "--no-planner"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_choice_is_shown_with_reason_and_conditions(run):
    shown = run("tune", *FEW)
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[1].split()[:3] == ["decoder", "promise", "kept"]
    assert lines[2].startswith("autoregressive ")
    assert "tokens/s" in shown.out
    assert any(line.startswith(("Chose ", "Kept ")) for line in lines)
    assert lines[-1].startswith("tiny-ar, 3 prompts, 1 at once, float32 on cpu")


def test_json_and_file_hold_the_same_choice_and_generate_and_compare_take_it(run, folder):
    shown = run("tune", *FEW, "--json", "--out", "mine.yaml")
    assert shown.code == 0, shown.err
    document = yaml.safe_load((folder / "mine.yaml").read_text())
    assert document == shown.json
    assert list(document)[:4] == ["decoder", "settings", "why", "measured"]
    result = run("generate", "copy: Ana", "--config", "mine.yaml", "--max-new-tokens", 4, "--json").json
    assert result["decoder"] == document["decoder"]
    compared = run("compare", "--config", "mine.yaml", *QUICK, "--json").json
    assert document["decoder"] in {row["decoder"] for row in compared["rows"]}


def test_trials_lie_beside_the_choice_and_the_next_call_goes_on_with_them(run, folder):
    run("tune", *FEW, "--out", "mine.yaml")
    assert (folder / "mine.study").exists()
    again = run("tune", *FEW, "--out", "mine.yaml")
    assert "mine.study holds 2 trials; going on with them." in again.err
    other = run("tune", *FEW, "--out", "mine.yaml", "--quality-floor", 0.5)
    assert (other.code, other.out) == (2, "")
    assert "other conditions (quality_floor differ)" in other.err


def test_an_interrupted_search_says_how_to_go_on(run, folder, monkeypatch):
    def interrupt(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("chordal.tuning.search.Study.run", interrupt)
    shown = run("tune", *FEW)
    assert (shown.code, shown.out) == (130, "")
    assert shown.err.endswith("The trials are kept in tuned.study; the same command goes on with them.\n")
    # An empty file of a choice would be one without a decoder.
    assert not (folder / "tuned.yaml").exists()


def test_a_file_of_prompts_is_tuned_for(run, write_jsonl):
    path = write_jsonl("copy: Ana Ben", {"prompt": "copy: Cleo"})
    shown = run("tune", "--data", path, "--max-new-tokens", 6, *FEW[6:], "--json")
    assert shown.code == 0, shown.err
    assert (shown.json["measured"]["prompts"], shown.json["measured"]["metric"]) == (2, "agreement")


def test_a_diffusion_model_is_tuned_within_the_floor(run):
    shown = run("tune", "--model", "tiny-mdm", *QUICK, "--trials", 3, "--decoders", "threshold", "--json")
    assert shown.code == 0, shown.err
    assert shown.json["measured"]["quality"] >= 0.99
    assert shown.json["measured"]["plain"]["decoder"] == "low_confidence"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "x.jsonl", "--tasks", "copy"], "--data and --tasks both say"),
        (["--quality-floor", "2"], "quality floor must be above 0"),
        (["--decoders", "autoregressive"], "nothing to search"),
        (["--out", "no/such/folder.yaml"], "cannot write"),
    ],
)
def test_misuse_is_one_line(run, args, message):
    shown = run("tune", *args)
    assert (shown.code, shown.out) == (2, "")
    assert message in shown.err
