from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from chordal.engine import Engine
from chordal.errors import InputError
from chordal.models.family import Family
from chordal.ops.randomness import uniforms
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import TINY_MASK, CountingModel, IdealModel, ToyModel, ideal, simulate

MASK = 9


def certainty(logits, positions, order):
    probs = logits[positions].softmax(1)
    return -torch.special.entr(probs).sum(1) if order == "entropy" else probs.max(1).values


def ranking(scores):
    """Indices from the highest score to the lowest, the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda at: (-float(scores[at]), at))


def release(predict, prompt, length, *, num_steps=None, ratio=4.0, adaptive=True, order="entropy", draw=None):
    """CCD's published loop for one row: gives the tokens, and the step that filled each, from 1.

    `predict(canvas)` gives the logits of every position, `draw(step, logits)` a token of each, by
    default the most likely one.
    """
    x = torch.tensor([*prompt, *[TINY_MASK] * length])
    filled_in, num_steps = [0] * len(x), num_steps or length
    b = length // num_steps
    v_max, v = b + int(b * ratio), 1
    buffers, ids = {}, {}
    step = 0
    while (x == TINY_MASK).any():
        masked = (x == TINY_MASK).nonzero()[:, 0].tolist()
        if len(masked) <= length / 10:
            v = 1
        v = 1 if step < 4 else min(v + 1, v_max)
        logits = predict(x)
        ids[step] = logits.argmax(1)
        proposed = ids[step] if draw is None else draw(step, logits)
        ranked = [masked[at] for at in ranking(certainty(logits, masked, order))]
        commit = ranked[:b]
        if 5 <= step < num_steps - 1 and set(ranked[:b]) & set(buffers[step - 1]):
            agree = [p for p in ranked[:v] if p in buffers[step - 1] and ids[step][p] == ids[step - 1][p]]
            if len(agree) >= b:
                commit = agree if adaptive else agree[:b]
        for p in commit:
            x[p], filled_in[p] = proposed[p], step + 1
        buffers[step] = [p for p in ranked if p not in commit][:v] if step >= 3 else []
        step += 1
    return x[len(prompt) :].tolist(), filled_in[len(prompt) :]


def paper(predict, prompt, length, *, d, v=4, adaptive=True, bound=0.3, order="entropy"):
    """The paper's rule for one row and one token a plain step: laws averaged over pools of d steps."""
    x = torch.tensor([*prompt, *[TINY_MASK] * length])
    filled_in, pools, step = [0] * len(x), [], 0
    while (x == TINY_MASK).any():
        masked = (x == TINY_MASK).nonzero()[:, 0].tolist()
        logits = predict(x)
        ranked = [masked[at] for at in ranking(certainty(logits, masked, order))]
        laws = {p: logits[p].softmax(0) for p in masked}
        mean = {}
        for p in sorted(ranked[:v], key=ranked.index):
            earlier = [pool[p] for pool in pools[max(0, step - d) :] if p in pool] if d else []
            if earlier:
                mean[p] = sum([laws[p], *earlier]) / (1 + len(earlier))
        if mean:
            entropy = {p: float(torch.special.entr(law).sum()) for p, law in mean.items()}
            score = {p: -entropy[p] if order == "entropy" else float(mean[p].max()) for p in mean}
            best = sorted(mean, key=lambda p: -score[p])
            commit = [p for at, p in enumerate(best) if at == 0 or (adaptive and entropy[p] <= bound)]
            tokens = {p: int(mean[p].argmax()) for p in commit}
        else:
            commit = ranked[:1]
            tokens = {p: int(logits[p].argmax()) for p in commit}
        for p in commit:
            x[p], filled_in[p] = tokens[p], step + 1
        pools.append({p: laws[p] for p in [p for p in ranked if p not in commit][:v]})
        step += 1
    return x[len(prompt) :].tolist(), filled_in[len(prompt) :]


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


SETTINGS = [
    {},
    {"adaptive": False},
    {"expand_ratio": 9.0},
    {"order": "confidence"},
    {"num_steps": 5, "expand_ratio": 2.0},
    {"num_steps": 7, "expand_ratio": 3.0},
]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_and_order_equal_the_published_loop(
    tiny, predict, decode, prompts, assert_same_commits, settings, shift
):
    given, length = prompts(4), 15
    seqs = decode(tiny("masked", shift=shift), "ccd", settings, prompts=given, max_new_tokens=length)
    named = {"ratio" if name == "expand_ratio" else name: value for name, value in settings.items()}
    assert_same_commits(seqs, [release(predict(shift), prompt, length, **named) for prompt in given])


def test_sampling_compares_the_most_likely_tokens_and_commits_the_drawn_ones(
    tiny, predict, decode, prompts, assert_same_commits
):
    given, seeds, length = prompts(4), range(4), 15

    def draw(prompt, seed):
        def drawn(step, logits):
            numbers = torch.from_numpy(uniforms(seed, "token", np.arange(len(prompt) + length), step))
            return (logits.softmax(1).cumsum(1) <= numbers[:, None]).sum(1)

        return drawn

    law = Law(temperature=1.0)
    seqs = decode(tiny("masked"), "ccd", {}, prompts=given, law=law, seeds=seeds, max_new_tokens=length)
    references = [
        release(predict(0), prompt, length, draw=draw(prompt, seed))
        for prompt, seed in zip(given, seeds, strict=True)
    ]
    assert_same_commits(seqs, references)
    assert any(len(set(forwards)) < length for _, forwards in references)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [
        {"history_length": 3},
        {"history_length": 1, "pool_size": 2},
        {"history_length": 2, "max_entropy": 2.0},
        {"history_length": 2, "pool_size": 6, "max_entropy": 1.5, "order": "confidence"},
        {"history_length": 3, "adaptive": False},
    ],
    ids=str,
)
def test_tokens_and_order_equal_the_papers_rule(
    tiny, predict, decode, prompts, assert_same_commits, settings, shift
):
    given, names = prompts(4), {"history_length": "d", "pool_size": "v", "max_entropy": "bound"}
    named = {names.get(name, name): value for name, value in settings.items()}
    seqs = decode(
        tiny("masked", shift=shift), "ccd", settings | {"variant": "paper"}, prompts=given, max_new_tokens=13
    )
    assert_same_commits(seqs, [paper(predict(shift), prompt, 13, **named) for prompt in given])


def test_the_papers_rule_averages_laws_after_the_repetition_penalty(
    tiny, predict, decode, prompts, assert_same_commits
):
    def penalized(canvas):
        logits, known = predict(0)(canvas), canvas[canvas != TINY_MASK].unique()
        seen = logits[:, known]
        logits[:, known] = torch.where(seen > 0, seen / 1.6, seen * 1.6)
        return logits

    given, settings = prompts(4), {"variant": "paper", "max_entropy": 2.0}
    law = Law(repetition_penalty=1.6)
    seqs = decode(tiny("masked"), "ccd", settings, prompts=given, max_new_tokens=13, law=law)
    assert_same_commits(seqs, [paper(penalized, prompt, 13, d=3, bound=2.0) for prompt in given])


class Scripted(ToyModel):
    """Prompt of one token; at each pass every position has the token and confidence of a script.

    Args:
        script: Gives, for the number of committed tokens behind the prompt, the tokens and confidences
            of all positions.
    """

    def __init__(self, script, shift=0, window=300):
        super().__init__(Family(kind="masked", mask_id=MASK, shift=shift), 10, window=window)
        self.script = script

    def logits(self, position, view):
        num_known = int(((view >= 0) & (view != MASK)).sum()) - 1
        tokens, confidences = self.script(num_known)
        at = position - 1 + self.family.shift
        logits = np.full(10, np.log(1e-9))
        if at < len(tokens):
            # The rest goes to one other token, so that entropies are ordered as confidences are.
            logits[8] = np.log(1 - confidences[at])
            logits[tokens[at]] = np.log(confidences[at])
        return logits


def run(model, length, settings, law=None):
    seq = Sequence(
        prompt=np.array([0]),
        family=model.family,
        stop=StopRules(max_new_tokens=length),
        law=law or Law(),
    )
    engine = Engine(model)
    engine.submit(make_decoder("ccd", settings), seq)
    engine.run()
    assert seq.error is None, seq.error
    return seq


def per_pass(seq):
    return np.bincount(seq.committed_at[seq.num_prompt : seq.limit])[1:].tolist()


def fixed(length, seed=0):
    rng = np.random.default_rng(seed)
    tokens, confidences = rng.integers(0, 7, length), rng.permutation(np.linspace(0.6, 0.99, length))
    return lambda num_known: (tokens, confidences)


@pytest.mark.parametrize(
    ("length", "forwards"),
    [(32, [1, 1, 1, 1, 1, 2, 3, 4, 5, 5, 5, 2, 1]), (64, 20), (256, 63)],
)
def test_on_predictions_that_never_change_the_published_schedule_takes_so_many_passes(length, forwards):
    seq = run(Scripted(fixed(length)), length, {})
    assert seq.output.tolist() == fixed(length)(0)[0].tolist()
    if isinstance(forwards, list):
        assert per_pass(seq) == forwards
    else:
        assert seq.stats.forwards["target"] == forwards
    plain = run(Scripted(fixed(length)), length, {"adaptive": False})
    assert per_pass(plain) == [1] * length
    # The order is that of confidence either way.
    confidences = fixed(length)(0)[1]
    for one in (seq, plain):
        by_pass = [confidences[one.committed_at[1:] == n].mean() for n in range(1, max(one.committed_at) + 1)]
        assert by_pass == sorted(by_pass, reverse=True)


@pytest.mark.parametrize("adaptive", [True, False])
def test_tokens_that_change_in_every_step_are_decoded_one_by_one_in_the_plain_order(adaptive):
    tokens, confidences = fixed(24)(0)

    def script(num_known):
        return (tokens + num_known) % 7, confidences

    seq = run(Scripted(script), 24, {"adaptive": adaptive})
    assert per_pass(seq) == [1] * 24
    order = seq.committed_at[1:].argsort()
    assert order.tolist() == np.argsort(-confidences).tolist()
    assert seq.output[order].tolist() == ((tokens[order] + np.arange(24)) % 7).tolist()


def rejecting(top_was_pooled):
    """Five plain steps fill positions 0 to 4. Then 5 leads, with a token that it did not have before.

    In step 4, whose pool is two positions, 6 and 7 follow, or 6 and 5.
    """

    def script(num_known):
        confidences = np.linspace(0.95, 0.6, 12)
        tokens = np.full(12, 1)
        if num_known < 5:
            confidences[5] = 0.7785 if top_was_pooled else 0.61
            confidences[[6, 7]] = 0.78, 0.77
        else:
            tokens[5], confidences[5] = 2, 0.99
        return tokens, confidences

    return Scripted(script)


def test_a_leading_position_whose_token_changed_is_rejected_and_the_next_is_committed():
    seq = run(rejecting(top_was_pooled=True), 12, {})
    assert sorted(np.flatnonzero(seq.committed_at[1:] == 6)) == [6]
    assert seq.committed_at[1 + 5] > 6


def test_a_leading_position_that_was_not_pooled_is_committed_by_the_code_and_rejected_by_the_paper():
    seq = run(rejecting(top_was_pooled=False), 12, {})
    assert sorted(np.flatnonzero(seq.committed_at[1:] == 6)) == [5]
    settings = {"variant": "paper", "history_length": 1, "pool_size": 2, "adaptive": False}
    seq = run(rejecting(top_was_pooled=False), 12, settings)
    assert sorted(np.flatnonzero(seq.committed_at[1:] == 6)) == [6]


def test_a_position_whose_laws_contradict_each_other_is_ranked_last_by_their_mean():
    """Position 2 is most certain of all now, of another token than before: one bit of entropy."""

    def script(num_known):
        tokens, confidences = np.array([1, 1, 1, 1]), np.array([0.999, 0.9, 0.95, 0.8])
        if num_known:
            tokens[2], confidences[2] = 2, 0.99999
        return tokens, confidences

    settings = {"variant": "paper", "history_length": 1, "pool_size": 3}
    plain = run(Scripted(script), 4, settings | {"history_length": 0})
    assert plain.committed_at[1:].tolist() == [1, 3, 2, 4]
    for adaptive in (True, False):
        seq = run(Scripted(script), 4, settings | {"adaptive": adaptive, "max_entropy": math.log(2) - 0.01})
        assert seq.committed_at[1:][2] > seq.committed_at[1:][1] == 2


def test_on_predictions_that_never_change_the_papers_rule_commits_its_pool():
    seq = run(Scripted(fixed(20)), 20, {"variant": "paper", "max_entropy": 9.0})
    assert per_pass(seq) == [1, 4, 4, 4, 4, 3]
    assert seq.output.tolist() == fixed(20)(0)[0].tolist()


@pytest.mark.parametrize("block_length", [None, 5])
@pytest.mark.parametrize(
    "law", [Law(), Law(temperature=0.8, repetition_penalty=1.3)], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize(
    "settings",
    [
        {"expand_ratio": 0.0},
        {"expand_ratio": 0.0, "adaptive": False},
        {"variant": "paper", "history_length": 0},
        {"variant": "paper", "history_length": 0, "adaptive": False},
    ],
    ids=str,
)
def test_without_a_pool_or_history_it_is_low_confidence(tiny, decode, prompts, settings, law, block_length):
    shared = {"block_length": block_length}
    ours, reference = (
        decode(tiny("masked"), name, more | shared, prompts=prompts(4), max_new_tokens=12, law=law)
        for name, more in (("ccd", settings | {"order": "confidence"}), ("low_confidence", {}))
    )
    for one, other in zip(ours, reference, strict=True):
        assert one.output.tolist() == other.output.tolist()
        assert one.committed_at.tolist() == other.committed_at.tolist()


def test_a_token_is_drawn_from_the_averaged_law_with_the_number_of_its_step():
    """Temperature 1, the same law in every step: averaging must change no draw."""
    model = Scripted(lambda _: (np.full(20, 1), np.linspace(0.6, 0.5, 20)))
    settings = {"variant": "paper", "adaptive": False}
    outputs = [
        run(model, 20, settings | {"history_length": d}, Law(temperature=1.0)).output.tolist()
        for d in (0, 1, 3)
    ]
    assert outputs[0] == outputs[1] == outputs[2]
    assert set(outputs[0]) == {1, 8}


def test_an_averaged_law_gives_no_token_that_is_banned(tiny, decode, prompts):
    """It used to be read from logits that had it still."""
    model = CountingModel(tiny("masked"))
    settings = {"commit": "averaged", "block_length": "canvas", "max_entropy": 9.0}
    outputs = []
    for eos_ids in ((), (21, 28)):  # these models say them often
        model.family = dataclasses.replace(model.family, eos_ids=eos_ids)
        seqs = decode(model, "denoise", settings | {"ban_eos": True}, prompts=prompts(4), max_new_tokens=16)
        outputs.append(np.concatenate([seq.output for seq in seqs]))
    assert np.isin(outputs[0], (21, 28)).any()
    assert not np.isin(outputs[1], (21, 28)).any()


def test_the_first_five_steps_of_the_published_code_are_plain(tiny, decode, prompts):
    plain = {"expand_ratio": 0.0}
    seqs, others = (
        decode(tiny("masked"), "ccd", settings, prompts=prompts(6), max_new_tokens=16)
        for settings in ({}, plain)
    )
    for seq, other in zip(seqs, others, strict=True):
        early = (other.committed_at >= 1) & (other.committed_at <= 5)
        assert (seq.committed_at[early] == other.committed_at[early]).all()
        assert (seq.tokens[early] == other.tokens[early]).all()


@pytest.mark.parametrize("settings", [{}, {"variant": "paper"}], ids=str)
@pytest.mark.parametrize(("length", "num_steps"), [(20, 5), (17, 4), (3, 2)])
def test_a_pass_commits_at_least_its_plain_share_even_behind_the_schedule(
    tiny, decode, prompts, settings, length, num_steps
):
    share = length // num_steps
    settings = settings | {"num_steps": num_steps}
    for seq in decode(tiny("masked"), "ccd", settings, prompts=prompts(5), max_new_tokens=length):
        assert all(count >= share for count in per_pass(seq)[:-1])
        assert len(seq.output) == length
        assert TINY_MASK not in seq.output


@pytest.mark.parametrize("variant", ["release", "paper"])
def test_each_block_starts_anew(decode, variant):
    """Blocks of 8 on fixed predictions: both take the same passes."""
    seq = run(Scripted(fixed(16)), 16, {"block_length": 8, "variant": variant, "max_entropy": 9.0})
    counts = per_pass(seq)
    half = len(counts) // 2
    assert counts[:half] == counts[half:]
    assert sum(counts[:half]) == 8


@pytest.mark.parametrize("variant", ["release", "paper"])
def test_decoding_ends_with_the_text_and_rows_do_not_share_state(decode, variant):
    script = fixed(40)
    eos = int(script(0)[0][11])
    first = script(0)[0].tolist().index(eos)
    alone = run(Scripted(script), 40, {"variant": variant})
    seqs = decode(
        Scripted(script),
        "ccd",
        {"variant": variant},
        prompts=[[0], [0], [0]],
        max_new_tokens=40,
        eos_ids=(eos,),
    )
    for seq in seqs:
        assert seq.output.tolist() == script(0)[0][: first + 1].tolist()
        assert seq.stats.committed_tokens == first + 1
        assert seq.committed_at[1 : first + 2].tolist() == alone.committed_at[1 : first + 2].tolist()


def test_dependent_tokens_are_right_as_long_as_nothing_is_committed_beside_them():
    model = IdealModel(ideal.copy(4))
    assert simulate(make_decoder("ccd"), model, 3).accuracy == 1
    shuffled = IdealModel(ideal.shuffle(4), noise=1e-6)
    assert simulate(make_decoder("ccd"), shuffled, 20).accuracy == 1  # all in the plain first steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expand_ratio": -1.0}, "expand_ratio must be a finite number of at least 0; got -1.0."),
        ({"history_length": -1}, "history_length must be at least 0; got -1."),
        ({"pool_size": 0}, "pool_size must be at least 1; got 0."),
        ({"max_entropy": -0.1}, "max_entropy must be at least 0; got -0.1."),
        ({"num_steps": 0}, "num_steps must be at least 1; got 0."),
        ({"block_length": 0}, "block_length must be at least 1; got 0."),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        make_decoder("ccd", settings)
    assert str(error.value) == message


def test_fewer_steps_than_blocks_are_refused(tiny, decode):
    with pytest.raises(InputError, match="num_steps must be at least the number of blocks; got 2 and 3"):
        decode(tiny("masked"), "ccd", {"num_steps": 2, "block_length": 4}, prompts=[[1]], max_new_tokens=12)
