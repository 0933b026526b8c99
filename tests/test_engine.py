from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

import chordal.engine
from chordal.decoders.autoregressive import Autoregressive
from chordal.decoders.decoder import Decoder
from chordal.decoders.low_confidence import LowConfidence
from chordal.decoders.prompt_lookup import PromptLookup
from chordal.engine import Engine, _Ask, _group_by_width
from chordal.errors import DecodingError, InputError
from chordal.forward import Causal, Forward, Logits, Sample, Tree
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import TINY_POISON, CountingModel, TableModel, random_prompt, tiny_model

PROMPT = np.array([1, 0, 2])
LAW = Law(temperature=1.0)


class Script(Decoder):
    """Decodes as a function of the sequence says."""

    name, family, promise, needs, paper, Config = "script", "autoregressive", "exact", ("causal",), "-", dict

    def __init__(self, script):
        super().__init__()
        self.script = script

    def decode(self, seq):
        return self.script(seq)


def make(model, length=4, prompt=PROMPT, **more):
    stop = StopRules(max_new_tokens=length)
    return Sequence(prompt=prompt, family=model.family, stop=stop, law=LAW, **more)


def submit(engine, length=4, decoder=None, **more):
    return engine.submit(decoder or Autoregressive(), make(engine.target, length, **more))


def alone(length=4, **more):
    """What a sequence gives on an engine of its own."""
    engine = Engine(TableModel())
    seq = submit(engine, length, **more)
    engine.run()
    return seq.output.tolist()


def span(seq, num, *, read=True, model="target"):
    """Ask for the last `num` committed tokens of a sequence to be fed."""
    at = np.arange(seq.frontier - num, seq.frontier)
    asked = seq.sample(np.array([num - 1]), np.array([seq.frontier])) if read else None
    return Forward(seq.committed[-num:], at, Causal(), asked, slots=at, model=model)


def rows_of(call):
    return [row for row, _ in call]


# Sequences come and go.


def test_sequences_of_all_lengths_give_what_they_give_alone_whenever_they_come():
    """40 sequences on 5 rows, in random batches at random ticks."""
    rng = np.random.default_rng(0)
    model = CountingModel(TableModel(max_rows=5))
    engine, seqs, todo = Engine(model), [], [*enumerate(rng.integers(1, 12, 40).tolist())]
    while todo or engine.has_work:
        for _ in range(rng.integers(0, 4)):
            if todo:
                seed, length = todo.pop()
                prompt = rng.integers(0, 4, rng.integers(1, 20))
                decoder = PromptLookup() if seed % 3 == 0 else Autoregressive()
                seqs.append(submit(engine, length, decoder, prompt=prompt, seed=seed))
        before = len(model.calls)
        engine.step()
        # Live sequences have the first rows, without a gap, and each is served every tick.
        served = [row for call in model.calls[before:] for row in rows_of(call)]
        assert sorted(served) == [*range(len(served))]
        assert len(served) <= 5
        assert engine.num_live <= 5
    for seq in seqs:
        assert seq.finish_reason == "length"
        assert seq.output.tolist() == alone(seq.stop.max_new_tokens, prompt=seq.prompt, seed=seq.seed)


def test_more_sequences_than_rows_wait_their_turn():
    engine, finished = Engine(TableModel(max_rows=2)), []
    seqs = [submit(engine, 2 + at // 2, seed=at) for at in range(7)]
    while engine.has_work:
        engine.step()
        assert engine.num_live <= 2
        finished += [at for at, seq in enumerate(seqs) if seq.done and at not in finished]
    assert finished == [0, 1, 2, 3, 4, 5, 6]
    assert [seq.output.tolist() for seq in seqs] == [alone(2 + at // 2, seed=at) for at in range(7)]


def test_nothing_runs_before_the_first_tick_and_nothing_is_left_after_the_last():
    model = CountingModel(TableModel())
    engine = Engine(model)
    assert not engine.has_work
    submit(engine)
    assert engine.has_work
    assert (engine.num_live, model.calls) == (0, [])
    engine.run()
    assert (engine.has_work, engine.num_live) == (False, 0)
    engine.step()
    assert len(model.calls) == 4


def test_an_engine_has_as_many_rows_as_its_smallest_model():
    assert Engine({"target": TableModel(max_rows=9), "draft": TableModel(max_rows=3)}).max_rows == 3


def test_an_engine_without_a_target_is_refused():
    with pytest.raises(InputError, match=r'needs a model named "target"; got draft\.'):
        Engine({"draft": TableModel()})
    with pytest.raises(InputError, match=r"got none\."):
        Engine({})


# Cancelling.


def test_cancelling_frees_the_row_and_leaves_the_others_alone():
    engine = Engine(TableModel(max_rows=3))
    seqs = [submit(engine, 8, seed=seed) for seed in range(5)]
    engine.step()
    engine.step()
    engine.cancel(seqs[0])  # runs
    engine.cancel(seqs[3])  # waits
    assert engine.num_live == 2
    engine.step()
    assert engine.num_live == 3
    engine.run()
    for seed, seq in enumerate(seqs):
        if seed in (0, 3):
            assert seq.finish_reason == "cancelled"
            assert seq.output.tolist() == alone(8, seed=seed)[: 2 if seed == 0 else 0]
        else:
            assert seq.output.tolist() == alone(8, seed=seed)


def test_cancelling_twice_or_after_the_end_is_harmless():
    engine = Engine(TableModel())
    seq = submit(engine)
    engine.run()
    engine.cancel(seq)
    engine.cancel(seq)
    assert seq.finish_reason == "length"


def test_a_cancelled_coroutine_is_closed():
    coroutines = []

    class Kept(Autoregressive):
        def decode(self, seq):
            coroutines.append(super().decode(seq))
            return coroutines[-1]

    engine = Engine(TableModel())
    seqs = [submit(engine, decoder=Kept()) for _ in range(2)]
    engine.cancel(seqs[1])
    assert [coroutine.gi_frame is None for coroutine in coroutines] == [False, True]
    engine.step()
    engine.cancel(seqs[0])
    assert [coroutine.gi_frame is None for coroutine in coroutines] == [True, True]


# One sequence's trouble is nobody else's.


def fail_in_front(seq):
    raise RuntimeError("broken")
    yield


def fail_later(seq):
    yield span(seq, 3)
    raise RuntimeError("broken")


def give_up(seq):
    yield span(seq, 3)


def ask_for_nonsense(seq):
    yield span(seq, 3)
    yield None


def commit_twice(seq):
    reading = yield span(seq, 3)
    seq.append(reading.tokens)
    seq.commit(np.array([3]), reading.tokens)


def ask_an_unknown_model(seq):
    yield span(seq, 3)
    yield span(seq, 1, model="drafts")


def feed_an_unknown_token(seq):
    yield span(seq, 3)
    at = np.array([3])
    yield Forward(np.array([99]), at, Causal(), Logits(np.array([0])), slots=at)


def draw_without_numbers(seq):
    yield span(seq, 3)
    at = np.array([3])
    yield Forward(np.array([1]), at, Causal(), Sample(np.array([0]), seq.law), slots=at)


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        (fail_in_front, RuntimeError, "broken"),
        (fail_later, RuntimeError, "broken"),
        (give_up, DecodingError, "the decoder ended before its sequence was done"),
        (ask_for_nonsense, TypeError, "not iterable"),
        (commit_twice, DecodingError, "already committed"),
        (ask_an_unknown_model, InputError, "no model named drafts in this engine"),
        (feed_an_unknown_token, (InputError, IndexError), ""),
        (draw_without_numbers, ValueError, "needs one uniform number for each row"),
    ],
)
@pytest.mark.parametrize("make_model", [TableModel, tiny_model])
def test_a_decoder_that_fails_ends_its_own_sequence_only(make_model, script, kind, message):
    others, engines = [], [Engine(make_model(max_rows=4)) for _ in range(2)]
    for engine in engines:
        others.append([submit(engine, 6, seed=seed) for seed in range(2)])
        if engine is engines[0]:
            sick = submit(engine, decoder=Script(script))
        others[-1] += [submit(engine, 6, seed=seed) for seed in range(2, 5)]
        engine.run()
    assert sick.finish_reason == "error"
    assert isinstance(sick.error, kind)
    assert message in str(sick.error)
    assert [seq.output.tolist() for seq in others[0]] == [seq.output.tolist() for seq in others[1]]


def test_a_listener_that_fails_ends_its_own_sequence_only():
    def listen(seq, event):
        raise RuntimeError("deaf")

    engine = Engine(TableModel())
    sick, healthy = submit(engine, listeners=[listen]), submit(engine, seed=1)
    engine.run()
    assert (sick.finish_reason, str(sick.error)) == ("error", "deaf")
    assert healthy.output.tolist() == alone(seed=1)


def prefill_and_wait(seq):
    yield span(seq, seq.num_prompt, read=False)
    yield span(seq, 1)


@pytest.mark.parametrize("decoder", [Autoregressive(), Script(prefill_and_wait)], ids=["read", "cached"])
def test_what_is_not_finite_ends_its_sequence_and_is_gone_before_the_next_has_its_row(decoder):
    """Beside a longer sequence, attention spans the slots that held it, and 0 times NaN is NaN."""
    engine = Engine(tiny_model(max_rows=2))
    long = submit(engine, 20, prompt=np.full(20, 5))
    sick = submit(engine, decoder=decoder, prompt=np.array([3] * 8 + [TINY_POISON, 4]))
    healthy = submit(engine)
    engine.step()
    if isinstance(decoder, Autoregressive):
        assert str(sick.error) == "tiny causal gave logits that are not finite."
    else:  # nothing has been read yet that would tell
        engine.cancel(sick)
    engine.run()
    assert [seq.finish_reason for seq in (long, healthy)] == ["length", "length"]
    fresh = Engine(tiny_model(max_rows=2))
    want = submit(fresh)
    fresh.run()
    assert healthy.output.tolist() == want.output.tolist()


def test_a_request_beyond_the_cache_ends_its_sequence_even_before_its_row_was_used():
    def ask_too_much(seq):
        at = np.array([100_000])
        yield Forward(np.array([1]), at, Causal(), Logits(np.array([0])), slots=at)

    engine = Engine(tiny_model())
    first = submit(engine, 3)
    engine.step()
    sick = submit(engine, decoder=Script(ask_too_much))
    engine.run()
    assert isinstance(sick.error, InputError)
    assert first.finish_reason == "length"


def test_a_decoder_that_never_decides_is_ended(monkeypatch):
    monkeypatch.setattr(chordal.engine, "_MAX_IDLE_PASSES", 10)

    def ponder(seq):
        while True:
            yield span(seq, 3)

    engine = Engine(TableModel())
    seq = submit(engine, 4, Script(ponder))
    engine.run()
    assert isinstance(seq.error, DecodingError)
    assert str(seq.error) == "nothing was committed in 19 forward passes."


def test_a_decoder_that_decides_slowly_is_not(monkeypatch):
    monkeypatch.setattr(chordal.engine, "_MAX_IDLE_PASSES", 0)

    def ponder_and_decide(seq):
        while not seq.done:
            for _ in range(3):
                yield span(seq, 3)
            reading = yield span(seq, 3)
            seq.append(reading.tokens)

    engine = Engine(TableModel())
    seq = submit(engine, 40, Script(ponder_and_decide))
    engine.run()
    assert seq.finish_reason == "length"


# What cannot run is refused at once.


def test_a_decoder_for_another_kind_of_model_is_refused():
    engine = Engine(TableModel())
    with pytest.raises(InputError, match=r"low_confidence needs a masked model; this one is causal\."):
        submit(engine, decoder=LowConfidence())
    assert not engine.has_work


def test_settings_that_do_not_fit_the_sequence_are_refused():
    def refuse(seq):
        raise InputError("num_steps must be at most 4")
        yield

    engine = Engine(TableModel())
    with pytest.raises(InputError, match="num_steps must be at most 4"):
        submit(engine, decoder=Script(refuse))
    assert not engine.has_work


# Requests and readings.


def test_one_request_is_answered_with_a_reading_and_several_with_a_tuple_in_order():
    given = []

    def script(seq):
        given.append((yield span(seq, 3)))
        at = np.array([3, 3])
        reads = [Logits(np.array([0])), Logits(np.array([0, 1])), None]
        given.append(
            (
                yield tuple(
                    Forward(np.array([at_, 1])[:2], at, Tree(3, (-1, -1)), read)
                    for at_, read in enumerate(reads)
                )
            )
        )
        given.append((yield (span(seq, 1),)))
        seq.append(np.zeros(4, np.int64))

    engine = Engine(TableModel())
    submit(engine, 4, Script(script))
    engine.run()
    one, several, single = given
    assert one.tokens.shape == (1,)
    assert [None if reading.logits is None else len(reading.logits) for reading in several] == [1, 2, None]
    assert isinstance(single, tuple)
    assert len(single) == 1


def test_requests_for_several_models_run_on_their_own():
    target, draft = TableModel(seed=0), TableModel(seed=1)
    given = []

    def script(seq):
        given.append((yield (span(seq, 3, model="draft"), span(seq, 3))))
        given.append((yield span(seq, 3, model="draft")))
        seq.append(np.zeros(4, np.int64))

    engine = Engine({"target": target, "draft": draft})
    seq = submit(engine, 4, Script(script), seed=3)
    engine.run()
    want = {}
    for name, model in (("target", TableModel(seed=0)), ("draft", TableModel(seed=1))):
        want[name] = model.run([(0, span(make(model, seed=3), 3))])[0]
    assert given[0][0].max_logit == want["draft"].max_logit
    assert given[0][1].max_logit == want["target"].max_logit
    assert given[1].max_logit == want["draft"].max_logit
    assert engine.passes == {"target": 1, "draft": 2}
    assert seq.stats.forwards == {"target": 1, "draft": 2}
    assert seq.stats.positions_fed == {"target": 3, "draft": 6}


def test_rows_of_every_model_move_together():
    """The middle sequence ends first, so the last one takes its row in both models."""

    def both(seq):
        while not seq.done:
            num = 3 if seq.frontier == 3 else 1
            one, two = yield (span(seq, num, model="draft"), span(seq, num))
            seq.append((one.tokens + two.tokens) % 4)

    def run(lengths):
        engine = Engine({"target": TableModel(seed=0), "draft": TableModel(seed=1)})
        seqs = [submit(engine, length, Script(both), seed=length) for length in lengths]
        engine.run()
        return [seq.output.tolist() for seq in seqs]

    assert run([9, 2, 7, 5]) == [run([length])[0] for length in (9, 2, 7, 5)]


# Counting.


def test_what_is_counted_is_what_the_model_saw():
    model = CountingModel(TableModel(max_rows=3))
    engine = Engine(model)
    seqs = [submit(engine, 3 + seed, PromptLookup(), seed=seed) for seed in range(6)]
    engine.run()
    assert engine.passes == {"target": len(model.calls)}
    assert engine.model_s > 0
    fed = sum(len(forward.tokens) for call in model.calls for _, forward in call)
    asked = sum(len(call) for call in model.calls)
    assert sum(seq.stats.positions_fed["target"] for seq in seqs) == fed
    assert sum(seq.stats.forwards["target"] for seq in seqs) == asked
    assert sum(seq.stats.rows for seq in seqs) == asked
    for seed, seq in enumerate(seqs):
        assert seq.stats.committed_tokens == 3 + seed
        assert 0 < seq.stats.model_s <= engine.model_s
        assert seq.stats.wall_s > 0


def test_a_pass_that_only_fills_the_cache_with_the_prompt_is_a_prefill_not_a_forward():
    def prefill_first(seq):
        at = np.arange(2)
        yield Forward(seq.prompt[:2], at, Causal(), None, slots=at)
        reading = yield span(seq, 1)
        seq.append(reading.tokens)
        # What feeds generated text counts, read or not.
        yield span(seq, 1, read=False)
        reading = yield span(seq, 1)
        seq.append(reading.tokens)

    engine = Engine(TableModel())
    seq = submit(engine, 2, Script(prefill_first))
    engine.run()
    assert (seq.stats.prefills, seq.stats.forwards, seq.stats.positions_fed) == (
        1,
        {"target": 3},
        {"target": 5},
    )
    assert seq.output.tolist() == alone(2)


def test_requests_at_the_same_time_are_one_forward_of_several_rows():
    def twice(seq):
        at = np.arange(3)
        yield tuple(Forward(seq.prompt, at, Tree(0, (-1, 0, 1)), Logits(np.array([2]))) for _ in range(2))
        seq.append(np.zeros(1, np.int64))

    engine = Engine(TableModel())
    seq = submit(engine, 1, Script(twice))
    engine.run()
    assert (seq.stats.forwards, seq.stats.rows) == ({"target": 1}, 2)
    assert seq.stats.positions_fed == {"target": 6}
    assert engine.passes == {"target": 1}


def test_commits_are_numbered_by_the_forward_they_came_from():
    heard = []
    engine = Engine(TableModel())
    submit(engine, 3, listeners=[lambda seq, event: heard.append((event.forward, event.positions.tolist()))])
    engine.run()
    assert heard == [(1, [3]), (2, [4]), (3, [5])]


# Which requests share a pass.


def requests(widths_by_row):
    """Requests as the engine collects them, one for each width of a row, with numbers for branches."""
    at = {width: np.arange(width) for widths in widths_by_row for width in widths}
    return [
        _Ask(None, index, row, Forward(at[width], at[width], Causal(), slots=at[width]))
        for row, widths in enumerate(widths_by_row)
        for index, width in enumerate(widths)
    ]


def row_widths(group):
    widths = {}
    for ask in group:
        widths[ask.row] = widths.get(ask.row, 0) + len(ask.forward.tokens)
    return widths


@pytest.mark.parametrize(
    ("widths", "groups"),
    [
        ([[1]] * 50, [50]),
        ([[1], [2], [9], [4]], [4]),
        ([[1], [1], [500]], [2, 1]),
        ([[500], [1], [490], [1]], [2, 2]),
        ([[1]] * 8 + [[9]], [9]),  # 8 tokens of padding in 8 rows cost as much as a pass
        ([[1]] * 8 + [[10]], [8, 1]),
        ([], []),
    ],
)
def test_requests_of_like_width_share_a_pass(widths, groups):
    assert [len(group) for group in _group_by_width(requests(widths))] == groups


def test_groups_keep_rows_whole_and_requests_in_order_and_waste_no_more_than_passes_would():
    rng = np.random.default_rng(0)
    for _ in range(200):
        asked = requests(
            [
                (rng.geometric(0.1, rng.integers(1, 4)) * rng.choice([1, 20])).tolist()
                for _ in range(rng.integers(1, 30))
            ]
        )
        groups = _group_by_width(asked)
        assert sorted((ask.row, ask.branch) for group in groups for ask in group) == [
            (ask.row, ask.branch) for ask in asked
        ]
        rows = [row for group in groups for row in row_widths(group)]
        assert len(rows) == len(set(rows))
        for group in groups:
            for row in row_widths(group):
                indices = [ask.branch for ask in group if ask.row == row]
                assert indices == sorted(indices)
            widths = row_widths(group).values()
            padding = sum(max(widths) - width for width in widths)
            assert padding <= chordal.engine._PASS_COST_TOKENS * (len(widths) - 1)


def test_complete_reports_each_sequence_once_as_it_is_done():
    model = TableModel(max_rows=2)
    engine = Engine(model)
    seqs = [make(model, length) for length in (5, 1, 3, 2)]
    order = []
    engine.complete([(Autoregressive(), seq) for seq in seqs], order.append)
    assert order == [1, 2, 0, 3]
    assert [len(seq.output) for seq in seqs] == [5, 1, 3, 2]


def test_complete_cancels_all_if_its_listener_fails():
    model = TableModel()
    engine = Engine(model)
    seqs = [make(model, length) for length in (5, 1)]
    with pytest.raises(KeyError):
        engine.complete([(Autoregressive(), seq) for seq in seqs], {}.__getitem__)
    assert not engine.has_work
    assert seqs[0].finish_reason == "cancelled"


def test_complete_with_nothing_to_do_does_nothing():
    engine = Engine(TableModel())
    engine.complete([])
    assert engine.passes == {"target": 0}


# Too little memory, and memory given back.


class Frail(CountingModel):
    """Runs, and then fails where several sequences, or one of them, have asked for too much."""

    def __init__(self, model, fails):
        super().__init__(model)
        self.fails = fails

    def run(self, requests):
        readings = super().run(requests)
        if self.fails(requests):
            raise torch.OutOfMemoryError("out of memory")
        return readings


def is_batch(requests):
    return len({row for row, _ in requests}) > 1


@pytest.mark.parametrize(
    "name", ["token_recycling", "rsd", "first_finish", "prompt_lookup", "autoregressive"]
)
def test_a_batch_that_does_not_fit_is_run_one_by_one_and_gives_the_same(name):
    """Late, in the middle of the model: what the requests moved in its cache stays moved once."""
    prompts = [np.resize(random_prompt(3, seed), 9) for seed in range(4)]
    given = []
    for fails in (lambda requests: False, is_batch):
        model = Frail(tiny_model(max_rows=4), fails)
        engine = Engine({"target": model, "draft": tiny_model(seed=1)})
        stop = StopRules(max_new_tokens=16)
        seqs = [
            engine.submit(make_decoder(name), Sequence(prompt=prompt, family=model.family, stop=stop, seed=3))
            for prompt in prompts
        ]
        engine.run()
        assert [seq.error for seq in seqs] == [None] * 4
        given.append([seq.output.tolist() for seq in seqs])
        assert any(map(is_batch, model.calls))
    assert given[0] == given[1]


def test_requests_of_one_sequence_stay_together_when_a_batch_is_run_one_by_one():
    model = Frail(TableModel(), is_batch)

    def twice(seq):
        at = np.arange(3)
        copies = tuple(Forward(seq.prompt, at, Tree(0, (-1, 0, 1)), Logits(np.array([2]))) for _ in range(2))
        yield copies
        seq.append(np.zeros(1, np.int64))

    engine = Engine(model)
    seqs = [submit(engine, 1, Script(twice)) for _ in range(2)]
    engine.run()
    assert [len(call) for call in model.calls] == [4, 2, 2]
    assert [seq.stats.rows for seq in seqs] == [2, 2]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")],
    ids=["device", "python", "host"],
)
def test_a_request_without_memory_ends_alone(error):
    def fails(requests):
        if any(len(forward.tokens) == 13 for _, forward in requests):
            raise error
        return False

    engine = Engine(Frail(TableModel(), fails))
    first = submit(engine, 6, seed=0)
    greedy = submit(engine, 6, prompt=np.arange(13) % 4)
    last = submit(engine, 6, seed=1)
    engine.run()
    assert greedy.finish_reason == "error"
    assert greedy.error is error
    assert [first.output.tolist(), last.output.tolist()] == [alone(6, seed=0), alone(6, seed=1)]


def test_an_error_does_not_keep_the_tensors_of_its_pass():
    kept = []

    class Leaky(CountingModel):
        def run(self, requests):
            tensor = torch.zeros(5)
            kept.append(weakref.ref(tensor))
            raise MemoryError

    engine = Engine(Leaky(TableModel()))
    seq = submit(engine)
    engine.run()
    assert isinstance(seq.error, MemoryError)
    assert kept[0]() is None


def test_an_idle_engine_gives_the_memory_of_its_caches_back():
    model = tiny_model()
    engine = Engine(model)
    want = submit(engine, seed=4)
    engine.step()
    engine.release()
    assert model.cache.slot_layers[0].keys.numel() > 0  # somebody is live
    engine.run()
    engine.release()
    engine.release()
    assert all(layer.keys.numel() == layer.values.numel() == 0 for layer in model.cache.slot_layers)
    again = submit(engine, seed=4)
    engine.run()
    assert again.output.tolist() == want.output.tolist()


def test_what_is_kept_of_prompts_outlives_the_caches():
    model = tiny_model(max_rows=2)
    engine = Engine(model, prefix_cache_bytes=10**6, prefix_page_tokens=4)
    prompt = random_prompt(11)
    first = submit(engine, prompt=prompt)
    engine.run()
    engine.release()
    again = submit(engine, prompt=prompt)
    engine.run()
    assert (first.stats.cached_tokens, again.stats.cached_tokens) == (0, 8)
    assert again.output.tolist() == first.output.tolist()


def test_the_time_in_the_queue_is_counted():
    engine = Engine(TableModel(max_rows=1))
    first, second, third = (submit(engine, 3, seed=seed) for seed in range(3))
    engine.cancel(third)
    engine.run()
    assert first.stats.queue_s > 0
    assert first.stats.model_s < second.stats.queue_s < second.stats.wall_s
    assert third.stats.queue_s > 0
    assert second.stats.to_dict()["queue_s"] == round(second.stats.queue_s, 6)
