from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.engine import Engine
from chordal.forward import Causal, Forward, Logits, Visible
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import (
    TINY_MASK,
    TINY_POISON,
    Alphabet,
    CountingModel,
    TableModel,
    random_prompt,
    tiny_model,
)


def test_a_counting_model_remembers_what_it_was_asked():
    counting = CountingModel(TableModel(window=32))
    engine = Engine(counting)
    seq = Sequence(prompt=np.array([0, 1]), family=counting.family, stop=StopRules(max_new_tokens=3))
    engine.submit(make_decoder("autoregressive"), seq)
    engine.run()
    assert [forward.tokens.tolist() for [(_, forward)] in counting.calls] == [
        [0, 1], [seq.output[0]], [seq.output[1]]
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["causal", "uniform"])
def test_tiny_models_are_seeded_and_answer_poison_with_nothing(kind):
    def logits(model, tokens):
        at = np.arange(len(tokens))
        [reading] = model.run([(0, Forward(np.asarray(tokens), at, Causal(), Logits(at), slots=at))])
        return reading.logits

    prompt = random_prompt(5)
    assert logits(tiny_model(kind), prompt).equal(logits(tiny_model(kind), prompt))
    assert not logits(tiny_model(kind), prompt).equal(logits(tiny_model(kind, seed=1), prompt))
    assert logits(tiny_model(kind), [1, TINY_POISON, 2])[1:].isnan().all()


def test_rounding_dies_out_in_what_a_tiny_uniform_model_says_of_what_it_said():
    """It grew from step to step, and the shape of a batch decided the text."""
    model, prompt, at = tiny_model("uniform"), random_prompt(9), np.arange(4)
    model.run([(0, Forward(prompt, np.arange(9), Causal(), slots=np.arange(9)))])
    sees = Visible(np.zeros(4, np.int64), np.full(4, 9), np.ones((4, 4), bool))
    said = torch.stack(
        [torch.zeros(4, 32), 1e-3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))]
    )
    distances = []
    for _ in range(12):
        asked = [Forward(at, 9 + at, sees, Logits(at), inject=logits) for logits in said]
        said = [reading.logits / 0.5 for reading in model.run([(0, ask) for ask in asked])]
        distances.append(float((said[1] - said[0]).abs().max()))
    assert distances[0] > 1e-5 > distances[-1]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["masked", "masked_causal"])
def test_among_masks_a_tiny_model_likes_the_mask_token_best(kind):
    model = tiny_model(kind).model
    ids = torch.from_numpy(np.append(random_prompt(5), [TINY_MASK] * 15))[None]
    can_attend = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    if kind == "masked_causal":
        can_attend = can_attend.tril()
    logits = model(input_ids=ids, attention_mask=can_attend).logits[0]
    assert (logits[5:].argmax(1) == TINY_MASK).all()


def test_an_alphabet_reads_and_writes_letters():
    alphabet = Alphabet()
    assert alphabet("bad.")["input_ids"] == [1, 0, 3, 27]
    assert alphabet.decode([1, 0, TINY_MASK, 3]) == "bad"
