from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from chordal.decoders.decoder import Decoder
from chordal.engine import Engine
from chordal.forward import Causal, Forward, Logits
from chordal.generation import Model
from chordal.testing.tiny import random_prompt, tiny_model
from chordal.verification.verify import verify

PROMPT = random_prompt(6).tolist()


class Misreading(Decoder):
    """Plain decoding that takes another token at some positions of the text, and may give up."""

    name = "misreading"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    paper = "-"

    @dataclass(frozen=True)
    class Config:
        at: tuple[int, ...] = ()
        gives_up_at: int | None = None

    def decode(self, seq):
        while not seq.done:
            if seq.frontier - len(PROMPT) == self.config.gives_up_at:
                seq.finish("length")
                return
            at = np.arange(seq.frontier)
            reading = yield Forward(seq.committed, at, Causal(), Logits(at[-1:]), slots=at)
            rank = int(seq.frontier - len(PROMPT) in self.config.at)
            seq.append(reading.logits[0].argsort(descending=True)[rank : rank + 1].numpy())


@pytest.fixture(scope="module")
def model():
    return Model(Engine(tiny_model()))


def compare(model, *, at=(), gives_up_at=None, **settings):
    decoder = Misreading(Misreading.Config(tuple(at), gives_up_at))
    return verify(model, decoder, [PROMPT], num_samples=0, **settings).greedy


def test_every_divergence_is_found_with_both_tokens_and_the_gap(model):
    found = compare(model, at=(2, 3, 7), max_new_tokens=10)
    [plain] = model.generate([PROMPT], max_new_tokens=10)
    assert [one.position for one in found.divergences] == [2, 3, 7]
    for one in found.divergences:
        text = [*PROMPT, *plain.tokens[: one.position]]
        at = np.arange(len(text))
        [reading] = model.engine.target.run([(0, Forward(np.array(text), at, Causal(), Logits(at[-1:]), at))])
        model.engine.target.free_row(0)
        best, other = reading.logits[0].topk(2).indices.tolist()
        assert (one.plain_token, one.token) == (best, other)
        assert one.text == model.tokenizer.decode([other])
        assert one.gap == pytest.approx(float(reading.logits[0, best] - reading.logits[0, other]))
        assert one.shortfall == pytest.approx(one.gap)
        assert not one.is_tie
    assert (found.num_same, found.num_bugs, found.num_tokens) == (0, 3, 10)


def test_a_divergence_at_the_last_token_is_found_and_ends_it(model):
    found = compare(model, at=(9,), max_new_tokens=10)
    assert [one.position for one in found.divergences] == [9]


def test_no_more_than_eight_divergences_of_a_prompt_are_looked_for(model):
    found = compare(model, at=range(20), max_new_tokens=20)
    assert [one.position for one in found.divergences] == [*range(8)]


def test_a_text_that_ends_too_early_is_a_bug_without_a_gap(model):
    found = compare(model, gives_up_at=4, max_new_tokens=10)
    [one] = found.divergences
    assert (one.position, one.token, one.text, one.gap, one.is_tie) == (4, None, "", None, False)
    assert one.plain_token is not None


def test_texts_are_compared_up_to_where_the_plain_one_stops(model):
    [plain] = model.generate([PROMPT], max_new_tokens=10)
    letter = plain.text[4]
    at = plain.text.index(letter)
    # The wrong token takes the place of the letter that ends the text.
    found = compare(model, at=(at,), max_new_tokens=10, stop_strings=letter)
    assert [one.position for one in found.divergences] == [at]
    assert found.num_tokens == at + 1
    assert compare(model, at=(at + 1,), max_new_tokens=10, stop_strings=letter).num_same == 1


def test_the_gap_is_of_what_the_penalty_leaves(model):
    gaps = [
        compare(model, at=(5,), max_new_tokens=6, repetition_penalty=penalty).divergences[0].gap
        for penalty in (1.0, 3.0)
    ]
    assert gaps[0] != pytest.approx(gaps[1])


def test_exact_decoding_measures_no_noise(model):
    found = compare(model, max_new_tokens=10)
    assert (found.num_same, found.divergences, found.noise, found.tolerance) == (1, (), None, None)
