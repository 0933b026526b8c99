from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from chordal.decoders.decoder import Decoder
from chordal.decoders.ete import ETE, explore_then_exploit
from chordal.engine import Engine
from chordal.errors import InputError
from chordal.fields import make_config
from chordal.forward import Together
from chordal.models.family import Family
from chordal.ops.randomness import uniforms
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import (
    TINY_MASK,
    CountingModel,
    IdealModel,
    ToyModel,
    ideal,
    random_prompt,
    simulate,
    tiny_model,
)

CANVAS, BLOCK = 14, 4


def ete(predict, prompt, *, K=4, tau=0.9, m=2, lam=1.0, W=2, tau_eos=0.99, eos=(), length=CANVAS):
    """Explore-then-exploit for one row without a cache, greedy.

    `predict(canvas)` gives the logits of every position. Gives the tokens, the round that filled each, and
    of each round: tokens filled, their -log p, canvases run, explored position.
    """
    x, size = torch.tensor([*prompt, *[TINY_MASK] * length]), len(prompt) + length
    filled_in, guess, rounds, now = [0] * size, None, [], 0
    while (x == TINY_MASK).any():
        now += 1
        masked = (x == TINY_MASK).nonzero()[:, 0].tolist()
        start = masked[0] - (masked[0] - len(prompt)) % BLOCK
        end, stop = min(start + BLOCK, size), min(start + W * BLOCK, size)
        targets = [p for p in masked if p < stop and (guess is None or p != guess[0])]
        worlds = []
        for token, prob in [(None, 1.0)] if guess is None else guess[1]:
            y = x.clone()
            if guess is not None:
                y[guess[0]] = token
            laws = {p: law.softmax(0) for p, law in enumerate(predict(y)) if p in targets}
            sure = []
            for p, law in laws.items():
                best = int(law.argmax())
                is_early = best in eos and p >= end
                if law[best] >= (max(tau, tau_eos) if is_early else tau):
                    sure.append(p)
            cascade = sum(int(laws[p].argmax()) not in eos for p in sure)
            worlds.append((math.log(prob) + lam * cascade, laws, sure))
        kept = max(range(len(worlds)), key=lambda k: (worlds[k][0], -k))
        _, laws, sure = worlds[kept]
        if m == 0 and not sure:
            sure = [max((p for p in targets if p < end), key=lambda p: (float(laws[p].max()), -p))]
        new = [(p, int(laws[p].argmax()), float(laws[p].max())) for p in sure]
        explored = None if guess is None else guess[0]
        if guess is not None:
            new.append((guess[0], *guess[1][kept]))
        guess, left = None, [p for p in targets if p not in sure]
        if len(sure) < m and left:
            block = [p for p in left if (p - len(prompt)) // BLOCK == (left[0] - len(prompt)) // BLOCK]
            at = max(block, key=lambda p: (float(torch.special.entr(laws[p]).sum()), -p))
            top = laws[at].sort(descending=True, stable=True)
            tried = [(int(v), float(q)) for v, q in zip(top.indices[:K], top.values[:K], strict=True)]
            if len(left) == 1 or K == 1:
                new.append((at, *tried[0]))
            else:
                guess = at, tried
        for p, token, _ in new:
            x[p], filled_in[p] = token, now
        rounds.append((len(new), -sum(math.log(q) for *_, q in new), len(worlds), explored))
    return x[len(prompt) :].tolist(), filled_in[len(prompt) :], rounds


@pytest.fixture
def predict(cacheless):
    """Gives the logits by predicted position of a canvas, for a shift."""

    def predict(shift):
        def run(canvas):
            logits = cacheless(canvas.numpy()).clone()
            logits[:, TINY_MASK] = -torch.inf
            return logits if shift == 0 else torch.cat([logits[:1], logits[:-1]])

        return run

    return predict


class Logging(Decoder):
    """The decoder with its rounds kept."""

    name, family, promise, needs, paper = "logging", "diffusion", "approximate", ("masked",), "-"
    Config = ETE.Config

    def __init__(self, settings):
        super().__init__(make_config(ETE.Config, settings))
        self.rounds = {}

    def decode(self, seq):
        yield from explore_then_exploit(seq, self.config, self.rounds.setdefault(id(seq), []))

    def of(self, seq):
        return self.rounds[id(seq)]


NAMES = {
    "K": "num_branches",
    "tau": "threshold",
    "m": "explore_below",
    "lam": "cascade_weight",
    "W": "window_blocks",
    "tau_eos": "eos_threshold",
}
KNOBS = [
    {"tau": 0.3},
    {"tau": 0.25, "m": 99},
    {"tau": 0.3, "K": 1},
    {"tau": 0.3, "K": 2, "lam": 0.2, "W": 1},
    {"tau": 0.25, "lam": 0.0, "W": 3, "m": 3},
    {"tau": 0.2, "m": 0, "W": 2, "tau_eos": 0.4},
    {"tau": 2.0, "m": 1},
]


def settings_of(knobs):
    return {"block_length": BLOCK} | {NAMES[name]: value for name, value in knobs.items()}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_tokens_order_and_bookkeeping_equal_a_plain_loop_without_cache(
    predict, decode, prompts, assert_same_commits, knobs, shift
):
    model = CountingModel(tiny_model("masked", shift=shift))
    model.family = dataclasses.replace(model.family, eos_ids=(21, 28))  # these models say them often
    decoder, given = Logging(settings_of(knobs)), prompts(5)
    seqs = decode(model, decoder, prompts=given, max_new_tokens=CANVAS)
    wanted = [ete(predict(shift), prompt, eos=(21, 28), **knobs) for prompt in given]
    assert_same_commits(seqs, [(tokens, forwards) for tokens, forwards, _ in wanted])
    for seq, (_, _, rounds) in zip(seqs, wanted, strict=True):
        got = decoder.of(seq)
        assert [(r.num_committed, r.num_branches, r.explored) for r in got] == [
            (num, branches, explored) for num, _, branches, explored in rounds
        ]
        assert [r.information for r in got] == pytest.approx([nats for _, nats, _, _ in rounds])
        assert seq.stats.rows == sum(r.num_branches for r in got)
        assert seq.stats.forwards["target"] == len(got)


@pytest.mark.parametrize(
    "law", [Law(), Law(temperature=0.9, repetition_penalty=1.2)], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("feed", ["whole", "prefix", "dual"])
@pytest.mark.parametrize("shift", [0, 1])
def test_without_exploring_and_with_one_block_it_is_threshold(tiny, decode, prompts, feed, shift, law):
    shared = {"threshold": 0.25, "feed": feed, "block_length": BLOCK}
    ours, reference = (
        decode(
            tiny("masked", shift=shift), name, more | shared, prompts=prompts(6), max_new_tokens=13, law=law
        )
        for name, more in (
            ("ete", {"explore_below": 0, "window_blocks": 1, "num_branches": 1, "cascade_weight": 0.0}),
            ("threshold", {}),
        )
    )
    for one, other in zip(ours, reference, strict=True):
        assert one.output.tolist() == other.output.tolist()
        assert one.committed_at.tolist() == other.committed_at.tolist()
        assert one.stats.positions_fed == other.stats.positions_fed


class Groups(ToyModel):
    """Groups of equal tokens: whatever is revealed first, one of four with the same chance, all repeat."""

    def __init__(self, num_groups, size, *, shift=0):
        family = Family(kind="masked", mask_id=6, shift=shift)
        super().__init__(family, 7, window=1 + num_groups * size)
        self.size = size

    def logits(self, position, view):
        at = position + self.family.shift
        if not 1 <= at < self.window:
            return np.zeros(7)
        start = at - (at - 1) % self.size
        known = view[start : start + self.size]
        known = known[(known >= 0) & (known != 6)]
        with np.errstate(divide="ignore"):
            return np.log([*(np.arange(4) == known[0]), 0, 0, 0] if len(known) else [0.25] * 4 + [0] * 3)


@pytest.mark.parametrize("feed", ["whole", "prefix", "dual"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("num_groups", "size"), [(1, 4), (3, 2), (5, 4), (8, 3)])
def test_groups_take_two_rounds_each_by_confidence_and_one_by_exploring(
    decode, num_groups, size, shift, feed
):
    """g groups: 2g rounds; exploring the next group while the last is exploited g + 1."""
    model, length = Groups(num_groups, size, shift=shift), num_groups * size
    shared = {"prompts": [[0]], "max_new_tokens": length}
    [plain] = decode(model, "threshold", {"block_length": None, "feed": feed}, **shared)
    assert plain.stats.forwards["target"] == 2 * num_groups
    [seq] = decode(model, "ete", {"block_length": None, "feed": feed, "explore_below": length}, **shared)
    assert seq.stats.forwards["target"] == num_groups + 1
    # The first round looks at one canvas, the others at four; caches are refreshed once.
    assert seq.stats.rows == 1 + 4 * num_groups
    groups = seq.output.reshape(num_groups, size)
    assert (groups == groups[:, :1]).all()
    # Exploring only where little is exploited, a group still takes two rounds.
    if size > 2:
        [seldom] = decode(model, "ete", {"block_length": None, "explore_below": 1}, **shared)
        assert seldom.stats.forwards["target"] == 2 * num_groups


@pytest.mark.parametrize("block_length", [4, 6])
def test_blocks_that_are_open_together_are_explored_and_exploited_together(decode, block_length):
    """Four groups of 4 in blocks of 4: g + 1 rounds as soon as the next block is open."""
    model, rounds = Groups(4, 4), []
    for window_blocks in (1, 2):
        settings = {"block_length": block_length, "window_blocks": window_blocks, "explore_below": 9}
        [seq] = decode(model, "ete", settings, prompts=[[0]], max_new_tokens=16)
        rounds.append(seq.stats.forwards["target"])
    assert rounds[1] == 5
    assert rounds[0] > 5


def test_the_information_of_a_text_is_that_of_its_path():
    """Any order of 4 items: log 4! nats, as long as only what follows is committed beside others."""
    for noise, prompt in ((0.0, 1), (1e-6, 7)):
        model = IdealModel(ideal.shuffle(4), noise=noise)
        decoder = Logging({"explore_below": 9})
        seq = Sequence(prompt=model.prompt(prompt), family=model.family, stop=StopRules(max_new_tokens=4))
        engine = Engine(model)
        engine.submit(decoder, seq)
        engine.run()
        assert model.is_valid(seq.output)
        assert sum(r.information for r in decoder.of(seq)) == pytest.approx(math.log(24), abs=1e-5)
        # The budget of a round: at most one token of its own choice, the rest follows.
        assert max(r.information for r in decoder.of(seq)) == pytest.approx(math.log(4), abs=1e-5)


def test_a_round_by_confidence_alone_carries_no_more_than_its_threshold_allows(decode, prompts):
    """At most log(1/tau) nats a token, but for the one that is forced."""
    decoder = Logging({"threshold": 0.3, "explore_below": 0, "block_length": BLOCK})
    seqs = decode(tiny_model("masked"), decoder, prompts=prompts(6), max_new_tokens=CANVAS)
    budgets = [(r.information, r.num_committed * math.log(1 / 0.3)) for s in seqs for r in decoder.of(s)]
    forced = [r for s in seqs for r in decoder.of(s) if r.information > math.log(1 / 0.3) * r.num_committed]
    assert all(r.num_committed == 1 for r in forced)
    assert len(forced) < len(budgets)


@pytest.mark.parametrize("law", [Law(), Law(temperature=1.1, top_k=9)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("feed", ["whole", "prefix", "dual"])
@pytest.mark.parametrize("explore_below", [1, 2, 99])
@pytest.mark.parametrize("length", [1, 2, 7, 13])
def test_there_are_never_more_rounds_than_tokens(tiny, decode, prompts, feed, explore_below, length, law):
    settings = {
        "threshold": 0.6,
        "explore_below": explore_below,
        "block_length": BLOCK,
        "feed": feed,
    }
    for seq in decode(tiny("masked"), "ete", settings, prompts=prompts(4), max_new_tokens=length, law=law):
        assert seq.stats.forwards["target"] <= length
        assert len(seq.output) == length
        assert TINY_MASK not in seq.output


@pytest.mark.parametrize("feed", ["whole", "prefix", "dual"])
@pytest.mark.parametrize("shift", [0, 1])
def test_branches_differ_in_one_position_and_those_not_kept_leave_nothing(feed, shift):
    """Over every round with branches, slots of the cache that nobody is to refresh stay bit for bit."""
    model = tiny_model("masked", shift=shift, max_rows=1)
    counting, prompt = CountingModel(model), random_prompt(5)
    decoder = Logging({"threshold": 0.35, "block_length": BLOCK, "feed": feed})
    engine = Engine(counting)
    seq = Sequence(prompt=prompt, family=model.family, stop=StopRules(max_new_tokens=CANVAS))
    engine.submit(decoder, seq)
    num_shared = 0
    while not seq.done:
        canvas, held = seq.tokens.copy(), cached(model, seq.limit)
        engine.step()
        asked, last = [ask for _, ask in counting.calls[-1]], decoder.of(seq)[-1]
        if last.num_branches == 1:
            continue
        copies = [ask for ask in asked if ask.read is not None]
        assert len(copies) == last.num_branches
        tokens = np.stack([copy.tokens for copy in copies])
        at = int(np.flatnonzero(copies[0].positions == last.explored)[0])
        assert len(set(tokens[:, at].tolist())) == len(copies)
        assert (np.delete(tokens, at, 1) == np.delete(canvas[copies[0].positions], at)).all()
        assert all(copy.slots is None for copy in copies)
        # What is written, if anything, is what is committed.
        for ask in asked:
            if ask.read is None:
                assert np.array_equal(ask.tokens, canvas[: seq.limit])
        if len(asked) == len(copies) and feed != "whole":
            num_shared += 1
            assert torch.equal(cached(model, seq.limit), held)
        changed = np.flatnonzero(seq.tokens != canvas)
        assert set(changed[seq.tokens[changed] != canvas[changed]]) <= set(
            np.flatnonzero(canvas == TINY_MASK)
        )
    assert feed == "whole" or num_shared > 0


def cached(model, num):
    layers = model.cache.slot_layers
    if layers[0].keys is None or layers[0].keys.numel() == 0:
        return torch.zeros(0)
    return torch.stack([torch.stack([layer.keys[0, :, :num], layer.values[0, :, :num]]) for layer in layers])


class OneByOne(CountingModel):
    """Runs every request in a pass of its own."""

    def run(self, requests):
        return [reading for one in requests for reading in super(OneByOne, self).run([one])]


@pytest.mark.parametrize("feed", ["whole", "prefix", "dual"])
def test_branches_in_one_pass_give_the_same_choice_as_one_by_one(decode, prompts, feed):
    settings = {"threshold": 0.3, "block_length": BLOCK, "feed": feed}
    together, apart, again = (
        decode(model, "ete", settings, prompts=prompts(4), max_new_tokens=CANVAS)
        for model in (tiny_model("masked"), OneByOne(tiny_model("masked")), tiny_model("masked"))
    )
    for one, *others in zip(together, apart, again, strict=True):
        for other in others:
            assert one.output.tolist() == other.output.tolist()
            assert one.committed_at.tolist() == other.committed_at.tolist()


def test_the_approximate_feeds_feed_the_window_once_its_cache_is_filled():
    model = CountingModel(tiny_model("masked", shift=1))
    for feed, num_fed in (("dual", 8), ("prefix", 12)):
        model.calls.clear()
        engine = Engine(model)
        settings = {"threshold": 2.0, "block_length": 4, "feed": feed}
        seq = Sequence(prompt=random_prompt(5), family=model.family, stop=StopRules(max_new_tokens=12))
        engine.submit(make_decoder("ete", settings), seq)
        engine.run()
        lengths = [[len(ask.tokens) for _, ask in call] for call in model.calls]
        assert lengths[0] == [17]
        # Once the block's first token is there, nobody needs the row before it.
        assert [sizes for sizes in lengths if sizes[0] < 17][1][:1] in ([num_fed], [num_fed + 1])
        # A new window is opened beside four whole canvases, or alone.
        assert [17] * 5 in lengths


class Scripted(ToyModel):
    """Behind a prompt of one token, the law of each position is given, for each set of known ones.

    Args:
        script: Gives, for a dict of the known positions' tokens, the law `[V]` of a position.
        eos: Stop token.
    """

    def __init__(self, script, eos=7):
        super().__init__(Family(kind="masked", mask_id=9, shift=0, eos_ids=(eos,)), 10, window=40)
        self.script = script

    def logits(self, position, view):
        known = {p - 1: int(view[p]) for p in range(1, self.window) if view[p] not in (-1, 9)}
        law = np.full(10, 1e-12)
        for token, prob in self.script(position - 1, known).items():
            law[token] = prob
        return np.log(law)


def run(script, settings, length, **more):
    model, decoder = CountingModel(Scripted(script)), Logging(settings)
    seq = Sequence(prompt=np.array([0]), family=model.family, stop=StopRules(max_new_tokens=length, **more))
    engine = Engine(model)
    engine.submit(decoder, seq)
    engine.run()
    assert seq.error is None, seq.error
    return seq, decoder.of(seq)


def test_the_token_that_makes_most_others_certain_is_kept():
    """Position 0 is 1, 2 or 3; only after 2 are the others certain."""

    def script(at, known):
        if at == 0:
            return {1: 0.5, 2: 0.3, 3: 0.2}
        return {4: 0.95, 5: 0.05} if known.get(0) == 2 else {4: 0.6, 5: 0.4}

    seq, rounds = run(script, {}, 4)
    assert (seq.output.tolist(), seq.committed_at[1:].tolist()) == ([2, 4, 4, 4], [2, 2, 2, 2])
    assert [(r.explored, r.rank, r.num_branches) for r in rounds] == [(None, 0, 1), (1, 1, 4)]
    # What it is worth is weighed against its likelihood: log .5 - log .3 is .51 nats for 3 positions.
    for weight, token in ((0.18, 2), (0.16, 1), (0.0, 1)):
        seq, _ = run(script, {"cascade_weight": weight}, 4)
        assert seq.output[0] == token


def test_the_least_certain_position_of_the_first_unfinished_block_is_explored():
    laws = [{1: 0.7, 2: 0.3}, {1: 0.5, 2: 0.5}, {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}, {1: 0.8, 2: 0.2}]
    _, rounds = run(lambda at, known: laws[at], {"block_length": 2}, 4)
    assert [r.explored for r in rounds] == [None, 2, 1, 3]
    _, rounds = run(lambda at, known: laws[at], {"block_length": None}, 4)
    assert [r.explored for r in rounds] == [None, 3, 2, 1]
    # The last one goes with the round that finds nothing hanging on it.
    assert rounds[-1].num_committed == 2


def test_what_nothing_hangs_on_is_not_explored():
    seq, rounds = run(lambda at, known: {1: 0.6, 2: 0.4}, {}, 1)
    assert (len(rounds), seq.stats.rows, rounds[0].explored) == (1, 1, None)
    # A window of one block, with one mask left in it: no copy would tell anything.
    seq, rounds = run(lambda at, known: {1: 0.6, 2: 0.4}, {"block_length": 2, "window_blocks": 1}, 4)
    assert [r.num_branches for r in rounds] == [1, 4, 1, 4]


@pytest.mark.parametrize(
    ("confidence", "settings", "passes"),
    [
        (0.95, {}, [1, 1, 2, 2]),
        (0.995, {}, [1, 1, 1, 1]),
        (0.95, {"eos_threshold": 0.5}, [1, 1, 1, 1]),
        (0.95, {"threshold": 0.97, "eos_threshold": 0.5}, [1, 1, 2, 3]),
    ],
)
def test_a_stop_token_needs_more_behind_the_first_unfinished_block(confidence, settings, passes):
    def script(at, known):
        return {1: 0.98, 2: 0.02} if at < 2 else {7: confidence, 2: 1 - confidence}

    seq, _ = run(script, {"block_length": 2, "explore_below": 0} | settings, 4)
    assert seq.committed_at[1:].tolist() == passes


def test_stop_tokens_do_not_count_as_a_cascade():
    """To end at once makes all else certain, which nobody would see."""

    def script(at, known):
        if at == 0:
            return {1: 0.6, 7: 0.4}
        return {7: 0.999, 2: 0.001} if known.get(0) == 7 else {2: 0.95 if at == 1 else 0.8, 7: 0.04}

    seq, _ = run(script, {}, 8, eos_ids=(7,))
    assert seq.output[0] == 1


def test_the_text_ends_when_all_up_to_a_stop_token_is_committed():
    def script(at, known):
        return {7: 0.97, 1: 0.03} if at == 3 else {at % 3: 0.95 if at != 1 else 0.6, 4: 0.05}

    seq, _ = run(script, {"explore_below": 9}, 8, eos_ids=(7,))
    assert (seq.output.tolist(), seq.finish_reason) == ([0, 1, 2, 7], "stop")
    assert seq.stats.committed_tokens == 4


def test_sampling_tries_draws_and_prefers_the_first_unless_another_makes_more_certain(decode):
    """Draws must not be weighed by their likelihood once more: all tokens are kept as often as drawn."""
    cumulative, law, num_other = [0.4, 0.7, 1.0], Law(temperature=1.0), 0

    def script(at, known):
        if at == 1 and known.get(0) == 3:
            return {5: 0.95, 6: 0.05}
        return {1: 0.4, 2: 0.3, 3: 0.3} if at == 0 else {1: 0.35, 2: 0.35, 3: 0.3}

    for seed in range(20):
        model = CountingModel(Scripted(script))
        settings = {"num_branches": 2, "explore_below": 1, "block_length": 1, "window_blocks": 3}
        [seq] = decode(model, "ete", settings, prompts=[[0]], max_new_tokens=3, law=law, seeds=[seed])
        [number] = uniforms(seed, "token", [1], 0)
        first, other = (int(np.searchsorted(cumulative, (number + k / 2) % 1, "right")) + 1 for k in (0, 1))
        tried = [int(ask.tokens[1]) for _, ask in model.calls[1]]
        assert tried == list(dict.fromkeys([first, other]))
        assert seq.output[0] == (other if other == 3 else first)
        num_other += first != other == 3
        settings["num_branches"] = 1
        [one] = decode(
            Scripted(script), "ete", settings, prompts=[[0]], max_new_tokens=3, law=law, seeds=[seed]
        )
        assert one.output[0] == first
    assert num_other > 0


def test_a_hot_law_may_commit_what_has_no_probability():
    """Its information is infinite, which must not fail."""

    def script(at, known):
        return {1: 1.0}

    class Sharp(Scripted):
        def logits(self, position, view):
            return 30 * super().logits(position, view)

    decoder, model = Logging({"threshold": 0.0}), Sharp(script)
    law = Law(temperature=1000.0)
    seq = Sequence(prompt=np.array([0]), family=model.family, stop=StopRules(max_new_tokens=8), law=law)
    engine = Engine(model)
    engine.submit(decoder, seq)
    engine.run()
    assert (seq.error, len(seq.output)) == (None, 8)
    assert decoder.of(seq)[0].information == math.inf


def test_exploring_an_ideal_model_is_always_right():
    for answers in (ideal.shuffle(4), ideal.latin(3), ideal.insert_random(5)):
        model = IdealModel(answers, noise=1e-6)
        result = simulate(make_decoder("ete", {"explore_below": 1, "cascade_weight": 0.1}), model, 20)
        plain = simulate(make_decoder("threshold"), model, 20)
        assert result.accuracy == 1
        assert result.forwards.mean() <= plain.forwards.mean()


def test_canvases_that_are_fed_whole_need_no_cache(decode, prompts):
    model = CountingModel(tiny_model("masked"))
    decode(model, "ete", {"threshold": 0.3, "block_length": BLOCK}, prompts=prompts(1), max_new_tokens=8)
    assert all(
        ask.slots is None and isinstance(ask.sees, Together) for call in model.calls for _, ask in call
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_branches": 0}, "num_branches must be at least 1; got 0."),
        ({"threshold": -0.1}, "threshold must be at least 0; got -0.1."),
        ({"explore_below": -1}, "explore_below must be at least 0; got -1."),
        ({"cascade_weight": math.inf}, "cascade_weight must be a finite number of at least 0; got inf."),
        ({"window_blocks": 0}, "window_blocks must be at least 1; got 0."),
        ({"eos_threshold": math.nan}, "eos_threshold must be at least 0; got nan."),
        ({"block_length": 0}, "block_length must be at least 1; got 0."),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        make_decoder("ete", settings)
    assert str(error.value) == message
