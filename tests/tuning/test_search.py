from __future__ import annotations

import json
import sys

import pytest

from chordal.bench.compare import Contender
from chordal.errors import DecodingError, InputError
from chordal.tuning.arena import Yardstick
from chordal.tuning.search import Result, Study, best_results
from chordal.tuning.space import OneOf, Whole

SPACE = {"prompt_lookup": {"num_draft": Whole(1, 32)}, "jacobi": {"window": Whole(1, 16)}}


def peak(contender):
    """Fastest, 3 times plain decoding, at num_draft=20; every jacobi loses."""
    if contender.decoder != "prompt_lookup":
        return 80.0
    return 300.0 - 10 * abs(contender.settings.get("num_draft", 10) - 20)


def search(arena, study=None, *, num_trials=30, floor=0.99, space=SPACE, **more):
    study = study or Study(None, {}, space)
    yardstick = Yardstick(arena.run(arena.plain, 0, arena.num_prompts))
    study.run(arena, yardstick, floor=floor, num_trials=num_trials, clock=arena.clock, **more)
    return study


def _pairs(calls):
    return list(zip(calls[::2], calls[1::2], strict=True))


def found(study):
    return [(one.contender.label, one.value, one.is_complete) for one in study.results()]


def test_the_best_settings_of_the_best_decoder_are_found(make_arena):
    [best] = best_results(search(make_arena(peak)).results(), 1)
    assert best.contender.decoder == "prompt_lookup"
    assert abs(best.contender.settings["num_draft"] - 20) <= 2
    assert best.ratio == pytest.approx(best.value)
    assert best.ratio > 2.7


def test_they_are_found_in_noise(make_arena):
    [best] = best_results(search(make_arena(peak, noise=0.1), num_trials=40).results(), 1)
    assert best.contender.decoder == "prompt_lookup"
    assert abs(best.contender.settings["num_draft"] - 20) <= 6


def test_an_approximate_decoder_below_the_floor_ranks_behind_every_other(make_arena):
    """The longer the draft the faster, but from 16 on the text is another."""
    arena = make_arena(
        lambda one: 100.0 + 10 * one.settings.get("num_draft", 10),
        lambda one: 10 if one.settings.get("num_draft", 10) < 16 else 8,
    )
    study = search(arena, space={"prompt_lookup": SPACE["prompt_lookup"]})
    [best] = best_results(study.results(), 1)
    assert best.contender.settings["num_draft"] == 15
    below = [one for one in study.results() if one.contender.settings.get("num_draft", 10) >= 16]
    assert below
    assert all(one.value < 0 < one.ratio for one in below)


def test_a_floor_that_is_met_exactly_is_met(make_arena):
    arena = make_arena(lambda one: 200.0, lambda one: 9)
    space = {"jacobi": {"ngram": Whole(5, 5)}}
    assert search(arena, space=space, floor=0.91, num_trials=1).results()[0].value < 0
    # One wrong token at the front of a text of ten leaves nothing of it.
    assert search(arena, space=space, floor=0.9, num_trials=1).results()[0].value == pytest.approx(2.0)


def test_few_prompts_weed_out_what_is_slow(make_arena):
    arena = make_arena(peak, num_prompts=40)
    slow = [one for one in search(arena).results()[6:] if one.ratio < 1.5]
    assert len(slow) >= 3
    assert not any(one.is_complete for one in slow)
    # Five prompts each, half a second of plain decoding, were enough.
    for one in slow:
        assert [end for label, _, end in arena.calls if label == one.contender.label] == [1, 4, 5]


def test_plain_decoding_runs_on_the_same_prompts_beside_every_trial(make_arena):
    arena = make_arena(peak)
    study = search(arena, num_trials=5)
    turns = [call for call in arena.calls[1:] if call[1:] != (0, 1)]
    for one, other in _pairs(turns):
        assert one[1:] == other[1:]
        assert (one[0] == "autoregressive") != (other[0] == "autoregressive")
    # Neither is always the first.
    assert {one[0] == "autoregressive" for one, _ in _pairs(turns)} == {True, False}
    assert study.num_trials == 5


def test_a_rung_is_at_least_a_batch(make_arena):
    arena = make_arena(peak, num_prompts=24, batch_size=8)
    search(arena, num_trials=2)
    assert {end - start for _, start, end in arena.calls if (start, end) != (0, 1)} <= {8, 16, 24}


def test_first_comes_what_is_known(make_arena):
    study = Study(None, {}, SPACE)
    planned = [Contender("prompt_lookup", {"num_draft": 7}), Contender("jacobi", {"window": 7})]
    first = study.first(lambda: [*planned, Contender("jacobi")])
    # The default of the window is 7: there is no second default.
    assert [one.label for one in first] == ["prompt_lookup: num_draft=7", "jacobi"]
    search(make_arena(peak), study, num_trials=3, first=first)
    assert [label for label, *_ in found(study)][:2] == ["prompt_lookup: num_draft=7", "jacobi"]


def test_nothing_is_measured_twice_and_a_small_space_ends_the_search(make_arena):
    study = search(make_arena(peak), space={"prompt_lookup": {"match": OneOf(("first", "last"))}})
    assert sorted(label for label, *_ in found(study)) == ["prompt_lookup", "prompt_lookup: match=last"]


def test_what_cannot_run_is_kept_with_its_reason(make_arena):
    def speed(contender):
        if contender.decoder == "jacobi":
            raise DecodingError("not finite")
        return 200.0

    study = search(make_arena(speed), num_trials=10)
    refused = [one for one in study.results() if one.contender.decoder == "jacobi"]
    assert refused
    assert {(one.problem, one.value, one.is_complete) for one in refused} == {("not finite", None, False)}


def test_same_seed_same_trials(make_arena):
    studies = [search(make_arena(peak), Study(None, {}, SPACE, seed=seed)) for seed in (3, 3, 4)]
    assert found(studies[0]) == found(studies[1]) != found(studies[2])


@pytest.mark.parametrize("stop_after", [1, 2, 17, 18, 19, 40])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(make_arena, tmp_path, stop_after):
    first = [Contender("jacobi"), Contender("prompt_lookup")]
    whole = search(make_arena(peak), first=first)
    path = tmp_path / "a.study"
    with pytest.raises(KeyboardInterrupt):
        search(make_arena(peak, stop_after=stop_after), Study(path, {}, SPACE), first=first)
    resumed = Study(path, {}, SPACE)
    before = found(resumed)
    assert before == found(whole)[: len(before)]
    search(make_arena(peak), resumed, first=first)
    assert found(resumed) == found(whole)
    assert found(Study(path, {}, SPACE)) == found(whole)


def test_a_broken_last_line_is_dropped(make_arena, tmp_path):
    path = tmp_path / "a.study"
    study = search(make_arena(peak), Study(path, {}, SPACE), num_trials=5)
    with path.open("a") as file:
        file.write('{"op_code": 4, "wor')
    again = Study(path, {}, SPACE)
    assert found(again) == found(study)
    search(make_arena(peak), again, num_trials=8)
    assert [json.loads(line) for line in path.read_text().splitlines()]


def test_trials_under_other_conditions_are_refused(make_arena, tmp_path):
    path = tmp_path / "a.study"
    search(make_arena(peak), Study(path, {"prompts": "a", "model": "m"}, SPACE), num_trials=2)
    with pytest.raises(InputError, match=r"other conditions \(prompts differ\)"):
        Study(path, {"prompts": "b", "model": "m"}, SPACE)
    with pytest.raises(InputError, match=r"\(seed, space differ\)"):
        Study(path, {"prompts": "a", "model": "m"}, {"jacobi": {}}, seed=1)


def test_a_file_that_is_no_study_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\nhalf a line")
    with pytest.raises(InputError, match="no journal"):
        Study(path, {}, SPACE)
    assert path.read_text() == "dear diary\nhalf a line"


def test_no_trial_begins_behind_the_time_limit(make_arena):
    arena, told = make_arena(peak), []
    study = search(arena, timeout_s=20.0, num_trials=100, on_trial=lambda *given: told.append(given[:2]))
    assert 1 < study.num_trials < 100
    # The total that is told is what the time allows.
    assert told[-1] == (study.num_trials, study.num_trials)


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"chordal\[tune\]"):
        Study(None, {}, SPACE)


def test_the_best_of_each_decoder_come_first():
    def result(label, value, is_complete=True):
        name, _, k = label.partition(":")
        return Result(
            contender=Contender(name, {"k": k}),
            is_complete=is_complete,
            ratio=value,
            quality=1.0,
            value=value,
        )

    results = [result("a:1", 2.0), result("a:2", 2.5), result("b:1", 1.5), result("c:1", 0.9)]
    results += [result("d:1", 9.0, is_complete=False), result("a:3", -0.1)]
    assert [one.value for one in best_results(results, 3)] == [2.5, 1.5, 2.0]
