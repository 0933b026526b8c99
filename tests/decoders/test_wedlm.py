from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from chordal.engine import Engine
from chordal.errors import InputError
from chordal.forward import Logits
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


@pytest.fixture(scope="session")
def reordered(plain):
    """Gives the logits of a causal model whose rows stand in any order, from transformers alone."""

    @torch.no_grad()
    def reordered(tokens, positions):
        num = len(tokens)
        return plain(
            input_ids=torch.as_tensor(np.asarray(tokens))[None],
            position_ids=torch.as_tensor(np.asarray(positions))[None],
            # Given, because without it positions that do not ascend are taken for packed documents.
            attention_mask=torch.ones(num, num, dtype=torch.bool).tril()[None, None],
            use_cache=False,
        ).logits[0]

    return reordered


def wedlm(logits, prompt, max_new_tokens, tau, lam, window, *, law=None, seed=0):
    """WeDLM's sampler for one row, without a cache: a list of (token, is it a mask) that slides on.

    Gives the tokens, and for each the number of the pass that filled it, from 1.
    """
    done, w = [*prompt], [None] * min(window, max_new_tokens)
    limit, now, filled_in = len(prompt) + max_new_tokens, 0, {}
    while len(done) < limit:
        now += 1
        filled = [k for k, token in enumerate(w) if token is not None]
        masked = [k for k, token in enumerate(w) if token is None]
        n = len(done)
        tokens = [*done, *(w[k] for k in filled), *[TINY_MASK] * len(masked)]
        z = logits(tokens, [*range(n), *(n + k for k in filled + masked)])[n + len(filled) :].float()
        z[:, TINY_MASK] = -torch.inf
        entropy = torch.special.entr(z.softmax(1)).sum(1)
        score = [float(h) + lam * (k - masked[0]) for h, k in zip(entropy, masked, strict=True)]
        sure = [i for i, s in enumerate(score) if tau is not None and s < tau]
        for i in sure or [min(range(len(score)), key=lambda i: (score[i], i))]:
            token = int(z[i].argmax())
            if law:
                q = z[i] / law.temperature
                q[q < q.topk(law.top_k).values[-1]] = -torch.inf
                number = uniforms(seed, "token", [n + masked[i]])[0]
                token = int((q.softmax(0).double().cumsum(0) <= number).sum())
            w[masked[i]], filled_in[n + masked[i]] = token, now
        while w and w[0] is not None:
            done.append(w.pop(0))
            if len(done) + len(w) < limit:
                w.append(None)
    return done[len(prompt) :], [filled_in[p] for p in range(len(prompt), limit)]


RULES = {
    "defaults": {},
    "one a pass": {"entropy_threshold": None, "window_length": 6},
    "one a pass, the first": {"entropy_threshold": None, "distance_penalty": 50.0},
    "some": {"entropy_threshold": 2.0, "distance_penalty": 0.1, "window_length": 5},
    "some without penalty": {"entropy_threshold": 1.8, "distance_penalty": 0.0, "window_length": 8},
    "all": {"entropy_threshold": math.inf, "distance_penalty": 0.0, "window_length": 4},
    "a window of one": {"window_length": 1},
}


def knobs(settings):
    config = make_decoder("wedlm", settings).config
    return config.entropy_threshold, config.distance_penalty, config.window_length


@pytest.mark.parametrize("name", RULES)
def test_tokens_and_order_equal_the_published_sampler_without_a_cache(
    tiny, reordered, decode, prompts, assert_same_commits, name
):
    given = prompts(5)
    seqs = decode(tiny("masked_causal"), "wedlm", RULES[name], prompts=given, max_new_tokens=13)
    assert_same_commits(seqs, [wedlm(reordered, p, 13, *knobs(RULES[name])) for p in given])


@pytest.mark.parametrize("name", ["one a pass", "some", "all"])
def test_sampling_equals_the_published_sampler_with_our_random_numbers(
    tiny, reordered, decode, prompts, assert_same_commits, name
):
    """One number a position, however many passes have predicted it before it is filled."""
    given, seeds, law = prompts(4), range(4), Law(temperature=1.2, top_k=9)
    seqs = decode(
        tiny("masked_causal"),
        "wedlm",
        RULES[name],
        prompts=given,
        law=law,
        seeds=seeds,
        max_new_tokens=9,
    )
    assert_same_commits(
        seqs,
        [
            wedlm(reordered, prompt, 9, *knobs(RULES[name]), law=law, seed=seed)
            for prompt, seed in zip(given, seeds, strict=True)
        ],
    )


class Replaying(CountingModel):
    """Asks every request once more for the logits of all its rows, which writes the same to the cache."""

    def __init__(self, model):
        super().__init__(model)
        self.logits = []

    def run(self, requests):
        readings = super().run(requests)
        [(row, forward)] = requests
        read = Logits(np.arange(len(forward.tokens)))
        self.logits += [
            one.logits for one in self.model.run([(row, dataclasses.replace(forward, read=read))])
        ]
        return readings


def test_the_logits_of_every_pass_equal_those_of_a_fresh_run_in_that_order(reordered, decode):
    model = Replaying(tiny_model("masked_causal", max_rows=1))
    settings = {"entropy_threshold": 2.0, "window_length": 6}
    [seq] = decode(model, "wedlm", settings, prompts=[random_prompt(7)], max_new_tokens=20)
    out_of_order = 0
    for [(_, forward)], logits in zip(model.calls, model.logits, strict=True):
        cached = np.arange(forward.slots[0])
        tokens = np.concatenate([seq.tokens[cached], forward.tokens])
        positions = np.concatenate([cached, forward.positions])
        fresh = reordered(tokens, positions)[len(cached) :]
        fresh[:, TINY_MASK] = -torch.inf
        torch.testing.assert_close(logits, fresh, rtol=0, atol=1e-9)
        out_of_order += (np.diff(positions) < 0).any()
    assert out_of_order >= 3


@torch.no_grad()
def test_leading_tokens_leave_what_a_causal_prefill_leaves_and_those_behind_a_gap_do_not(plain):
    model = tiny_model("masked_causal", max_rows=1)
    counting = CountingModel(model)
    engine = Engine(counting)
    seq = Sequence(prompt=random_prompt(5), family=model.family, stop=StopRules(max_new_tokens=24))
    engine.submit(make_decoder("wedlm", {"entropy_threshold": 2.0, "window_length": 8}), seq)

    leading, behind = 0, []
    while not seq.done:
        frontier = seq.frontier
        engine.step()
        fresh = prefill(plain, seq.tokens[:frontier])
        for ours, theirs in zip(model.cache.slot_layers, fresh, strict=True):
            torch.testing.assert_close(ours.keys[:1, :, :frontier], theirs.keys, rtol=0, atol=1e-9)
            torch.testing.assert_close(ours.values[:1, :, :frontier], theirs.values, rtol=0, atol=1e-9)
        leading += frontier
        [(_, forward)] = counting.calls[-1]
        for row in np.flatnonzero((forward.tokens != TINY_MASK) & (forward.positions > frontier)):
            slot, position = forward.slots[row], forward.positions[row]
            assert slot < position
            behind.append((position, model.cache.slot_layers[-1].values[0, :, slot].clone()))
    assert leading > 50

    # In the end it is known what stands in the gap.
    true = prefill(plain, seq.tokens[: seq.limit])[-1].values[0]
    assert len(behind) >= 3
    for position, values in behind:
        assert (values - true[:, position]).abs().max() > 1e-3


def prefill(plain, tokens):
    return plain.model(input_ids=torch.from_numpy(tokens[None]), use_cache=True).past_key_values.layers


A, B, C, D, E, F, PROMPT, MASK = range(8)


class Scripted(ToyModel):
    """Says A to F behind a prompt of one token, with entropies given for each number of known tokens.

    Args:
        entropies: By the number of known tokens a mask sees, prompt included, those of the answer's
            positions; 9 is as unsure as can be.
    """

    def __init__(self, entropies):
        family = Family(kind="masked_causal", mask_id=MASK, shift=0)
        super().__init__(family, MASK + 1, window=16)
        self.entropies = entropies

    def logits(self, position, view):
        num_known = int(((view >= 0) & (view != MASK)).sum())
        entropy = self.entropies[num_known][position - 1]
        low, high = 1 / MASK, 1.0
        for _ in range(60):  # the entropy falls as the best token gains
            best = (low + high) / 2
            probs = np.full(MASK, (1 - best) / (MASK - 1))
            probs[position - 1] = best
            with np.errstate(divide="ignore", invalid="ignore"):
                is_too_unsure = -np.nansum(probs * np.log(probs)) > entropy
            low, high = (best, high) if is_too_unsure else (low, best)
        with np.errstate(divide="ignore"):
            return np.log([*probs, 0.0])


# A window of 3, as in the drawing of the decoder: A and B, then C and E, then D and F.
WINDOW_OF_3 = {1: [0, 0, 9, 9, 9, 9], 3: [9, 9, 0, 9, 0, 9], 5: [9, 9, 9, 0, 9, 0]}


def script(entropies, settings, **stop):
    """Start decoding with a scripted model; gives the sequence, its engine and the requests."""
    model = CountingModel(Scripted(entropies))
    engine, stop = Engine(model), {"max_new_tokens": 6} | stop
    seq = Sequence(prompt=np.array([PROMPT]), family=model.family, stop=StopRules(**stop))
    engine.submit(make_decoder("wedlm", settings), seq)
    return seq, engine, model.calls


def test_a_window_of_3_is_refilled_reordered_and_committed_as_traced_by_hand():
    seq, engine, calls = script(WINDOW_OF_3, {"window_length": 3})
    outputs = []
    while not seq.done:
        engine.step()
        outputs.append(seq.output.tolist())
    fed = [
        (forward.tokens.tolist(), forward.positions.tolist(), forward.slots.tolist())
        for [(_, forward)] in calls
    ]
    assert fed == [
        ([PROMPT, MASK, MASK, MASK], [0, 1, 2, 3], [0, 1, 2, 3]),
        ([A, B, MASK, MASK, MASK], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        ([C, E, MASK, MASK], [3, 5, 4, 6], [3, 4, 5, 6]),
    ]
    # What is shown is always a prefix in the order of the text; E waits for D.
    assert outputs == [[A, B], [A, B, C], [A, B, C, D, E, F]]
    assert seq.committed_at[1:].tolist() == [1, 1, 2, 3, 2, 3]


def test_a_stop_behind_a_gap_ends_the_text_when_the_gap_is_closed():
    seq, engine, _ = script(WINDOW_OF_3, {"window_length": 3}, eos_ids=(E,))
    engine.step()
    engine.step()
    assert seq.tokens[5] == E
    assert not seq.done
    engine.step()
    assert (seq.output.tolist(), seq.finish_reason, seq.stop_reason) == ([A, B, C, D, E], "stop", E)
    assert seq.stats.committed_tokens == 5


@pytest.mark.parametrize(
    ("entropies", "settings", "filled"),
    [
        # tau .4, lambda .02: .3 .39 .38 .35 .5 .1 become .3 .41 .42 .41 .58 .2
        ([0.3, 0.39, 0.38, 0.35, 0.5, 0.1], {}, [A, F]),
        ([0.3, 0.39, 0.38, 0.35, 0.5, 0.1], {"distance_penalty": 0.0}, [A, B, C, D, F]),
        ([0.3, 0.39, 0.38, 0.35, 0.5, 0.1], {"window_length": 3}, [A]),
        ([0.3, 0.39, 0.38, 0.35, 0.5, 0.1], {"distance_penalty": 0.1}, [A]),
        # None below: the lowest with its penalty, and the first of equals.
        ([0.9, 0.8, 1.0, 1.0, 1.0, 1.0], {"distance_penalty": 0.05}, [B]),
        ([0.9, 0.8, 1.0, 1.0, 1.0, 1.0], {"distance_penalty": 0.2}, [A]),
        ([9, 0, 0, 0, 0, 0], {"entropy_threshold": 0.0, "distance_penalty": 0.0}, [B]),
        ([0.3, 0.2, 0.1, 0.2, 0.2, 0.2], {"entropy_threshold": None}, [C]),
        # Strictly below.
        ([0, 0, 9, 0, 9, 9], {"entropy_threshold": 0.0, "distance_penalty": 0.0}, [A]),
        ([0, 0, 9, 0, 9, 9], {"entropy_threshold": 1e-6, "distance_penalty": 0.0}, [A, B, D]),
        ([1.5, 1.2, 1.9, 0.9, 9, 9], {"entropy_threshold": 1.4, "distance_penalty": 0.0}, [B, D]),
    ],
)
def test_a_pass_fills_what_is_below_the_threshold_with_its_distance(entropies, settings, filled):
    seq, engine, _ = script({1: entropies}, settings)
    engine.step()
    assert np.flatnonzero(seq.committed_at[1:] == 1).tolist() == filled
    assert seq.tokens[1:][filled].tolist() == filled


def test_distance_is_counted_from_the_leftmost_mask_not_from_the_cache():
    """After A to C, D stands at 0 and E at 1; only with two cached positions more would E be too far."""
    script_4 = {1: [0, 0, 0, 9, 9, 9], 4: [9, 9, 9, 0.3, 0.3, 0.3]}
    seq, engine, _ = script(script_4, {"distance_penalty": 0.07})
    engine.step()
    engine.step()
    assert seq.committed_at[1:].tolist() == [1, 1, 1, 2, 2, -1]


@pytest.mark.parametrize("settings", [{"window_length": 5}, {"distance_penalty": 0.3}], ids=str)
def test_without_a_threshold_a_pass_fills_one_token(tiny, decode, prompts, settings):
    settings = {"entropy_threshold": None, **settings}
    for seq in decode(tiny("masked_causal"), "wedlm", settings, prompts=prompts(4), max_new_tokens=11):
        assert sorted(seq.committed_at[seq.num_prompt :].tolist()) == list(range(1, 12))
        assert (seq.stats.forwards["target"], seq.stats.prefills) == (11, 0)


def test_without_a_bound_a_pass_fills_the_window(tiny, decode, prompts):
    settings = {"entropy_threshold": math.inf, "distance_penalty": 0.0, "window_length": 4}
    for seq in decode(tiny("masked_causal"), "wedlm", settings, prompts=prompts(4), max_new_tokens=10):
        assert seq.committed_at[seq.num_prompt :].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("settings", "num", "fed"),
    [
        # 4 masks; then those 4 tokens and 4 masks.
        ({"entropy_threshold": math.inf, "distance_penalty": 0.0, "window_length": 4}, 8, 4 + 8),
        ({"entropy_threshold": math.inf, "distance_penalty": 0.0, "window_length": 8}, 8, 8),
        # From left to right: 2 masks; a token and 2 masks; a token and the last mask.
        ({"entropy_threshold": None, "distance_penalty": 99.0, "window_length": 2}, 3, 2 + 3 + 2),
    ],
)
def test_the_share_of_fed_tokens_that_were_committed_follows_from_the_counters(
    tiny, decode, prompts, settings, num, fed
):
    """The paper's p_cache: the prompt is fed once, and all else that is fed is decoding."""
    counting = CountingModel(tiny("masked_causal"))
    for prompt in prompts(3):
        counting.calls.clear()
        [seq] = decode(counting, "wedlm", settings, prompts=[prompt], max_new_tokens=num)
        decoded = seq.stats.positions_fed["target"] - seq.num_prompt
        assert decoded == fed == sum(len(ask.tokens) for [(_, ask)] in counting.calls) - len(prompt)
        assert seq.stats.committed_tokens / decoded == num / fed <= 1


@pytest.mark.parametrize("name", RULES)
def test_a_pass_feeds_the_window_and_what_is_not_cached_and_nothing_behind_the_limit(tiny, decode, name):
    counting = CountingModel(tiny("masked_causal"))
    law = Law(repetition_penalty=1.2)
    [seq] = decode(counting, "wedlm", RULES[name], prompts=[random_prompt(6)], max_new_tokens=20, law=law)
    window = knobs(RULES[name])[2]
    for at, [(_, forward)] in enumerate(counting.calls):
        was_known = seq.committed_at[: seq.limit] <= at
        frontier = int(np.argmin(was_known))
        assert np.array_equal(np.sort(forward.positions), forward.slots)
        assert forward.slots[-1] + 1 == min(frontier + window, seq.limit)
        num_known = int((forward.tokens != TINY_MASK).sum())
        assert was_known[forward.positions[:num_known]].all()
        assert not was_known[forward.positions[num_known:]].any()
        assert forward.read.rows.tolist() == list(range(num_known, len(forward.tokens)))
        for context in forward.read.contexts:
            assert context.tolist() == seq.tokens[: seq.limit][was_known].tolist()


def test_one_token_a_pass_is_always_right_and_all_at_once_has_the_closed_form():
    """Shuffling 4 items in one pass is right with probability 4! / 4^4; 3 sigma of 1,000 runs."""
    model = IdealModel(ideal.shuffle(4), noise=1e-6, kind="masked_causal")
    for temperature in (0.0, 1.0):
        one = simulate(make_decoder("wedlm", {"entropy_threshold": None}), model, 30, temperature=temperature)
        assert (one.accuracy, set(one.forwards)) == (1, {4})
    every = make_decoder("wedlm", {"entropy_threshold": math.inf})
    result = simulate(every, model, 1000, temperature=1.0)
    wanted = math.factorial(4) / 4**4
    assert abs(result.accuracy - wanted) <= 3 * math.sqrt(wanted * (1 - wanted) / 1000)
    assert set(result.forwards) == {1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_threshold": -0.1}, "entropy_threshold must be at least 0; got -0.1."),
        ({"entropy_threshold": math.nan}, "entropy_threshold must be at least 0; got nan."),
        ({"distance_penalty": -0.1}, "distance_penalty must be a finite number of at least 0; got -0.1."),
        ({"distance_penalty": math.inf}, "distance_penalty must be a finite number of at least 0; got inf."),
        ({"distance_penalty": math.nan}, "distance_penalty must be a finite number of at least 0; got nan."),
        ({"window_length": 0}, "window_length must be at least 1; got 0."),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        make_decoder("wedlm", settings)
    assert str(error.value) == message


def test_other_kinds_of_model_are_refused(tiny, decode):
    with pytest.raises(InputError, match="wedlm needs a masked_causal model; this one is causal"):
        decode(tiny("causal"), "wedlm", prompts=[[1]])
