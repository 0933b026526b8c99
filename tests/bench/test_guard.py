from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from chordal.bench import guard
from chordal.models.family import Family
from chordal.registry import make_decoder

PLAIN, APPROXIMATE = make_decoder("low_confidence"), make_decoder("threshold")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("CHORDAL_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(guard, "_told", set())


def model(name="m", weights="w"):
    engine = SimpleNamespace(models={"target": SimpleNamespace(fingerprint=weights, name=name)})
    return SimpleNamespace(name=name, engine=engine, family=Family(kind="masked", mask_id=1))


def row(label, value, *, baseline=False, num_graded=100, decoder="threshold", task="all"):
    config = make_decoder(decoder).config
    return {
        "label": label,
        "decoder": decoder,
        "settings": dataclasses.asdict(config),
        "task": task,
        "quality": {"value": value, "num_graded": num_graded},
        "is_baseline": baseline,
    }


def remember(of, *rows):
    decoders = [{"label": row["label"], "models": []} for row in rows]
    tasks = [{"name": "copy", "grader": "same_text"}]
    guard.remember(of, {"decoders": decoders, "tasks": tasks, "created": "now"}, rows)


def test_a_decoder_under_the_floor_does_not_hold_it():
    rows = [row("plain", 0.8, baseline=True), row("good", 0.761), row("bad", 0.759)]
    good, bad = guard.judge(rows, 0.95)
    assert (good.is_held, bad.is_held) == (True, False)
    assert bad.needed == pytest.approx(0.76)


def test_an_approximate_decoder_nobody_measured_is_said_once():
    words = guard.notice(model(), APPROXIMATE)
    assert "threshold" in words
    assert "never measured" in words
    assert "\n" not in words
    assert guard.notice(model(), APPROXIMATE) is None


def test_exact_and_plain_decoders_need_no_word():
    assert guard.notice(model(), make_decoder("prompt_lookup")) is None
    assert guard.notice(model(), PLAIN) is None


def test_the_plain_decoder_with_other_settings_is_another_one():
    assert guard.notice(model(), make_decoder("low_confidence", {"num_steps": 2})) is not None


def test_what_was_measured_needs_no_word_any_more():
    remember(model(), row("threshold", 0.9))
    assert guard.notice(model(), APPROXIMATE) is None


@pytest.mark.parametrize("of", [model(name="other"), model(weights="other")])
def test_a_measurement_is_of_one_model_and_its_weights(of):
    remember(model(), row("threshold", 0.9))
    assert guard.notice(of, APPROXIMATE) is not None


def test_a_measurement_is_of_one_setting():
    remember(model(), row("threshold", 0.9))
    assert guard.notice(model(), make_decoder("threshold", {"threshold": 0.5})) is not None


def test_a_handful_of_prompts_is_no_measurement():
    remember(model(), row("threshold", 1.0, num_graded=guard.MIN_GRADED - 1))
    assert guard.notice(model(), APPROXIMATE) is not None


def test_measuring_again_replaces_what_was_there(tmp_path):
    remember(model(), row("threshold", 0.9))
    remember(model(), row("threshold", 0.7))
    [line] = (tmp_path / "state" / "quality.jsonl").read_text().splitlines()
    assert json.loads(line)["quality"]["value"] == 0.7


def test_damaged_lines_are_skipped(tmp_path):
    remember(model(), row("threshold", 0.9))
    path = tmp_path / "state" / "quality.jsonl"
    path.write_text(path.read_text() + "[1]\n{half")
    assert guard.notice(model(), APPROXIMATE) is None


def test_a_state_that_cannot_be_written_stops_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHORDAL_STATE", str(tmp_path / "file" / "below"))
    remember(model(), row("threshold", 0.9))
    assert guard.notice(model(), APPROXIMATE) is not None


def test_the_state_is_where_the_user_keeps_such_things(monkeypatch, tmp_path):
    monkeypatch.delenv("CHORDAL_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    remember(model(), row("threshold", 0.9))
    assert (tmp_path / "chordal" / "quality.jsonl").exists()
