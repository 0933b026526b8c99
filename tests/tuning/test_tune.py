from __future__ import annotations

import itertools

import pytest
import torch

import chordal
from chordal.bench.tasks.workload import Workload
from chordal.errors import InputError
from chordal.tuning.search import Study
from chordal.tuning.space import OneOf, Whole
from chordal.tuning.tune import search_space, tune, tune_in

SPACE = {"prompt_lookup": {"num_draft": Whole(1, 32)}, "jacobi": {"window": Whole(1, 16)}}
PROMPTS = ["copy: Ana Ben", "reverse: Cleo Dan", "sort: Eva Fay", "copy: Gus Hal", "copy: Ida Jon"]


def run(arena, space=SPACE, study=None, **more):
    settings = {"floor": 0.99, "num_trials": 20, "clock": arena.clock, **more}
    return tune_in(arena, study or Study(None, {}, space), **settings)


def by_name(**speeds):
    return lambda contender: speeds[contender.decoder]


ONE_EACH = {"prompt_lookup": {"max_ngram": OneOf((3,))}, "jacobi": {"recycle": OneOf((0,))}}


def test_the_fastest_wins_and_the_reason_has_its_figures(make_arena):
    tuned = run(make_arena(by_name(prompt_lookup=250.0, jacobi=150.0)), ONE_EACH)
    assert (tuned.chosen.decoder, tuned.chosen.ratio, tuned.chosen.tokens_per_s) == (
        "prompt_lookup",
        2.5,
        250,
    )
    assert [one.decoder for one in tuned.finalists] == ["prompt_lookup", "jacobi"]
    # A pass commits 2 tokens and takes 2 / 2.5 of a plain one.
    assert tuned.chosen.break_even == pytest.approx(0.8)
    for words in (
        "Chose prompt_lookup: 2.50 times (2.50 to 2.50 in 5 rounds) as fast as autoregressive",
        "(250 against 100 tokens/s) on 20 prompts, 1 at once, out of 2 trials of 2 decoders.",
        "It is exact",
        "It commits 2.00 tokens a forward pass, which takes 0.80 times a plain one, so it would lose where "
        "fewer than 0.80 are committed; 0 of the 20 prompts are such.",
        "Next is jacobi, 1.50 times",
    ):
        assert words in tuned.why


def test_where_nothing_is_faster_plain_decoding_is_kept(make_arena):
    tuned = run(make_arena(by_name(prompt_lookup=90.0, jacobi=99.0)), ONE_EACH)
    assert tuned.chosen is tuned.plain
    assert (tuned.to_dict()["decoder"], tuned.to_dict()["settings"]) == ("autoregressive", {})
    assert "Kept autoregressive, 100 tokens/s on 20 prompts" in tuned.why
    assert "nothing was faster within the floor" in tuned.why


def test_noise_alone_is_no_win(make_arena):
    """Decoders as fast as plain decoding, some of them lucky in the search: most of 20 keep plain."""
    kept = 0
    for seed in range(20):
        arena = make_arena(by_name(prompt_lookup=100.0, jacobi=100.0), noise=0.05)
        arena.rng.seed(seed)
        kept += run(arena, num_trials=10).chosen.decoder == "autoregressive"
    # Each finalist wins all five rounds with a chance of 1 in 32.
    assert kept >= 16


def test_a_real_win_survives_noise(make_arena):
    tuned = run(make_arena(by_name(prompt_lookup=130.0, jacobi=100.0), noise=0.05), ONE_EACH)
    assert tuned.chosen.decoder == "prompt_lookup"
    assert tuned.chosen.low < tuned.chosen.ratio < tuned.chosen.high


def test_the_fastest_below_the_floor_is_named_and_not_chosen(make_arena):
    arena = make_arena(
        by_name(prompt_lookup=150.0, jacobi=400.0), lambda one: 10 if one.decoder == "prompt_lookup" else 8
    )
    tuned = run(arena, ONE_EACH, floor=0.9)
    assert tuned.chosen.decoder == "prompt_lookup"
    assert "jacobi ran 4.00 times as fast and kept 80.0% of the plain decoder's text" in tuned.why
    assert "below the floor of 90.0%" in tuned.why
    within = run(arena, ONE_EACH, floor=0.7)
    assert (within.chosen.decoder, within.chosen.quality) == ("jacobi", pytest.approx(0.8))
    assert "It is approximate and keeps 80.0% of the plain decoder's text; the floor is 70.0%." in within.why


def test_an_exact_decoder_is_chosen_over_an_approximate_one_that_is_no_faster(make_arena):
    arena = make_arena(
        by_name(prompt_lookup=198.0, jacobi=200.0),
        lambda one: 10 if one.decoder == "prompt_lookup" else 9,
        noise=0.05,
    )
    tuned = run(arena, ONE_EACH, floor=0.5)
    assert tuned.chosen.decoder == "prompt_lookup"


def test_prompts_that_lose_are_counted(make_arena):
    """Every tenth prompt commits a token a pass where two are the rule, and a pass costs 1.5 plain ones."""
    arena = make_arena(by_name(prompt_lookup=150.0, jacobi=50.0))
    plain_run = arena.run

    def run_uneven(contender, start, end):
        done = plain_run(contender, start, end)
        if contender != arena.plain:
            for place, output in zip(range(start, end), done.outputs, strict=True):
                object.__setattr__(output, "forwards", 10 if place % 10 == 0 else 5)
        return done

    arena.run = run_uneven
    chosen = run(arena, ONE_EACH).chosen
    assert (chosen.tokens_per_forward, chosen.num_slower) == (pytest.approx(200 / 110), 2)


def test_the_document_holds_the_choice_first_and_plain_values_only(make_arena):
    document = run(make_arena(by_name(prompt_lookup=250.0, jacobi=150.0)), ONE_EACH).to_dict()
    assert list(document)[:4] == ["decoder", "settings", "why", "measured"]
    measured = document["measured"]
    assert (measured["ratio"], measured["low"], measured["high"], measured["rounds"]) == (2.5, 2.5, 2.5, 5)
    assert measured["plain"]["tokens_per_s"] == 100.0
    assert (measured["metric"], measured["quality_floor"], measured["trials"]) == ("agreement", 0.99, 2)


@pytest.fixture(scope="module")
def model(make_backbone, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_backbone("llama", torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return chordal.load(str(folder), max_rows=2)


def test_a_real_model_is_tuned_resumed_and_its_clock_need_not_be_real(model, tmp_path):
    ticks = itertools.count()
    notes, trials = [], []
    given = {
        "decoders": ["prompt_lookup", "aggressive"],
        "study": tmp_path / "a.study",
        "repeats": 1,
        "clock": lambda: float(next(ticks)),
        "on_note": notes.append,
        "on_trial": lambda done, total, result: trials.append(result.problem),
        "use_planner": False,
    }
    workloads = [Workload("mine", PROMPTS, 6)]
    first = tune(model, workloads, num_trials=2, **given)
    assert (first.num_trials, first.num_prompts, notes) == (2, 5, [])
    second = tune(model, workloads, num_trials=3, **given)
    assert (second.num_trials, len(trials), set(trials)) == (3, 3, {None})
    assert notes == [f"{tmp_path / 'a.study'} holds 2 trials; going on with them."]
    with pytest.raises(InputError, match="prompts differ"):
        tune(model, [Workload("mine", PROMPTS[:4], 6)], num_trials=3, **given)


def test_the_planner_says_what_to_try_first(model):
    tried = []
    tune(
        model,
        [Workload("mine", PROMPTS, 12)],
        decoders=["prompt_lookup"],
        num_trials=1,
        repeats=1,
        on_step=lambda done, total, words: tried.append(words),
    )
    assert any(words.startswith("prompt_lookup: drafting generously") for words in tried)


def test_the_space_is_what_fits_the_model_and_those_beside_it(model):
    space = search_space(model)
    assert "prompt_lookup" in space
    assert not {"autoregressive", "draft_model", "threshold"} & set(space)
    with pytest.raises(InputError, match="needs a draft model"):
        search_space(model, ["draft_model"])
    with pytest.raises(InputError, match="needs a masked"):
        search_space(model, ["threshold"])
    with pytest.raises(InputError, match="nothing to search"):
        search_space(model, ["autoregressive"])


def test_sampled_texts_without_a_grader_leave_approximate_decoders_out(model):
    notes = []
    given = {"num_trials": 1, "repeats": 1, "use_planner": False, "temperature": 0.8, "on_note": notes.append}
    tune(model, [Workload("mine", PROMPTS, 4)], decoders=["prompt_lookup", "diverse_beam"], **given)
    assert notes == ["Sampled texts that nobody grades cannot be judged: approximate decoders are left out."]
    assert not {"superposed", "diverse_beam"} & set(search_space(model, is_sampled=True))
    with pytest.raises(InputError, match="give graded tasks"):
        tune(model, [Workload("mine", PROMPTS, 4)], decoders=["first_finish"], **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"floor": 0.0}, "floor"),
        ({"floor": 1.5}, "floor"),
        ({"num_trials": 0}, "at least 1"),
        ({"repeats": 0}, "at least 1"),
    ],
)
def test_what_is_out_of_range_is_refused(model, given, message):
    with pytest.raises(InputError, match=message):
        tune(model, [Workload("mine", PROMPTS, 4)], **given)
    with pytest.raises(InputError, match="at least one prompt"):
        tune(model, [])
