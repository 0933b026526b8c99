from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.decoders.decoder import Decoder
from chordal.decoders.denoise import canvas_blocks, denoise, split_steps
from chordal.engine import Engine
from chordal.errors import InputError, UnknownNameError
from chordal.forward import Forward, Full, Logits
from chordal.models.family import Family
from chordal.ops.sampling import Law
from chordal.policies.commit import Scheduled
from chordal.policies.feed import Block, BlockFeed, CanvasFeed, model_blocks
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
    ("num_prompt", "limit", "part_length", "spans"),
    [
        (3, 9, None, [(0, 4), (4, 8), (8, 12)]),
        (4, 8, None, [(4, 8)]),
        (6, 9, 3, [(4, 7), (7, 8), (8, 11), (11, 12)]),
        (7, 9, 3, [(7, 8), (8, 11), (11, 12)]),  # the part that is all prompt is left out
        (2, 4, 2, [(2, 4)]),
    ],
)
def test_model_blocks_are_aligned_to_position_0(make_sequence, num_prompt, limit, part_length, spans):
    blocks = model_blocks(make_sequence("a" * num_prompt, limit - num_prompt), 4, part_length)
    assert [(block.start, block.end) for block in blocks] == spans
    assert {block.canvas_end for block in blocks} == {-(-limit // 4) * 4}


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
def test_feeds_feed_what_their_diagram_shows_and_offer_what_is_masked_in_the_block(
    make_sequence, feed, step, span
):
    seq = make_sequence("abcdefgh", 12)
    seq.open_canvas(20)
    seq.commit(np.array([9, 14]), np.array([1, 1]))
    plan = feed.plan(seq, Block(8, 12, 20), step)
    assert plan.positions.tolist() == list(range(*span))
    assert plan.candidates.tolist() == [8, 10, 11]


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


class WithLogits:
    """Commits the leftmost candidate with its second most likely token."""

    reads, of = ("probs", "logits"), "model"

    def __call__(self, candidates):
        assert candidates.scores["logits"].shape[0] == len(candidates.positions)
        candidates.tokens = candidates.scores["logits"].topk(2, dim=1).indices[:, 1].numpy()
        return np.array([0])


class Prefers(ToyModel):
    """At every position 3 before 2 before 1 before 0."""

    def __init__(self):
        super().__init__(Family(kind="masked", mask_id=4, shift=0), 5, window=20)

    def logits(self, position, view):
        return np.arange(5.0)


def test_a_rule_may_read_logits_and_put_other_tokens_in():
    decoder = Denoises(blocks=canvas_blocks(1, 5, 2), feed=CanvasFeed(), rules=[WithLogits()] * 2)
    assert run(Prefers(), decoder, [1], 4).output.tolist() == [2] * 4


class Forbids3:
    """Takes its probability from token 3; remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, logits_NV, positions, seq):
        self.asked.append(positions.tolist())
        return logits_NV.index_fill(1, torch.tensor([3]), -torch.inf)


class StopsAfter:
    """Stops after some passes."""

    def __init__(self, num_passes):
        self.num_passes = num_passes

    def watches(self, seq):
        return seq.masked(seq.num_prompt, seq.canvas_end)

    def __call__(self, seq, positions, gaps):
        assert len(positions) == len(gaps)
        return seq.stats.forwards["target"] >= self.num_passes


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("stop", [None, StopsAfter(99)])
def test_a_refinement_sees_the_candidates_and_no_others(stop, cfg_scale):
    refine = Forbids3()
    decoder = Denoises(
        blocks=canvas_blocks(1, 5, 2),
        feed=CanvasFeed(),
        rules=[Scheduled(2, order="left_to_right")] * 2,
        refine=refine,
        stop=stop,
        cfg_scale=cfg_scale,
    )
    assert run(Prefers(), decoder, [1], 4).output.tolist() == [2] * 4
    assert refine.asked == [[1, 2], [2], [3, 4], [4]]


def test_a_stop_commits_everything_before_the_rule_of_its_pass_decides():
    decoder = Denoises(
        blocks=canvas_blocks(1, 7, 2),
        feed=CanvasFeed(),
        rules=[Scheduled(2, order="left_to_right")] * 3,
        stop=StopsAfter(3),
        refine=Forbids3(),
    )
    seq = run(Prefers(), decoder, [1], 6)
    assert seq.committed_at.tolist() == [0, 1, 2, 3, 3, 3, 3]
    # What a refinement changed is committed as changed.
    assert seq.output.tolist() == [2, 2, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("num_steps", "num_masked", "split"),
    [(None, [4, 4, 1], [4, 4, 1]), (6, [4, 4], [3, 3]), (3, [4, 4, 1], [1, 1, 1]), (10, [4, 1], [8, 2])],
)
def test_steps_are_split_by_what_is_masked(num_steps, num_masked, split):
    assert split_steps(num_steps, num_masked) == split


# --- The decoder of any parts ---------------------------------------------------------------------------

PRESETS = [
    ("threshold", {"threshold": 0.3}, {"commit": "threshold", "threshold": 0.3}),
    ("threshold", {"threshold": 0.3, "feed": "dual"}, {"threshold": 0.3, "feed": "dual"}),
    ("threshold", {"factor": 2.0, "feed": "prefix"}, {"commit": "factor", "factor": 2.0, "feed": "prefix"}),
    ("threshold", {}, {}),
    (
        "localleap",
        {"threshold": 0.5, "relaxed_threshold": 0.2, "radius": 2},
        {"commit": "local_leap", "threshold": 0.5, "relaxed_threshold": 0.2, "radius": 2},
    ),
    ("localleap", {"feed": "dual"}, {"commit": "local_leap", "feed": "dual"}),
    ("credit_decoding", {"threshold": 0.5}, {"refine": "credit", "threshold": 0.5}),
    (
        "credit_decoding",
        {"fusion": 2.0, "decay": 0.9, "concavity": 0.5, "feed": "prefix"},
        {"refine": "credit", "fusion": 2.0, "decay": 0.9, "concavity": 0.5, "feed": "prefix"},
    ),
    ("low_confidence", {}, {"commit": "schedule"}),
    ("low_confidence", {"num_steps": 5}, {"commit": "schedule", "num_steps": 5}),
    ("low_confidence", {"num_steps": 30}, {"commit": "schedule", "num_steps": 30}),
    (
        "low_confidence",
        {"num_steps": 6, "order": "random"},
        {"commit": "schedule", "num_steps": 6, "order": "random"},
    ),
    (
        "low_confidence",
        {"num_steps": 6, "cfg_scale": 1.5, "ban_eos": True},
        {"commit": "schedule", "num_steps": 6, "cfg_scale": 1.5, "ban_eos": True},
    ),
    ("low_confidence", {"defer_eos": True}, {"commit": "schedule", "defer_eos": True}),
    (
        "prophet",
        {"answer_start": 2, "early_threshold": 1.5, "middle_threshold": 1.2, "late_threshold": 0.5},
        {
            "commit": "schedule",
            "stop": "prophet",
            "answer_start": 2,
            "early_threshold": 1.5,
            "middle_threshold": 1.2,
            "late_threshold": 0.5,
        },
    ),
    (
        "prophet",
        {"answer_start": -3, "answer_length": 2, "num_steps": 6, "late_threshold": 1.0, "feed": "prefix"},
        {
            "commit": "schedule",
            "stop": "prophet",
            "answer_start": -3,
            "answer_length": 2,
            "num_steps": 6,
            "late_threshold": 1.0,
            "feed": "prefix",
        },
    ),
]
CANVAS_PRESETS = [
    ("ccd", {}, {"commit": "coherent"}),
    (
        "ccd",
        {"expand_ratio": 2.0, "adaptive": False},
        {"commit": "coherent"} | {"expand_ratio": 2.0, "adaptive": False},
    ),
    (
        "ccd",
        {"order": "confidence", "num_steps": 4},
        {"commit": "coherent"} | {"order": "confidence", "num_steps": 4},
    ),
    ("ccd", {"variant": "paper"}, {"commit": "averaged"}),
    (
        "ccd",
        {"variant": "paper", "history_length": 1, "pool_size": 6, "max_entropy": 2.0, "num_steps": 4},
        {"commit": "averaged", "history_length": 1, "pool_size": 6, "max_entropy": 2.0, "num_steps": 4},
    ),
    ("window_diffusion", {}, {"feed": "window", "commit": "schedule"}),
    (
        "window_diffusion",
        {"active_length": 2, "window_length": 4, "refresh_period": 3, "threshold": 0.3},
        {"feed": "window", "active_length": 2, "window_length": 4, "refresh_period": 3, "threshold": 0.3},
    ),
]
BLOCK_PRESETS = [
    ({}, {"commit": "schedule", "scores_of": "law"}),
    ({"order": "random"}, {"commit": "schedule", "order": "random"}),
    ({"order": "left_to_right"}, {"commit": "schedule", "order": "left_to_right", "feed": "block"}),
    ({"entropy_bound": 2.0}, {"commit": "entropy", "entropy_bound": 2.0}),
    # Published code commits above the threshold, not at it.
    ({"threshold": 0.3}, {"threshold": float(np.nextafter(0.3, 1)), "scores_of": "law"}),
]
LAWS = [Law(), Law(temperature=0.8, top_k=9, repetition_penalty=1.2)]


def assert_equal(ours, preset):
    for one, other in zip(ours, preset, strict=True):
        assert one.output.tolist() == other.output.tolist()
        assert one.committed_at.tolist() == other.committed_at.tolist()
        assert one.stats.forwards == other.stats.forwards
        assert one.stats.positions_fed == other.stats.positions_fed


@pytest.mark.parametrize(("name", "settings", "parts"), PRESETS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("block_length", [None, 5])
def test_a_named_decoder_is_a_choice_of_parts(
    tiny, decode, prompts, name, settings, parts, law, block_length
):
    cut = "canvas" if block_length is None else block_length
    ours, preset = (
        decode(tiny("masked"), decoder, more, prompts=prompts(4), max_new_tokens=11, law=law)
        for decoder, more in (
            ("denoise", parts | {"block_length": cut}),
            (name, settings | {"block_length": block_length}),
        )
    )
    assert_equal(ours, preset)


@pytest.mark.parametrize(("name", "settings", "parts"), CANVAS_PRESETS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_decoder_of_whole_canvases_is_a_choice_of_parts(
    tiny, decode, prompts, name, settings, parts, law, shift
):
    cut = {} if "feed" in parts else {"block_length": "canvas"}
    ours, preset = (
        decode(tiny("masked", shift=shift), decoder, more, prompts=prompts(4), max_new_tokens=11, law=law)
        for decoder, more in (("denoise", parts | cut), (name, settings))
    )
    assert_equal(ours, preset)


@pytest.mark.parametrize("settings", [{}, {"sub_block_cache": True}, {"sub_block_length": 3}], ids=str)
@pytest.mark.parametrize("law", LAWS, ids=["greedy", "sampled"])
def test_fast_dllm_v2_is_a_choice_of_parts(tiny, decode, settings, law):
    """Without shifted logits; with them it also reads a token when it stores a block."""
    given = [random_prompt(length) for length in (1, 4, 7, 8, 14)]
    settings = {"sub_block_length": 2, "threshold": 0.3} | settings
    parts = settings | {"feed": "sub_block", "scores_of": "law", "threshold": float(np.nextafter(0.3, 1))}
    ours, preset = (
        decode(tiny("block"), decoder, more, prompts=given, max_new_tokens=11, law=law)
        for decoder, more in (("denoise", parts), ("fast_dllm_v2", settings))
    )
    assert_equal(ours, preset)


@pytest.mark.parametrize(("settings", "parts"), BLOCK_PRESETS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("shift", [0, 1])
def test_block_diffusion_is_a_choice_of_parts(tiny, decode, settings, parts, law, shift):
    """With prompts of up to three blocks and a bit."""
    given = [random_prompt(length) for length in (1, 4, 7, 8, 14)]
    ours, preset = (
        decode(tiny("block", shift=shift), decoder, more, prompts=given, max_new_tokens=11, law=law)
        for decoder, more in (("denoise", parts), ("block_diffusion", settings))
    )
    assert_equal(ours, preset)


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy", "random", "left_to_right"])
def test_a_schedule_takes_its_order(order):
    """Positions of confidences .5, .6, .5 and .4, and other margins and entropies."""

    class Varied(ToyModel):
        probs = np.array([[0.5, 0.5, 0], [0.6, 0.4, 0], [0.5, 0.25, 0.25], [0.4, 0.3, 0.3]])

        def __init__(self):
            super().__init__(Family(kind="masked", mask_id=3, shift=0), 4, window=6)

        def logits(self, position, view):
            return np.log(np.append(self.probs[position - 1], 1) + 1e-12)

    wanted = {
        "confidence": [2, 1, 3, 4],
        "margin": [4, 2, 1, 3],
        "entropy": [2, 1, 3, 4],
        "left_to_right": [1, 2, 3, 4],
    }
    decoder = make_decoder("denoise", {"commit": "schedule", "order": order})
    at = run(Varied(), decoder, [0], 4).committed_at[1:].tolist()
    assert sorted(at) == [1, 2, 3, 4]
    if order != "random":
        assert at == wanted[order]


@pytest.mark.parametrize(
    ("bound", "forwards"), [(0.0, 6), (0.69, 6), (0.7, 3), (1.39, 2), (3.5, 1), (99.0, 1)]
)
def test_near_independent_positions_are_one_more_than_the_bound_holds(bound, forwards):
    """Six positions of ln 2 nats each."""

    class Coins(ToyModel):
        def __init__(self):
            super().__init__(Family(kind="masked", mask_id=2, shift=0), 3, window=8)

        def logits(self, position, view):
            return np.zeros(3)

    decoder = make_decoder("denoise", {"commit": "near_independent", "entropy_bound": bound or 1e-9})
    assert run(Coins(), decoder, [0], 6).stats.forwards["target"] == forwards


def test_all_parts_run_together(tiny, decode, prompts):
    settings = {"commit": "local_leap", "refine": "credit", "stop": "prophet", "answer_start": 0}
    settings |= {"threshold": 0.6, "relaxed_threshold": 0.2, "late_threshold": 1.0, "cfg_scale": 0.5}
    seqs = decode(tiny("masked"), "denoise", settings, prompts=prompts(6), max_new_tokens=12)
    assert all(len(seq.output) == 12 for seq in seqs)
    assert min(seq.stats.forwards["target"] for seq in seqs) < 12


@pytest.mark.parametrize("commit", ["schedule", "threshold", "local_leap", "near_independent"])
@pytest.mark.parametrize("refine", [None, "credit"])
def test_a_stop_that_never_comes_changes_nothing(tiny, decode, prompts, commit, refine):
    parts = {"commit": commit, "refine": refine, "block_length": 5}
    never = {"stop": "prophet", "answer_start": 2, "early_threshold": np.inf, "middle_threshold": np.inf}
    never |= {"late_threshold": np.inf}
    for law in LAWS:
        with_stop, without = (
            decode(tiny("masked"), "denoise", settings, prompts=prompts(4), max_new_tokens=11, law=law)
            for settings in (parts | never, parts)
        )
        assert_equal(with_stop, without)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"radius": 3},
            "no part that was chosen takes radius; these do: commit=local_leap. Choose one, or leave radius "
            "out.",
        ),
        ({"decay": 0.5}, "no part that was chosen takes decay; these do: refine=credit."),
        (
            {"num_steps": 8},
            "takes num_steps; these do: commit=schedule, commit=coherent, commit=averaged, stop=prophet.",
        ),
        (
            {"feed": "block", "block_length": 8},
            "takes block_length; these do: feed=whole, feed=prefix, feed=dual.",
        ),
        ({"stop": "prophet"}, "stop=prophet needs answer_start; give it."),
        (
            {"stop": "prophet", "answer_start": 0, "feed": "dual"},
            "stop=prophet commits all that is masked, so every pass must read all of it, and feed=dual "
            "leaves some out. Use feed=whole or feed=prefix.",
        ),
        ({"stop": "prophet", "answer_start": 0, "feed": "block"}, "and feed=block leaves some out"),
        (
            {"cfg_scale": 1.0, "feed": "prefix"},
            "cfg_scale needs passes over the whole canvas; got feed=prefix",
        ),
        ({"threshold": -1}, "threshold must be at least 0; got -1.0."),
        ({"entropy_bound": 0.0, "commit": "entropy"}, "entropy_bound must be above 0; got 0.0."),
        ({"factor": 0.0, "commit": "factor"}, "factor must be above 0; got 0.0."),
        ({"block_length": 0}, "block_length must be at least 1; got 0."),
        ({"block_length": "all"}, "block_length must be a whole number, canvas or none; got 'all'."),
    ],
    ids=str,
)
def test_choices_that_make_no_sense_are_refused_with_the_reason(settings, message):
    with pytest.raises(InputError) as error:
        make_decoder("denoise", settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("masked", {"feed": "block"}, "feed=block is for block models; this one is masked. Use feed=whole"),
        ("block", {"feed": "dual"}, "feed=dual is for masked models; this one is block. Use feed=block"),
        ("block", {"block_length": 4}, "takes block_length; these do: feed=whole"),
        ("block", {"stop": "prophet", "answer_start": 0}, "and feed=block leaves some out"),
        ("block", {"cfg_scale": 1.0}, "cfg_scale needs passes over the whole canvas; got feed=block"),
        ("causal", {}, "denoise needs a masked or block model; this one is causal"),
        ("masked", {"commit": "local_leap", "threshold": 0.5}, "relaxed_threshold must be at most threshold"),
        ("masked", {"commit": "schedule", "block_length": 2, "num_steps": 3}, "got 3 and 4 blocks"),
    ],
    ids=str,
)
def test_choices_that_do_not_fit_the_model_are_refused_with_the_reason(tiny, decode, kind, settings, message):
    with pytest.raises(InputError, match=message):
        decode(tiny(kind), "denoise", settings, prompts=[[1, 2, 3]])


@pytest.mark.parametrize(
    ("slot", "name"), [("feed", "hole"), ("commit", "treshold"), ("refine", "credits"), ("stop", "profet")]
)
def test_a_part_that_does_not_exist_is_named_with_what_is_near(slot, name):
    with pytest.raises(UnknownNameError, match=f"unknown {slot} '{name}'. Did you mean"):
        make_decoder("denoise", {slot: name})
