from __future__ import annotations

import numpy as np

from chordal.decoders.autoregressive import Autoregressive
from chordal.engine import Engine
from chordal.generation import Model
from chordal.ops.homogeneity import Homogeneity
from chordal.testing.tiny import random_prompt, tiny_model
from chordal.verification.sampled import SampledReport
from chordal.verification.verify import verify

PROMPTS = [random_prompt(5, seed).tolist() for seed in range(2)]


class Watching(Autoregressive):
    """Plain decoding that notes the seeds it is given, or draws every token with one random number."""

    def __init__(self, *, repeats=False):
        super().__init__()
        self.seeds, self.repeats = [], repeats

    def decode(self, seq):
        self.seeds.append(seq.seed)
        if self.repeats:
            first = np.array([seq.num_prompt])
            draw = seq.uniforms
            seq.uniforms = lambda positions, *more: draw(first.repeat(len(positions)), *more)
        return super().decode(seq)


def run(decoder, **settings):
    model = Model(Engine(tiny_model(max_rows=64)))
    return verify(model, decoder, PROMPTS, **{"num_samples": 20, "max_new_tokens": 8, **settings})


def test_no_two_texts_share_a_random_number(monkeypatch):
    seen = []
    submit = Engine.submit
    monkeypatch.setattr(
        Engine, "submit", lambda self, decoder, seq: (seen.append(seq.seed), submit(self, decoder, seq))[1]
    )
    for seed in (0, 1):
        run(Watching(), seed=seed)
    sampled = [seed for seed in seen if seed not in (0, 1)]
    assert len(sampled) >= 2 * 80 - 2
    assert len(set(sampled)) == len(sampled)


def test_the_same_random_number_at_every_position_is_found():
    """Each token alone has the right law; only together they have not."""
    found = run(Watching(repeats=True), num_samples=100)
    assert found.greedy.num_same == 2
    assert found.sampled.failed
    assert not found.is_exact


def test_truncated_laws_are_compared_as_they_are():
    assert run(Watching(), temperature=1.5, top_k=3, top_p=0.9, repetition_penalty=1.3).is_exact


def test_a_test_fails_below_its_share_of_the_false_alarms():
    def report(*p_values):
        tests = {str(at): Homogeneity(1.0, 1, p) for at, p in enumerate(p_values)}
        return SampledReport(
            num_prompts=1, num_samples=20, temperature=1.0, false_alarm=0.01, tests=tests
        ).failed

    assert report(0.0051, 0.0049) == ("1",)
    assert report(0.0099) == ("0",)
    assert report(0.5, 0.9) == ()
