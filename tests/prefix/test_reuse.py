from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
import torch

import chordal
from chordal.decoders.autoregressive import Autoregressive
from chordal.decoders.decoder import Decoder
from chordal.engine import Engine
from chordal.errors import InputError
from chordal.forward import Blocks, Causal, Forward, Full, Logits, Loops, Together, Visible
from chordal.models.family import Family
from chordal.ops.sampling import Law
from chordal.prefix.groups import PrefixGroup, group_prompts
from chordal.prefix.reuse import is_out_of_memory, plain_span, without_rows
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import TINY_POISON, CountingModel, TableModel, tiny_model
from chordal.testing.toys import ToyModel

PAGE = 4
MIB = 2**20


class BlockTable(ToyModel):
    """A block model whose token depends on all that it sees, so that a wrong cache is a wrong text."""

    def __init__(self, max_rows=64):
        family = Family(kind="block", mask_id=5, shift=0, block_length=4)
        super().__init__(family, 6, window=64, max_rows=max_rows, name="block table")

    def logits(self, position, view):
        return np.random.default_rng([position, *(view + 1)]).standard_normal(6)


class Script(Decoder):
    name, family, promise, needs, paper, Config = "script", "autoregressive", "exact", ("causal",), "-", dict

    def __init__(self, script):
        super().__init__()
        self.script = script

    def decode(self, seq):
        return self.script(seq)


def engine_of(models, *, num_bytes=MIB, page=PAGE, **more):
    return Engine(models, prefix_cache_bytes=num_bytes, prefix_page_tokens=page, **more)


def make(model, prompt, *, seed=0, length=5, law=Law(), salt=""):  # noqa: B008
    stop = StopRules(max_new_tokens=length)
    return Sequence(prompt=prompt, family=model.family, stop=stop, law=law, seed=seed, cache_salt=salt)


def run(engine, prompts, decoder=None, *, tick=None, **more):
    """Decode prompts, each with its number as seed; some may come later, as `tick` says of each."""
    seqs = [make(engine.target, prompt, seed=seed, **more) for seed, prompt in enumerate(prompts)]
    now = 0
    while now == 0 or engine.has_work or (tick is not None and now <= max(tick)):
        for at, seq in enumerate(seqs):
            if (0 if tick is None else tick[at]) == now:
                engine.submit(decoder or Autoregressive(), seq)
        engine.step()
        now += 1
    for seq in seqs:
        if seq.error is not None:
            raise seq.error
    return seqs


def outputs(seqs):
    return [seq.output.tolist() for seq in seqs]


def fed(seqs, name="target"):
    return [seq.stats.positions_fed.get(name, 0) for seq in seqs]


def cached(seqs):
    return [seq.stats.cached_tokens for seq in seqs]


def decoder_of(name):
    """Some read rows of the prompt, which must be fed for that; here few."""
    settings = {
        "first_finish": {"num_samples": 2},
        "token_recycling": {"recycle_prompt": 2},
        "renoise": {"num_steps": 3},
    }
    return make_decoder(name, settings.get(name))


def prompt_family(rng, num, *, letters, longest=36):
    """Prompts whose beginnings form a random tree."""
    texts = [rng.integers(0, letters, rng.integers(1, 12))]
    for _ in range(num - 1):
        parent = texts[rng.integers(0, len(texts))]
        parent = parent[: rng.integers(0, len(parent) + 1)]
        texts.append(np.concatenate([parent, rng.integers(0, letters, rng.integers(1, 14))])[:longest])
    return texts


# The promise: nothing changes but what is fed.

TOYS = {
    "causal": lambda seed=0: TableModel(seed=seed, max_rows=7),
    "block": lambda seed=0: BlockTable(max_rows=7),
}
DECODERS = [
    ("causal", "autoregressive"),
    ("causal", "prompt_lookup"),
    ("causal", "draft_model"),
    ("causal", "rsd"),
    ("causal", "token_recycling"),
    ("causal", "pearl"),
    ("causal", "jacobi"),
    ("causal", "first_finish"),
    ("block", "block_diffusion"),
    ("block", "fast_dllm_v2"),
    ("block", "s2d2"),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("kind", "name"), DECODERS)
def test_200_prompts_of_a_random_tree_give_what_they_give_without_sharing(kind, name, temperature):
    """Coming in at random ticks, on a bound that drops pages all the time and on one that drops none."""
    rng = np.random.default_rng([len(name), int(temperature)])
    prompts = prompt_family(rng, 200 if name in ("autoregressive", "block_diffusion") else 60, letters=4)
    law = Law(temperature=temperature)

    def models():
        return {"target": TOYS[kind](), "draft": TableModel(seed=1, max_rows=7)}

    want = run(Engine(models()), prompts, decoder_of(name), law=law)
    ticks = np.sort(rng.integers(0, 40, len(prompts))).tolist()
    for num_bytes in (MIB, 40 * PAGE * 16):
        engine = engine_of(models(), num_bytes=num_bytes)
        got = run(engine, prompts, decoder_of(name), law=law, tick=ticks)
        assert outputs(got) == outputs(want)
        assert sum(cached(got)) > 100
        assert engine.prefix_bytes <= num_bytes
        looked_up = [prompt for prompt in prompts if kind == "causal" or len(prompt) >= PAGE]
        assert engine.prefix_queries == sum(map(len, looked_up))
        # What was not fed is what was cached, wherever each position is fed as often as without.
        if name in ("autoregressive", "block_diffusion", "fast_dllm_v2", "s2d2"):
            assert [a - b for a, b in zip(fed(want), fed(got), strict=True)] == cached(got)


TINY = [
    ("causal", "autoregressive"),
    ("causal", "token_recycling"),
    ("causal", "draft_model"),
    ("causal", "first_finish"),
    ("block", "block_diffusion"),
    ("block", "fast_dllm_v2"),
    ("block", "s2d2"),
    ("masked_causal", "wedlm"),
    ("uniform", "renoise"),
]


@pytest.mark.parametrize(("kind", "name"), TINY)
def test_models_with_real_attention_give_what_they_give_without_sharing(kind, name):
    """Float64, so that another shape of a batch does not show."""
    rng = np.random.default_rng(3)
    prompts = prompt_family(rng, 24, letters=20)
    for law in (Law(), Law(temperature=1.0)):
        models = {"target": tiny_model(kind, max_rows=7), "draft": tiny_model(seed=1, max_rows=7)}
        want = run(Engine(models), prompts, decoder_of(name), law=law)
        got = run(engine_of(models), prompts, decoder_of(name), law=law)
        assert outputs(got) == outputs(want)
        assert sum(cached(got)) > 40


@pytest.mark.parametrize("arch", ["llama", "olmoe", "glm4_moe"])
def test_other_architectures_share_too(arch):
    """Among them mixtures of experts; those with sliding windows are of the uniform kind above."""
    rng = np.random.default_rng(4)
    prompts = prompt_family(rng, 20, letters=20)
    model = tiny_model(arch=arch, max_rows=7)
    want = run(Engine(model), prompts)
    got = run(engine_of(model), prompts)
    assert outputs(got) == outputs(want)
    assert sum(cached(got)) > 40


@pytest.mark.parametrize(
    ("name", "decoder"), [("tiny-ar", "autoregressive"), ("tiny-block", "block_diffusion")]
)
def test_bundled_models_share_a_header(name, decoder):
    header = "sort: Mia Leo Ana Ben Cleo Dan Eva Finn Gus Hal " * 3
    prompts = [f"{header}{who}" for who in ("Ida", "Jon", "Kim", "Lou")]
    shared, plain = chordal.load(name), chordal.load(name, prefix_cache_mib=0)
    got = shared.generate(prompts, decoder=decoder, max_new_tokens=16)
    want = plain.generate(prompts, decoder=decoder, max_new_tokens=16)
    assert [one.text for one in got] == [one.text for one in want]
    assert [one.stats["cached_tokens"] > 0 for one in got] == [False, True, True, True]
    assert all(one.stats["cached_tokens"] == 0 for one in want)


@pytest.mark.parametrize("decoder", ["block_diffusion", "wedlm", "pearl"])
def test_the_conformance_suite_passes_on_a_store_that_knows_every_prompt(decoder, monkeypatch):
    """All engines on a model have one store, with pages of a token, or of a block."""
    stores = {}

    def make_engine(models, **more):
        engine = Engine(models, prefix_cache_bytes=16 * MIB, prefix_page_tokens=1, **more)
        inner = {name: getattr(model, "model", None) for name, model in engine.models.items()}
        known = [
            id(inner[name] if isinstance(model, CountingModel) else model)
            for name, model in engine.models.items()
        ]
        if "target" in engine.models and not isinstance(engine.target, TableModel):
            engine._reuse.store = stores.setdefault(tuple(known), engine._reuse.store)
        return engine

    conformance = importlib.import_module("chordal.testing.conformance")
    monkeypatch.setattr(conformance, "Engine", make_engine)
    conformance.conformance(decoder)
    assert sum(store.num_bytes for store in stores.values()) > 0


# How much is fed.


def test_what_is_fed_follows_from_the_pages():
    """The first feeds all, each later one what is not in whole pages of those before, and its last token."""
    engine = engine_of(TableModel())
    header = np.arange(13) % 4
    tails = [[0, 1], [1, 2, 3], [0, 1, 2, 2], [0, 1, 2, 2]]
    prompts = [np.concatenate([header, tail]) for tail in tails]
    seqs = run(engine, prompts, tick=[0, 2, 4, 6])
    # Lengths 15, 16, 17, 17; pages that are there: 0, 3, 3, 4.
    assert cached(seqs) == [0, 12, 12, 16]
    assert fed(seqs) == [15 + 4, 4 + 4, 5 + 4, 1 + 4]
    assert (engine.prefix_queries, engine.prefix_hits) == (65, 40)
    # Of a prompt that is there whole the last token is fed all the same.
    [again] = run(engine, [prompts[1]])
    assert (cached([again]), fed([again])) == ([15], [1 + 4])


def test_generated_tokens_are_not_shared():
    engine = engine_of(TableModel())
    [first] = run(engine, [np.arange(8) % 4], length=12)
    [second] = run(engine, [first.tokens[:20]])
    assert cached([second]) == [8]


def test_off_is_off():
    model = CountingModel(TableModel())
    engine = Engine(model)
    seqs = run(engine, [np.arange(12) % 4] * 3)
    assert cached(seqs) == [0, 0, 0]
    assert (engine.prefix_queries, engine.prefix_hits, engine.prefix_bytes) == (0, 0, 0)
    assert [len(call) for call in model.calls] == [3] * 5
    with pytest.raises(InputError, match="at least 0 bytes and pages of at least 1 token"):
        Engine(model, prefix_cache_bytes=-1)
    with pytest.raises(InputError, match="got 1 and 0"):
        Engine(model, prefix_cache_bytes=1, prefix_page_tokens=0)


def test_a_prefill_that_is_there_whole_is_not_run():
    counting = CountingModel(tiny_model("uniform"))
    engine = engine_of(counting)
    prompt = np.arange(8)
    for prefills in (1, 0):
        counting.calls.clear()
        [seq] = run(engine, [prompt], make_decoder("renoise"))
        assert seq.stats.prefills == prefills
        assert seq.stats.positions_fed["target"] == sum(
            len(forward.tokens) for call in counting.calls for _, forward in call
        )
    assert cached([seq]) == [8]


@pytest.mark.parametrize("kind", ["masked", "looped"])
def test_models_whose_cache_depends_on_more_share_nothing(kind):
    model = tiny_model(arch="looped") if kind == "looped" else tiny_model(kind)
    engine = engine_of(model)
    seqs = run(engine, [np.arange(12)] * 3, make_decoder(model.family.default_decoder))
    assert cached(seqs) == [0, 0, 0]
    assert (engine.prefix_queries, engine.prefix_bytes, engine.prefix_unit) == (0, 0, None)


def test_the_draft_model_shares_for_itself():
    engine = engine_of({"target": TableModel(), "draft": TableModel(seed=1)})
    seqs = run(engine, [np.arange(14) % 4] * 2, make_decoder("draft_model"), tick=[0, 30])
    assert fed(seqs)[0] - fed(seqs)[1] == 12
    assert fed(seqs, "draft")[0] - fed(seqs, "draft")[1] == 12
    assert cached(seqs) == [0, 12]


def test_models_that_run_at_the_same_time_share_as_well():
    prompts = prompt_family(np.random.default_rng(5), 30, letters=4)
    models = {"target": TableModel(max_rows=5), "draft": TableModel(seed=1, max_rows=5)}
    want = run(Engine(models), prompts, make_decoder("pearl"))
    got = run(engine_of(models, concurrent=True), prompts, make_decoder("pearl"))
    assert outputs(got) == outputs(want)
    assert sum(cached(got)) > 60


def test_salts_share_nothing():
    engine = engine_of(TableModel())
    prompt = np.arange(12) % 4
    for salt, want in (("", 0), ("a", 0), ("b", 0), ("a", 11), ("", 11)):
        [seq] = run(engine, [prompt], salt=salt)
        assert cached([seq]) == [want]
    # Nor do they wait for each other.
    model = CountingModel(TableModel())
    engine = engine_of(model)
    seqs = [make(model, np.arange(60) % 4, salt=salt) for salt in "abcd"]
    for seq in seqs:
        engine.submit(Autoregressive(), seq)
    engine.step()
    assert sum(len(call) for call in model.calls) == 4


# Many at once.


def test_of_a_burst_one_computes_what_all_share_and_the_others_wait_a_tick():
    model = CountingModel(TableModel())
    engine = engine_of(model)
    prompts = [np.r_[np.arange(40) % 4, tail, 0] for tail in (0, 1, 2)]
    seqs = [engine.submit(Autoregressive(), make(model, prompt)) for prompt in prompts]
    engine.step()
    assert [[(row, len(forward.tokens)) for row, forward in call] for call in model.calls] == [[(0, 42)]]
    engine.step()
    assert sorted((row, len(forward.tokens)) for row, forward in model.calls[1]) == [(0, 1), (1, 2), (2, 2)]
    engine.run()
    assert cached(seqs) == [0, 40, 40]


def test_nobody_waits_for_what_spares_less_than_a_pass():
    model = CountingModel(TableModel())
    engine = engine_of(model)
    for tail in (0, 1):
        engine.submit(Autoregressive(), make(model, np.r_[np.arange(40) % 4, tail]))
    engine.step()
    assert [len(call) for call in model.calls] == [2]


@pytest.mark.parametrize("end", ["cancel", "fail", "poison"])
def test_nobody_waits_for_one_that_is_gone(end):
    """The first of a burst is cancelled, raises, or has numbers that cannot be shared."""
    model = tiny_model()
    engine = engine_of(model)
    header = np.arange(40) % 20
    if end == "poison":
        header[20] = TINY_POISON
    prompts = [np.r_[header, tail] for tail in range(4)]
    seqs = [make(model, prompt, seed=at) for at, prompt in enumerate(prompts)]

    def fail(seq):
        raise RuntimeError("broken")
        yield

    def fail_after(seq):
        at = np.arange(seq.num_prompt)
        yield Forward(seq.prompt, at, Causal(), Logits(at[-1:]), slots=at)
        raise RuntimeError("broken")

    engine.submit(Script(fail_after) if end == "fail" else Autoregressive(), seqs[0])
    for seq in seqs[1:]:
        engine.submit(Autoregressive(), seq)
    if end == "cancel":
        engine.cancel(seqs[0])
    ticks = 0
    while engine.has_work:
        engine.step()
        ticks += 1
        assert ticks < 30
    if end == "poison":
        assert [seq.finish_reason for seq in seqs] == ["error"] * 4
        assert engine.prefix_bytes == 0
    else:
        assert [seq.finish_reason for seq in seqs[1:]] == ["length"] * 3
        assert cached(seqs)[2:] == [40, 40]


def test_a_store_without_room_holds_nobody_up():
    model = CountingModel(TableModel())
    engine = engine_of(model, num_bytes=1)
    seqs = run(engine, [np.r_[np.arange(40) % 4, tail] for tail in range(4)] * 3)
    assert len(model.calls) < 5 + 5 + 4
    assert cached(seqs) == [0] * 12


def test_cancelling_at_random_ticks_leaves_what_is_kept_right():
    rng = np.random.default_rng(6)
    prompts = prompt_family(rng, 120, letters=4)
    want = outputs(run(Engine(TableModel(max_rows=6)), prompts, law=Law(temperature=1.0)))
    engine = engine_of(TableModel(max_rows=6), num_bytes=60 * PAGE * 16)
    seqs = [make(engine.target, one, seed=at, law=Law(temperature=1.0)) for at, one in enumerate(prompts)]
    todo = list(seqs)
    while todo or engine.has_work:
        for _ in range(rng.integers(0, 5)):
            if todo:
                engine.submit(Autoregressive(), todo.pop(0))
        engine.step()
        if rng.random() < 0.4:
            engine.cancel(seqs[rng.integers(0, len(seqs) - len(todo))] if len(todo) < len(seqs) else seqs[0])
    ended = [seq.finish_reason for seq in seqs]
    assert ended.count("cancelled") > 10
    assert ended.count("length") > 40
    for seq, text in zip(seqs, want, strict=True):
        assert seq.output.tolist() == (text if seq.finish_reason == "length" else text[: len(seq.output)])


# Groups.


def test_a_group_computes_its_prefix_once_and_keeps_nothing():
    """As many tokens are fed as the groups say, on fewer rows than members."""
    rng = np.random.default_rng(7)
    model = TableModel(max_rows=3)
    prompts = [
        np.concatenate([header, rng.integers(0, 4, rng.integers(2, 6))])
        for header in (rng.integers(0, 4, 24), rng.integers(0, 4, 16))
        for _ in range(5)
    ]
    order = rng.permutation(len(prompts))
    prompts = [prompts[at] for at in order]
    groups = group_prompts([prompt[:-1] for prompt in prompts], [5] * len(prompts), unit=PAGE)
    engine, most = engine_of(model), 0
    seqs = [make(model, prompt, seed=at) for at, prompt in enumerate(prompts)]

    def watch(index):
        nonlocal most
        most = max(most, engine.prefix_bytes)

    engine.complete([(Autoregressive(), seq) for seq in seqs], watch, groups=groups)
    assert sum(cached(seqs)) == sum(group.num_spared for group in groups) == 4 * 24 + 4 * 16
    assert 0 < most <= 40 * 16
    assert engine.prefix_bytes == 0
    plain = Engine(model)
    assert outputs(seqs) == outputs(run(plain, prompts))


def test_groups_that_are_interrupted_let_go_too():
    engine = engine_of(TableModel(max_rows=2))
    seqs = [make(engine.target, np.r_[np.arange(20) % 4, at % 4], length=3 + at) for at in range(4)]

    def stop(index):
        raise KeyboardInterrupt

    groups = [PrefixGroup(20, (2, 0, 1, 3))]
    with pytest.raises(KeyboardInterrupt):
        engine.complete([(Autoregressive(), seq) for seq in seqs], stop, groups=groups)
    assert engine.prefix_bytes == 0
    assert not engine.has_work


def test_results_keep_their_order_and_do_not_depend_on_it():
    model = chordal.load("tiny-ar")
    names = ["Ida", "Jon", "Kim", "Lou"]
    prompts = [f"{task} Mia Leo Ana Ben Cleo {name}" for name in names for task in ("sort:", "reverse:")]
    settings = {"max_new_tokens": 12, "temperature": 0.8, "seed": 3}
    want = [one.text for one in model.generate(prompts, group_prefixes=False, **settings)]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
        got = model.generate([prompts[at] for at in order], **settings)
        assert [one.prompt for one in got] == [prompts[at] for at in order]
        assert [one.text for one in got] == [want[at] for at in order]


# What may be left out of a request.

PROMPT = np.arange(10, 20)


def request(start, end, sees=None, *, tokens=None, positions=None, slots=None, read=None, **more):
    at = np.arange(start, end)
    return Forward(
        (np.arange(10, 40)[start:end] if tokens is None else np.array(tokens)),
        at if positions is None else np.array(positions),
        sees or Causal(),
        None if read is None else Logits(np.array(read)),
        slots=at if slots is None else np.array(slots),
        **more,
    )


def visible(start, end, **more):
    at = np.arange(start, end)
    return Visible(np.zeros_like(at), at + 1, **more)


@pytest.mark.parametrize(
    ("forward", "block", "span"),
    [
        (request(0, 10), 1, (0, 10)),
        (request(0, 14), 1, (0, 10)),  # what is not the prompt does not count
        (request(3, 8), 1, (3, 8)),
        (request(10, 12), 1, (10, 10)),
        (request(0, 4, tokens=[10, 11, 0, 13]), 1, (0, 2)),
        (request(0, 4, positions=[0, 1, 3, 2]), 1, (0, 2)),
        (request(0, 4, slots=[0, 1, 0, 3]), 1, (0, 0)),  # a later row writes there
        (request(0, 4, slots=[0, 1, 5, 6]), 1, (0, 2)),
        (request(0, 6, Full(6)), 1, (0, 0)),
        (request(0, 6, Together()), 1, (0, 0)),
        (request(0, 6, visible(0, 6)), 1, (0, 6)),
        (request(0, 6, visible(0, 6, own=np.zeros((6, 6), bool))), 1, (0, 6)),
        (request(0, 6, visible(0, 6, own=np.eye(6, dtype=bool))), 1, (0, 0)),
        (request(0, 6, visible(0, 6, hidden=np.array([9]))), 1, (0, 0)),
        (request(0, 4, visible(0, 4, seen=np.tri(4, 8, dtype=bool))), 1, (0, 4)),
        (request(0, 4, visible(0, 4, seen=np.tri(4, 8, k=1, dtype=bool))), 1, (0, 0)),
        (request(0, 3, Visible(np.array([0, 0, 1]), np.arange(1, 4))), 1, (0, 2)),
        (request(0, 6, loops=Loops(2)), 1, (0, 0)),
        (request(0, 6, inject=torch.zeros(6, 3)), 1, (0, 0)),
        (request(0, 6, Blocks(4)), 4, (0, 4)),
        (request(0, 14, Blocks(4)), 4, (0, 8)),  # the block that the prompt ends in has other tokens
        (request(0, 8, Blocks(4), tokens=[10, 11, 12, 13, 14, 15, 0, 17]), 4, (0, 4)),
        (request(0, 8, Blocks(2)), 4, (0, 0)),
        (request(0, 8), 4, (0, 0)),
        (request(6, 8, Blocks(4)), 4, (6, 8)),
    ],
)
def test_plain_rows(forward, block, span):
    assert plain_span(forward, PROMPT, block) == span


def test_a_request_without_its_first_rows_reads_the_same():
    seen, own = np.tri(6, 9, dtype=bool), np.tri(6, dtype=bool)
    forward = request(0, 6, visible(0, 6, own=own, seen=seen), read=[3, 5])
    left = without_rows(forward, 2)
    assert left.tokens.tolist() == [12, 13, 14, 15]
    assert left.positions.tolist() == left.slots.tolist() == [2, 3, 4, 5]
    assert left.read.rows.tolist() == [1, 3]
    assert left.sees.end.tolist() == [3, 4, 5, 6]
    assert np.array_equal(left.sees.own, own[2:, 2:])
    assert np.array_equal(left.sees.seen, seen[2:])
    assert without_rows(request(0, 3), 3) is None


def test_what_is_overwritten_is_neither_left_out_nor_kept():
    """The second pass feeds other tokens than the prompt's, the third the prompt again."""
    prompt = np.arange(12) % 4
    other = prompt.copy()
    other[5] = 3 - other[5]
    engine = engine_of(TableModel())
    run(engine, [prompt])
    readings = []

    def script(seq):
        at = np.arange(12)
        for tokens in (prompt, other, prompt):
            reading = yield Forward(tokens, at, Causal(), Logits(at[-1:]), slots=at)
            readings.append(reading.logits[0])
        seq.append(np.zeros(5, np.int64))

    [seq] = run(engine, [prompt], Script(script))
    assert cached([seq]) == [11]
    assert seq.stats.positions_fed == {"target": 1 + 7 + 7}
    assert torch.equal(readings[0], readings[2])
    assert outputs(run(engine, [other])) == outputs(run(Engine(TableModel()), [other]))


def test_errors_of_too_little_memory_are_known():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("broken"))


@pytest.mark.parametrize("method", ["read_slots", "write_slots"])
def test_without_memory_to_share_nothing_is_shared(method, monkeypatch):
    model = TableModel()
    engine = engine_of(model)
    prompt = np.arange(12) % 4
    if method == "write_slots":
        run(engine, [prompt])

    def fail(*given):
        raise MemoryError

    monkeypatch.setattr(model, method, fail)
    got = run(engine, [prompt] * 3)
    assert cached(got) == [0, 0, 0]
    assert outputs(got) == outputs(run(Engine(TableModel()), [prompt] * 3))


def test_a_family_tells_whether_its_prompts_can_be_shared():
    model = TableModel()
    for family, unit in (
        (Family(kind="causal"), 16),
        (Family(kind="masked_causal", mask_id=1), 16),
        (Family(kind="uniform", block_length=10), 16),
        (Family(kind="block", mask_id=1, block_length=10), 20),
        (Family(kind="block", mask_id=1, block_length=32), 32),
        (Family(kind="masked", mask_id=1), None),
        (dataclasses.replace(Family(kind="causal"), num_loops=4), None),
    ):
        model.family = family
        assert Engine(model, prefix_cache_bytes=1).prefix_unit == unit
