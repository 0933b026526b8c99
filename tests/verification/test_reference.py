from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.ops.sampling import Law
from chordal.testing.tiny import CountingModel, random_prompt, tiny_model
from chordal.testing.toys import TableModel
from chordal.verification.reference import measure_noise, ranks, score


def test_scores_are_those_of_the_model_itself():
    model, text = tiny_model(), random_prompt(9)
    want = model.model(input_ids=torch.from_numpy(text)[None]).logits[0, 3:-1]
    got = score(model, text, 4, Law())
    assert got.shape == (5, model.vocab_size)
    torch.testing.assert_close(got, want.to(got.dtype))
    # Nothing is left behind that another text could see.
    torch.testing.assert_close(score(model, text[:6], 4, Law()), got[:2])


def test_scores_are_behind_the_law():
    model, text = tiny_model(), random_prompt(9)
    plain, law = score(model, text, 4, Law()), Law(temperature=2.0, repetition_penalty=1.5)
    penalised = score(model, text, 4, law)
    for row in range(5):
        seen = np.unique(text[: 4 + row])
        unseen = np.setdiff1d(np.arange(model.vocab_size), seen)
        torch.testing.assert_close(penalised[row, unseen], plain[row, unseen] / 2)
        assert (penalised[row, seen] < plain[row, seen] / 2 + plain[row, seen].abs()).all()
        assert not torch.allclose(penalised[row, seen], plain[row, seen] / 2)
    assert (score(model, text, 4, Law(top_k=3)).isfinite().sum(1) == 3).all()


def test_ranks_are_the_chance_of_likelier_tokens_and_of_the_own_one():
    model, prompt = TableModel(4, seed=3), np.array([0, 1])
    p = model.joint(prompt, 1, temperature=0.5)
    order = np.argsort(-p)
    texts = [np.append(prompt, token) for token in order]
    got = np.concatenate([*ranks(model, texts, 2, Law(temperature=0.5))])
    np.testing.assert_allclose(got[:, 0], np.append(0, np.cumsum(p[order])[:-1]), atol=1e-6)
    np.testing.assert_allclose(got[:, 1], p[order], atol=1e-6)
    np.testing.assert_allclose(got[:, 2], p.max(), atol=1e-6)


def test_tokens_of_equal_probability_share_a_rank():
    model = TableModel(4)
    model.table_VVV[:] = 0
    [row] = next(ranks(model, [np.array([0, 1, 2])], 2, Law(temperature=1.0)))
    np.testing.assert_allclose(row, [0, 1, 0.25])


def test_ranks_of_texts_of_one_length_run_together():
    model = CountingModel(TableModel(4, max_rows=2))
    texts = [np.array([0, 1, *rest]) for rest in ([2], [3], [1], [0, 0])]
    got = [*ranks(model, texts, 2, Law(temperature=1.0))]
    assert [len(call) for call in model.calls] == [2, 1, 1]
    assert [len(rows) for rows in got] == [1, 1, 1, 2]
    alone = [next(ranks(model, [text], 2, Law(temperature=1.0))) for text in texts]
    for together, single in zip(got, alone, strict=True):
        np.testing.assert_array_equal(together, single)


@pytest.mark.parametrize("start", [1, 4, 11])
def test_noise_is_as_small_as_the_numbers_of_the_model_are_exact(start):
    text = random_prompt(12)
    types = (torch.float64, torch.float32, torch.bfloat16)
    noise = [measure_noise(tiny_model(dtype=dtype), text, start, Law()) for dtype in types]
    assert 0 < noise[0] < 1e-12 < 1e-8 < noise[1] < 1e-4 < noise[2] < 1


def test_noise_is_measured_in_the_shapes_that_decoding_has():
    model = CountingModel(tiny_model(max_rows=4))
    measure_noise(model, random_prompt(12), 4, Law())
    shapes = {(len(call), len(call[0][1].tokens)) for call in model.calls}
    assert {(1, 11), (1, 4), (1, 1), (1, 7), (4, 4), (4, 1), (4, 7)} == shapes


def test_noise_shows_what_depends_on_the_rest_of_the_batch():
    class Coupled(TableModel):
        def run(self, requests):
            readings = super().run(requests)
            for reading in readings:
                reading.logits[:, 0] += 0.5 * (len(requests) > 1)
            return readings

    text = np.array([0, 1, 2, 3, 0, 1])
    assert measure_noise(TableModel(4), text, 1, Law()) < 1e-6
    assert measure_noise(Coupled(4), text, 1, Law()) == pytest.approx(0.5)
