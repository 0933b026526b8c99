from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest
import torch

from chordal.engine import Engine
from chordal.errors import InputError
from chordal.forward import Logits
from chordal.models.family import Family
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import (
    TINY_MASK,
    UNSEEN,
    CountingModel,
    ToyModel,
    chi_square,
    random_prompt,
    sample_joint,
    tiny_model,
)

CAUSAL = {"causal_cache": True, "causal_draft": True}
ALWAYS = {"route": "always"} | CAUSAL


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.output.tolist() == other.output.tolist()


EXACT = {
    "always": ALWAYS,
    "parts": ALWAYS | {"sub_block_length": 3},
    "any draft": ALWAYS | {"causal_draft": False},
    "any draft, parts": ALWAYS | {"causal_draft": False, "sub_block_length": 3},
}
EXACT_SHIFTED = EXACT | {
    # The row before a single mask is a known token's: a causal draft of it has the verifier's law.
    "no single tokens": {"route": "span", "min_span": 2} | CAUSAL,
}


@pytest.mark.parametrize("name", EXACT)
def test_verified_greedy_text_is_that_of_blocks_of_one_token(tiny, decode, prompts, name):
    given = prompts(9)
    ours = decode(tiny("block"), "s2d2", EXACT[name], prompts=given, max_new_tokens=13)
    same(ours, decode(tiny("block", block_length=1), "block_diffusion", prompts=given, max_new_tokens=13))


@pytest.mark.parametrize("name", EXACT_SHIFTED)
def test_with_shifted_logits_verified_greedy_text_is_that_of_the_causal_model(tiny, decode, prompts, name):
    given = prompts(9)
    ours = decode(tiny("block", shift=1), "s2d2", EXACT_SHIFTED[name], prompts=given, max_new_tokens=13)
    causal = tiny_model("causal")
    # The causal model may not say the mask token either.
    causal.family = dataclasses.replace(causal.family, mask_id=TINY_MASK)
    causal.model.get_output_embeddings().weight = tiny("block").model.get_output_embeddings().weight
    same(ours, decode(causal, "autoregressive", prompts=given, max_new_tokens=13))


def test_a_repetition_penalty_sees_what_blocks_of_one_token_see(tiny, decode, prompts):
    given, law = prompts(6), Law(repetition_penalty=1.5)
    ours = decode(tiny("block"), "s2d2", ALWAYS, prompts=given, max_new_tokens=11, law=law)
    base = decode(tiny("block", block_length=1), "block_diffusion", prompts=given, max_new_tokens=11, law=law)
    same(ours, base)


class Context(ToyModel):
    """Says something else for everything that can be seen; a pass that sees what it must not is found out."""

    def __init__(self, shift):
        family = Family(kind="block", mask_id=3, shift=shift, block_length=3)
        super().__init__(family, 4, window=16)
        self.known = {}

    def logits(self, position, view):
        key = position, view.tobytes()
        if key not in self.known:
            rng = np.random.default_rng(zlib.crc32(view.tobytes()) + position)
            self.known[key] = 1.5 * rng.standard_normal(4)
        return self.known[key]

    def joint(self, prompt, length, law):
        """The law of continuations by blocks of one token, token by token."""
        joint = np.zeros((3,) * length)

        def go_on(text, chance):
            if len(text) == len(prompt) + length:
                joint[tuple(text[len(prompt) :])] = chance
                return
            view = np.full(self.window, UNSEEN, np.int64)
            view[: len(text)] = text
            if self.family.shift == 0:
                view[len(text)] = 3
            z = self.logits(len(text) - self.family.shift, view)[:3] / law.temperature
            q = np.exp(z) / np.exp(z).sum()
            if law.top_k:
                q = np.where(q >= np.sort(q)[-law.top_k], q, 0)
            for token, share in enumerate(q / q.sum()):
                go_on([*text, token], chance * share)

        go_on(list(prompt), 1.0)
        return joint


def chance_of_samples(settings, shift=0, law=Law(temperature=1.3)):  # noqa: B008
    """How likely 600 samples of 3 tokens, the last behind a block's edge, are under the exact law."""
    model, prompt = Context(shift), np.array([0])
    counts = sample_joint(make_decoder("s2d2", settings), model, prompt, 3, 600, law)
    return chi_square(counts[:3, :3, :3], model.joint(prompt, 3, law))


@pytest.mark.parametrize(
    ("shift", "settings"),
    [
        (0, ALWAYS),
        (0, ALWAYS | {"causal_draft": False, "sub_block_length": 2}),
        (1, ALWAYS),
        (1, ALWAYS | {"causal_draft": False, "sub_block_length": 2}),
        (1, EXACT_SHIFTED["no single tokens"]),
    ],
    ids=str,
)
def test_verified_samples_have_the_joint_law_of_blocks_of_one_token(shift, settings):
    """Fails by chance once in a million."""
    assert chance_of_samples(settings, shift) > 1e-6


def test_verified_samples_keep_to_the_truncated_law():
    assert chance_of_samples(ALWAYS, law=Law(temperature=1.3, top_k=2)) > 1e-6


@pytest.mark.parametrize("settings", [ALWAYS | {"ratio_power": 0.2}, {"route": "never"} | CAUSAL], ids=str)
def test_the_test_of_the_law_notices_what_has_another_one(settings):
    assert chance_of_samples(settings) < 1e-6


def test_over_a_cache_that_is_not_causal_verified_text_is_another_one(tiny, decode):
    given = [random_prompt(num, seed=num) for num in (9, 11, 13, 16)]
    settings = ALWAYS | {"causal_cache": False}
    ours = decode(tiny("block"), "s2d2", settings, prompts=given, max_new_tokens=13)
    base = decode(tiny("block", block_length=1), "block_diffusion", prompts=given, max_new_tokens=13)
    assert any(one.output.tolist() != two.output.tolist() for one, two in zip(ours, base, strict=True))


@pytest.mark.parametrize("law", [Law(), Law(temperature=1.2, top_k=9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_without_verification_it_is_the_base_decoder(tiny, decode, prompts, law, threshold):
    """Token for token and pass for pass, `block_diffusion` without shifted logits and `fast_dllm_v2` with."""
    given, more = prompts(8), {"law": law, "seeds": range(8), "max_new_tokens": 13}
    for shift, name, settings in (
        (0, "block_diffusion", {}),
        (0, "fast_dllm_v2", {"sub_block_length": 3}),
        (1, "fast_dllm_v2", {"sub_block_length": 3}),
        (1, "fast_dllm_v2", {"sub_block_length": 4}),
    ):
        model = tiny("block", shift=shift)
        ours = decode(
            model, "s2d2", settings | {"route": "never", "threshold": threshold}, prompts=given, **more
        )
        base = decode(model, name, settings | {"threshold": threshold}, prompts=given, **more)
        for one, other in zip(ours, base, strict=True):
            assert one.output.tolist() == other.output.tolist()
            assert one.committed_at.tolist() == other.committed_at.tolist()
            assert one.stats.forwards == other.stats.forwards


class Replaying(CountingModel):
    """Runs every request once more for the logits of all its rows."""

    def __init__(self, model):
        super().__init__(model)
        self.logits = []

    def run(self, requests):
        readings = super().run(requests)
        for row, forward in requests:
            if forward.slots is None:
                read = Logits(np.arange(len(forward.tokens)))
                [again] = self.model.run([(row, dataclasses.replace(forward, read=read))])
                self.logits.append((forward, again.logits))
        return readings


@pytest.mark.parametrize("shift", [0, 1])
def test_every_verified_row_equals_a_causal_run_of_the_text_before_it(cacheless, decode, shift):
    """And behind that text a mask, unless logits are shifted."""
    model = Replaying(tiny_model("block", shift=shift, block_length=8, max_rows=1))
    [seq] = decode(model, "s2d2", ALWAYS, prompts=[random_prompt(11)], max_new_tokens=24)
    checked = 0
    for forward, logits in model.logits[1::2]:
        start = int(forward.positions[0])
        for row in forward.read.rows:
            num = int(forward.positions[row]) - start
            text = [*seq.tokens[:start], *forward.tokens[:num], forward.tokens[row]]
            assert (text[-1] != TINY_MASK) == shift
            want = cacheless(text, torch.ones(len(text), len(text), dtype=torch.bool).tril())[-1].float()
            want[TINY_MASK] = -torch.inf
            torch.testing.assert_close(logits[row], want, rtol=0, atol=1e-5, check_dtype=False)
            checked += 1
    assert checked >= 20


@pytest.mark.parametrize(
    ("shift", "tokens", "positions", "rows", "sees"),
    [
        # Drafts of tokens 2 2 behind a known 1: a known row, a drafted one, two masks in their places.
        (0, [1, 2, 3, 3], [4, 5, 5, 6], [2, 3], ["1...", "11..", "1.1.", "11.1"]),
        (1, [1, 2], [4, 5], [0, 1], ["1.", "11"]),
    ],
)
def test_what_a_verification_feeds_and_sees(decode, shift, tokens, positions, rows, sees):
    """A block of 3 from position 4 on whose first token is known."""

    class Twos(ToyModel):
        def __init__(self):
            family = Family(kind="block", mask_id=3, shift=shift, block_length=4)
            super().__init__(family, 4, window=16)

        def logits(self, position, view):
            return np.array([0.0, 1.0, 2.0, 3.0])

    model = CountingModel(Twos())
    decode(model, "s2d2", ALWAYS, prompts=[[0, 0, 0, 0, 1]], max_new_tokens=2)
    [(_, asked)] = model.calls[-1]
    assert asked.tokens.tolist() == tokens
    assert asked.positions.tolist() == positions
    assert asked.read.rows.tolist() == rows
    assert asked.slots is None
    assert (asked.sees.start.tolist(), asked.sees.end.tolist()) == ([0] * len(tokens), [4] * len(tokens))
    assert asked.sees.own.tolist() == [[mark == "1" for mark in row] for row in sees]


@pytest.mark.parametrize("causal_draft", [True, False])
def test_a_draft_sees_the_block_or_before_its_first_mask_what_is_before(decode, causal_draft):
    model = Replaying(tiny_model("block", block_length=8, max_rows=1))
    settings = ALWAYS | {"causal_draft": causal_draft}
    decode(model, "s2d2", settings, prompts=[random_prompt(3)], max_new_tokens=30)
    num_known = []
    for forward, _ in model.logits[::2]:
        num_known.append(int(np.argmax(forward.tokens == TINY_MASK)))
        own = np.ones((8, 8), bool)
        if causal_draft:
            own[: num_known[-1]] = np.tri(8, dtype=bool)[: num_known[-1]]
        assert np.array_equal(forward.sees.own, own)
    assert len(set(num_known)) > 3


@torch.no_grad()
@pytest.mark.parametrize("causal_cache", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_only_finished_blocks_are_cached_as_a_prefill_of_that_attention(plain, shift, causal_cache):
    """Drafts and verifications leave no key behind them that is ever seen."""
    model = tiny_model("block", shift=shift, max_rows=1)
    engine, stop, checked = Engine(model), StopRules(max_new_tokens=30), 0
    settings = {"estimate": "margin_slope", "causal_cache": causal_cache}
    for seed in range(3):
        seq = Sequence(
            prompt=random_prompt(6), family=model.family, stop=stop, law=Law(temperature=1.5), seed=seed
        )
        engine.submit(make_decoder("s2d2", settings), seq)
        while not seq.done:
            engine.step()
            start = seq.frontier // 4 * 4
            now = seq.stats.forwards.get("target", 0)
            if seq.done or start == 0 or now == 0 or now not in seq.committed_at[start : start + 4]:
                continue
            at = torch.arange(start) // (1 if causal_cache else 4)
            fresh = plain.model(
                input_ids=torch.from_numpy(seq.tokens[None, :start]),
                attention_mask=(at[None, :] <= at[:, None])[None, None],
                use_cache=True,
            ).past_key_values
            for ours, theirs in zip(model.cache.slot_layers, fresh.layers, strict=True):
                torch.testing.assert_close(ours.keys[:1, :, :start], theirs.keys, rtol=0, atol=1e-9)
                torch.testing.assert_close(ours.values[:1, :, :start], theirs.values, rtol=0, atol=1e-9)
            checked += 1
    assert checked >= 6


class Uniform(ToyModel):
    """Predicts every position the same, whatever is seen: draft and verifier agree."""

    def __init__(self, shift):
        family = Family(kind="block", mask_id=4, shift=shift, block_length=4)
        super().__init__(family, 5, window=32)

    def logits(self, position, view):
        return np.array([0.0, 0.3, 0.6, 0.9, 9.0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_verifier_that_agrees_keeps_every_draft(decode, shift, temperature):
    """Blocks of 4: two passes each, and with shifted logits one that stores and tells the first token."""
    seqs = decode(
        Uniform(shift), "s2d2", ALWAYS, prompts=[[1] * 4] * 20, max_new_tokens=12, seeds=range(20),
        law=Law(temperature=temperature),
    )  # fmt: skip
    for seq in seqs:
        assert seq.stats.draft_tokens == seq.stats.accepted_tokens == (9 if shift else 12)
        assert seq.stats.forwards["target"] == (9 if shift else 6)


@pytest.mark.parametrize("law", [Law(), Law(temperature=1.5)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shift", [0, 1])
def test_every_verified_step_commits_what_is_kept_and_one_more(decode, tiny, shift, law):
    model, drafts = tiny("block", shift=shift, block_length=8), []

    def listen(seq, event):
        if event.kind == "draft":
            drafts.append(event)
            at = seq.committed_at[event.positions] == event.forward
            assert at.sum() == min(len(at), event.num_accepted + 1)
            assert at[: at.sum()].all()

    [seq] = decode(
        model, "s2d2", ALWAYS, prompts=[random_prompt(5)], max_new_tokens=30, law=law, listeners=[listen]
    )
    assert len(drafts) > 5
    assert any(0 < event.num_accepted < len(event.tokens) for event in drafts)
    assert all(event.positions[-1] < seq.limit for event in drafts)


class Three(ToyModel):
    """Surer of what stands further left; alone with the text before, it wants another third token."""

    def __init__(self):
        family = Family(kind="block", mask_id=3, shift=0, block_length=4)
        super().__init__(family, 4, window=16)

    def logits(self, position, view):
        is_third = position == 6 and view[7] == UNSEEN
        return np.eye(4)[1 if is_third else 0] * (9 - position / 2)


# Every drafted token is expected to be kept.
SURE = {"estimate": "confidence_power", "estimate_at": 0.0, "cost_per_confident": False}


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [
        # A draft of 4 of which verification keeps 2 and replaces one; then the last.
        ({"route": "always"}, [2, 2, 2, 4]),
        ({"route": "never"}, [1, 2, 3, 4]),
        ({"route": "span", "min_span": 4}, [2, 2, 2, 3]),
        ({"route": "span", "min_span": 5}, [1, 2, 3, 4]),
        ({"route": "score", "verify_cost": 1.0} | SURE, [2, 2, 2, 4]),
        ({"route": "score", "verify_cost": 1.5} | SURE, [2, 2, 2, 3]),
        ({"route": "score", "verify_cost": 1.5, "min_score": 3.0} | SURE, [1, 2, 3, 4]),
        ({"route": "hysteresis", "verify_cost": 1.0, "on_score": 2.0, "off_score": 0.0} | SURE, [2, 2, 2, 4]),
        ({"route": "hysteresis", "verify_cost": 1.0, "on_score": 2.0, "off_score": 1.0} | SURE, [2, 2, 2, 3]),
        ({"route": "hysteresis", "verify_cost": 1.0, "on_score": 3.0, "off_score": 0.0} | SURE, [1, 2, 3, 4]),
        ({"route": "bandit"}, [2, 2, 2, 4]),
    ],
    ids=str,
)
def test_what_the_route_says_is_done(decode, settings, forwards):
    """The number of the pass that committed each token of a block of 4; a score is the span less the cost."""
    settings = settings | {"threshold": 1.0}
    [seq] = decode(Three(), "s2d2", settings, prompts=[[0] * 4], max_new_tokens=4)
    assert seq.committed_at[4:].tolist() == forwards
    assert seq.output.tolist() == [0, 0, int(forwards[0] == 2), 0]


@pytest.mark.parametrize(("threshold", "forwards"), [(1.0, [2, 2, 2, 4]), (0.9, [1, 1, 1, 1])])
def test_the_cost_can_be_counted_for_each_confident_position(decode, threshold, forwards):
    """Above .9 are all four, which would cost four times 1.5."""
    settings = SURE | {"cost_per_confident": True, "verify_cost": 1.5, "threshold": threshold}
    [seq] = decode(Three(), "s2d2", settings, prompts=[[0] * 4], max_new_tokens=4)
    assert seq.committed_at[4:].tolist() == forwards


@pytest.mark.parametrize("route", ["hysteresis", "bandit"])
def test_a_route_with_memory_belongs_to_its_sequence(tiny, decode, prompts, route):
    """Alone, in a batch, and once more with the same decoder."""
    given, model = prompts(6), tiny("block", block_length=8)
    decoder = make_decoder("s2d2", {"route": route, "on_score": 0.5, "off_score": 0.2})
    together = decode(model, decoder, prompts=given, max_new_tokens=24)
    for prompt, other in zip(given, together, strict=True):
        [alone] = decode(model, decoder, prompts=[prompt], max_new_tokens=24)
        assert alone.output.tolist() == other.output.tolist()
        assert alone.stats.forwards == other.stats.forwards


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "threshold must be at least 0; got -0.1."),
        ({"verify_cost": float("nan")}, "verify_cost must be at least 0; got nan."),
        ({"exploration": -1.0}, "exploration must be at least 0; got -1.0."),
        ({"sub_block_length": 0}, "sub_block_length must be at least 1; got 0."),
        ({"min_span": 0}, "min_span must be at least 1; got 0."),
        ({"estimate_at": -1.0}, "estimate_at must be at least 0; got -1.0."),
        (
            {"on_score": 1.0, "off_score": 1.0},
            "off_score must be below on_score; got off_score=1.0, on_score=1.0.",
        ),
        ({"ratio_power": 0.0}, "ratio_power must be a finite number above 0; got 0.0."),
        ({"ratio_power": float("inf")}, "ratio_power must be a finite number above 0; got inf."),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        make_decoder("s2d2", settings)
    assert str(error.value) == message
