from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from chordal.engine import Engine
from chordal.errors import InputError
from chordal.models.family import Family
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import TINY_MASK, ToyModel, random_prompt, tiny_model

CANVAS, BLOCK = 12, 4


def fast_dllm(plain, prompt, choose, cache, shift, canvas=CANVAS, block=BLOCK):
    """Fast-dLLM's decoding for one row; `choose` gets the confidences of the candidates.

    Each block starts with a forward pass of the whole canvas, whose keys and values are kept. Later
    passes of "prefix" feed the canvas from the block on, of "dual" the block alone, and take all else
    from what was kept; attention does not care in which order it gets keys. Models with shifted logits
    feed the token before the block as long as its row is needed. Gives the tokens, the pass that
    committed each, and what was kept after every pass.
    """
    x = torch.tensor([*prompt, *[TINY_MASK] * canvas])
    committed_in = [0] * len(x)
    kept, history, now = None, [], 0

    def forward(rows):
        nonlocal kept
        cached = DynamicCache()
        if kept is not None:
            others = [p for p in range(len(x)) if p not in rows]
            for layer, (keys, values) in enumerate(kept):
                cached.update(keys[:, :, others], values[:, :, others], layer)
        rows = torch.tensor(list(rows))
        logits = plain(
            input_ids=x[None, rows],
            position_ids=rows[None],
            attention_mask=torch.ones(1, 1, len(rows), len(x), dtype=torch.bool),
            past_key_values=cached,
        ).logits[0]
        if kept is None:
            kept = [(layer.keys, layer.values) for layer in cached.layers]
        else:
            kept = [(keys.clone(), values.clone()) for keys, values in kept]
            for (keys, values), layer in zip(kept, cached.layers, strict=True):
                keys[:, :, rows] = layer.keys[:, :, -len(rows) :]
                values[:, :, rows] = layer.values[:, :, -len(rows) :]
        history.append(kept)
        logits[:, TINY_MASK] = -torch.inf
        return dict(zip(rows.tolist(), logits, strict=True))

    for start in range(len(prompt), len(x), block):
        end = min(start + block, len(x))
        kept = None
        while masked := [p for p in range(start, end) if x[p] == TINY_MASK]:
            first = start - 1 if shift and masked[0] == start else start
            if kept is None or cache == "whole":
                kept, rows = None, range(len(x))
            else:
                rows = range(first, len(x) if cache == "prefix" else end)
            z = forward(rows)
            now += 1
            probs = [z[max(p - shift, 0)].softmax(0) for p in masked]
            for index in choose([float(q.max()) for q in probs]):
                x[masked[index]], committed_in[masked[index]] = int(probs[index].argmax()), now
    return x[len(prompt) :].tolist(), committed_in[len(prompt) :], history


def by_threshold(threshold):
    def choose(confidences):
        best = max(range(len(confidences)), key=lambda i: confidences[i])
        return [i for i, c in enumerate(confidences) if c >= threshold or i == best]

    return choose


def by_factor(factor):
    def choose(confidences):
        ranked = sorted(range(len(confidences)), key=lambda i: -confidences[i])
        num = 1
        while num < len(ranked) and (num + 2) * (1 - confidences[ranked[num]]) < factor:
            num += 1
        return ranked[:num]

    return choose


class SureModel(ToyModel):
    """Predicts token i mod 3 for position i, always with the given confidence."""

    def __init__(self, confidence, window=80):
        super().__init__(Family(kind="masked", mask_id=4, shift=0), 5, window=window)
        self.confidence = np.broadcast_to(confidence, window)

    def logits(self, position, view):
        logits = np.full(5, np.log((1 - self.confidence[position]) / 3))
        logits[position % 3] = np.log(self.confidence[position])
        return logits


@torch.no_grad()
@pytest.mark.parametrize("feed", ["whole", "prefix", "dual"])
@pytest.mark.parametrize(
    ("rule", "value"), [("threshold", 0.25), ("threshold", 0.6), ("factor", 1.0), ("factor", 2.5)]
)
@pytest.mark.parametrize("shift", [0, 1])
def test_tokens_and_order_equal_fast_dllm(
    tiny, plain, decode, prompts, assert_same_commits, rule, value, feed, shift
):
    given = prompts(5)
    settings = {rule: value, "feed": feed, "block_length": BLOCK}
    choose = by_threshold(value) if rule == "threshold" else by_factor(value)
    seqs = decode(tiny("masked", shift=shift), "threshold", settings, prompts=given, max_new_tokens=CANVAS)
    assert_same_commits(seqs, [fast_dllm(plain, prompt, choose, feed, shift)[:2] for prompt in given])


def test_the_approximate_feeds_do_differ(tiny, decode, prompts):
    outputs = {
        feed: [
            seq.output.tolist()
            for seq in decode(
                tiny("masked"),
                "threshold",
                {"threshold": 0.25, "feed": feed, "block_length": BLOCK},
                prompts=prompts(20),
                max_new_tokens=CANVAS,
            )
        ]
        for feed in ("whole", "prefix", "dual")
    }
    assert outputs["whole"] != outputs["prefix"] != outputs["dual"] != outputs["whole"]


@torch.no_grad()
@pytest.mark.parametrize("feed", ["whole", "prefix", "dual"])
@pytest.mark.parametrize("shift", [0, 1])
def test_the_cache_holds_what_fast_dllm_keeps_after_every_pass(plain, feed, shift):
    model, prompt = tiny_model("masked", shift=shift, max_rows=1), random_prompt(5)
    settings = {"threshold": 2, "feed": feed, "block_length": BLOCK}
    *_, history = fast_dllm(plain, prompt, by_threshold(2), feed, shift)
    engine = Engine(model)
    engine.submit(
        make_decoder("threshold", settings),
        Sequence(prompt=prompt, family=model.family, stop=StopRules(max_new_tokens=CANVAS)),
    )
    assert len(history) == CANVAS
    for kept in history:
        engine.step()
        for layer, (keys, values) in zip(model.cache.slot_layers, kept, strict=True):
            for ours, theirs in ((layer.keys, keys), (layer.values, values)):
                torch.testing.assert_close(ours[:1, :, : 5 + CANVAS], theirs, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_dual_pass_refreshes_the_block_and_nothing_else(plain):
    """Prompt of 4, two blocks of 4. The second pass of the first block feeds positions 4 to 7 only."""
    model, prompt = tiny_model("masked", max_rows=1), random_prompt(4)
    engine = Engine(model)
    seq = Sequence(prompt=prompt, family=model.family, stop=StopRules(max_new_tokens=8))
    decoder = make_decoder("threshold", {"threshold": 2, "feed": "dual", "block_length": 4})
    engine.submit(decoder, seq)
    engine.step()
    before = [layer.keys[0, :, :12].clone() for layer in model.cache.slot_layers]
    canvas = seq.tokens.copy()
    engine.step()
    after = [layer.keys[0, :, :12] for layer in model.cache.slot_layers]
    cached = DynamicCache()
    ids, everything = torch.from_numpy(canvas)[None], torch.ones(1, 1, 12, 12, dtype=torch.bool)
    plain(input_ids=ids, attention_mask=everything, past_key_values=cached)
    # In the first layer keys depend on their own token alone: one token changed since the first pass.
    changed = [
        bool((old != new).any()) for old, new in zip(before[0].unbind(1), after[0].unbind(1), strict=True)
    ]
    assert [p for p in range(12) if changed[p]] == [int(seq.committed_at.tolist().index(1))]
    torch.testing.assert_close(after[0], cached.layers[0].keys[0])
    # Deeper, those of the block see the commit; those outside are as they were, which is not exact.
    for old, new, fresh in zip(before[1:], after[1:], cached.layers[1:], strict=True):
        assert torch.equal(old[:, :4], new[:, :4])
        assert torch.equal(old[:, 8:], new[:, 8:])
        assert (old[:, 4:8] != new[:, 4:8]).any((0, 2)).all()
        assert not torch.allclose(new[:, 8:], fresh.keys[0, :, 8:])


@pytest.mark.parametrize("block_length", [1, 3, 4, None])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_threshold_above_1_equals_low_confidence(tiny, decode, prompts, block_length, shift):
    model, given = tiny("masked", shift=shift), prompts(8)
    ours, reference = (
        decode(model, name, {"block_length": block_length} | settings, prompts=given, max_new_tokens=CANVAS)
        for name, settings in (("threshold", {"threshold": 1.01}), ("low_confidence", {}))
    )
    for one, other in zip(ours, reference, strict=True):
        assert one.output.tolist() == other.output.tolist()
        assert one.committed_at.tolist() == other.committed_at.tolist()


@pytest.mark.parametrize("feed", ["prefix", "dual"])
def test_caches_that_are_refreshed_every_pass_are_exact(tiny, decode, prompts, feed):
    settings = {"block_length": 1, "threshold": 0.5}
    exact = decode(tiny("masked"), "threshold", settings, prompts=prompts(8))
    cached = decode(tiny("masked"), "threshold", settings | {"feed": feed}, prompts=prompts(8))
    assert [seq.output.tolist() for seq in cached] == [seq.output.tolist() for seq in exact]


@pytest.mark.parametrize("feed", ["whole", "prefix", "dual"])
@pytest.mark.parametrize("settings", [{"threshold": 0.9}, {"threshold": 0.0}, {"factor": 100.0}], ids=str)
def test_a_block_of_sure_tokens_takes_one_forward(decode, feed, settings):
    settings = settings | {"feed": feed, "block_length": 32}
    [seq] = decode(SureModel(0.95), "threshold", settings, prompts=[[0, 1, 2]], max_new_tokens=64)
    assert seq.stats.forwards["target"] == 2
    assert seq.output.tolist() == [position % 3 for position in range(3, 67)]


def test_a_threshold_of_0_takes_one_forward_a_block(tiny, decode, prompts):
    seqs = decode(
        tiny("masked"),
        "threshold",
        {"threshold": 0.0, "block_length": 5},
        prompts=prompts(3),
        max_new_tokens=CANVAS,
    )
    assert [seq.stats.forwards["target"] for seq in seqs] == [3, 3, 3]


@pytest.mark.parametrize(
    ("feed", "fed"),
    [
        # Prompt 3, blocks of 4, one token a pass: each pass feeds ...
        ("whole", 8 * 11),
        ("prefix", 11 + 3 * 8 + 11 + 3 * 4),
        ("dual", 11 + 3 * 4 + 11 + 3 * 4),
    ],
)
def test_each_feed_feeds_what_its_name_says(decode, feed, fed):
    settings = {"threshold": 2, "feed": feed, "block_length": 4}
    [seq] = decode(SureModel(0.95), "threshold", settings, prompts=[[0, 1, 2]])
    assert (seq.stats.forwards["target"], seq.stats.positions_fed["target"]) == (8, fed)


def test_a_lower_threshold_never_needs_more_forwards(decode):
    confidence = np.random.default_rng(0).uniform(0.3, 1, 80)
    forwards = [
        decode(SureModel(confidence), "threshold", {"threshold": tau}, prompts=[[0]], max_new_tokens=32)[
            0
        ].stats.forwards["target"]
        for tau in (2, 0.95, 0.8, 0.6, 0.3, 0)
    ]
    assert forwards == sorted(forwards, reverse=True)
    assert (forwards[0], forwards[-1]) == (32, 1)
    assert len(set(forwards)) > 3


@pytest.mark.parametrize(
    ("confidences", "factor", "counts"),
    [
        ([0.99, 0.9, 0.8, 0.7], 1.0, [3, 1]),  # the fourth needs .80
        ([0.3, 0.26], 1.0, [1, 1]),  # the second needs .667
        ([0.99, 0.67, 0.74, 0.8], 1.0, [2, 2]),  # .80, then .74 fails 3/4: the run ends there
        ([0.9, 0.9, 0.9, 0.9], 1e-9, [1, 1, 1, 1]),
        ([0.3, 0.3, 0.3, 0.3], 9.0, [4]),
    ],
)
def test_the_factor_rule_commits_by_its_table(decode, confidences, factor, counts):
    model = SureModel(np.pad(confidences, (1, 0)), window=1 + len(confidences))
    [seq] = decode(model, "threshold", {"factor": factor}, prompts=[[0]], max_new_tokens=len(confidences))
    assert np.bincount(seq.committed_at[1:])[1:].tolist() == counts


def test_a_prediction_at_the_threshold_is_committed_and_the_best_one_always(decode):
    model = SureModel([0.5, 0.75, 0.5, 0.4, 0.3], window=5)
    [seq] = decode(model, "threshold", {"threshold": 0.5}, prompts=[[0]], max_new_tokens=4)
    assert seq.committed_at[1:].tolist() == [1, 1, 2, 3]


@pytest.mark.parametrize(
    "settings",
    [{"threshold": -0.1}, {"threshold": float("nan")}, {"factor": 0.0}, {"block_length": 0}],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match="must be"):
        make_decoder("threshold", settings)
