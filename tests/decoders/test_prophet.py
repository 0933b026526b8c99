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
from chordal.testing import TINY_MASK, CountingModel, ToyModel

CANVAS = 12
NEVER = {"early_threshold": math.inf, "middle_threshold": math.inf, "late_threshold": math.inf}
AT_ONCE = {"early_threshold": -math.inf}


def prophet(logits, prompt, answer, thresholds, block, shift, *, temperature=0.0, seed=0):
    """Prophet around LLaDA's sampler for one row, one token a step; tokens and their passes."""
    x = [*prompt, *[TINY_MASK] * CANVAS]
    committed_in, g = [0] * len(x), 0
    region = [p for p in range(len(prompt) + answer, len(prompt) + answer + 5) if p < len(x)]
    for start in range(len(prompt), len(x), block):
        for _ in range(start, min(start + block, len(x))):
            z = logits(x).float()
            z[:, TINY_MASK] = -torch.inf
            if shift:
                z = torch.cat([z[:1], z[:-1]])
            g += 1
            masked = [p for p in range(len(x)) if x[p] == TINY_MASK]
            x0 = z.argmax(1).tolist()
            if temperature:
                cumulative = (z / temperature).double().softmax(1).cumsum(1)
                numbers = uniforms(seed, "token", range(len(x)), g - 1)
                x0 = [int((row <= number).sum()) for row, number in zip(cumulative, numbers, strict=True)]
            gaps = [float(z[p].topk(2).values.diff().abs()) for p in region]
            early, middle, late = thresholds
            r = g / CANVAS
            threshold = early if r < 0.33 else middle if r < 0.67 else late
            if sum(gaps) / len(gaps) >= threshold:
                for p in masked:
                    x[p], committed_in[p] = x0[p], g
                return x[len(prompt) :], committed_in[len(prompt) :]
            c = z.softmax(1)
            best = max((p for p in masked if p < start + block), key=lambda p: (float(c[p][x0[p]]), -p))
            x[best], committed_in[best] = x0[best], g
    return x[len(prompt) :], committed_in[len(prompt) :]


@pytest.mark.parametrize(
    ("answer", "thresholds"), [(0, (1.2, 0.9, 0.6)), (3, (1.4, 0.8, 0.8)), (9, (2.5, 1.0, 0.9))], ids=str
)
@pytest.mark.parametrize("block_length", [5, None])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_and_order_equal_the_published_sampler(
    tiny,
    cacheless,
    decode,
    prompts,
    assert_same_commits,
    answer,
    thresholds,
    block_length,
    shift,
    temperature,
):
    """Rows of a batch, some of which stop while others go on."""
    given, seeds = prompts(6), range(6)
    names = ("early_threshold", "middle_threshold", "late_threshold")
    seqs = decode(
        tiny("masked", shift=shift),
        "prophet",
        {"answer_start": answer, "block_length": block_length} | dict(zip(names, thresholds, strict=True)),
        prompts=given,
        max_new_tokens=CANVAS,
        law=Law(temperature=temperature),
        seeds=seeds,
    )
    assert_same_commits(
        seqs,
        [
            prophet(
                cacheless,
                prompt,
                answer,
                thresholds,
                block_length or CANVAS,
                shift,
                temperature=temperature,
                seed=seed,
            )
            for prompt, seed in zip(given, seeds, strict=True)
        ],
    )
    stopped = {seq.stats.forwards["target"] for seq in seqs}
    assert len(stopped) > 1
    assert min(stopped) < CANVAS


@pytest.mark.parametrize("settings", [NEVER | {"answer_start": 2}, {}, {"answer_start": 99}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("num_steps", [None, 5, 20])
def test_without_a_stop_it_equals_low_confidence(tiny, decode, prompts, settings, temperature, num_steps):
    shared = {"block_length": 5, "num_steps": num_steps}
    ours, reference = (
        decode(
            tiny("masked", shift=1),
            name,
            shared | more,
            prompts=prompts(6),
            max_new_tokens=CANVAS,
            law=Law(temperature=temperature),
        )
        for name, more in (("prophet", settings), ("low_confidence", {}))
    )
    for one, other in zip(ours, reference, strict=True):
        assert one.output.tolist() == other.output.tolist()
        assert one.committed_at.tolist() == other.committed_at.tolist()
        assert one.stats.forwards == other.stats.forwards


@pytest.mark.parametrize("feed", ["whole", "prefix"])
def test_thresholds_of_minus_infinity_commit_the_first_canvas(tiny, cacheless, decode, prompts, feed):
    settings = {"answer_start": -1, "feed": feed, "block_length": 4} | AT_ONCE
    for seq in decode(tiny("masked"), "prophet", settings, prompts=prompts(6), max_new_tokens=CANVAS):
        logits = cacheless([*seq.prompt, *[TINY_MASK] * CANVAS])[len(seq.prompt) :]
        logits[:, TINY_MASK] = -torch.inf
        assert seq.output.tolist() == logits.argmax(1).tolist()
        assert seq.stats.forwards["target"] == 1


class Gap(ToyModel):
    """Prefers token p mod 3 at position p by a gap of logits, which may depend on the prompt."""

    def __init__(self, gap, constant=0.0):
        super().__init__(Family(kind="masked", mask_id=4, shift=0), 5, window=260)
        self.gap, self.constant = gap, constant

    def logits(self, position, view):
        gap = self.gap(position, view) if callable(self.gap) else self.gap
        logits = np.full(5, self.constant)
        logits[position % 3] += gap
        return logits


def exit_step(decode, model, *, temperature=0.0, canvas=256, **settings):
    settings = {"answer_start": 204, "block_length": 32} | settings
    law = Law(temperature=temperature)
    [seq] = decode(model, "prophet", settings, prompts=[[0]], max_new_tokens=canvas, law=law)
    assert len(seq.output) == canvas
    assert 4 not in seq.output
    return seq.stats.forwards["target"]


@pytest.mark.parametrize(("gap", "step"), [(8.0, 1), (7.5, 1), (7.4, 85), (6.0, 85), (4.9, 172), (2.5, 172)])
def test_a_constant_gap_stops_where_its_threshold_begins(decode, gap, step):
    assert exit_step(decode, Gap(gap)) == step


def test_a_gap_below_every_threshold_never_stops(decode):
    assert exit_step(decode, Gap(2.4), canvas=64, answer_start=50) == 64


@pytest.mark.parametrize(("constant", "temperature"), [(64.0, 0.0), (-64.0, 0.0), (0.0, 0.7), (0.0, 3.0)])
def test_constants_and_temperature_do_not_move_the_stop(decode, constant, temperature):
    """A gap of 3 stops with the third threshold: at 43 of 64 passes."""
    step = exit_step(decode, Gap(3.0, constant), temperature=temperature, canvas=64, answer_start=50)
    assert step == 43


def test_a_region_beyond_the_canvas_is_cut_and_committed_positions_count(decode):
    """Only the last two of five positions exist. Their mean gap is 5 once the first of them is committed."""

    def gap(position, view):
        is_known = view[position] != 4
        return {11: 9.0 if is_known else 3.0, 12: 1.0}.get(position, 2.0)

    settings = {"answer_start": -2, "early_threshold": 5.0, "block_length": None}
    [seq] = decode(Gap(gap), "prophet", settings, prompts=[[0]], max_new_tokens=12)
    # Position 11 goes first, of the highest confidence; the next pass sees it and stops.
    assert seq.committed_at[1:].tolist() == [*[2] * 10, 1, 2]


def test_rows_stop_by_themselves_and_what_was_committed_stays(decode):
    """The gap is the first token of the prompt: 9 stops at once, 6 after a third of the passes."""

    def gap(position, view):
        return {0: 9.0, 1: 6.0, 2: 2.0}[int(view[0])]

    settings = {"answer_start": 3, "block_length": 4}
    commits = {}

    def listen(seq, event):
        commits.setdefault(int(seq.prompt[0]), []).append(len(event.positions))

    seqs = decode(
        Gap(gap),
        "prophet",
        settings,
        prompts=[[1], [0], [2]],
        max_new_tokens=12,
        listeners=[listen],
    )
    assert [seq.stats.forwards["target"] for seq in seqs] == [4, 1, 12]
    assert commits == {1: [1, 1, 1, 9], 0: [12], 2: [1] * 12}


def test_a_stop_token_ends_the_text_of_a_canvas_that_is_committed_at_once(decode):
    [seq] = decode(Gap(9.0), "prophet", {"answer_start": 0}, prompts=[[0]], max_new_tokens=12, eos_ids=(0,))
    assert (seq.output.tolist(), seq.finish_reason, seq.stats.committed_tokens) == ([1, 2, 0], "stop", 3)


def test_the_prefix_feed_reads_the_answer_afresh_wherever_it_is(tiny, decode, prompts):
    """In later blocks the answer lies before what the feed recomputes."""
    model = CountingModel(tiny("masked"))
    settings = {"answer_start": 0, "answer_length": 2, "feed": "prefix", "block_length": 4} | NEVER
    [seq] = decode(model, "prophet", settings, prompts=prompts(3)[2:], max_new_tokens=CANVAS)
    for at, [(_, forward)] in enumerate(model.calls):
        read = forward.positions[forward.read.rows].tolist()
        masked = [p for p in range(seq.num_prompt, seq.limit) if seq.committed_at[p] > at]
        assert read == sorted({seq.num_prompt, seq.num_prompt + 1, *masked})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer_length": 0}, "answer_length must be at least 1; got 0."),
        ({"early_threshold": math.nan}, "early_threshold must be a number; got nan."),
        ({"late_threshold": math.nan}, "late_threshold must be a number; got nan."),
        ({"num_steps": 0}, "num_steps must be at least 1; got 0."),
        (
            {"feed": "dual"},
            "feed must be whole or prefix; got dual, which leaves out later blocks, and a stop commits them "
            "as the pass sees them.",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        make_decoder("prophet", settings)
    assert str(error.value) == message


def test_fewer_steps_than_blocks_are_refused(decode):
    with pytest.raises(InputError, match="num_steps must be at least the number of blocks; got 2 and 3"):
        decode(Gap(1.0), "prophet", {"block_length": 4, "num_steps": 2}, prompts=[[0]], max_new_tokens=12)
