from __future__ import annotations

import dataclasses

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
from chordal.testing import TINY_MASK, CountingModel, ToyModel, random_prompt, tiny_model

LENGTH = 13
LAWS = {
    "greedy": Law(),
    "greedy, penalized": Law(repetition_penalty=1.5),
    "sampled": Law(temperature=1.2, top_k=9),
    "sampled, penalized": Law(temperature=0.8, repetition_penalty=1.3),
}


@pytest.fixture(scope="session")
def commits(decode):
    """Decodes prompts and gives their sequences and, of each, every commit in order."""

    def commits(model, decoder, settings, given, **more):
        events = {}
        keep = [lambda seq, event: events.setdefault(id(seq), []).append(event)]
        more = {"max_new_tokens": LENGTH, "seeds": range(len(given))} | more
        seqs = decode(model, decoder, settings, prompts=given, listeners=keep, **more)
        orders = [[(e.positions.tolist(), e.tokens.tolist()) for e in events[id(seq)]] for seq in seqs]
        return seqs, orders

    return commits


@pytest.fixture(scope="session")
def assert_lossless(commits):
    """Compares settings of `freedave` with a plain decoder: the text, and which commit came when."""

    def assert_lossless(model, plain, plain_settings, settings, given, *, one_a_step=False, **more):
        wanted, order = commits(model, plain, plain_settings, given, **more)
        for one in settings:
            seqs, got = commits(model, "freedave", one, given, **more)
            assert got == order, one
            for seq, other in zip(seqs, wanted, strict=True):
                assert seq.output.tolist() == other.output.tolist()
                assert (seq.finish_reason, seq.stop_reason) == (other.finish_reason, other.stop_reason)
                assert seq.stats.forwards["target"] <= other.stats.forwards["target"]
                if one_a_step:
                    in_pass = np.bincount(seq.committed_at[seq.num_prompt :].clip(0))[1:]
                    assert in_pass.min() >= 1
                    assert in_pass.max() <= one["num_drafts"]
        return seqs, wanted

    return assert_lossless


def forwards(seqs):
    return sum(seq.stats.forwards["target"] for seq in seqs)


def drafts(**settings):
    return [{"num_drafts": num, **settings} for num in (1, 2, 4, 8, LENGTH)]


@pytest.mark.parametrize("feed", ["whole", "prefix", "dual"])
@pytest.mark.parametrize("shift", [0, 1])
def test_text_and_order_equal_one_token_a_pass_with_the_same_feed(
    tiny, assert_lossless, prompts, feed, shift
):
    """Blocks of 5 do not divide the 13 tokens."""
    settings = {"feed": feed, "block_length": 5}
    ours, plain = assert_lossless(
        tiny("masked", shift=shift),
        "threshold",
        {"threshold": 2.0, **settings},
        drafts(**settings),
        prompts(5),
        one_a_step=True,
    )
    assert forwards(ours) < forwards(plain)


@pytest.mark.parametrize("block_length", [3, 4])
@pytest.mark.parametrize("shift", [0, 1])
def test_text_and_order_equal_one_token_a_pass_of_a_block_model(
    tiny, assert_lossless, prompts, shift, block_length
):
    model = tiny("block", shift=shift, block_length=block_length)
    ours, plain = assert_lossless(model, "block_diffusion", {}, drafts(), prompts(5), one_a_step=True)
    assert forwards(ours) < forwards(plain)


@pytest.mark.parametrize("kind", ["masked", "block"])
@pytest.mark.parametrize("shift", [0, 1])
def test_drafts_that_reach_into_later_blocks_change_nothing(tiny, assert_lossless, prompts, kind, shift):
    model = tiny(kind, shift=shift)
    plain = ("threshold", {"threshold": 2.0, "block_length": 4})
    if kind == "block":
        plain = ("block_diffusion", {})
    settings = [
        {"num_drafts": num, "num_ahead": ahead, "block_length": 4} for num in (2, 8) for ahead in (1, 3)
    ]
    assert_lossless(model, *plain, settings, prompts(5), one_a_step=True)


def test_the_defaults_equal_plain_decoding(tiny, assert_lossless, prompts):
    assert_lossless(tiny("masked"), "low_confidence", {}, [{}], prompts(3))
    assert_lossless(tiny("block"), "block_diffusion", {}, [{}], prompts(3))


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.6])
@pytest.mark.parametrize(
    ("kind", "feed", "shift"),
    [
        ("masked", "whole", 0),
        ("masked", "prefix", 1),
        ("masked", "dual", 1),
        ("block", "whole", 0),
        ("block", "whole", 1),
    ],
)
def test_by_exact_match_a_threshold_gives_what_threshold_decoding_gives(
    tiny, assert_lossless, prompts, threshold, kind, feed, shift
):
    settings = {"threshold": threshold}
    if kind == "masked":
        settings |= {"feed": feed, "block_length": 5}
    plain = "threshold" if kind == "masked" else "block_diffusion"
    ours = [settings | {"num_drafts": num} for num in (1, 3, 8)]
    if feed == "whole":
        ours.append(settings | {"num_drafts": 6, "num_ahead": 1})
    assert_lossless(tiny(kind, shift=shift), plain, settings, ours, prompts(4))


@pytest.mark.parametrize("law", [name for name in LAWS if name != "greedy"])
@pytest.mark.parametrize(
    ("kind", "feed", "shift"), [("masked", "whole", 0), ("masked", "dual", 1), ("block", "whole", 1)]
)
def test_sampled_text_equals_plain_sampling_with_the_same_seed(
    tiny, assert_lossless, prompts, law, kind, feed, shift
):
    ours = [{"num_drafts": num, "feed": feed, "block_length": 5} for num in (1, 3, 8)]
    plain = ("threshold", {"threshold": 2.0, "feed": feed, "block_length": 5})
    if kind == "block":
        plain = ("block_diffusion", {})
    assert_lossless(tiny(kind, shift=shift), *plain, ours, prompts(4), law=LAWS[law], one_a_step=True)


def sampled_threshold(logits, prompt, length, block_length, threshold, law, seed):
    """Threshold decoding of one row, without a cache, that draws anew for each number of known tokens."""
    x = [*prompt, *[TINY_MASK] * length]
    order = []
    for start in range(len(prompt), len(x), block_length):
        while masked := [p for p in range(start, min(start + block_length, len(x))) if x[p] == TINY_MASK]:
            z = logits(x)[masked].float()
            z[:, TINY_MASK] = -torch.inf
            numbers = uniforms(seed, "token", masked, len(x) - len(prompt) - x.count(TINY_MASK))
            drawn = [
                int(((q / law.temperature).softmax(0).double().cumsum(0) <= number).sum())
                for q, number in zip(z, numbers, strict=True)
            ]
            sure = [float(q.softmax(0)[token]) for q, token in zip(z, drawn, strict=True)]
            best = max(range(len(sure)), key=lambda i: (sure[i], -i))
            chosen = [i for i in range(len(sure)) if sure[i] >= threshold or i == best]
            for i in chosen:
                x[masked[i]] = drawn[i]
            order.append(([masked[i] for i in chosen], [drawn[i] for i in chosen]))
    return order


def test_sampling_with_a_threshold_draws_anew_for_each_number_of_known_tokens(
    tiny, commits, cacheless, prompts
):
    """So the law is that of threshold decoding: no number decides twice on one path."""
    given, law = prompts(5), Law(temperature=0.9)
    for num in (1, 3, 8):
        settings = {"num_drafts": num, "threshold": 0.4, "block_length": 5}
        _, orders = commits(tiny("masked"), "freedave", settings, given, law=law)
        assert orders == [
            sampled_threshold(cacheless, prompt.tolist(), LENGTH, 5, 0.4, law, seed)
            for seed, prompt in enumerate(given)
        ]
    assert max(len(positions) for order in orders for positions, _ in order) > 1


@pytest.mark.parametrize("feed", ["whole", "dual"])
def test_a_stop_token_ends_the_text_where_it_ends_plain_decoding(tiny, assert_lossless, prompts, feed):
    model, given = tiny("masked"), prompts(4)
    settings = {"feed": feed, "block_length": 5}
    plain = ("threshold", {"threshold": 2.0, **settings})
    for eos in range(0, 28, 3):
        assert_lossless(model, *plain, [{"num_drafts": 4, **settings}], given, eos_ids=(eos, eos + 1))


@pytest.mark.parametrize("kind", ["masked", "block"])
def test_a_single_draft_asks_for_what_plain_decoding_asks_for(tiny, commits, prompts, kind):
    given = prompts(3)
    for feed in ("whole", "prefix", "dual") if kind == "masked" else ("whole",):
        settings = {"feed": feed, "block_length": 5} if kind == "masked" else {}
        plain = ("threshold", {"threshold": 2.0, **settings}) if kind == "masked" else ("block_diffusion", {})
        ours, _ = commits(tiny(kind), "freedave", {"num_drafts": 1, **settings}, given)
        wanted, _ = commits(tiny(kind), *plain, given)
        for one, other in zip(ours, wanted, strict=True):
            assert one.committed_at.tolist() == other.committed_at.tolist()
            assert one.stats.forwards == other.stats.forwards
            assert one.stats.positions_fed == other.stats.positions_fed


MASK, VOCAB = 9, 10


class Fixed(ToyModel):
    """Predicts for each position what it always predicts, each with a confidence of its own."""

    def __init__(self, kind="masked", block_length=None, window=64):
        family = Family(kind=kind, mask_id=MASK, shift=0, block_length=block_length)
        super().__init__(family, VOCAB, window=window)
        self.logits_TV = 2 * np.random.default_rng(0).standard_normal((window, VOCAB))

    def logits(self, position, view):
        return self.logits_TV[position]


class Adversarial(Fixed):
    """Changes its mind about every position whenever a token becomes known."""

    def logits(self, position, view):
        num_known = ((view >= 0) & (view != MASK)).sum()
        return np.roll(self.logits_TV[position], num_known)


@pytest.mark.parametrize(("num_drafts", "forwards"), [(1, 32), (2, 17), (4, 9), (8, 5), (32, 2)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("feed", ["whole", "prefix", "dual", "block"])
def test_predictions_that_never_change_take_the_fewest_forwards(
    decode, num_drafts, forwards, temperature, feed
):
    """Sampled ones too: drafts are drawn with the numbers of the steps they stand for."""
    model, settings, prompt = Fixed(), {"feed": feed}, [1]
    if feed == "block":
        model, settings, prompt = Fixed("block", 32), {}, [1] * 32
    law = Law(temperature=temperature)
    [seq] = decode(
        model,
        "freedave",
        {"num_drafts": num_drafts, **settings},
        prompts=[prompt],
        law=law,
        max_new_tokens=32,
    )
    assert seq.stats.forwards["target"] == forwards
    in_pass = np.bincount(seq.committed_at)[1:]
    assert in_pass[0] == 1
    assert (in_pass[1:-1] == num_drafts).all()


@pytest.mark.parametrize("num_drafts", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("kind", ["masked", "block"])
def test_predictions_that_always_change_take_a_forward_a_token(decode, num_drafts, kind):
    model = Adversarial(kind, 32 if kind == "block" else None)
    prompt = [1] * 32 if kind == "block" else [1]
    [seq] = decode(model, "freedave", {"num_drafts": num_drafts}, prompts=[prompt], max_new_tokens=32)
    assert seq.stats.forwards["target"] == 32
    assert sorted(seq.committed_at[len(prompt) :].tolist()) == list(range(1, 33))


@pytest.mark.parametrize("kind", ["masked", "block"])
@pytest.mark.parametrize(("num_ahead", "forwards"), [(0, 16), (2, 5)])
def test_reaching_ahead_saves_the_forwards_at_the_ends_of_blocks(decode, kind, num_ahead, forwards):
    """8 drafts in blocks of 4: a block takes two passes, or 32 tokens take 1 + ceil(31 / 8)."""
    model, settings = Fixed(kind, 4 if kind == "block" else None), {"num_drafts": 8, "num_ahead": num_ahead}
    if kind == "masked":
        settings["block_length"] = 4
    [seq] = decode(model, "freedave", settings, prompts=[[1] * 4], max_new_tokens=32)
    assert seq.stats.forwards["target"] == forwards


@pytest.mark.parametrize(
    ("feed", "fed"),
    [
        # Prompt of 1, a block of 8, 4 drafts: passes of 1, 4 and 3 states.
        ("whole", 8 * 9),
        ("prefix", 9 + 7 * 8),
        ("dual", 9 + 7 * 8),
    ],
)
def test_forwards_count_passes_and_rows_count_drafts(decode, feed, fed):
    settings = {"num_drafts": 4, "feed": feed, "block_length": 8}
    [seq] = decode(Fixed(), "freedave", settings, prompts=[[1]], max_new_tokens=8)
    assert (seq.stats.forwards["target"], seq.stats.rows) == (3, 8)
    assert seq.stats.positions_fed["target"] == fed


class Scripted(ToyModel):
    """Fills 5 positions from left to right with 0 1 2 3 4, except as the script has it.

    Args:
        script: By the number of known tokens, (token, confidence) by position of the answer.
    """

    def __init__(self, script):
        super().__init__(Family(kind="masked", mask_id=MASK, shift=0), VOCAB, window=6)
        self.script = script

    def logits(self, position, view):
        num_known = int(((view >= 0) & (view != MASK)).sum()) - 1
        at = position - 1
        token, confidence = self.script.get(num_known, {}).get(at, (at, 0.5 - 0.05 * at))
        probs = np.full(VOCAB, (1 - confidence) / (VOCAB - 1))
        probs[token] = confidence
        return np.log(probs)


@pytest.mark.parametrize(
    ("script", "committed_at", "output"),
    [
        ({}, [1, 2, 2, 2, 2], [0, 1, 2, 3, 4]),
        # D_1 and D_2 are as T_0 and T_1 have it; T_2 has another token than D_3.
        ({3: {3: (8, 0.4)}}, [1, 2, 2, 2, 3], [0, 1, 2, 8, 4]),
        # T_0 has another token than D_1; that T_1 and T_2 agree with the next ones counts for nothing.
        ({1: {1: (8, 0.4)}}, [1, 2, 3, 3, 3], [0, 8, 2, 3, 4]),
        # T_0 has another position than D_1.
        ({1: {4: (4, 0.9)}}, [1, 3, 3, 3, 2], [0, 1, 2, 3, 4]),
    ],
)
def test_drafts_are_kept_as_far_as_each_follows_from_the_one_before(decode, script, committed_at, output):
    [seq] = decode(Scripted(script), "freedave", {"num_drafts": 4}, prompts=[[0]], max_new_tokens=5)
    assert seq.output.tolist() == output
    assert seq.committed_at[1:].tolist() == committed_at


@pytest.mark.parametrize(
    ("match", "committed_at", "output"),
    [("exact", [1, 2, 2, 2, 3], [0, 1, 2, 3, 4]), ("subset", [1, 2, 2, 2, 3], [0, 1, 2, 8, 4])],
)
def test_by_subset_a_draft_on_the_way_to_what_follows_is_kept(decode, match, committed_at, output):
    """Of one known token follow 1, 2 and 3 at once; of the draft 0 1 2 follows 8."""
    script = {1: {at: (at, 0.9) for at in (1, 2, 3)}, 3: {3: (8, 0.4)}}
    settings = {"num_drafts": 3, "threshold": 0.8, "match": match}
    [seq] = decode(Scripted(script), "freedave", settings, prompts=[[0]], max_new_tokens=5)
    assert seq.output.tolist() == output
    assert seq.committed_at[1:].tolist() == committed_at


def test_subset_match_differs_with_a_threshold_only(tiny, commits, prompts):
    given = prompts(8)
    same, differs = (
        [
            commits(tiny("masked"), "freedave", settings | {"match": match}, given)[1]
            for match in ("exact", "subset")
        ]
        for settings in (
            {"num_drafts": 3, "block_length": None},
            {"num_drafts": 3, "block_length": None, "threshold": 0.3},
        )
    )
    assert same[0] == same[1]
    assert differs[0] != differs[1]


def start(model, feed):
    """Start decoding one sequence with a model of one row; gives the engine and the sequence."""
    settings = {"num_drafts": 4, "feed": feed, "block_length": 8}
    settings["num_ahead"] = int(model.family.kind == "block")
    engine = Engine(model)
    seq = Sequence(prompt=random_prompt(6), family=model.family, stop=StopRules(max_new_tokens=16))
    engine.submit(make_decoder("freedave", settings), seq)
    return engine, seq


@pytest.mark.parametrize(
    ("kind", "shift", "feed"),
    [("masked", 0, "prefix"), ("masked", 0, "dual"), ("masked", 1, "dual"), ("block", 1, "whole")],
)
def test_a_verifying_pass_leaves_what_is_cached_bit_for_bit(kind, shift, feed):
    model = CountingModel(tiny_model(kind, shift=shift, max_rows=1))
    layers = model.model.cache.slot_layers
    engine, seq = start(model, feed)
    num_written, num_checked = 0, 0
    while not seq.done:
        before = [
            (layer.keys[0, :, :num_written].clone(), layer.values[0, :, :num_written].clone())
            for layer in layers
            if num_written
        ]
        engine.step()
        slots = [forward.slots for _, forward in model.calls[-1] if forward.slots is not None]
        for written in slots:
            num_written = max(num_written, written.max() + 1)
        if before and not slots:
            for (keys, values), layer in zip(before, layers, strict=True):
                assert torch.equal(layer.keys[0, :, : keys.shape[1]], keys)
                assert torch.equal(layer.values[0, :, : values.shape[1]], values)
            num_checked += 1
    assert num_checked >= 3


@pytest.mark.parametrize("feed", ["prefix", "dual"])
def test_a_shifted_model_caches_the_row_before_the_block_as_plain_decoding_does(feed, prompts):
    """As the last pass left it in which the block's first token was masked; no later pass feeds it."""
    num_compared = 0
    for prompt in prompts(12):
        rows = []
        for name, settings in (("threshold", {"threshold": 2.0}), ("freedave", {"num_drafts": 4})):
            model, settings = tiny_model("masked", shift=1, max_rows=1), settings | {"feed": feed}
            engine = Engine(model)
            seq = Sequence(prompt=prompt, family=model.family, stop=StopRules(max_new_tokens=LENGTH))
            engine.submit(make_decoder(name, settings), seq)
            values = model.cache.slot_layers[-1]
            engine.step()
            first = values.values[0, :, len(prompt) - 1].clone()
            engine.run()
            rows.append(values.values[0, :, len(prompt) - 1])
        if 1 < seq.committed_at[len(prompt)] < seq.stats.forwards["target"]:
            torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-9)
            num_compared += not torch.allclose(rows[1], first)
    assert num_compared >= 3


def test_a_whole_canvas_needs_no_cache():
    model = CountingModel(tiny_model("masked", max_rows=1))
    engine, _ = start(model, "whole")
    engine.run()
    assert all(forward.slots is None for call in model.calls for _, forward in call)


class Apart(CountingModel):
    """Compares what a pass says of each draft with what it says of it alone, and beside another one."""

    num_compared = 0

    def run(self, requests):
        readings = super().run(requests)
        copies = [
            (row, dataclasses.replace(one, read=Logits(np.arange(len(one.tokens)))))
            for row, one in requests
            if one.slots is None
        ]
        if len(copies) > 1:
            together = self.model.run(copies)
            for copy, reading in zip(copies, together, strict=True):
                [alone] = self.model.run([copy])
                torch.testing.assert_close(reading.logits, alone.logits, rtol=0, atol=1e-6)
            row, second = copies[1]
            other = dataclasses.replace(second, tokens=second.tokens[::-1].copy())
            first, *_ = self.model.run([copies[0], (row, other), *copies[2:]])
            torch.testing.assert_close(first.logits, together[0].logits, rtol=0, atol=1e-6)
            self.num_compared += 1
        return readings


@pytest.mark.parametrize(
    ("kind", "shift", "feed"),
    [("masked", 0, "whole"), ("masked", 0, "dual"), ("masked", 1, "prefix"), ("block", 1, "whole")],
)
def test_drafts_do_not_see_each_other(kind, shift, feed):
    model = Apart(tiny_model(kind, shift=shift, max_rows=1))
    engine, seq = start(model, feed)
    engine.run()
    assert seq.error is None
    assert model.num_compared >= 4


class Sure(ToyModel):
    """Is as sure of token 1 as a float can be."""

    def __init__(self, kind):
        family = Family(kind=kind, mask_id=3, shift=0, block_length=4 if kind == "block" else None)
        super().__init__(family, 4, window=32)

    def logits(self, position, view):
        return np.array([-np.inf, 0.0, -np.inf, 0.0])


@pytest.mark.parametrize(("kind", "plain"), [("masked", "threshold"), ("block", "block_diffusion")])
@pytest.mark.parametrize("threshold", [0.99, 1.0])
def test_a_confidence_at_the_threshold_counts_as_it_does_in_plain_decoding(commits, kind, plain, threshold):
    """It passes `threshold` and does not pass that of `block_diffusion`."""
    given, settings = [[1, 1, 1, 1]], {"threshold": threshold}
    _, wanted = commits(Sure(kind), plain, settings, given)
    _, got = commits(Sure(kind), "freedave", settings, given)
    assert got == wanted


@pytest.mark.parametrize(
    "settings",
    [
        {"num_drafts": 0},
        {"threshold": -0.1},
        {"threshold": float("nan")},
        {"block_length": 0},
        {"num_ahead": -1},
        {"num_ahead": 1, "feed": "dual"},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(InputError, match="must be"):
        make_decoder("freedave", settings)


def test_a_block_model_has_no_approximate_feed(tiny, decode):
    with pytest.raises(InputError, match="feed=dual is for masked models"):
        decode(tiny("block"), "freedave", {"feed": "dual"}, prompts=[[1]])
