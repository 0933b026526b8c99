"""The scripts behind the numbers of the documentation run, on a prompt or two."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from chordal.bench.compare import Contender

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def diffusion(monkeypatch):
    spec = importlib.util.spec_from_file_location("diffusion", FOLDER / "diffusion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
