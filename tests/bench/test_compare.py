from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from chordal.bench.compare import Contender, compare
from chordal.bench.tasks import CANVAS, TASKS, Grade
from chordal.bench.tasks.workload import Workload
from chordal.errors import DecodingError, InputError
from chordal.models.family import Family

WORKLOADS = [
    Workload("graded", ["a", "b"], 4, grade=lambda index, text: Grade.of(text == "ab"[index])),
    Workload("ungraded", ["c"]),
]


class FakeModel:
    """Echoes its prompts; each call takes as long as `seconds` says for the decoder, one after another."""

    family = Family()

    def __init__(self, seconds, wrong=(), broken=()):
        self.seconds = {name: itertools.cycle(times) for name, times in seconds.items()}
        self.wrong, self.broken = wrong, broken
        self.now = 0.0
        self.calls = []

    def clock(self):
        return self.now

    def generate(self, prompts, *, decoder, config, max_new_tokens, **settings):
        self.calls.append((decoder, dict(config), len(prompts), max_new_tokens, settings))
        # One prompt of a longer workload is the warm-up.
        if max_new_tokens is None or len(prompts) > 1:
            self.now += next(self.seconds[decoder])
        return [
            SimpleNamespace(
                text="?" if decoder in self.wrong else prompt,
                promise="exact",
                error=DecodingError("broken") if decoder in self.broken else None,
                stats={
                    "committed_tokens": 6,
                    "forwards": 3,
                    "draft_forwards": {"draft": 2},
                    "rows": 4,
                    "positions_fed": 30,
                },
            )
            for prompt in prompts
        ]


def run(model, *contenders, **more):
    return compare(model, WORKLOADS, contenders, clock=model.clock, **more)


def test_plain_decoder_is_always_in_the_run_first_and_once():
    model = FakeModel({"autoregressive": [1], "x": [1]})
    rows = run(model, Contender("x"), Contender("autoregressive"))
    assert [row.decoder for row in rows] == ["autoregressive", "x"]
    assert rows[0].ratio == 1.0


def test_plain_decoder_with_other_settings_is_a_row_of_its_own():
    model = FakeModel({"autoregressive": [1]})
    rows = run(model, Contender("autoregressive", {"k": 2}))
    assert [row.label for row in rows] == ["autoregressive", "autoregressive: k=2"]


def test_ratio_is_the_median_of_paired_rounds():
    # One warm-up call of the ungraded workload, then two calls a round.
    plain, other = [0, 2, 2, 4, 4, 6, 6], [0, 1, 1, 1, 1, 1, 1]
    rows = run(FakeModel({"autoregressive": plain, "x": other}), Contender("x"), repeats=3)
    assert rows[0].seconds == (8, 4, 12)
    assert rows[1].seconds == (2, 2, 2)
    # The rounds give 2, 4 and 6 times.
    assert rows[1].ratio == 4.0
    assert rows[1].tokens_per_s == 18 / 2


def test_rounds_alternate_the_decoders_in_both_directions():
    model = FakeModel({"autoregressive": [1], "x": [1]})
    run(model, Contender("x"), repeats=2)
    rounds = [call[0] for call in model.calls if call[2] == 2]
    assert rounds == ["autoregressive", "x", "x", "autoregressive"]


def test_counts_are_of_one_round_and_summed_over_prompts():
    [row] = run(FakeModel({"autoregressive": [1]}), repeats=3)
    assert (row.committed_tokens, row.forwards, row.draft_forwards) == (18, 9, 6)
    assert (row.rows, row.positions_fed) == (12, 90)
    assert row.tokens_per_forward == 2.0


def test_accuracy_is_of_graded_prompts_only():
    rows = run(FakeModel({"autoregressive": [1], "x": [1]}, wrong=["x"]), Contender("x"))
    assert [row.accuracy for row in rows] == [1.0, 0.0]
    assert [row.accuracies for row in rows] == [{"graded": 1.0}, {"graded": 0.0}]
    assert [row.same_text for row in rows] == [1.0, 0.0]


def test_nothing_graded_has_no_accuracy():
    model = FakeModel({"autoregressive": [1]})
    [row] = compare(model, WORKLOADS[1:], [], clock=model.clock)
    assert row.accuracy is None
    assert row.accuracies == {}


def test_settings_reach_every_call():
    model = FakeModel({"autoregressive": [1], "x": [1]})
    run(model, Contender("x", {"k": 2}), repeats=1, temperature=0.5)
    assert {(name, tuple(config.items())) for name, config, *_ in model.calls} == {
        ("autoregressive", ()),
        ("x", (("k", 2),)),
    }
    assert {limit for *_, limit, _ in model.calls} == {4, None}
    assert all(settings == {"temperature": 0.5} for *_, settings in model.calls)


def test_progress_is_told_of_every_run():
    told = []
    model = FakeModel({"autoregressive": [1], "x": [1]})
    run(model, Contender("x"), repeats=2, on_run=lambda *args: told.append(args[:2]))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_failed_decoding_gives_no_row():
    with pytest.raises(DecodingError, match="broken"):
        run(FakeModel({"autoregressive": [1], "x": [1]}, broken=["x"]), Contender("x"))


def test_repeats_must_be_positive():
    with pytest.raises(InputError, match="repeats"):
        run(FakeModel({}), repeats=0)


def test_canvas_of_each_group_holds_its_answers(tokenizer):
    for task in TASKS.values():
        answers = [instance.answer for instance in itertools.islice(task.instances(0), 100)]
        longest = max(len(tokens) for tokens in tokenizer(answers)["input_ids"])
        # One more for the token that ends it.
        assert longest + 1 <= CANVAS[task.group]
