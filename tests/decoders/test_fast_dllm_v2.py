from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from chordal.engine import Engine
from chordal.errors import InputError
from chordal.forward import Blocks
from chordal.models.family import Family
from chordal.ops.randomness import uniforms
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import TINY_MASK, CountingModel, ToyModel, random_prompt, tiny_model

LENGTH = 6


@pytest.fixture(scope="session")
def fast_dllm_v2(plain):
    """Fast-dLLM v2's sampler for one row, on transformers and its own cache."""

    @torch.no_grad()
    def run(tokens, positions, can_attend, held):
        """Give logits, and the keys and values of what is fed and what is held before it."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(held):
            cache.update(keys, values, layer)
        logits = plain(
            input_ids=torch.as_tensor(np.asarray(tokens))[None],
            position_ids=torch.as_tensor(np.asarray(positions))[None],
            attention_mask=can_attend[None, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[0]
        return logits, [(layer.keys, layer.values) for layer in cache.layers]

    def sampler(prompt, max_new_tokens, sb, tau, cached, *, shift=0, law=None, seed=0):
        """Give the tokens, and for each the pass that committed it.

        Passes that only store are not counted; with shifted logits they commit a token, and are.
        """
        limit = len(prompt) + max_new_tokens
        end = -(-limit // LENGTH) * LENGTH
        x = [*prompt, *[TINY_MASK] * (end - len(prompt))]
        committed_in, now = [0] * end, 0
        everything = torch.ones(LENGTH, end, dtype=torch.bool)
        prefix = []

        def sample(z, position, now):
            z = z.clone()
            z[TINY_MASK] = -torch.inf
            if law:
                z = z / law.temperature
                z[z < z.topk(law.top_k).values[-1]] = -torch.inf
            q = z.softmax(0)
            token = int(q.argmax())
            if law:
                token = int((q.cumsum(0) <= uniforms(seed, "token", [position], now)[0]).sum())
            return token, float(q[token])

        for start in range(0, end, LENGTH):
            stop = start + LENGTH
            block = range(start, stop)
            stale = None
            for first in range(start, stop, sb):
                last = min(first + sb, stop)
                while masked := [p for p in range(first, last) if x[p] == TINY_MASK]:
                    if not cached or stale is None or x[first] == TINY_MASK:
                        z, held = run(x[start:stop], block, everything[:, :stop], prefix)
                        stale = [(keys[:, :, start:], values[:, :, start:]) for keys, values in held]
                        fed_from = start
                    else:
                        others = [p - start for p in block if not first <= p < last]
                        held = [
                            (torch.cat([k, sk[:, :, others]], 2), torch.cat([v, sv[:, :, others]], 2))
                            for (k, v), (sk, sv) in zip(prefix or empty(stale), stale, strict=True)
                        ]
                        can_attend = everything[: last - first, :stop]
                        z, _ = run(x[first:last], range(first, last), can_attend, held)
                        fed_from = first
                    drawn = {p: sample(z[p - shift - fed_from], p, now) for p in masked}
                    now += 1
                    best = max(masked, key=lambda p: (drawn[p][1], -p))
                    for p in masked:
                        if p == best or drawn[p][1] > tau:
                            x[p], committed_in[p] = drawn[p][0], now
            z, prefix = run(x[start:stop], block, everything[:, :stop], prefix)
            if shift and stop < end and x[stop] == TINY_MASK:
                x[stop], _ = sample(z[-1], stop, now)
                now += 1
                committed_in[stop] = now
        return x[len(prompt) : limit], committed_in[len(prompt) : limit]

    def empty(held):
        return [(keys[:, :, :0], values[:, :, :0]) for keys, values in held]

    return sampler


SETTINGS = {
    "one a pass": {"threshold": 1.0, "sub_block_length": 2},
    "some": {"threshold": 0.3, "sub_block_length": 3},
    "some, parts that do not divide": {"threshold": 0.2, "sub_block_length": 4},
    "one part": {"threshold": 0.3, "sub_block_length": 8},
    "parts of one": {"threshold": 0.3, "sub_block_length": 1},
    "cached": {"threshold": 0.3, "sub_block_length": 3, "sub_block_cache": True},
    "cached, one a pass": {"threshold": 1.0, "sub_block_length": 4, "sub_block_cache": True},
    "cached, one part": {"threshold": 0.2, "sub_block_length": 6, "sub_block_cache": True},
    "all": {"threshold": 0.0, "sub_block_length": 4},
}


def knobs(settings):
    config = make_decoder("fast_dllm_v2", settings).config
    return config.sub_block_length, config.threshold, config.sub_block_cache


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shift", [0, 1])
def test_tokens_and_order_equal_the_published_sampler(
    tiny, fast_dllm_v2, decode, assert_same_commits, name, shift
):
    """Prompts shorter than a block, of whole blocks, and of blocks and a rest."""
    given = [random_prompt(num) for num in (1, 4, 6, 9, 12)]
    model = tiny("block", shift=shift, block_length=LENGTH)
    seqs = decode(model, "fast_dllm_v2", SETTINGS[name], prompts=given, max_new_tokens=13)
    assert_same_commits(seqs, [fast_dllm_v2(p, 13, *knobs(SETTINGS[name]), shift=shift) for p in given])


@pytest.mark.parametrize("name", ["some", "cached", "parts of one"])
@pytest.mark.parametrize("shift", [0, 1])
def test_sampling_equals_the_published_sampler_with_our_random_numbers(
    tiny, fast_dllm_v2, decode, assert_same_commits, name, shift
):
    given, law = [random_prompt(num) for num in (3, 6, 8)], Law(temperature=1.2, top_k=9)
    model = tiny("block", shift=shift, block_length=LENGTH)
    seqs = decode(
        model, "fast_dllm_v2", SETTINGS[name], prompts=given, law=law, seeds=range(3), max_new_tokens=11
    )
    assert_same_commits(
        seqs,
        [
            fast_dllm_v2(prompt, 11, *knobs(SETTINGS[name]), shift=shift, law=law, seed=seed)
            for seed, prompt in enumerate(given)
        ],
    )


@pytest.mark.parametrize("cached", [False, True])
def test_one_part_is_block_diffusion(tiny, decode, prompts, cached):
    """Whether the sub-block cache is on or not: a part that is the block has nothing stale beside it."""
    given, settings = prompts(6), {"threshold": 0.3, "sub_block_length": 4, "sub_block_cache": cached}
    ours = decode(tiny("block"), "fast_dllm_v2", settings, prompts=given, max_new_tokens=11)
    base = decode(tiny("block"), "block_diffusion", {"threshold": 0.3}, prompts=given, max_new_tokens=11)
    for one, other in zip(ours, base, strict=True):
        assert one.output.tolist() == other.output.tolist()
        assert one.committed_at.tolist() == other.committed_at.tolist()
        assert one.stats.forwards == other.stats.forwards


@pytest.mark.parametrize("shift", [0, 1])
def test_parts_of_one_token_are_left_to_right(tiny, decode, prompts, shift):
    given, model = prompts(6), tiny("block", shift=shift)
    ours = decode(model, "fast_dllm_v2", {"sub_block_length": 1}, prompts=given, max_new_tokens=11)
    settings = {"order": "left_to_right"}
    base = decode(model, "block_diffusion", settings, prompts=given, max_new_tokens=11)
    for one, other in zip(ours, base, strict=True):
        assert one.output.tolist() == other.output.tolist()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("num_prompt", [1, 5, 6, 7, 12])
def test_a_threshold_of_1_commits_one_token_a_pass(tiny, decode, shift, num_prompt, cached):
    """With shifted logits the pass that stores a block commits the next one's first token."""
    settings = {"threshold": 1.0, "sub_block_length": 3, "sub_block_cache": cached}
    model = tiny("block", shift=shift, block_length=LENGTH)
    [seq] = decode(model, "fast_dllm_v2", settings, prompts=[random_prompt(num_prompt)], max_new_tokens=13)
    at = seq.committed_at[num_prompt:]
    assert sorted(at[at > 0].tolist()) == list(range(1, seq.stats.forwards["target"] + 1))


@pytest.mark.parametrize("shift", [0, 1])
def test_parts_are_finished_from_left_to_right(tiny, decode, prompts, shift):
    settings = {"threshold": 0.2, "sub_block_length": 4}
    model = tiny("block", shift=shift, block_length=LENGTH)
    for seq in decode(model, "fast_dllm_v2", settings, prompts=prompts(5), max_new_tokens=17):
        parts = [seq.committed_at[at:to] for b in range(0, 24, 6) for at, to in ((b, b + 4), (b + 4, b + 6))]
        parts = [part[part > 0] for part in parts if (part > 0).any()]
        for before, after in itertools.pairwise(parts):
            # A block's first token may come in the pass that stores the block before.
            assert before.max() < after.min()


class InOrder(ToyModel):
    """Is surest of the first position, or of the last."""

    def __init__(self, sign, shift):
        family = Family(kind="block", mask_id=3, shift=shift, block_length=LENGTH)
        super().__init__(family, 4, window=32)
        self.sign = sign

    def logits(self, position, view):
        return np.array([self.sign * 0.1 * position, 4.0, 0.0, 9.0])


BLOCK, LEFT, RIGHT = (6, 12), (6, 9), (9, 12)


@pytest.mark.parametrize(
    ("shift", "cached", "sign", "fed"),
    [
        (0, False, 1, [(0, 12), *[BLOCK] * 5]),
        (0, True, 1, [(0, 12), LEFT, LEFT, BLOCK, RIGHT, RIGHT]),
        # The whole block is fed as long as a part's first token is masked.
        (0, True, -1, [(0, 12), *[BLOCK] * 5]),
        # The pass that stores the prompt commits the first token, so that of the left part is known.
        (1, False, 1, [(0, 6), *[BLOCK] * 5]),
        (1, True, 1, [(0, 6), BLOCK, LEFT, BLOCK, RIGHT, RIGHT]),
        (1, True, -1, [(0, 6), BLOCK, LEFT, *[BLOCK] * 3]),
    ],
)
def test_what_is_fed_is_the_block_or_with_the_cache_the_part(decode, shift, cached, sign, fed):
    model = CountingModel(InOrder(sign, shift))
    settings = {"threshold": 1.0, "sub_block_length": 3, "sub_block_cache": cached}
    decode(model, "fast_dllm_v2", settings, prompts=[[1] * 6], max_new_tokens=6)
    got = [(forward.positions[0], forward.positions[-1] + 1) for [(_, forward)] in model.calls]
    assert got == fed
    assert all(forward.sees == Blocks(LENGTH) for [(_, forward)] in model.calls)


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("num_prompt", [3, 6, 15])
def test_the_cache_of_finished_blocks_equals_a_fresh_prefill(plain, shift, num_prompt, cached):
    model = tiny_model("block", shift=shift, block_length=LENGTH, max_rows=1)
    engine = Engine(model)
    seq = Sequence(prompt=random_prompt(num_prompt), family=model.family, stop=StopRules(max_new_tokens=20))
    settings = {"threshold": 0.3, "sub_block_length": 3, "sub_block_cache": cached}
    engine.submit(make_decoder("fast_dllm_v2", settings), seq)
    checked = 0
    while not seq.done:
        engine.step()
        start = seq.frontier // LENGTH * LENGTH
        now = seq.stats.forwards.get("target", 0)
        if seq.done or start == 0 or now == 0 or now not in seq.committed_at[start : start + LENGTH]:
            continue
        block_of = torch.arange(start) // LENGTH
        fresh = plain.model(
            input_ids=torch.from_numpy(seq.tokens[None, :start]),
            attention_mask=(block_of[None, :] <= block_of[:, None])[None, None],
            use_cache=True,
        ).past_key_values
        for ours, theirs in zip(model.cache.slot_layers, fresh.layers, strict=True):
            torch.testing.assert_close(ours.keys[:1, :, :start], theirs.keys, rtol=0, atol=1e-9)
            torch.testing.assert_close(ours.values[:1, :, :start], theirs.values, rtol=0, atol=1e-9)
        checked += 1
    assert checked >= 6


@pytest.mark.parametrize(
    ("num_prompt", "prefills", "first"),
    [(4, 0, range(4, 6)), (6, 0, [6]), (8, 1, range(8, 12)), (12, 0, [12])],
)
def test_with_shifted_logits_whole_blocks_of_prompt_tell_the_first_token(
    tiny, decode, num_prompt, prefills, first
):
    """A prompt that is shorter than a block is not stored before it is decoded; one of a rest is."""
    model = tiny("block", shift=1, block_length=LENGTH)
    settings = {"threshold": 0.0}
    [seq] = decode(model, "fast_dllm_v2", settings, prompts=[random_prompt(num_prompt)], max_new_tokens=9)
    assert seq.stats.prefills == prefills
    assert np.flatnonzero(seq.committed_at == 1).tolist() == list(first)


class Sure(ToyModel):
    """Is as sure of token 1 as a float can be."""

    def __init__(self):
        family = Family(kind="block", mask_id=3, shift=0, block_length=4)
        super().__init__(family, 4, window=16)

    def logits(self, position, view):
        return np.array([-np.inf, 0.0, -np.inf, 0.0])


@pytest.mark.parametrize(("threshold", "forwards"), [(0.99, 4), (1.0, 8)])
def test_a_confidence_passes_what_it_exceeds_and_not_what_it_equals(decode, threshold, forwards):
    settings = {"threshold": threshold, "sub_block_length": 2}
    [seq] = decode(Sure(), "fast_dllm_v2", settings, prompts=[[1, 1, 1, 1]], max_new_tokens=8)
    assert seq.stats.forwards["target"] == forwards


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "threshold must be at least 0; got -0.1."),
        ({"threshold": float("nan")}, "threshold must be at least 0; got nan."),
        ({"sub_block_length": 0}, "sub_block_length must be at least 1; got 0."),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        make_decoder("fast_dllm_v2", settings)
    assert str(error.value) == message
