from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.decoders.decoder import Decoder
from chordal.decoders.denoise import canvas_blocks, denoise
from chordal.engine import Engine
from chordal.forward import Forward, Full, Logits
from chordal.models.family import Family
from chordal.ops.sampling import Law
from chordal.policies.commit import Scheduled
from chordal.policies.feed import Block, BlockFeed, CanvasFeed
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import CountingModel, ToyModel, random_prompt, tiny_model


class CountsSeen(ToyModel):
    """Predicts, for every masked position, how many committed tokens the canvas has, mod 7."""

    def __init__(self, shift=0):
        super().__init__(Family(kind="masked", mask_id=9, shift=shift), 10, window=40)

    def logits(self, position, view):
        logits = np.zeros(10)
        logits[((view >= 0) & (view != 9)).sum() % 7] = 3.0
        return logits


class Denoises(Decoder):
    """Any use of `denoise`, as a decoder."""

    name, family, promise, needs, paper = "denoises", "diffusion", "approximate", ("masked",), "-"

    class Config:
        pass

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def decode(self, seq):
        seq.open_canvas(seq.limit)
        yield from denoise(seq, **self.settings)


class Never:
    """Commits nothing."""

    reads, of = (), "model"

    def __call__(self, candidates):
        return np.array([], np.int64)


def run(model, decoder, prompt, max_new_tokens, **settings):
    seq = Sequence(
        prompt=np.asarray(prompt),
        family=model.family,
        stop=StopRules(max_new_tokens=max_new_tokens),
        **settings,
    )
    engine = Engine(model)
    engine.submit(decoder, seq)
    engine.run()
    return seq


@pytest.mark.parametrize("shift", [0, 1])
def test_every_pass_predicts_from_what_the_passes_before_committed(shift):
    """Prompt of 2; 2, then 1, then 1 commits, so the passes see 2, 4 and 5 tokens."""
    decoder = Denoises(
        blocks=[Block(2, 6, 6)], feed=CanvasFeed(), rules=[Scheduled(3, order="left_to_right")]
    )
    seq = run(CountsSeen(shift), decoder, [1, 1], 4)
    assert seq.output.tolist() == [2, 2, 4, 5]
    assert seq.committed_at.tolist() == [0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize("shift", [0, 1])
def test_a_block_is_finished_before_the_next_begins(shift):
    events = []
    decoder = Denoises(
        blocks=canvas_blocks(2, 9, 3), feed=CanvasFeed(), rules=[Scheduled(2, order="random")] * 3
    )
    run(CountsSeen(shift), decoder, [1, 1], 7, listeners=[lambda _, event: events.append(event)])
    assert [sorted({(position - 2) // 3 for position in event.positions}) for event in events] == [
        [0], [0], [1], [1], [2]
    ]  # fmt: skip


def test_canvas_blocks_cut_from_the_start_and_leave_a_shorter_last_one():
    assert canvas_blocks(3, 13, 4) == [Block(3, 7, 13), Block(7, 11, 13), Block(11, 13, 13)]
    assert canvas_blocks(0, 4, 4) == [Block(0, 4, 4)]


@pytest.mark.parametrize(
    ("feed", "step", "span"),
    [
        (CanvasFeed("whole"), 0, (0, 20)),
        (CanvasFeed("whole"), 3, (0, 20)),
        (CanvasFeed("prefix"), 0, (0, 20)),
        (CanvasFeed("prefix"), 1, (8, 20)),
        (CanvasFeed("dual"), 0, (0, 20)),
        (CanvasFeed("dual"), 1, (8, 12)),
        (BlockFeed(4, carry=True), 0, (4, 12)),
        (BlockFeed(4, carry=True), 1, (8, 12)),
        (BlockFeed(4, carry=False), 0, (8, 12)),
    ],
)
def test_feeds_give_the_span_their_diagram_shows(feed, step, span):
    assert feed.span(Block(8, 12, 20), step) == span


class RightToLeft:
    """Commits the last candidate."""

    reads, of = (), "model"

    def __call__(self, candidates):
        return np.array([len(candidates.positions) - 1])


@pytest.mark.parametrize(
    ("rule", "fed"), [(Scheduled(3, order="left_to_right"), [4, 5, 6]), (RightToLeft(), [3, 4, 5, 6])]
)
def test_a_shifted_model_feeds_the_token_before_the_block_while_its_row_is_needed(rule, fed):
    model = CountingModel(CountsSeen(shift=1))
    decoder = Denoises(blocks=[Block(4, 7, 7)], feed=CanvasFeed("dual"), rules=[rule])
    run(model, decoder, [1, 1, 1, 1], 3)
    assert [forward.positions.tolist() for [(_, forward)] in model.calls] == [list(range(7)), fed, fed]


@torch.no_grad()
def test_feeding_the_whole_canvas_through_the_cache_equals_no_cache(cacheless):
    """Five canvases in one row, one after the other, shorter and longer than those before."""
    model = tiny_model("masked", dtype=torch.float32)
    for length in (9, 14, 3, 11, 14):
        tokens, at = random_prompt(length, seed=length), np.arange(length)
        [reading] = model.run([(0, Forward(tokens, at, Full(length), Logits(at), slots=at))])
        wanted = cacheless(tokens)
        torch.testing.assert_close(reading.logits[:, :-1], wanted[:, :-1].float(), rtol=0, atol=1e-5)


def test_a_rule_that_never_commits_ends_with_an_error_and_ends_alone():
    model = CountsSeen()
    never = Denoises(blocks=[Block(1, 3, 3)], feed=CanvasFeed(), rules=[Never()])
    seq = Sequence(prompt=np.array([1]), family=model.family, stop=StopRules(max_new_tokens=2))
    other = Sequence(prompt=np.array([1]), family=model.family, stop=StopRules(max_new_tokens=3))
    engine = Engine(model)
    engine.submit(never, seq)
    engine.submit(make_decoder("low_confidence"), other)
    engine.run()
    assert (seq.finish_reason, other.finish_reason) == ("error", "length")
    assert "nothing was committed in" in str(seq.error)


def test_the_passes_of_a_schedule_run_even_if_nothing_is_masked():
    decoder = Denoises(
        blocks=canvas_blocks(1, 5, 2), feed=CanvasFeed(), rules=[Scheduled(1), Scheduled(2)], num_steps=[4, 2]
    )
    seq = run(CountsSeen(), decoder, [1], 4)
    assert seq.committed_at.tolist() == [0, 1, 1, 5, 6]


def test_a_repetition_penalty_counts_every_committed_token():
    """Greedy with a huge penalty on a constant model: no token twice as long as there are others."""

    class Constant(ToyModel):
        def __init__(self):
            super().__init__(Family(kind="masked", mask_id=6, shift=0), 7, window=10)

        def logits(self, position, view):
            return np.array([6.0, 5, 4, 3, 2, 1, 0])

    law = Law(repetition_penalty=100.0)
    decoder = Denoises(
        blocks=[Block(1, 6, 6)], feed=CanvasFeed(), rules=[Scheduled(5, order="left_to_right")]
    )
    seq = run(Constant(), decoder, [1], 5, law=law)
    assert seq.output.tolist() == [0, 2, 3, 4, 5]


def test_banned_tokens_are_never_chosen_and_unscored_ones_last():
    class Prefers(ToyModel):
        """Position p prefers token p - 1."""

        def __init__(self):
            super().__init__(Family(kind="masked", mask_id=5, shift=0), 6, window=6)

        def logits(self, position, view):
            return 4.0 * np.eye(6)[position - 1] + 0.1 * np.arange(6)

    def decoder(**more):
        return Denoises(blocks=[Block(1, 4, 4)], feed=CanvasFeed(), rules=[Scheduled(3)], **more)

    banned = run(Prefers(), decoder(banned=(0,)), [1], 3)
    assert banned.output.tolist() == [4, 1, 2]
    unscored = run(Prefers(), decoder(unscored=(2,)), [1], 3)
    assert unscored.output.tolist() == [0, 1, 2]
    assert unscored.committed_at[3] == 3
