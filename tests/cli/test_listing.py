from __future__ import annotations

import pytest

from chordal.registry import decoder_names, list_decoders


def test_json_rows_are_those_of_the_library(run):
    result = run("list", "--json")
    assert result.code == 0
    assert result.json == list_decoders()
    assert {"name", "family", "promise", "needs", "paper"} <= result.json[0].keys()


def test_table_has_a_row_for_each_decoder(run):
    header, *rows = run("list").out.splitlines()
    assert header.split()[:3] == ["name", "family", "promise"]
    assert [row.split()[0] for row in rows] == decoder_names()


def test_approximate_decoders_say_when_they_are_exact(run):
    [row] = [line for line in run("list").out.splitlines() if line.startswith("threshold")]
    assert "threshold > 1" in row


def test_models_are_listed_with_family_and_size(run, zoo_dir):
    rows = run("list", "--models", "--json").json
    assert [(row["name"], row["family"]) for row in rows] == [
        ("tiny-ar", "causal"),
        ("tiny-block", "block"),
        ("tiny-mdm", "masked"),
    ]
    assert all(row["parameters"] > 1000 for row in rows)
    table = run("list", "--models").out
    assert f"{rows[0]['parameters']:,}" in table


@pytest.mark.parametrize("args", [[], ["--json"]])
def test_no_bundled_models_is_no_failure(run, monkeypatch, tmp_path, args):
    monkeypatch.setattr("chordal.models.checkpoint.zoo_dir", lambda: tmp_path)
    # `run` has set the folder already; the listing must not have kept it.
    result = run("list", "--models", *args)
    assert result.code == 0
    assert result.out in ("[]\n", "No models are bundled with this installation.\n")
