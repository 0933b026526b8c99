from __future__ import annotations

from types import SimpleNamespace

import pytest

from chordal.bench.compare import Contender
from chordal.bench.tasks.workload import Workload
from chordal.errors import DecodingError
from chordal.models.family import Family
from chordal.tuning.arena import ModelArena, Output, Run, Yardstick, agreement


def texts(*tokens, right=None):
    return [Output(given, len(given), 1, right) for given in tokens]


def graded(pattern):
    return [Output((1,), 1, 1, right == "x") for right in pattern]


@pytest.mark.parametrize(
    ("plain", "other", "share"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4), 1.0),
        ((1, 2, 3, 4), (1, 2, 5, 4, 6), 0.4),
        ((1, 2), (1, 2, 3, 4), 0.5),
        ((1, 2, 3, 4), (1,), 0.25),
        ((1, 2), (2, 1), 0.0),
        ((), (), 1.0),
        ((), (1,), 0.0),
    ],
)
def test_agreement_is_the_common_beginning_by_the_longer_text(plain, other, share):
    assert agreement(plain, other) == share


def test_quality_of_ungraded_prompts_is_their_mean_agreement():
    yardstick = Yardstick(Run(1.0, texts((1, 2), (3, 4)), "exact"))
    assert yardstick.metric == "agreement"
    assert yardstick.quality(texts((1, 2), (3, 5))) == 0.75
    assert yardstick.quality(texts((1, 2))) == 1.0


def test_quality_of_graded_prompts_is_what_is_kept_of_the_right_answers():
    yardstick = Yardstick(Run(1.0, graded("xx-x"), "exact"))
    assert yardstick.metric == "accuracy"
    assert yardstick.quality(graded("x--x")) == pytest.approx(2 / 3)
    # One that plain decoding gets wrong makes up for one that it gets right.
    assert yardstick.quality(graded("x-xx")) == 1.0


def test_where_plain_decoding_gets_nothing_right_texts_are_compared():
    assert Yardstick(Run(1.0, graded("---"), "exact")).metric == "agreement"


def test_a_miss_on_few_prompts_is_forgiven_once_while_it_can_be_made_good():
    yardstick = Yardstick(Run(1.0, graded("x" * 20), "exact"))
    assert not yardstick.misses(0.9, graded("xxx-"))
    assert yardstick.misses(0.9, graded("xx--"))
    # 19 of 20 are all that it could still have.
    assert yardstick.misses(0.96, graded("xxx-"))
    assert not yardstick.misses(0.95, graded("x" * 19 + "-"))
    assert yardstick.misses(0.96, graded("x" * 19 + "-"))


class FakeModel:
    """Echoes its prompts and takes a second for each call."""

    family = Family()
    engine = SimpleNamespace(max_rows=2)

    def __init__(self, error=None):
        self.calls, self.now, self.error = [], 0.0, error

    def generate(self, prompts, *, decoder, config, **request):
        self.calls.append((decoder, config, tuple(prompts), request))
        self.now += 1.0
        stats = {"committed_tokens": 3, "forwards": 2}
        return [
            SimpleNamespace(text=prompt, tokens=[1, 2], stats=stats, promise="exact", error=self.error)
            for prompt in prompts
        ]


WORKLOADS = [
    Workload("graded", ["a", "b", "c"], 4, grade=lambda index, text: text == "axc"[index]),
    Workload("ungraded", ["d", "e"]),
]


def test_prompts_are_mixed_by_the_seed_and_each_comes_once():
    orders = [ModelArena(FakeModel(), WORKLOADS, seed=seed).prompts for seed in range(5)]
    assert {tuple(sorted(order)) for order in orders} == {tuple("abcde")}
    assert len({tuple(order) for order in orders}) > 1
    assert ModelArena(FakeModel(), WORKLOADS, seed=3).prompts == orders[3]


def test_a_run_gives_outputs_in_order_and_asks_for_the_length_of_each_workload():
    model = FakeModel()
    arena = ModelArena(model, WORKLOADS, clock=lambda: model.now, temperature=0.5)
    run = arena.run(Contender("x", {"k": 2}), 0, 5)
    right = {"a": True, "b": False, "c": True, "d": None, "e": None}
    assert [output.right for output in run.outputs] == [right[prompt] for prompt in arena.prompts]
    assert (run.seconds, run.num_tokens, run.forwards, run.tokens_per_s) == (2.0, 15, 10, 7.5)
    assert {request.get("max_new_tokens") for *_, request in model.calls} == {4, None}
    assert {(name, config["k"], request["temperature"]) for name, config, _, request in model.calls} == {
        ("x", 2, 0.5)
    }


def test_a_prompt_that_fails_ends_the_run():
    arena = ModelArena(FakeModel(RuntimeError("broken")), WORKLOADS)
    with pytest.raises(DecodingError, match="x: broken"):
        arena.run(Contender("x"), 0, 2)
