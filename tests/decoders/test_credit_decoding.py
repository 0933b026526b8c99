from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from chordal.errors import InputError
from chordal.models.family import Family
from chordal.ops.randomness import uniforms
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.testing import TINY_MASK, ToyModel

CANVAS = 11


def credit_decoding(logits, prompt, tau, alpha, beta, gamma, block, shift, *, temperature=0.0, seed=0):
    """CreditDecoding for one row, with a credit for every token; gives tokens and their passes."""
    x = [*prompt, *[TINY_MASK] * CANVAS]
    committed_in, now = [0] * len(x), 0
    for start in range(len(prompt), len(x), block):
        credit = {}
        while masked := [p for p in range(start, min(start + block, len(x))) if x[p] == TINY_MASK]:
            z = logits(x).float()
            z[:, TINY_MASK] = -torch.inf
            c, x0 = {}, {}
            for p in masked:
                row = z[p - shift]
                probs = row.softmax(0)
                best = int(probs.argmax())
                credit[p] = credit.get(p, torch.zeros_like(row)) * beta
                credit[p][best] += probs[best] ** gamma
                row = row + alpha * torch.log(1 + credit[p])
                x0[p] = int(row.argmax())
                if temperature:
                    [number] = uniforms(seed, "token", [p], now)
                    x0[p] = int(((row / temperature).double().softmax(0).cumsum(0) <= number).sum())
                c[p] = float(row.softmax(0)[x0[p]])
            now += 1
            surest = max(masked, key=lambda p: (c[p], -p))
            for p in masked:
                if c[p] >= tau or p == surest:
                    x[p], committed_in[p] = x0[p], now
    return x[len(prompt) :], committed_in[len(prompt) :]


@pytest.mark.parametrize(
    "constants",
    [(0.9, 0.65, 0.7, 0.2), (0.5, 0.65, 0.7, 0.2), (0.5, 2.0, 0.9, 0.5), (0.6, 3.0, 1.0, 1.0)],
    ids=str,
)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_and_order_equal_the_published_rule(
    tiny, cacheless, decode, prompts, assert_same_commits, constants, shift, temperature
):
    """Rows of several lengths together; blocks that do not divide the canvas."""
    given, seeds = prompts(5), range(5)
    settings = dict(zip(("threshold", "fusion", "decay", "concavity"), constants, strict=True))
    seqs = decode(
        tiny("masked", shift=shift),
        "credit_decoding",
        settings | {"block_length": 4},
        prompts=given,
        max_new_tokens=CANVAS,
        law=Law(temperature=temperature),
        seeds=seeds,
    )
    assert_same_commits(
        seqs,
        [
            credit_decoding(cacheless, prompt, *constants, 4, shift, temperature=temperature, seed=seed)
            for prompt, seed in zip(given, seeds, strict=True)
        ],
    )


@pytest.mark.parametrize("feed", ["whole", "prefix", "dual"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_without_fusion_it_equals_threshold(tiny, decode, prompts, feed, temperature):
    shared = {"threshold": 0.3, "block_length": 5, "feed": feed}
    law = Law(temperature=temperature, repetition_penalty=1.2)
    ours, threshold = (
        decode(
            tiny("masked", shift=1),
            name,
            shared | more,
            prompts=prompts(6),
            max_new_tokens=CANVAS,
            law=law,
        )
        for name, more in (("credit_decoding", {"fusion": 0.0}), ("threshold", {}))
    )
    for one, other in zip(ours, threshold, strict=True):
        assert one.output.tolist() == other.output.tolist()
        assert one.committed_at.tolist() == other.committed_at.tolist()
        assert one.stats.positions_fed == other.stats.positions_fed


def test_one_pass_a_block_commits_what_threshold_does(tiny, decode, prompts):
    """The first credit is of the most likely token, which it cannot change."""
    shared = {"threshold": 0.0, "block_length": 5}
    ours, threshold = (
        decode(tiny("masked"), name, shared, prompts=prompts(6), max_new_tokens=CANVAS)
        for name in ("credit_decoding", "threshold")
    )
    for one, other in zip(ours, threshold, strict=True):
        assert one.output.tolist() == other.output.tolist()
        assert one.stats.forwards["target"] == other.stats.forwards["target"] == 3


class Hesitates(ToyModel):
    """Gives A the listed probabilities at every masked position, one for each number of known tokens."""

    def __init__(self, probs):
        super().__init__(Family(kind="masked", mask_id=2, shift=0), 3, window=16)
        self.probs = probs

    def logits(self, position, view):
        p = self.probs[int(((view >= 0) & (view != 2)).sum())]
        return np.array([math.log(p), math.log(1 - p), 0.0])


def test_a_steady_token_crosses_the_threshold_with_time(decode):
    """At p = .82 credit gives .8736, .8958, .9050: the third pass commits everything that is left."""
    shared = {"prompts": [[0]], "max_new_tokens": 6}
    [seq] = decode(Hesitates([0.82] * 7), "credit_decoding", **shared)
    assert seq.committed_at.tolist() == [0, 1, 2, 3, 3, 3, 3]
    [seq] = decode(Hesitates([0.82] * 7), "threshold", **shared)
    assert seq.stats.forwards["target"] == 6


def test_a_new_block_begins_without_credit(decode):
    settings = {"block_length": 3}
    [seq] = decode(Hesitates([0.82] * 9), "credit_decoding", settings, prompts=[[0]], max_new_tokens=7)
    assert seq.committed_at.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_credit_can_make_another_token_win_than_the_model_now_prefers(decode):
    probs = {1: 0.6, 2: 0.6, 3: 0.6, 4: 0.6, 5: 0.6, 6: 0.48}
    for decoder, wanted in (("credit_decoding", 0), ("threshold", 1)):
        [seq] = decode(Hesitates(probs), decoder, prompts=[[0]], max_new_tokens=6)
        assert seq.output.tolist() == [0] * 5 + [wanted]


def test_a_request_leaves_no_credit_for_the_next(tiny, decode, prompts):
    """One decoder serves every request of an engine; a state of its own would show."""
    given = prompts(1) * 3
    first, second, third = decode(tiny("masked", max_rows=1), "credit_decoding", prompts=given)
    assert first.committed_at.tolist() == second.committed_at.tolist() == third.committed_at.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "threshold must be at least 0; got -0.1."),
        ({"fusion": -0.1}, "fusion must be a finite number of at least 0; got -0.1."),
        ({"fusion": math.inf}, "fusion must be a finite number of at least 0; got inf."),
        ({"decay": 1.1}, "decay must be between 0 and 1; got 1.1."),
        ({"decay": math.nan}, "decay must be between 0 and 1; got nan."),
        ({"concavity": 0}, "concavity must be a finite number above 0; got 0.0."),
        ({"block_length": 0}, "block_length must be at least 1; got 0."),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        make_decoder("credit_decoding", settings)
    assert str(error.value) == message
