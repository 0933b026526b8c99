from __future__ import annotations

import json

import numpy as np
import pytest

from chordal import strict_json
from chordal.engine import Engine
from chordal.errors import InputError
from chordal.generation import Model
from chordal.planning.acceptance import Acceptance
from chordal.planning.latency import LatencyTable, Roofline
from chordal.planning.plan import TAKES, Costs, Limits, choose, make_plan
from chordal.registry import decoder_class, decoder_names, make_decoder
from chordal.testing.toys import TableModel

PROMPTS = [[1, 2, 3], [4, 0], [2, 5, 1, 3], [3, 3], [5, 4, 3], [0, 1]]
GOOD = Acceptance((0.8,))
SHAPED = Acceptance((0.5, 0.2, 0.1))


def roofline(**settings):
    base = {"weight_bytes": 1e9, "cache_bytes": 1e5, "flops": 1e9, "bandwidth": 1e12, "peak": 1e14}
    return Roofline(**{**base, **settings})


def best(decoder="prompt_lookup", acceptance=GOOD, batch=1, draft=None, limits=None, **settings):
    costs = Costs(target=roofline(**settings), draft=draft)
    return choose(decoder, acceptance, costs, batch=batch, limits=limits or Limits())


@pytest.mark.parametrize("name", [name for name in TAKES if name in decoder_names()])
def test_a_decoder_has_the_setting_that_is_planned(name):
    takes = TAKES[name]
    assert takes.setting in decoder_class(name).Config.__dataclass_fields__


def test_a_free_pass_is_filled_and_one_that_costs_all_is_not():
    assert best(peak=1e30).chosen.settings == {"num_draft": 16}
    assert best(weight_bytes=0, cache_bytes=0).chosen.settings == {}


def test_the_choice_is_that_of_the_formula():
    table = LatencyTable((1, 17), (1,), np.array([[1.0, 2.6]]), (0,))
    choice = choose("prompt_lookup", GOOD, Costs(target=table), batch=1, limits=Limits())
    speeds = {num: (1 - 0.8 ** (num + 1)) / 0.2 / (1 + 0.1 * num) for num in range(17)}
    expected = max(speeds, key=speeds.get)
    assert choice.chosen.settings == {"num_draft": expected}
    assert choice.chosen.ratio == pytest.approx(speeds[expected])
    assert [option.tokens_per_s for option in choice.options] == pytest.approx(list(speeds.values()))


@pytest.mark.parametrize("decoder", ["prompt_lookup", "token_recycling"])
def test_drafting_ends_where_computing_is_what_costs(decoder):
    # A large batch, or memory without limit: every position has its price.
    assert best(decoder, SHAPED, batch=10**6).decoder == "autoregressive"
    assert best(decoder, SHAPED, bandwidth=1e30).decoder == "autoregressive"
    assert best(decoder, SHAPED).decoder == decoder


@pytest.mark.parametrize("decoder", ["prompt_lookup", "token_recycling"])
def test_where_computing_is_free_wider_is_never_worse(decoder):
    speeds = [option.tokens_per_s for option in best(decoder, SHAPED, peak=1e30).options]
    assert speeds == sorted(speeds)


def test_larger_batches_draft_less():
    lengths = [best(batch=batch).chosen.num_nodes for batch in (1, 8, 32, 128, 1024)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[2] > lengths[-1] == 0


def test_long_texts_keep_drafts_worth_their_while_at_large_batches():
    assert best(batch=256).decoder == "autoregressive"
    assert best(batch=256, context=4096).decoder == "prompt_lookup"


def test_drafts_that_gain_less_than_the_margin_are_off_and_it_says_so():
    table = LatencyTable((1, 2), (1,), np.array([[1.0, 1.75]]), (0,))
    costs = Costs(target=table)
    off = choose("prompt_lookup", GOOD, costs, batch=1, limits=Limits(margin=0.05))
    assert (off.decoder, off.chosen.settings, off.chosen.ratio) == ("autoregressive", {}, 1.0)
    assert off.reason.startswith(
        "Drafting is off at batch 1, as the best draft, prompt_lookup with num_draft=1"
    )
    assert "1.03 times as fast as plain decoding, and 1.05 times is asked for" in off.reason
    assert choose("prompt_lookup", GOOD, costs, batch=1, limits=Limits(margin=0.0)).decoder == "prompt_lookup"


def test_a_reason_names_costs_acceptance_and_neighbours():
    table = LatencyTable((1, 17), (1,), np.array([[1e-3, 2.6e-3]]), (0,))
    reason = choose("prompt_lookup", GOOD, Costs(target=table), batch=1, limits=Limits()).reason
    assert reason.startswith("Chose prompt_lookup with num_draft=6 at batch 1, 2.47 times as fast as plain")
    assert "commits 3.95 tokens a row and takes 1.60 ms, 1.60 times a plain pass (1.00 ms)" in reason
    assert "chance of 0.80" in reason
    assert "num_draft=5 2.46 and num_draft=7 2.45" in reason


def test_a_draft_model_pays_for_each_of_its_passes():
    free = best("draft_model", draft=roofline(weight_bytes=1))
    dear = best("draft_model", draft=roofline(weight_bytes=3e8))
    assert free.chosen.num_nodes > dear.chosen.num_nodes > 0
    assert best("draft_model", draft=roofline()).decoder == "autoregressive"


def test_time_outside_of_the_models_shortens_drafts():
    target, draft = roofline(), roofline(weight_bytes=1e8)
    lengths = [
        choose(
            "draft_model", GOOD, Costs(target=target, draft=draft, host_s=host_s), batch=1, limits=Limits()
        ).chosen.num_nodes
        for host_s in (0.0, 1e-4, 5e-4)
    ]
    assert lengths[0] > lengths[1] > lengths[2]


def test_trees_are_asked_for_in_the_form_their_decoders_take():
    limits = Limits(max_nodes=6)
    tree = best("token_recycling", SHAPED, peak=1e30, limits=limits).chosen
    assert tree.settings == {"tree": "3/1,1,0/1,0"} or tree.num_nodes == 6
    assert tree.tokens == pytest.approx(1 + 0.5 + 0.2 + 0.25 + 0.1 + 0.125 + 0.1, abs=0.03)
    widths = best("rsd", SHAPED, peak=1e30, limits=limits, draft=roofline(weight_bytes=1)).chosen
    assert set(widths.settings["widths"]) <= set("123,")


def test_even_trees_pay_one_draft_pass_a_level():
    draft = roofline(weight_bytes=1e8)  # .1 ms a pass, the target's 1 ms
    choice = best("rsd", Acceptance((0.9,)), draft=draft, limits=Limits(max_draft=3, max_nodes=3))
    assert [option.settings.get("widths") for option in choice.options] == [None, "1", "1,1", "1,1,1"]
    assert [option.round_s for option in choice.options] == pytest.approx([1e-3, 1.1e-3, 1.2e-3, 1.3e-3])


@pytest.mark.parametrize("slope", [0.0, 0.02, 0.1])
def test_what_is_predicted_is_what_a_run_takes(make_timed, clock, slope):
    """Replayed texts and measured passes give the speed of the run, as nothing else costs."""
    model = make_timed(slope=slope, spread=6.0)
    plan = make_plan(
        model,
        "prompt_lookup",
        PROMPTS,
        batches=(1, 2, 4),
        limits=Limits(max_draft=6),
        repeats=1,
        clock=clock,
        max_new_tokens=60,
    )
    for choice in plan.choices:
        assert abs(choice.check.misfit) < 0.1, choice
        assert not choice.check.is_misfit
    assert plan.choices[0].decoder == "prompt_lookup"


def test_drafts_that_lose_are_off_and_plain_decoding_is_what_is_checked(make_timed, clock):
    model = make_timed(slope=10.0)
    plan = make_plan(model, "prompt_lookup", PROMPTS, repeats=1, clock=clock, max_new_tokens=40)
    [choice] = plan.choices
    assert (choice.decoder, choice.chosen.settings) == ("autoregressive", {})
    assert choice.check.tokens_per_s == choice.check.plain_tokens_per_s
    assert choice.check.ratio == 1


def test_settings_that_are_not_planned_stay(make_timed, clock):
    plan = make_plan(
        make_timed(spread=6.0),
        "prompt_lookup",
        PROMPTS,
        settings={"match": "last"},
        repeats=1,
        clock=clock,
        max_new_tokens=40,
    )
    document = plan.to_dict()
    assert document["decoder"] == "prompt_lookup"
    assert document["settings"]["match"] == "last"
    assert document["settings"]["num_draft"] > 0
    assert json.loads(strict_json.dumps(document)) == document


def test_acceptance_that_is_given_is_not_measured(make_timed, clock):
    plan = make_plan(
        make_timed(), "prompt_lookup", PROMPTS, acceptance=GOOD, repeats=1, clock=clock, max_new_tokens=40
    )
    assert plan.acceptance is GOOD
    [choice] = plan.choices
    assert choice.chosen.tokens == pytest.approx((1 - 0.8 ** (choice.chosen.num_nodes + 1)) / 0.2)


def test_a_misfit_is_told(make_timed, clock):
    """Drafts that were said to be right and are not."""
    wrong = Acceptance((0.95,))
    plan = make_plan(
        make_timed(spread=0.1),
        "prompt_lookup",
        PROMPTS,
        acceptance=wrong,
        repeats=1,
        clock=clock,
        temperature=1.0,
        max_new_tokens=40,
    )
    [choice] = plan.choices
    assert choice.check.is_misfit
    assert choice.check.misfit < -0.1


def test_drafts_that_lose_when_they_run_are_off_whatever_was_predicted(make_timed, clock):
    plan = make_plan(
        make_timed(spread=0.1, slope=0.2),
        "prompt_lookup",
        PROMPTS,
        acceptance=Acceptance((0.95,)),
        repeats=1,
        clock=clock,
        temperature=1.0,
        max_new_tokens=40,
    )
    [choice] = plan.choices
    assert max(option.ratio for option in choice.options) > 2
    assert (choice.decoder, choice.chosen, choice.check.ratio) == ("autoregressive", choice.options[0], 1.0)
    assert "times as fast as plain decoding and ran 0." in choice.reason
    assert not choice.check.is_misfit


@pytest.mark.parametrize(
    "name", [name for name in ("draft_model", "rsd", "token_recycling") if name in decoder_names()]
)
def test_every_shape_is_planned_for_its_decoder(make_timed, clock, name):
    """With the target itself as its draft, at no cost: what is drafted is right."""
    model = make_timed(spread=6.0)
    target = model.engine.target
    draft = TableModel(vocab_size=6, window=128, seed=3, spread=6.0, max_rows=8)
    model = Model(Engine({"target": target, "draft": draft}))
    limits = Limits(max_draft=4, max_nodes=8)
    plan = make_plan(
        model, name, PROMPTS, batches=(1, 2), limits=limits, repeats=1, clock=clock, max_new_tokens=60
    )
    for choice in plan.choices:
        assert choice.decoder == name
        assert choice.chosen.num_nodes > 0
        assert choice.check.ratio > 1.5
        make_decoder(name, choice.chosen.settings)
    if TAKES[name].draft:
        assert plan.acceptance.alpha == 1
        assert plan.choices[0].check.misfit == pytest.approx(0, abs=0.1)


def test_a_plan_leaves_the_engine_idle(make_timed, clock):
    model = make_timed()
    make_plan(model, "prompt_lookup", PROMPTS, batches=(1, 3), repeats=1, clock=clock, max_new_tokens=20)
    assert model.engine.num_live == 0
    assert model.engine.target.rows_in_use == 0
    assert len(model.generate(PROMPTS, max_new_tokens=4)) == len(PROMPTS)


def test_steps_are_told_to_their_end(make_timed, clock):
    steps = []
    make_plan(
        make_timed(),
        "prompt_lookup",
        PROMPTS,
        batches=(1, 2),
        repeats=1,
        clock=clock,
        on_step=lambda *step: steps.append(step),
        max_new_tokens=20,
    )
    assert [done for done, *_ in steps] == list(range(len(steps)))
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder": "threshold"}, "nothing is known to plan for threshold"),
        ({"settings": {"num_draft": 3}}, "num_draft is what the plan chooses"),
        ({"decoder": "draft_model"}, "drafts with a second model"),
        ({"batches": (9,)}, "batches from 1 to 8"),
        ({"batches": ()}, "batches from 1 to 8"),
        ({"prompts": []}, "0 prompts"),
        ({"repeats": 0}, "repeats of at least 1"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_runs(make_timed, clock, change, words):
    model = make_timed()
    given = {"decoder": "prompt_lookup", "prompts": PROMPTS, "clock": clock, **change}
    with pytest.raises(InputError, match=words):
        make_plan(model, **given)
    assert model.engine.target.seen == []


@pytest.mark.parametrize("limits", [{"max_draft": 0}, {"max_nodes": 0}, {"margin": -0.1}])
def test_limits_that_leave_nothing_are_refused(limits):
    with pytest.raises(InputError, match="max_draft and max_nodes must be at least 1"):
        Limits(**limits)


def test_a_plan_needs_texts_of_several_passes(make_timed, clock):
    with pytest.raises(InputError, match="texts are too short"):
        make_plan(make_timed(), "prompt_lookup", PROMPTS, repeats=1, clock=clock, max_new_tokens=1)
