from __future__ import annotations

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
from chordal.testing import TINY_MASK, ToyModel, random_prompt, tiny_model


def sdar(logits, prompt, max_new_tokens, length, num_steps, rule, *, shift=0, law=None, seed=0):
    """SDAR's block decoding for one row, without a cache.

    `rule` gets how many to commit, the confidence and entropy of each candidate, and gives those to
    commit. Gives the tokens, and for each the number of the denoising step that committed it, from 1.
    """
    limit = len(prompt) + max_new_tokens
    end = -(-limit // length) * length
    x = [*prompt, *[TINY_MASK] * (end - len(prompt))]
    committed_in = [0] * end
    block_of = torch.arange(end) // length
    can_attend = block_of[None, :] <= block_of[:, None]
    now = 0
    for start in range(len(prompt) // length * length, end, length):
        stop = start + length
        step = 0
        while masked := [p for p in range(start, stop) if x[p] == TINY_MASK]:
            now += 1
            z = logits(x[:stop], can_attend[:stop, :stop])
            if shift:
                z = torch.cat([z[:1], z[:-1]])
            z[:, TINY_MASK] = -torch.inf
            z = z[masked] / (law.temperature if law else 1)
            if law and law.top_k:
                z[z < z.topk(law.top_k).values[:, -1:]] = -torch.inf
            q = z.softmax(1)
            x0 = q.argmax(1)
            if law:
                numbers = torch.from_numpy(uniforms(seed, "token", masked, now - 1))
                x0 = (q.cumsum(1) <= numbers[:, None]).sum(1)
            confidence = q.gather(1, x0[:, None])[:, 0].tolist()
            entropy = torch.special.entr(q).sum(1).tolist()
            share = length // num_steps + (step < length % num_steps)
            for index in rule(min(share, len(masked)), confidence, entropy):
                x[masked[index]], committed_in[masked[index]] = int(x0[index]), now
            step += 1
    return x[len(prompt) : limit], committed_in[len(prompt) : limit]


def ranked(scores):
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def static(num, confidence, entropy):
    return ranked(confidence)[:num]


def sequential(num, confidence, entropy):
    return range(num)


def dynamic(threshold):
    def rule(num, confidence, entropy):
        sure = [i for i, c in enumerate(confidence) if c > threshold]
        return sure if len(sure) >= num else ranked(confidence)[:num]

    return rule


def entropy_bounded(bound):
    def rule(num, confidence, entropy):
        order = sorted(range(len(entropy)), key=lambda i: entropy[i])
        num = 1
        while num < len(order) and sum(entropy[i] for i in order[: num + 1]) < bound:
            num += 1
        return order[:num]

    return rule


RULES = {
    "static": ({"num_steps": None}, static),
    "static in 2 steps": ({"num_steps": 2}, static),
    "static in 3 steps": ({"num_steps": 3}, static),
    "sequential": ({"num_steps": 3, "order": "left_to_right"}, sequential),
    "dynamic .2": ({"threshold": 0.2}, dynamic(0.2)),
    "dynamic .5 in 2 steps": ({"threshold": 0.5, "num_steps": 2}, dynamic(0.5)),
    "dynamic 1": ({"threshold": 1.0}, dynamic(1.0)),
    "entropy 1": ({"entropy_bound": 1.0}, entropy_bounded(1.0)),
    "entropy 5": ({"entropy_bound": 5.0}, entropy_bounded(5.0)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shift", [0, 1])
def test_tokens_and_order_equal_sdar(tiny, cacheless, decode, prompts, assert_same_commits, name, shift):
    settings, rule = RULES[name]
    given = prompts(5)
    seqs = decode(tiny("block", shift=shift), "block_diffusion", settings, prompts=given, max_new_tokens=10)
    num_steps = settings.get("num_steps") or 4
    assert_same_commits(
        seqs, [sdar(cacheless, prompt, 10, 4, num_steps, rule, shift=shift) for prompt in given]
    )


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_every_block_length_equals_sdar(tiny, cacheless, decode, prompts, assert_same_commits, length):
    """A block of one token is causal decoding with a masked query for each token."""
    given = prompts(4)
    seqs = decode(
        tiny("block", block_length=length),
        "block_diffusion",
        {"threshold": 0.3},
        prompts=given,
        max_new_tokens=9,
    )
    assert_same_commits(seqs, [sdar(cacheless, p, 9, length, length, dynamic(0.3)) for p in given])


@pytest.mark.parametrize("name", ["static in 2 steps", "dynamic .2", "entropy 5"])
def test_sampling_equals_sdar_with_our_random_numbers(
    tiny, cacheless, decode, prompts, assert_same_commits, name
):
    settings, rule = RULES[name]
    given, seeds, law = prompts(4), range(4), Law(temperature=1.2, top_k=9)
    seqs = decode(
        tiny("block"), "block_diffusion", settings, prompts=given, law=law, seeds=seeds, max_new_tokens=7
    )
    num_steps = settings.get("num_steps") or 4
    assert_same_commits(
        seqs,
        [
            sdar(cacheless, prompt, 7, 4, num_steps, rule, law=law, seed=seed)
            for prompt, seed in zip(given, seeds, strict=True)
        ],
    )


@pytest.mark.parametrize("settings", [{}, {"num_steps": 2}, {"threshold": 0.2}], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_merging_saves_a_forward_a_block_and_changes_no_token(tiny, decode, prompts, settings, shift):
    """Blocks of 4; all but the last finished block are stored."""
    given = prompts(9)
    merged, alone = (
        decode(
            tiny("block", shift=shift),
            "block_diffusion",
            settings | {"merge": merge},
            prompts=given,
            max_new_tokens=14,
        )
        for merge in (True, False)
    )
    for one, other in zip(merged, alone, strict=True):
        assert one.output.tolist() == other.output.tolist()
        num_blocks = -(-one.limit // 4) - one.num_prompt // 4
        assert other.stats.forwards["target"] - one.stats.forwards["target"] == num_blocks - 1


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8, 10, 12])
def test_one_step_a_token_takes_a_forward_a_mask_and_the_published_stores(tiny, decode, merge, num_prompt):
    """13 tokens in blocks of 4: every mask of the opened blocks but those behind the limit."""
    settings = {"merge": merge, "order": "left_to_right"}
    [seq] = decode(
        tiny("block"),
        "block_diffusion",
        settings,
        prompts=[random_prompt(num_prompt)],
        max_new_tokens=13,
    )
    num_blocks = -(-seq.limit // 4) - num_prompt // 4
    assert seq.stats.forwards["target"] == 13 + (0 if merge else num_blocks - 1)
    # Merging leaves the last whole block of the prompt to the first step.
    assert seq.stats.prefills == int(num_prompt // 4 > (1 if merge else 0))


@pytest.mark.parametrize("settings", [{"threshold": 1.0}, {"threshold": 7.0}, {}], ids=str)
def test_a_threshold_of_1_is_one_token_a_forward(tiny, decode, prompts, settings):
    seqs = decode(tiny("block"), "block_diffusion", settings, prompts=prompts(5), max_new_tokens=12)
    for seq in seqs:
        # The last block may need the tokens behind the limit first.
        at = seq.committed_at[seq.num_prompt :]
        assert sorted(at[at > 0].tolist()) == list(range(1, seq.stats.forwards["target"] + 1))


def test_an_entropy_bound_of_almost_nothing_is_one_token_a_forward(tiny, decode, prompts):
    seqs = decode(
        tiny("block"), "block_diffusion", {"entropy_bound": 1e-9}, prompts=prompts(3), max_new_tokens=8
    )
    for seq in seqs:
        at = seq.committed_at[seq.num_prompt :]
        assert len(set(at[at > 0].tolist())) == (at > 0).sum()


def test_random_order_commits_the_static_share(tiny, decode):
    settings = {"num_steps": 3, "order": "random"}
    seqs = decode(
        tiny("block"),
        "block_diffusion",
        settings,
        prompts=[random_prompt(4)] * 30,
        max_new_tokens=8,
        seeds=range(30),
    )
    orders = {tuple(seq.committed_at[4:8].tolist()) for seq in seqs}
    assert {tuple(np.bincount(order)[1:].tolist()) for order in orders} == {(2, 1, 1)}
    assert len(orders) > 6


@torch.no_grad()
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("num_prompt", [3, 9])
def test_the_cache_of_finished_blocks_equals_a_fresh_prefill(plain, merge, num_prompt):
    model = tiny_model("block", max_rows=1)
    engine = Engine(model)
    seq = Sequence(prompt=random_prompt(num_prompt), family=model.family, stop=StopRules(max_new_tokens=16))
    engine.submit(make_decoder("block_diffusion", {"merge": merge, "num_steps": 2}), seq)
    checked = 0
    while not seq.done:
        engine.step()
        # After any step of a block, everything before it is stored.
        start = seq.frontier // 4 * 4
        now = seq.stats.forwards.get("target", 0)
        if seq.done or start == 0 or now == 0 or now not in seq.committed_at[start : start + 4]:
            continue
        block_of = torch.arange(start) // 4
        fresh = plain.model(
            input_ids=torch.from_numpy(seq.tokens[None, :start]),
            attention_mask=(block_of[None, :] <= block_of[:, None])[None, None],
            use_cache=True,
        ).past_key_values
        for ours, theirs in zip(model.cache.slot_layers, fresh.layers, strict=True):
            torch.testing.assert_close(ours.keys[:1, :, :start], theirs.keys, rtol=0, atol=1e-9)
            torch.testing.assert_close(ours.values[:1, :, :start], theirs.values, rtol=0, atol=1e-9)
        checked += 1
    assert checked >= 4


def test_more_steps_than_the_block_is_long_are_refused(tiny, decode):
    with pytest.raises(InputError, match="num_steps must be at most the block length 4; got 5"):
        decode(tiny("block"), "block_diffusion", {"num_steps": 5}, prompts=[[1]])


@pytest.mark.parametrize(
    "settings",
    [{"num_steps": 0}, {"threshold": -1.0}, {"entropy_bound": 0.0}, {"threshold": 0.9, "entropy_bound": 1.0}],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(InputError):
        make_decoder("block_diffusion", settings)


class Sure(ToyModel):
    """Is as sure of token 1 as a float can be."""

    def __init__(self):
        family = Family(kind="block", mask_id=3, shift=0, block_length=4)
        super().__init__(family, 4, window=16)

    def logits(self, position, view):
        return np.array([-np.inf, 0.0, -np.inf, 0.0])


@pytest.mark.parametrize(("threshold", "forwards"), [(0.99, 2), (1.0, 8)])
def test_a_confidence_passes_what_it_exceeds_and_not_what_it_equals(decode, threshold, forwards):
    settings = {"threshold": threshold, "num_steps": 4}
    [seq] = decode(Sure(), "block_diffusion", settings, prompts=[[1, 1, 1, 1]], max_new_tokens=8)
    assert seq.stats.forwards["target"] == forwards
