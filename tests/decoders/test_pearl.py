from __future__ import annotations

import threading

import numpy as np
import pytest

from chordal.engine import Engine
from chordal.errors import InputError
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import CountingModel, TableModel, chi_square, random_prompt, sample_joint

PROMPT = np.array([0, 1, 0, 1, 0])
WARM = Law(temperature=1.0)


@pytest.fixture
def pair(tiny):
    return {"target": tiny("causal"), "draft": tiny("causal", seed=1)}


@pytest.fixture
def twins(tiny):
    return {"target": tiny("causal"), "draft": tiny("causal", window=65)}


@pytest.mark.parametrize("num_draft", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("models", ["pair", "twins"])
def test_greedy_text_is_that_of_plain_decoding(request, decode, prompts, models, num_draft):
    models = request.getfixturevalue(models)
    given = {"prompts": prompts(6), "max_new_tokens": 13}
    got = decode(models, "pearl", {"num_draft": num_draft}, **given)
    want = decode(models["target"], "autoregressive", **given)
    assert [seq.output.tolist() for seq in got] == [seq.output.tolist() for seq in want]


def test_followed_drafts_give_the_sampled_text_of_plain_decoding(decode, prompts, pair):
    given = {"prompts": prompts(6), "max_new_tokens": 13, "law": WARM, "seeds": range(6)}
    got = decode(pair, "pearl", {"acceptance": "follow"}, **given)
    want = decode(pair["target"], "autoregressive", **given)
    assert [seq.output.tolist() for seq in got] == [seq.output.tolist() for seq in want]


@pytest.mark.parametrize("num_draft", [2, 3])
def test_four_sampled_tokens_have_the_law_of_the_target(num_draft):
    """Also right behind a token that was verified before its draft was done."""
    target = TableModel(3, seed=0)
    models = {"target": target, "draft": TableModel(3, seed=1, spread=0.7)}
    decoder = make_decoder("pearl", {"num_draft": num_draft})
    counts = sample_joint(decoder, models, PROMPT % 3, length=4, runs=2000, law=WARM)
    assert chi_square(counts, target.joint(PROMPT % 3, 4)) > 1e-6


def test_a_number_that_is_used_for_two_positions_bends_the_law(monkeypatch):
    """As in the published code; without it the test above could not fail."""
    draw = Sequence.uniforms

    def shared(self, positions, purpose, number=0):
        return draw(self, np.zeros_like(positions) if purpose == "accept" else positions, purpose, number)

    monkeypatch.setattr(Sequence, "uniforms", shared)
    target = TableModel(3, seed=0)
    models = {"target": target, "draft": TableModel(3, seed=1, spread=0.7)}
    counts = sample_joint(make_decoder("pearl"), models, PROMPT % 3, length=4, runs=2000, law=WARM)
    assert chi_square(counts, target.joint(PROMPT % 3, 4)) < 1e-6


def test_right_drafts_are_verified_one_round_later_and_never_stop(decode, twins):
    """Pre-verify commits one token, every later round all of the last draft but the token before it."""
    counting = CountingModel(twins["target"])
    models = {**twins, "target": counting}
    [seq] = decode(models, "pearl", {"num_draft": 4}, prompts=[random_prompt(5)], max_new_tokens=17)
    assert [len(call[0][1].tokens) for call in counting.calls] == [5, 4, 4, 4, 4]
    assert np.bincount(seq.committed_at[5:])[1:].tolist() == [1, 4, 4, 4, 4]


def test_verified_intervals_tile_the_text(decode, pair):
    commits = []
    [seq] = decode(
        pair,
        "pearl",
        {"num_draft": 3},
        prompts=[random_prompt(5)],
        max_new_tokens=20,
        listeners=[lambda _, event: commits.append(event) if event.kind == "commit" else None],
    )
    positions = np.concatenate([event.positions for event in commits])
    assert positions.tolist() == list(range(5, 25))
    assert {len(event.positions) for event in commits} <= {1, 2, 3}
    assert len(seq.output) == 20


def simulate(chance, num_draft, rounds=200_000):
    """Tokens a round of the chain of pre- and post-verification, each draft right with one chance."""
    rng = np.random.default_rng(0)
    committed, num_ahead = 0, 0
    for _ in range(rounds):
        judged = num_ahead + 1
        wrong = np.flatnonzero(rng.random(judged) >= chance)
        committed += judged if not len(wrong) else int(wrong[0]) + 1
        num_ahead = num_draft - 1 if not len(wrong) else 0
    return committed / rounds


def test_the_published_throughput_formula_holds():
    for chance, num_draft in ((0.8, 5), (0.6, 3), (0.9, 4)):
        power = chance**num_draft
        formula = (1 - power) / ((1 - chance) * (1 + chance - power))
        assert simulate(chance, num_draft) == pytest.approx(formula, rel=0.01)


class Waits:
    """A target that waits in each pass until the draft model has run so often since the last one."""

    def __init__(self, model, passes, num):
        self.model, self.passes, self.num = model, passes, num
        self.packs = model.packs
        for name in ("name", "family", "window", "vocab_size", "max_rows", "tokenizer", "device", "dtype"):
            setattr(self, name, getattr(model, name))
        self.move_row, self.free_row = model.move_row, model.free_row
        self.met = []

    def run(self, requests):
        self.met.append(all(self.passes.acquire(timeout=20) for _ in range(self.num)))
        return self.model.run(requests)


class Tells(Waits):
    """A draft model that tells of each of its passes."""

    def run(self, requests):
        readings = self.model.run(requests)
        self.passes.release()
        return readings


def test_the_draft_model_runs_several_passes_inside_one_of_the_target(tiny):
    passes = threading.Semaphore(0)
    target = Waits(tiny("causal"), passes, 3)
    models = {"target": target, "draft": Tells(tiny("causal", window=65), passes, 0)}
    engine = Engine(models, concurrent=True)
    prompt = random_prompt(5)
    stop = StopRules(max_new_tokens=1 + 3 * 3)
    seq = engine.submit(
        make_decoder("pearl", {"num_draft": 3}), Sequence(prompt=prompt, family=target.family, stop=stop)
    )
    while len(target.met) < 3:
        engine.step()
    assert target.met == [True] * 3
    engine.cancel(seq)


def test_concurrent_models_give_the_same_text(decode, prompts, pair):
    given = prompts(6)
    want = decode(pair["target"], "autoregressive", prompts=given, max_new_tokens=13)
    engine = Engine(pair, concurrent=True)
    stop = StopRules(max_new_tokens=13)
    decoders = [
        make_decoder(name) for name in ("pearl", "draft_model", "pearl", "autoregressive", "rsd", "pearl")
    ]
    seqs = [
        engine.submit(decoder, Sequence(prompt=prompt, family=pair["target"].family, stop=stop))
        for decoder, prompt in zip(decoders, given, strict=True)
    ]
    engine.run()
    assert [seq.output.tolist() for seq in seqs] == [seq.output.tolist() for seq in want]
    assert engine.num_live == 0


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="num_draft must be at least 1; got 0"):
        make_decoder("pearl", {"num_draft": 0})
