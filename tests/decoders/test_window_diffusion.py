from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from chordal.decoders.decoder import Decoder
from chordal.decoders.denoise import denoise
from chordal.engine import Engine
from chordal.errors import InputError
from chordal.models.family import Family
from chordal.ops.sampling import Law
from chordal.policies.feed import Block, CanvasFeed, WindowFeed
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import TINY_MASK, CountingModel, ToyModel, random_prompt, tiny_model

CANVAS = 14


class Session:
    """One canvas on a plain transformers model, with keys and values kept by position."""

    def __init__(self, plain, prompt, shift):
        self.plain, self.shift, self.num_prompt = plain, shift, len(prompt)
        self.x = torch.tensor([*prompt, *[TINY_MASK] * CANVAS])
        self.filled_in = [0] * len(self.x)
        self.kept, self.valid, self.now = None, set(), 0

    def masked(self):
        return (self.x == TINY_MASK).nonzero()[:, 0].tolist()

    def forward(self, rows, seen):
        """Feed some positions; they see these and all of `seen`. Gives logits by what they predict."""
        rows = sorted(rows)
        others = sorted(set(seen) - set(rows))
        assert set(others) <= self.valid
        cached = DynamicCache()
        for layer, (keys, values) in enumerate(self.kept if others else []):
            cached.update(keys[:, :, others], values[:, :, others], layer)
        at = torch.tensor(rows)
        logits = self.plain(
            input_ids=self.x[None, at],
            position_ids=at[None],
            attention_mask=torch.ones(1, 1, len(rows), len(rows) + len(others), dtype=torch.bool),
            past_key_values=cached,
        ).logits[0]
        if self.kept is None:
            shape = (*cached.layers[0].keys.shape[:2], len(self.x), cached.layers[0].keys.shape[3])
            self.kept = [(torch.zeros(shape).double(), torch.zeros(shape).double()) for _ in cached.layers]
        for (keys, values), layer in zip(self.kept, cached.layers, strict=True):
            keys[:, :, at], values[:, :, at] = (
                layer.keys[:, :, -len(rows) :],
                layer.values[:, :, -len(rows) :],
            )
        self.valid |= set(rows)
        logits[:, TINY_MASK] = -torch.inf
        return {row + self.shift: one for row, one in zip(rows, logits, strict=True)}

    def commit(self, logits, candidates, num, order):
        probs = {p: logits[p].softmax(0) for p in candidates}
        if order == "entropy":
            score = {p: -float(torch.special.entr(q).sum()) for p, q in probs.items()}
        else:
            score = {p: float(q.max()) for p, q in probs.items()}
        chosen = sorted(candidates, key=lambda p: (-score[p], p))[:num]
        for p in chosen:
            self.x[p], self.filled_in[p] = int(probs[p].argmax()), self.now
        return chosen

    def before(self, positions):
        """Rows that predict these positions."""
        return {max(p - self.shift, 0) for p in positions}

    @property
    def result(self):
        return self.x[self.num_prompt :].tolist(), self.filled_in[self.num_prompt :]


def llada_port(plain, prompt, shift, A, W, R, steps=CANVAS):
    """The LLaDA port: everything is refreshed; first masks and what was committed since are active."""
    s = Session(plain, prompt, shift)
    everything, window = set(range(len(s.x))), set()
    step = age = 0
    while masked := s.masked():
        s.now += 1
        num = CANVAS // steps + (step < CANVAS % steps) if step < steps else 1
        active = [p for p in masked if p in window][:A]
        if age % R == 0 or not active:
            logits = s.forward(everything, everything)
            just, recent, age = s.commit(logits, masked, num, "confidence"), [], 0
            window = everything - set(s.masked()[W:])
        else:
            rows = {*active, *recent, *(just if age == 1 else [])}
            logits = s.forward(rows | s.before(active), window)
            recent += s.commit(logits, active, num, "confidence")
        step, age = step + 1, age + 1
    return s.result


def dream_port(plain, prompt, shift, A, W, R, *, slide=True, eos=None):
    """The Dream port, by index: the far field is never computed; a slice from the leftmost mask on.

    With `eos` the canvas ends behind the first of it once there is one.
    """
    s = Session(plain, prompt, shift)
    age, seen, active = 0, set(), []
    while True:
        canvas = s.x[s.num_prompt :].tolist()
        end = s.num_prompt + canvas.index(eos) + 1 if eos in canvas else len(s.x)
        masked = [p for p in s.masked() if p < end]
        if not masked:
            return s.result
        s.now += 1
        if age == 1 or slide:
            num = min(A, len([p for p in masked if p in seen]))
            stop = [*masked, end][num]
        active = [p for p in masked if p < stop] if age else []
        if age % R == 0 or end < len(s.x) or not active:
            seen = set(range(end)) - set(masked[W:])
            logits, start, age = s.forward(seen, seen), masked[0], 0
            s.commit(logits, masked[:1], 1, "entropy")
        else:
            logits = s.forward(set(range(start, stop)) | s.before(active), seen)
            s.commit(logits, active, 1, "entropy")
        age += 1


DREAM = {
    "prune_at_refresh": True,
    "leftmost_at_refresh": True,
    "contiguous": True,
    "order": "entropy",
}
SHAPES = [(3, 6, 4), (1, 1, 5), (4, 30, 3), (30, 4, 6), (2, 5, 30), (3, 3, 1)]


def shape(A, W, R):
    return {"active_length": A, "window_length": W, "refresh_period": R}


@torch.no_grad()
@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_tokens_and_order_equal_the_llada_port(
    tiny, plain, decode, prompts, assert_same_commits, sizes, shift, steps
):
    given, settings = prompts(3), shape(*sizes) | {"num_steps": steps}
    seqs = decode(
        tiny("masked", shift=shift), "window_diffusion", settings, prompts=given, max_new_tokens=CANVAS
    )
    references = [llada_port(plain, prompt, shift, *sizes, steps or CANVAS) for prompt in given]
    assert_same_commits(seqs, references)


@torch.no_grad()
@pytest.mark.parametrize("slide", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_tokens_and_order_equal_the_dream_port_by_index(
    tiny, plain, decode, prompts, assert_same_commits, sizes, shift, slide
):
    given, settings = prompts(3), DREAM | shape(*sizes) | {"slide": slide}
    seqs = decode(
        tiny("masked", shift=shift), "window_diffusion", settings, prompts=given, max_new_tokens=CANVAS
    )
    references = [dream_port(plain, prompt, shift, *sizes, slide=slide) for prompt in given]
    assert_same_commits(seqs, references)


def test_the_settings_do_differ(tiny, decode, prompts):
    base = shape(3, 5, 4)
    switches = [*({name: value} for name, value in DREAM.items()), {"slide": False}, {}]
    outputs = [
        str(
            [
                seq.committed_at.tolist()
                for seq in decode(
                    tiny("masked"),
                    "window_diffusion",
                    base | more,
                    prompts=prompts(12),
                    max_new_tokens=CANVAS,
                )
            ]
        )
        for more in switches
    ]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    ("name", "settings", "shared"),
    [
        ("low_confidence", {}, {}),
        ("low_confidence", {}, {"num_steps": 5}),
        ("threshold", {}, {"threshold": 0.25}),
    ],
)
@pytest.mark.parametrize("law", [Law(), Law(temperature=0.9)], ids=["greedy", "drawn"])
def test_refreshed_in_every_pass_it_is_the_plain_loop(
    tiny, decode, prompts, name, settings, shared, shift, law
):
    given, model = prompts(6), tiny("masked", shift=shift)
    ours, reference = (
        decode(model, decoder, more | shared, prompts=given, max_new_tokens=CANVAS, law=law)
        for decoder, more in (
            ("window_diffusion", shape(2, 3, 1)),
            (name, settings | {"block_length": None}),
        )
    )
    for one, other in zip(ours, reference, strict=True):
        assert one.output.tolist() == other.output.tolist()
        assert one.committed_at.tolist() == other.committed_at.tolist()


class Denoises(Decoder):
    """Any use of `denoise`, as a decoder."""

    name, family, promise, needs, paper = "denoises", "diffusion", "approximate", ("masked",), "-"

    class Config:
        pass

    def __init__(self, feed, rule):
        super().__init__()
        self.feed, self.rule = feed, rule

    def decode(self, seq):
        seq.open_canvas(seq.limit)
        block = Block(seq.num_prompt, seq.limit, seq.limit)
        yield from denoise(seq, [block], self.feed, [self.rule])


class Watches:
    """Commits the first candidate in the passes it is told, and keeps all logits."""

    reads, of = ("logits",), "model"

    def __init__(self, commits):
        self.commits, self.seen = commits, []

    def __call__(self, candidates):
        self.seen.append(dict(zip(candidates.positions.tolist(), candidates.scores["logits"], strict=True)))
        return np.array([0] if len(self.seen) in self.commits else [], np.int64)


@pytest.mark.parametrize("shift", [0, 1])
def test_between_refreshes_only_decided_tokens_are_stale(tiny, shift):
    """A window over all masks: with nothing committed in between, a pass tells what a full one tells."""
    model = tiny("masked", shift=shift)

    def watch(feed, commits, passes=4):
        rule = Watches(commits)
        seq = Sequence(prompt=random_prompt(5), family=model.family, stop=StopRules(max_new_tokens=8))
        engine = Engine(model)
        engine.submit(Denoises(feed, rule), seq)
        for _ in range(passes):
            engine.step()
        engine.cancel(seq)
        return rule.seen

    for commits, is_same in (((), True), ((2,), False)):
        whole = watch(CanvasFeed(), commits)
        windowed = watch(WindowFeed(8, 8, 9), commits)
        for full, part in zip(whole[:2], windowed[:2], strict=True):
            assert full.keys() == part.keys()
            assert all(torch.allclose(full[p], part[p], atol=1e-9) for p in full)
        near = [torch.allclose(whole[3][p], windowed[3][p], atol=1e-9) for p in whole[3]]
        assert all(near) == is_same  # the prompt has not seen what was committed


class SureModel(ToyModel):
    """Predicts token i mod 3 for position i, ever surer to the left; a toy refuses unwritten slots."""

    def __init__(self, shift=0, window=80, eos_at=None):
        super().__init__(Family(kind="masked", mask_id=5, shift=shift, eos_ids=(4,)), 6, window=window)
        self.eos_at = eos_at

    def logits(self, position, view):
        logits, at = np.zeros(6), position + self.family.shift
        logits[4 if at == self.eos_at else at % 3] = 9 if at == self.eos_at else 5 - at / 40
        return logits


def calls_of(decode, settings, *, shift=0, length=20, **more):
    model = CountingModel(SureModel(shift, **more))
    [seq] = decode(model, "window_diffusion", settings, prompts=[[0, 1, 2]], max_new_tokens=length)
    return seq, [forward for [(_, forward)] in model.calls]


def test_a_pass_feeds_what_is_active_and_what_was_committed_since(decode):
    seq, calls = calls_of(decode, shape(4, 8, 5))
    fed = [len(forward.tokens) for forward in calls]
    # In a pass between, 4 masks, those committed since, and right behind a refresh the one it committed.
    between = [4 + 1, 4 + 1, 4 + 2, 4 + 3]
    assert fed == [23, *between, 23, *between, 23, *between, 23, 4 + 1, 3 + 1, 2 + 2, 1 + 3]
    assert seq.stats.positions_fed["target"] == sum(fed)
    assert seq.stats.forwards["target"] == 20


def test_pruned_the_cost_of_a_refresh_does_not_grow_with_the_canvas(decode):
    for length in (20, 60):
        _, calls = calls_of(decode, shape(4, 8, 5) | DREAM, length=length)
        assert [len(forward.tokens) for forward in calls[:6]] == [3 + 8, 5, 6, 7, 8, 3 + 5 + 8]


@pytest.mark.parametrize("prune", [True, False])
def test_no_row_ever_sees_the_far_field(decode, prune):
    settings = shape(3, 6, 5) | {"prune_at_refresh": prune}
    _, calls = calls_of(decode, settings, length=40)
    for at, forward in enumerate(calls):
        is_refresh = at % 5 == 0
        hidden = set(forward.sees.hidden.tolist())
        assert not hidden & set(forward.positions.tolist())
        assert (len(hidden) > 0) == (prune or not is_refresh) or at > 30
        masks = sorted({*forward.positions[forward.tokens == 5].tolist()})
        assert not masks or max(masks) < min([*hidden, 99])


@pytest.mark.parametrize("settings", [{}, DREAM], ids=["llada", "dream"])
@pytest.mark.parametrize("shift", [0, 1])
def test_the_row_that_predicts_is_the_one_before_the_position_if_logits_are_shifted(decode, settings, shift):
    """All of what was committed is right, so nothing came from another row; and the model is asked for it."""
    seq, calls = calls_of(decode, shape(3, 5, 4) | settings, shift=shift)
    assert seq.output.tolist() == [position % 3 for position in range(3, 23)]
    for at, forward in enumerate(calls, start=1):
        committed = np.flatnonzero(seq.committed_at[: seq.limit] == at)
        assert set(committed - shift) <= set(forward.positions[forward.read.rows].tolist())


def test_confidence_is_the_models_and_entropy_that_of_the_law_as_published(decode):
    for settings, of, score in (({}, "model", "probs"), (DREAM, "law", "entropy")):
        _, calls = calls_of(decode, settings, length=4)
        assert {(forward.read.of, forward.read.scores) for forward in calls} == {(of, (score,))}


def test_a_threshold_can_only_hasten_the_schedule(decode):
    slow, _ = calls_of(decode, shape(8, 16, 4))
    fast, _ = calls_of(decode, shape(8, 16, 4) | {"threshold": 0.5})
    assert slow.stats.forwards["target"] == 20
    assert fast.stats.forwards["target"] == 1  # a refresh may commit all
    some, _ = calls_of(decode, shape(8, 16, 4) | {"threshold": 0.5, "leftmost_at_refresh": True})
    assert np.bincount(some.committed_at[3:])[1:].tolist() == [1, 8, 8, 1, 2]
    shared, _ = calls_of(decode, shape(8, 16, 4) | {"threshold": 2.0, "num_steps": 5})
    assert np.bincount(shared.committed_at[3:])[1:].tolist() == [4] * 5


def test_with_fewer_candidates_than_its_share_a_schedule_is_made_up_for_behind_it(decode):
    seq, _ = calls_of(decode, shape(2, 20, 10) | {"num_steps": 5})
    assert np.bincount(seq.committed_at[3:])[1:].tolist() == [4, 2, 2, 2, 2, *[1] * 8]
    assert len(seq.output) == 20


@torch.no_grad()
@pytest.mark.parametrize("shift", [0, 1])
def test_a_canvas_that_is_cut_equals_the_dream_port_up_to_its_stop_token(plain, decode, prompts, shift):
    sizes, num_cut = (3, 6, 4), 0
    model = CountingModel(tiny_model("masked", shift=shift))
    [seq] = decode(model, "window_diffusion", shape(*sizes), prompts=prompts(1), max_new_tokens=CANVAS)
    eos = int(seq.output[CANVAS // 2])
    model.family = dataclasses.replace(model.family, eos_ids=(eos,))
    settings = DREAM | shape(*sizes) | {"cut_at_eos": True}
    given = prompts(8)
    seqs = decode(model, "window_diffusion", settings, prompts=given, max_new_tokens=CANVAS, eos_ids=(eos,))
    for prompt, seq in zip(given, seqs, strict=True):
        tokens, forwards = dream_port(plain, prompt, shift, *sizes, eos=eos)
        num, committed_at = len(seq.output), seq.committed_at[seq.num_prompt :].tolist()
        assert (seq.output.tolist(), committed_at[:num]) == (tokens[:num], forwards[:num])
        num_cut += seq.finish_reason == "stop" and committed_at[num - 1] < max(committed_at)
    assert num_cut > 0


def test_after_the_cut_passes_feed_the_text_only_and_refresh_it(decode):
    settings = shape(4, 30, 8) | {"cut_at_eos": True}
    model = CountingModel(SureModel(eos_at=9))
    [seq] = decode(model, "window_diffusion", settings, prompts=[[0, 1, 2]], max_new_tokens=20, eos_ids=(4,))
    fed = [forward.positions.tolist() for [(_, forward)] in model.calls]
    assert seq.committed_at[9] == 1
    assert fed == [[*range(23)], *[[*range(10)]] * 6]
    assert (seq.output.tolist(), seq.finish_reason) == ([0, 1, 2, 0, 1, 2, 4], "stop")
    # Not told to cut it ends there too, after as many passes as the order takes.
    [whole] = decode(
        SureModel(eos_at=9), "window_diffusion", shape(4, 30, 8), prompts=[[0, 1, 2]], max_new_tokens=20,
        eos_ids=(4,),
    )  # fmt: skip
    assert whole.output.tolist() == seq.output.tolist()


def test_a_cut_that_does_not_end_the_text_is_lifted(decode):
    """With stop tokens ignored; a toy refuses to read what was never computed."""
    settings = DREAM | shape(3, 30, 6) | {"cut_at_eos": True, "leftmost_at_refresh": False}
    [seq] = decode(SureModel(eos_at=9), "window_diffusion", settings, prompts=[[0, 1, 2]], max_new_tokens=20)
    assert len(seq.output) == 20
    assert seq.output[6] == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active_length": 0}, "active_length must be at least 1; got 0."),
        ({"window_length": 0}, "window_length must be at least 1; got 0."),
        ({"refresh_period": 0}, "refresh_period must be at least 1; got 0."),
        ({"threshold": -1.0}, "threshold must be at least 0; got -1.0."),
        ({"num_steps": 0}, "num_steps must be at least 1; got 0."),
        (
            {"threshold": 0.9, "order": "entropy"},
            "a threshold goes by confidence; got order=entropy. Leave out one of them.",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        make_decoder("window_diffusion", settings)
    assert str(error.value) == message
