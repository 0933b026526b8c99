from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.errors import InputError
from chordal.models.family import Family
from chordal.ops.randomness import uniforms
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.testing import TINY_MASK, IdealModel, ToyModel, ideal, simulate

CANVAS = 11


def localleap(logits, prompt, tau, tau_r, r, block, shift, *, temperature=0.0, seed=0):
    """LocalLeap for one row with its loops over anchors and neighbours; tokens and their passes."""
    x = [*prompt, *[TINY_MASK] * CANVAS]
    committed_in, now = [0] * len(x), 0
    for start in range(len(prompt), len(x), block):
        while masked := [p for p in range(start, min(start + block, len(x))) if x[p] == TINY_MASK]:
            z = logits(x).float()
            z[:, TINY_MASK] = -torch.inf
            c, x0 = {}, {}
            for p in masked:
                row = z[p - shift]
                x0[p] = int(row.argmax())
                if temperature:
                    [number] = uniforms(seed, "token", [p], now)
                    x0[p] = int(((row / temperature).double().softmax(0).cumsum(0) <= number).sum())
                c[p] = float(row.softmax(0)[x0[p]])
            now += 1
            anchors = [p for p in masked if c[p] >= tau]
            chosen = set(anchors)
            for anchor in anchors:
                for p in range(anchor - r, anchor + r + 1):
                    if c.get(p, -1) >= tau_r:
                        chosen.add(p)
            for p in chosen or [max(masked, key=lambda p: (c[p], -p))]:
                x[p], committed_in[p] = x0[p], now
    return x[len(prompt) :], committed_in[len(prompt) :]


RULES = [(0.5, 0.3, 1), (0.5, 0.15, 2), (0.35, 0.2, 4), (0.6, 0.05, 20)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_and_order_equal_the_published_rule(
    tiny, cacheless, decode, prompts, assert_same_commits, rule, shift, temperature
):
    given, seeds = prompts(5), range(5)
    settings = dict(zip(("threshold", "relaxed_threshold", "radius"), rule, strict=True))
    seqs = decode(
        tiny("masked", shift=shift),
        "localleap",
        settings | {"block_length": 4},
        prompts=given,
        max_new_tokens=CANVAS,
        law=Law(temperature=temperature),
        seeds=seeds,
    )
    assert_same_commits(
        seqs,
        [
            localleap(cacheless, prompt, *rule, 4, shift, temperature=temperature, seed=seed)
            for prompt, seed in zip(given, seeds, strict=True)
        ],
    )


def test_the_rules_above_do_leap(tiny, decode, prompts):
    """Or the reference would only show that of a threshold."""
    for threshold, relaxed, radius in RULES:
        passes = [
            [
                seq.stats.forwards["target"]
                for seq in decode(
                    tiny("masked"),
                    "localleap",
                    {"threshold": threshold, "relaxed_threshold": relaxed_threshold, "radius": radius},
                    prompts=prompts(5),
                    max_new_tokens=CANVAS,
                )
            ]
            for relaxed_threshold in (relaxed, threshold)
        ]
        assert sum(passes[0]) < sum(passes[1])


@pytest.mark.parametrize("settings", [{"relaxed_threshold": 0.3}, {"relaxed_threshold": 0.1, "radius": 0}])
@pytest.mark.parametrize("feed", ["whole", "prefix", "dual"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_without_relaxation_or_radius_it_equals_threshold(tiny, decode, prompts, settings, feed, temperature):
    shared = {"threshold": 0.3, "block_length": 5, "feed": feed}
    ours, threshold = (
        decode(
            tiny("masked", shift=1),
            name,
            shared | more,
            prompts=prompts(6),
            max_new_tokens=CANVAS,
            law=Law(temperature=temperature),
        )
        for name, more in (("localleap", settings), ("threshold", {}))
    )
    for one, other in zip(ours, threshold, strict=True):
        assert one.output.tolist() == other.output.tolist()
        assert one.committed_at.tolist() == other.committed_at.tolist()
        assert one.stats.positions_fed == other.stats.positions_fed


def test_a_threshold_above_1_is_one_token_a_pass(tiny, decode, prompts):
    ours, reference = (
        decode(tiny("masked"), name, settings, prompts=prompts(6), max_new_tokens=CANVAS)
        for name, settings in (("localleap", {"threshold": 1.01}), ("low_confidence", {}))
    )
    for one, other in zip(ours, reference, strict=True):
        assert one.output.tolist() == other.output.tolist()
        assert one.committed_at.tolist() == other.committed_at.tolist()


class SureModel(ToyModel):
    """Predicts token p mod 3 at position p, as surely as is given for each number of known tokens."""

    def __init__(self, confidences):
        super().__init__(Family(kind="masked", mask_id=4, shift=0), 5, window=16)
        self.confidences = confidences

    def logits(self, position, view):
        num_known = int(((view >= 0) & (view != 4)).sum())
        confidence = self.confidences[num_known][position - 1]
        logits = np.full(5, np.log((1 - confidence) / 3))
        logits[position % 3] = np.log(confidence)
        return logits


@pytest.mark.parametrize("block_length", [4, 32, None])
def test_a_committed_token_is_no_anchor(decode, block_length):
    """First .95 commits alone; then nothing reaches .9, so its neighbours go one by one."""
    model = SureModel({1: [0.95, 0.7, 0.7, 0.3], 2: [0.5, 0.8, 0.79, 0.6], 3: [0.5, 0.5, 0.91, 0.76]})
    settings = {"block_length": block_length}
    [seq] = decode(model, "localleap", settings, prompts=[[0]], max_new_tokens=4)
    assert seq.committed_at.tolist() == [0, 1, 2, 3, 3]


def test_an_anchor_reaches_no_further_than_its_block(decode):
    model = SureModel({1: [0.95, 0.8, 0.8, 0.8], 3: [0.5, 0.5, 0.8, 0.7]} | {4: [0.5, 0.5, 0.5, 0.7]})
    [seq] = decode(model, "localleap", {"block_length": 2}, prompts=[[0]], max_new_tokens=4)
    assert seq.committed_at.tolist() == [0, 1, 1, 2, 3]


def test_a_stop_token_ends_the_text_and_what_is_behind_is_not_counted(decode):
    model = SureModel({1: [0.95, 0.8, 0.95, 0.8]})
    [seq] = decode(model, "localleap", prompts=[[0]], max_new_tokens=4, eos_ids=(2,))
    assert (seq.output.tolist(), seq.finish_reason, seq.stats.committed_tokens) == ([1, 2], "stop", 2)


def test_on_one_right_answer_it_is_never_wrong():
    model = IdealModel(ideal.copy(6), noise=1e-6)
    result = simulate(make_decoder("localleap"), model, 20)
    assert (result.accuracy, set(result.forwards)) == (1, {1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "threshold must be at least 0; got -0.1."),
        ({"threshold": float("nan")}, "threshold must be at least 0; got nan."),
        ({"relaxed_threshold": -1}, "relaxed_threshold must be at least 0; got -1.0."),
        ({"threshold": 0.5}, "relaxed_threshold must be at most threshold; got 0.75 and 0.5."),
        ({"radius": -1}, "radius must be at least 0; got -1."),
        ({"block_length": 0}, "block_length must be at least 1; got 0."),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        make_decoder("localleap", settings)
    assert str(error.value) == message
