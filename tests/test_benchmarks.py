"""The scripts behind the numbers of the documentation run, on a prompt or two."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import pytest

import chordal
from chordal.bench.compare import Contender
from chordal.decoders.draft_model import DraftModel
from chordal.models.checkpoint import zoo_dir

FOLDER = Path(__file__).parents[1] / "benchmarks"
QUICK = ["--target", "tiny-ar", "--dtype", "float32", "--num-prompts", "2", "--repeats", "1"]


@pytest.fixture
def script(monkeypatch):
    """Load a script as it is when it runs, beside the others."""
    monkeypatch.syspath_prepend(FOLDER)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look for it
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def diffusion(script, monkeypatch):
    module = script("diffusion")
    monkeypatch.setattr(module, "TASKS", ("copy", "latin"))
    monkeypatch.setattr(module, "LINEUP", {"tiny-mdm": [Contender("threshold", {"feed": "dual"})]})
    return module


def test_tasks_are_tabled_stored_and_drawn(diffusion, tmp_path, capsys):
    stored, drawn = tmp_path / "rows.json", tmp_path / "plot.png"
    diffusion.main(["tasks", "--num-prompts", "2", "--json", str(stored), "--plot", str(drawn)])
    header, _, plain, other = capsys.readouterr().out.splitlines()[:4]
    assert header.split(" | ")[:3] == ["| tiny-mdm", "copy", "latin"]
    assert plain.startswith("| low_confidence | ")
    assert other.startswith("| threshold: feed=dual | ")
    rows = json.loads(stored.read_text())["rows"]["tiny-mdm"]["copy"]
    assert [row["decoder"] for row in rows] == ["low_confidence", "threshold"]
    assert rows[1]["forwards"] < rows[0]["forwards"]
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_wide_canvases_are_graded_where_they_can_be(diffusion, monkeypatch, capsys):
    asked = []
    measure = diffusion.compare

    def narrow(model, workloads, contenders, **settings):
        asked.extend(
            (workload.name, workload.max_new_tokens, settings["ignore_eos"]) for workload in workloads
        )
        short = [diffusion.dataclasses.replace(workload, max_new_tokens=12) for workload in workloads]
        return measure(model, short, contenders, **settings)

    monkeypatch.setattr(diffusion, "compare", narrow)
    monkeypatch.setattr(diffusion, "LONG", [Contender("threshold")])
    diffusion.main(["long", "--num-prompts", "1", "--repeats", "1"])
    assert asked == [("rename", 128, False), ("copy", 256, True), ("arithmetic", 256, True)]
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "threshold" in line]
    graded, filled = rows
    assert graded[1].isdigit()
    assert filled[1] == "-"


@pytest.fixture
def speculative(script, monkeypatch):
    module = script("speculative")
    # Beside a progress bar and a table, these are all it changes for good.
    monkeypatch.setattr(module.transformers.logging, "set_verbosity_error", lambda: None)
    monkeypatch.setattr(module.transformers.logging, "disable_progress_bar", lambda: None)
    monkeypatch.setattr(module, "WIDTHS", (1, 4))
    return module


def rows_of(out, start):
    """Give the cells of the table that begins so, by system."""
    lines = iter(out.splitlines())
    header = next(line for line in lines if line.startswith(f"| {start}"))
    next(lines)
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *cells = line.strip("| ").split(" | ")
        rows[name] = dict(zip(header.strip("| ").split(" | ")[1:], cells, strict=True))
    return rows


def test_every_system_stands_beside_plain_generation(speculative, tmp_path, capsys):
    stored = tmp_path / "report.json"
    speculative.main([*QUICK, "--tasks", "copy", "--batch-sizes", "1,2", "--json", str(stored)])
    out = capsys.readouterr().out
    assert list(rows_of(out, "ms a pass")) == [
        f"{name}, batch {batch}" for name in ("target", "draft", "middle") for batch in (1, 2)
    ]
    alone, together = rows_of(out, "batch 1"), rows_of(out, "batch 2")
    assert list(alone) == list(together)
    assert next(iter(alone)) == "transformers: plain"
    assert alone["transformers: plain"]["mean ratio"] == "1.00x [1.00-1.00]"
    for name in ("prompt lookup", "assisted", "our n-gram drafter"):
        assert set(together[f"transformers: {name}"].values()) == {"-"}
        assert float(alone[f"transformers: {name}"]["tokens/pass"]) > 1.2
    assert float(alone["transformers: assisted"]["draft passes/pass"]) > 1
    report = json.loads(stored.read_text())
    promised = {row["system"]: row for rows in report["batches"].values() for row in rows}
    assert {"autoregressive", "prompt_lookup", "draft_model"} <= set(promised)
    for name, row in promised.items():
        if row["promise"] != "approximate":
            assert row["same"] == 1, name
            assert row["accuracy"] == 1, name
    for row in (alone["prompt_lookup"], together["prompt_lookup"]):
        assert row["copy"].endswith("(2.0)")
        assert row["acceptance"] == row["tokens/pass"]
    assert report["conditions"]["prompts"] == {"copy": 2}


def test_exact_decoders_stand_before_approximate_ones(speculative):
    model = chordal.load("tiny-ar", draft="tiny-draft")
    reference, draft = (speculative.load_reference(name, model) for name in ("tiny-ar", "tiny-draft"))
    lineup = list(speculative.systems(model, reference, draft, None))
    assert lineup[4].label == "autoregressive"
    promises = [system.promise for system in lineup]
    assert promises == sorted(promises, key=["", "exact", "approximate"].index)


def test_a_decoder_without_its_models_is_left_out_and_named(speculative, monkeypatch, capsys):
    monkeypatch.setattr(DraftModel, "needs_models", ("draft", "judge"))
    names = "autoregressive,draft_model"
    speculative.main([*QUICK, "--tasks", "copy", "--batch-sizes", "1", "--decoders", names])
    out, err = capsys.readouterr()
    assert "draft_model left out: no judge model" in err
    ours = [name for name in rows_of(out, "batch 1") if not name.startswith("transformers")]
    assert ours == ["autoregressive"]


def test_prompts_of_a_file_are_decoded_ungraded_on_a_grown_target(speculative, monkeypatch, tmp_path, capsys):
    small = {"factor": 1, "num_layers": 7, "intermediate_size": 520}
    monkeypatch.setattr(speculative, "grow_checkpoint", partial(speculative.grow_checkpoint, **small))
    data, kept = tmp_path / "mine.jsonl", tmp_path / "large"
    data.write_text('"reverse: Ana Ben Cleo Dan"\n{"prompt": [5, 6, 7]}\n')
    more = ["--data", str(data), "--max-new-tokens", "5", "--batch-sizes", "1", "--keep-target", str(kept)]
    speculative.main([*QUICK[2:], *more, "--decoders", "prompt_lookup"])
    row = rows_of(capsys.readouterr().out, "batch 1")["prompt_lookup"]
    assert (row["same"], row["accuracy"]) == ("100%", "-")
    assert "mine.jsonl" in row
    assert chordal.load(kept).generate("reverse: Ana Ben", max_new_tokens=8)[0].text == "Ben Ana"


def test_systems_take_turns_in_both_directions(script):
    common, ran = script("common"), []
    seconds = common.interleave([partial(ran.append, name) for name in "abc"], 3)
    assert "".join(ran) == "abccbaabc"
    assert [len(spent) for spent in seconds] == [3, 3, 3]
    assert common.quartiles([2.0]) == (2, 2, 2)
    assert common.quartiles([1.0, 2.0, 4.0]) == (1.5, 2, 3)


def test_plain_decoding_is_measured_beside_transformers_own(script):
    decode = script("decode")
    row = decode.against_transformers(chordal.load("tiny-ar", dtype="float32"), 2, 1)
    assert row["identical"]
    assert row["time_ratio"] == pytest.approx(row["time_s"] / row["baseline_s"])


def test_drafts_of_one_pass_stand_beside_texts_sampled_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    superposed = importlib.import_module("superposed")
    monkeypatch.setattr(superposed, "SETTINGS", [{}, {"ngrams": "corpus", "rerank": False}])
    stored = tmp_path / "rows.json"
    superposed.main(["--num-prompts", "1", "--tasks", "copy", "--num-drafts", "2", "--json", str(stored)])
    greedy, sampled, beams, plain, informed = json.loads(stored.read_text())["rows"]
    assert [row[0] for row in (sampled, beams)] == ["2 sampled, top_p=0.9", "beam search, 2 beams"]
    assert [row[3] for row in (greedy, plain, informed)] == ["1.0", "2.0", "2.0"]
    assert float(greedy[1]) <= float(greedy[2]) <= float(informed[2])
    assert capsys.readouterr().out.splitlines()[2].startswith("| greedy | ")


def test_shared_prefixes_are_tabled_and_stored(script, tmp_path, capsys):
    stored = tmp_path / "prefix.json"
    script("prefix").main(["--repeats", "1", "--json", str(stored)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| `prefix_cache_mib=0` | 7,008 | ")
    assert lines[3].startswith("| in groups | 1,056 | ")
    assert json.loads(stored.read_text())["shared"]["as they come"][0]["positions_fed"] == 1056


def test_packing_is_tabled_and_stored_and_changes_no_text(script, tmp_path, capsys):
    stored = tmp_path / "packing.json"
    asked = ["--rows", "4", "--num-prompts", "8", "--repeats", "1", "--target", str(zoo_dir() / "tiny-ar")]
    script("packing").main([*asked, "--json", str(stored)])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 6
    for row, found in zip(rows, json.loads(stored.read_text())["systems"], strict=True):
        assert row.endswith(" | yes |")
        assert found["packed"]["passes"] <= found["padded"]["passes"]


def test_servers_are_started_asked_and_tabled(script, tmp_path, capsys):
    stored = tmp_path / "serving.json"
    asked = ["--systems", "2", "--concurrency", "1,2", "--requests", "2,4", "--repeats", "1"]
    script("serving").main([*asked, "--tasks", "copy", "--json", str(stored)])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[:2] for row in rows] == [["| chordal serve", "1"], ["| chordal serve", "2"]]
    [[[one, two]]] = json.loads(stored.read_text())["rounds"]
    assert (one["num_ok"], two["num_ok"]) == (2, 4)
    assert two["quality"]["num_right"] == 4
