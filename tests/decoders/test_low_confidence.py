from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.errors import InputError
from chordal.models.family import Family
from chordal.ops.randomness import uniforms
from chordal.ops.sampling import Law
from chordal.testing import TINY_EOS, TINY_MASK, ToyModel, chi_square

CANVAS = 8

# Block lengths that divide the canvas, with fewer steps than tokens, as many, and more.
BLOCKS_AND_STEPS = [
    *((8, steps) for steps in (1, 2, 3, 5, 8, 11)),
    *((4, steps) for steps in (2, 4, 6, 8, 12)),
    *((2, steps) for steps in (4, 8, 12)),
    *((1, steps) for steps in (8, 16)),
]
DREAM_ORDERS = ["maskgit_plus", "topk_margin", "entropy"]


def llada(
    logits, prompt, block_length, steps, *, shift=0, cfg=0.0, ban=(), defer=(), temperature=0.0, draw=None
):
    """LLaDA's low-confidence sampler for one row, as paper and code have it.

    Gives the tokens and, for each, the number of the step that committed it, from 1.
    """
    x = [*prompt, *[TINY_MASK] * CANVAS]
    committed_in = [0] * len(x)
    num_blocks = CANVAS // block_length
    steps_per_block = steps // num_blocks
    now = 0
    for block in range(num_blocks):
        end = len(prompt) + (block + 1) * block_length
        num_masked = sum(x[p] == TINY_MASK for p in range(end - block_length, end))
        for step in range(steps_per_block):
            now += 1
            z = logits(x)
            if cfg:
                without = logits([TINY_MASK] * len(prompt) + x[len(prompt) :])
                z = without + (cfg + 1) * (z - without)
            if shift:
                z = torch.cat([z[:1], z[:-1]])
            z[:, [TINY_MASK, *ban]] = -torch.inf
            x0 = draw(z / temperature, now) if temperature else z.argmax(1)
            # At temperature 0 their noisy logits are the logits, so what must wait loses its score too.
            z[:, list(defer)] = -torch.inf
            confidence = z.softmax(1).gather(1, x0[:, None])[:, 0].tolist()
            masked = [p for p in range(end) if x[p] == TINY_MASK]
            masked.sort(key=lambda p: (-confidence[p], p))
            for p in masked[: num_masked // steps_per_block + (step < num_masked % steps_per_block)]:
                x[p], committed_in[p] = int(x0[p]), now
    return x[len(prompt) :], committed_in[len(prompt) :]


def dream(logits, prompt, steps, order, *, shift, temperature=0.0, top_p=1.0, draw=None):
    """Dream's sampler for one row and the orders that use a score; gives what `llada` gives."""
    x = [*prompt, *[TINY_MASK] * CANVAS]
    committed_in = [0] * len(x)
    times = torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        z = logits(x)
        if shift:
            z = torch.cat([z[:1], z[:-1]])
        z[:, TINY_MASK] = -torch.inf
        if temperature:
            z = z / temperature
        for row in z:
            ranked = row.argsort(descending=True)
            before = row.softmax(0)[ranked].cumsum(0).roll(1)
            before[0] = 0
            row[ranked[before > top_p]] = -torch.inf
        q = z.softmax(1)
        x0 = draw(z, step + 1) if temperature else q.argmax(1)
        best, second = q.topk(2).values.T
        score = {
            "maskgit_plus": q.gather(1, x0[:, None])[:, 0],
            "topk_margin": best - second,
            "entropy": (q * (q + 1e-10).log()).sum(1),
        }[order].tolist()
        masked = [p for p in range(len(x)) if x[p] == TINY_MASK]
        masked.sort(key=lambda p: (-score[p], p))
        num = int(len(masked) * (1 - times[step + 1] / times[step])) if step < steps - 1 else len(masked)
        for p in masked[:num]:
            x[p], committed_in[p] = int(x0[p]), step + 1
    return x[len(prompt) :], committed_in[len(prompt) :]


def keyed_draw(seed):
    """Draws by our own random numbers, one for each position and forward pass, counted from 0."""

    def draw(z, now):
        numbers = torch.from_numpy(uniforms(seed, "token", np.arange(len(z)), now - 1))
        return (z.softmax(1).cumsum(1) <= numbers[:, None]).sum(1)

    return draw


class FixedModel(ToyModel):
    """Predicts by position alone: row i of `logits` is what position `start + i` should become."""

    def __init__(self, logits, start, shift=0):
        self.table = np.asarray(logits, float)
        vocab = self.table.shape[1]
        family = Family(kind="masked", mask_id=vocab, shift=shift)
        super().__init__(family, vocab + 1, window=start + len(logits), max_rows=256)
        self.start = start

    def logits(self, position, view):
        return np.append(self.table[position + self.family.shift - self.start], 0.0)


@pytest.mark.parametrize(("block_length", "num_steps"), BLOCKS_AND_STEPS)
@pytest.mark.parametrize("shift", [0, 1])
def test_tokens_and_order_equal_lladas_sampler(
    tiny, cacheless, decode, prompts, assert_same_commits, block_length, num_steps, shift
):
    given = prompts(3, seed=num_steps)
    settings = {"block_length": block_length, "num_steps": num_steps}
    seqs = decode(tiny("masked", shift=shift), "low_confidence", settings, prompts=given)
    assert_same_commits(
        seqs, [llada(cacheless, prompt, block_length, num_steps, shift=shift) for prompt in given]
    )


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_sampled_tokens_and_order_equal_lladas_sampler_with_our_random_numbers(
    tiny, cacheless, decode, prompts, assert_same_commits, temperature
):
    given, seeds = prompts(6), range(6)
    settings, law = {"block_length": 4, "num_steps": 6}, Law(temperature=temperature)
    seqs = decode(tiny("masked"), "low_confidence", settings, prompts=given, law=law, seeds=seeds)
    assert_same_commits(
        seqs,
        [
            llada(cacheless, prompt, 4, 6, temperature=temperature, draw=keyed_draw(seed))
            for prompt, seed in zip(given, seeds, strict=True)
        ],
    )


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("shift", [0, 1])
def test_guidance_equals_lladas(tiny, cacheless, decode, prompts, assert_same_commits, scale, shift):
    given = prompts(4)
    settings = {"block_length": 4, "num_steps": 6, "cfg_scale": scale}
    seqs = decode(tiny("masked", shift=shift), "low_confidence", settings, prompts=given)
    assert_same_commits(seqs, [llada(cacheless, p, 4, 6, cfg=scale, shift=shift) for p in given])
    assert [seq.stats.rows for seq in seqs] == [2 * 6] * 4
    assert [seq.stats.forwards["target"] for seq in seqs] == [6] * 4


def test_guidance_changes_nothing_if_the_prompt_says_nothing(decode):
    table = np.random.default_rng(0).standard_normal((CANVAS, 5))
    model = FixedModel(table, start=3)
    plain, guided = (
        decode(model, "low_confidence", {"cfg_scale": scale}, prompts=[[0, 1, 2]])[0] for scale in (0, 3.0)
    )
    assert guided.output.tolist() == plain.output.tolist()
    assert guided.committed_at.tolist() == plain.committed_at.tolist()
    assert (plain.stats.rows, guided.stats.rows) == (CANVAS, 2 * CANVAS)


@pytest.mark.parametrize("option", ["ban", "defer"])
def test_stop_tokens_are_banned_or_deferred_as_in_lladas_code(
    cacheless, decode, prompts, assert_same_commits, tiny, monkeypatch, option
):
    # The likeliest tokens of all count as stop tokens, so that the option has something to do.
    given = prompts(8)
    model, stops = tiny("masked"), (1, 8, 20, TINY_EOS)
    free = decode(model, "low_confidence", {"num_steps": 4}, prompts=given)
    stops = tuple(np.unique([seq.output[:2] for seq in free]).tolist())
    monkeypatch.setattr(model, "family", Family(kind="masked", mask_id=TINY_MASK, shift=0, eos_ids=stops))
    settings = {"num_steps": 4, "block_length": None, f"{option}_eos": True}
    seqs = decode(model, "low_confidence", settings, prompts=given)
    assert_same_commits(seqs, [llada(cacheless, prompt, 8, 4, **{option: stops}) for prompt in given])
    has_stop = [bool(set(seq.output.tolist()) & set(stops)) for seq in seqs]
    assert any(has_stop) == (option == "defer")


@pytest.mark.parametrize("order", DREAM_ORDERS)
@pytest.mark.parametrize("num_steps", [1, 3, 4, 8, 12])
@pytest.mark.parametrize("shift", [0, 1])
def test_tokens_and_order_equal_dreams_sampler(
    tiny, cacheless, decode, prompts, assert_same_commits, order, num_steps, shift
):
    given = prompts(2, seed=num_steps)
    settings = {"order": order, "num_steps": num_steps}
    seqs = decode(tiny("masked", shift=shift), "low_confidence", settings, prompts=given)
    assert_same_commits(seqs, [dream(cacheless, prompt, num_steps, order, shift=shift) for prompt in given])


@pytest.mark.parametrize("order", DREAM_ORDERS)
def test_sampled_tokens_and_order_equal_dreams_sampler_with_our_random_numbers(
    tiny, cacheless, decode, prompts, assert_same_commits, order
):
    given, seeds = prompts(4), range(4)
    law = Law(temperature=0.7, top_p=0.8)
    settings = {"order": order, "num_steps": 5}
    seqs = decode(tiny("masked", shift=1), "low_confidence", settings, prompts=given, law=law, seeds=seeds)
    assert_same_commits(
        seqs,
        [
            dream(cacheless, prompt, 5, order, shift=1, temperature=0.7, top_p=0.8, draw=keyed_draw(seed))
            for prompt, seed in zip(given, seeds, strict=True)
        ],
    )


@pytest.mark.parametrize(
    ("length", "num_steps", "counts"),
    [
        (32, 5, [7, 7, 6, 6, 6]),
        (8, 3, [3, 3, 2]),
        (4, 4, [1, 1, 1, 1]),
        (4, 6, [1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("order", ["low_confidence", "random"])
def test_llada_spreads_the_canvas_over_the_steps(decode, length, num_steps, counts, order):
    model = FixedModel(np.zeros((length, 3)), start=1)
    settings = {"num_steps": num_steps, "block_length": None, "order": order}
    [seq] = decode(model, "low_confidence", settings, prompts=[[0]], max_new_tokens=length)
    assert np.bincount(seq.committed_at[1:])[1:].tolist() == counts


@pytest.mark.parametrize(
    ("length", "num_steps", "counts"),
    [
        (8, 4, [1, 2, 2, 3]),
        (10, 3, [3, 3, 4]),
        (8, 8, [0, 1, 1, 1, 1, 1, 1, 2]),
        (64, 32, [1, *[2] * 30, 3]),
    ],
)
@pytest.mark.parametrize("order", DREAM_ORDERS)
def test_dream_rounds_its_time_grid_down(decode, length, num_steps, counts, order):
    model = FixedModel(np.zeros((length, 3)), start=1)
    settings = {"num_steps": num_steps, "order": order}
    [seq] = decode(model, "low_confidence", settings, prompts=[[0]], max_new_tokens=length)
    assert np.bincount(seq.committed_at[1:])[1:].tolist() == counts
    assert seq.stats.forwards["target"] == num_steps


def test_every_step_of_the_schedule_runs_even_if_it_commits_nothing(decode):
    """Two blocks of 4 tokens in 6 steps each: the first idles twice, the second ends with its last token."""
    model = FixedModel(np.zeros((8, 3)), start=1)
    settings = {"num_steps": 12, "block_length": 4}
    [seq] = decode(model, "low_confidence", settings, prompts=[[0]])
    assert seq.committed_at[1:].tolist() == [1, 2, 3, 4, 7, 8, 9, 10]
    assert seq.stats.forwards["target"] == 10


def test_one_token_a_pass_commits_the_most_confident_first(decode):
    strength = [1.0, 4.0, 2.0, 3.0]
    table = [[0, s, 0, 0] for s in strength]
    [seq] = decode(
        FixedModel(table, start=1), "low_confidence", {"block_length": None}, prompts=[[0]], max_new_tokens=4
    )
    assert seq.committed_at[1:].tolist() == [4, 1, 3, 2]


def test_blocks_of_one_token_are_left_to_right(decode):
    table = np.random.default_rng(0).standard_normal((8, 5))
    [seq] = decode(FixedModel(table, start=1), "low_confidence", {"block_length": 1}, prompts=[[0]])
    assert seq.committed_at[1:].tolist() == list(range(1, 9))


@pytest.mark.parametrize("shift", [0, 1])
def test_a_position_gets_the_token_predicted_for_it(decode, shift):
    model = FixedModel(5.0 * np.eye(CANVAS), start=3, shift=shift)
    for settings in ({}, {"order": "entropy", "num_steps": 3}, {"cfg_scale": 1.0}):
        [seq] = decode(model, "low_confidence", settings, prompts=[[0, 0, 0]])
        assert seq.output.tolist() == list(range(CANVAS))


def test_random_order_takes_every_position_equally_often(decode):
    """First of 4 positions in 500 runs; chi-square, false alarm at most once in a million."""
    model = FixedModel(np.zeros((4, 3)), start=1)
    for order in ("random", "origin"):
        settings = {"order": order, "num_steps": 4, "block_length": None}
        seqs = decode(
            model, "low_confidence", settings, prompts=[[0]] * 500, max_new_tokens=4, seeds=range(500)
        )
        at = np.array([seq.committed_at[1:] for seq in seqs])
        is_first = (at == at.min(1, keepdims=True)).sum(0)
        assert chi_square(is_first, np.full(4, 0.25)) > 1e-6


def test_origin_commits_each_position_with_the_share_of_its_time_grid(decode):
    """16 positions, 4 steps, 400 runs: mean commits of a step within 4 standard deviations."""
    model = FixedModel(np.zeros((16, 3)), start=1)
    settings = {"order": "origin", "num_steps": 4}
    seqs = decode(model, "low_confidence", settings, prompts=[[0]] * 400, max_new_tokens=16, seeds=range(400))
    times = np.linspace(1, 1e-3, 5)
    at = np.array([seq.committed_at[1:] for seq in seqs])
    for step in range(3):
        share = 1 - times[step + 1] / times[step]
        num_masked = (at > step).sum()
        deviation = np.sqrt(num_masked * share * (1 - share))
        assert abs((at == step + 1).sum() - num_masked * share) < 4 * deviation
    assert (at <= 4).all()


def test_order_temperature_draws_positions_by_the_softmax_of_their_scores(decode):
    """The first of 4 positions in 1,000 runs; chi-square, false alarm at most once in a million."""
    probs = np.array([0.4, 0.6, 0.8, 0.9])
    table = np.log([[p, 1 - p - 1e-9, 1e-9] for p in probs])
    table[0] = np.log([0.4, 0.35, 0.25])
    settings = {"order": "maskgit_plus", "num_steps": 2, "order_temperature": 0.2}
    seqs = decode(
        FixedModel(table, start=1),
        "low_confidence",
        settings,
        prompts=[[0]] * 1000,
        max_new_tokens=4,
        seeds=range(1000),
    )
    at = np.array([seq.committed_at[1:] for seq in seqs])
    assert ((at == 1).sum(1) == 1).all()
    weights = np.exp(probs / 0.2)
    assert chi_square((at == 1).sum(0), weights / weights.sum()) > 1e-6


def test_blocks_need_not_divide_the_canvas(decode):
    model = FixedModel(np.zeros((10, 3)), start=1)
    settings = {"block_length": 4, "num_steps": 5}
    [seq] = decode(model, "low_confidence", settings, prompts=[[0]], max_new_tokens=10)
    assert seq.committed_at[1:].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_fewer_steps_than_blocks_are_refused(decode):
    model = FixedModel(np.zeros((8, 3)), start=1)
    with pytest.raises(InputError, match="num_steps must be at least the number of blocks; got 3 and 4"):
        decode(model, "low_confidence", {"block_length": 2, "num_steps": 3}, prompts=[[0]])


@pytest.mark.parametrize(
    "settings",
    [{"num_steps": 0}, {"block_length": 0}, {"cfg_scale": -1}, {"order_temperature": float("nan")}],
)
def test_settings_out_of_range_are_refused(decode, settings):
    with pytest.raises(InputError, match="must be"):
        decode(FixedModel(np.zeros((8, 3)), start=1), "low_confidence", settings, prompts=[[0]])
