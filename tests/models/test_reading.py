from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from chordal.forward import Logits, Reading, Sample, TopK
from chordal.models.reading import read_logits
from chordal.ops.sampling import Law, draw, transform

VOCAB_SIZE = 30
NAN, INF = float("nan"), float("inf")


def random_logits(rows, seed=0):
    return 2 * torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def rows(num):
    return np.arange(num)


def every_read():
    """One read of each kind, of two rows each."""
    context = (np.array([1, 2, 2]), np.array([3]))
    sampled = {"law": Law(temperature=0.7, top_k=9, top_p=0.9), "uniforms": np.array([0.3, 0.9])}
    return [
        Sample(rows(2)),
        Sample(rows(2), **sampled),
        Sample(rows(2), Law(temperature=1.0), np.array([0.1, 0.5])),
        Sample(rows(2), **sampled, scores=("probs", "margin", "entropy")),
        Sample(rows(2), **sampled, scores=("probs", "entropy"), of="law"),
        Sample(rows(2), scores=("entropy",), of="law", banned=(4, 7)),
        Sample(rows(2), scores=("probs",), unscored=(0, 1)),
        Sample(rows(2), Law(repetition_penalty=1.5), contexts=context, scores=("probs",)),
        Sample(rows(2), Law(repetition_penalty=1.5), contexts=context, scores=("entropy",), of="raw"),
        Sample(rows(2), **sampled, logprobs=3),
        Sample(rows(2), Law(presence_penalty=2.0, logit_bias=((3, 1.0),)), contexts=context, logprobs=0),
        TopK(rows(2), 3),
        TopK(rows(2), 99),
        Logits(rows(2)),
    ]


def as_lists(reading):
    values = {field.name: getattr(reading, field.name) for field in dataclasses.fields(Reading)}
    found = values.pop("logprobs")
    lists = {name: value.tolist() for name, value in values.items() if value is not None}
    return lists | ({} if found is None else {"logprobs": [part.tolist() for part in astuple(found)]})


def astuple(found):
    return (found.chosen, found.tokens, found.likeliest)


def test_each_read_of_a_batch_is_bit_for_bit_the_read_alone():
    reads = every_read()
    logits = random_logits(2 * len(reads))
    together = read_logits(logits, reads)
    alone = [read_logits(logits[2 * at : 2 * at + 2], [read])[0] for at, read in enumerate(reads)]
    assert [as_lists(reading) for reading in together] == [as_lists(reading) for reading in alone]


def test_reading_leaves_the_logits_as_they_are():
    reads = every_read()
    logits = random_logits(2 * len(reads))
    before = logits.clone()
    read_logits(logits, reads)
    assert torch.equal(logits, before)


def test_one_transfer_to_the_host_serves_the_whole_batch(monkeypatch):
    transfers = []

    def count(tensor, *args, _cpu=torch.Tensor.cpu, **kwargs):
        transfers.append(tuple(tensor.shape))
        return _cpu(tensor, *args, **kwargs)

    def refuse(tensor, *args):
        raise AssertionError("a value was read back by itself")

    monkeypatch.setattr(torch.Tensor, "cpu", count)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    reads = every_read()
    read_logits(random_logits(2 * len(reads)), reads)
    assert len(transfers) == 1
    read_logits(random_logits(4), [Sample(rows(4))])
    assert len(transfers) == 2


def test_raw_scores_are_of_the_logits_whatever_the_law():
    """Uniform logits have ln V nats and a certain token none; penalty, cut and temperature change neither."""
    logits = torch.cat([torch.zeros(1, VOCAB_SIZE), 1e3 * torch.eye(VOCAB_SIZE)[:1], random_logits(1)])
    law = Law(temperature=0.3, top_k=4, repetition_penalty=2.0)
    contexts = (np.arange(5),) * 3
    read = Sample(rows(3), law, np.full(3, 0.4), scores=("entropy",), of="raw", contexts=contexts)
    model = dataclasses.replace(read, of="model")
    raw, penalized = read_logits(logits.repeat(2, 1), [read, model])
    want = torch.distributions.Categorical(logits=logits).entropy()
    assert raw.entropy == pytest.approx(want.tolist(), abs=1e-5)
    assert raw.entropy[:2] == pytest.approx([np.log(VOCAB_SIZE), 0], abs=1e-5)
    assert abs(penalized.entropy[2] - raw.entropy[2]) > 0.01
    assert raw.tokens.tolist() == penalized.tokens.tolist()


def test_a_greedy_read_takes_the_largest_logit_and_the_lower_of_two():
    logits = random_logits(3)
    logits[1, [8, 20]] = 50.0
    [reading] = read_logits(logits, [Sample(rows(3))])
    assert reading.tokens.tolist() == [int(logits[0].argmax()), 8, int(logits[2].argmax())]
    assert reading.tokens.dtype == np.int64
    [scored] = read_logits(logits, [Sample(rows(3), scores=("probs",))])
    assert scored.tokens.tolist() == reading.tokens.tolist()


def test_a_sampled_read_draws_from_its_law_at_its_numbers():
    laws = [Law(temperature=0.5), Law(temperature=1.0), Law(temperature=2.0, top_k=5, min_p=0.1)]
    logits, numbers = random_logits(12), np.linspace(0, 0.99, 12)
    reads = [Sample(rows(4), law, numbers[4 * at : 4 * at + 4]) for at, law in enumerate(laws)]
    got = np.concatenate([reading.tokens for reading in read_logits(logits, reads)])
    per_row = [law for law in laws for _ in range(4)]
    assert got.tolist() == draw(transform(logits, per_row), torch.from_numpy(numbers)).tolist()


def test_scores_of_the_model_are_of_the_raw_logits_whatever_the_law():
    logits = random_logits(5)
    law = Law(temperature=0.3, top_k=2)
    read = Sample(rows(5), law, np.linspace(0, 0.9, 5), ("probs", "margin", "entropy"))
    [reading] = read_logits(logits, [read])
    probs = logits.double().softmax(1)
    best = probs.sort(dim=1, descending=True).values
    np.testing.assert_allclose(reading.probs, probs[rows(5), reading.tokens], rtol=1e-5)
    np.testing.assert_allclose(reading.margin, best[:, 0] - best[:, 1], rtol=1e-4)
    np.testing.assert_allclose(reading.entropy, -(probs * probs.log()).sum(1), rtol=1e-5)


def test_scores_of_the_law_are_after_temperature_and_truncation():
    logits = random_logits(5)
    law = Law(temperature=0.3, top_k=3)
    read = Sample(rows(5), law, np.linspace(0, 0.9, 5), ("probs", "margin", "entropy"), of="law")
    [reading] = read_logits(logits, [read])
    probs = (logits.double() / 0.3).topk(3, dim=1).values.softmax(1)
    assert all(min(abs(probs[row] - reading.probs[row])) < 1e-6 for row in range(5))
    np.testing.assert_allclose(reading.margin, probs[:, 0] - probs[:, 1], atol=1e-6)
    np.testing.assert_allclose(reading.entropy, torch.special.entr(probs).sum(1), atol=1e-5)


def test_a_banned_token_is_never_chosen_and_has_no_probability():
    logits = random_logits(4)
    best = logits.argmax(1)
    banned = tuple(set(best.tolist()))
    [unscored] = read_logits(logits, [Sample(rows(4), banned=banned)])
    [reading] = read_logits(logits, [Sample(rows(4), scores=("probs",), banned=banned)])
    left = logits.clone()
    left[:, best] = -INF
    assert reading.tokens.tolist() == unscored.tokens.tolist() == left.argmax(1).tolist()
    np.testing.assert_allclose(reading.probs, left.softmax(1).amax(1), rtol=1e-5)


def test_an_unscored_token_may_be_chosen_but_scores_nothing():
    logits = random_logits(2)
    best = int(logits[0].argmax())
    logits[1, best] = -9.0
    [reading] = read_logits(logits, [Sample(rows(2), scores=("probs", "entropy"), unscored=(best,))])
    assert reading.tokens.tolist() == [best, int(logits[1].argmax())]
    assert reading.probs[0] == 0
    left = logits.clone()
    left[:, best] = -INF
    np.testing.assert_allclose(reading.probs[1], left.softmax(1)[1].max(), rtol=1e-5)


def test_each_row_is_penalized_for_the_context_before_it():
    logits = random_logits(3)
    contexts = [np.array([5, 5, 9, 0]), np.array([], np.int64), np.arange(20)]
    law = Law(repetition_penalty=3.0)
    [reading] = read_logits(logits, [Sample(rows(3), law, contexts=tuple(contexts))])
    processor = RepetitionPenaltyLogitsProcessor(3.0)
    want = [
        int(processor(torch.from_numpy(context)[None], logits[row : row + 1].clone()).argmax())
        for row, context in enumerate(contexts)
    ]
    assert reading.tokens.tolist() == want
    assert want != logits.argmax(1).tolist()


def test_the_most_likely_tokens_come_with_the_probability_and_entropy_of_the_whole_row():
    logits = random_logits(6)
    few, many = read_logits(logits, [TopK(rows(2), 3), TopK(rows(4), 5)])
    probs = logits.softmax(1)
    for reading, part, k in ((few, probs[:2], 3), (many, probs[2:], 5)):
        want = part.topk(k, dim=1)
        assert reading.tokens.tolist() == want.indices.tolist()
        np.testing.assert_allclose(reading.probs, want.values, rtol=1e-6)
        np.testing.assert_allclose(reading.entropy, torch.special.entr(part).sum(1), rtol=1e-5)
    np.testing.assert_allclose(few.max_logit, logits[:2].amax(1), rtol=1e-6)


def test_no_more_tokens_are_read_than_there_are():
    [reading] = read_logits(random_logits(2), [TopK(rows(2), VOCAB_SIZE + 5)])
    assert reading.tokens.shape == reading.probs.shape == (2, VOCAB_SIZE)
    np.testing.assert_allclose(reading.probs.sum(1), 1, rtol=1e-5)


def test_logits_are_given_as_they_are():
    logits = random_logits(5)
    _, reading = read_logits(logits, [Sample(rows(2)), Logits(rows(3))])
    assert torch.equal(reading.logits, logits[2:])


def test_only_what_was_asked_for_is_set():
    logits = random_logits(6)
    plain, scored, logits_only = read_logits(
        logits, [Sample(rows(2)), Sample(rows(2), scores=("margin",)), Logits(rows(2))]
    )
    assert set(as_lists(plain)) == {"tokens", "max_logit"}
    assert set(as_lists(scored)) == {"tokens", "margin", "max_logit"}
    assert set(as_lists(logits_only)) == {"logits", "max_logit"}


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_row_that_is_not_finite_shows_and_disturbs_no_other(bad):
    reads = every_read()
    clean = random_logits(2 * len(reads))
    for broken, _ in enumerate(reads):
        logits = clean.clone()
        logits[2 * broken, 11] = bad
        got, want = read_logits(logits, reads), read_logits(clean, reads)
        assert not np.isfinite(got[broken].max_logit[0])
        for at, (reading, expected) in enumerate(zip(got, want, strict=True)):
            if at != broken:
                assert as_lists(reading) == as_lists(expected)


def test_a_read_of_no_rows_gives_nothing():
    none, some = read_logits(random_logits(2), [Sample(rows(0), scores=("probs",)), Sample(rows(2))])
    assert len(none.tokens) == len(none.probs) == 0
    assert len(some.tokens) == 2


def test_a_sampled_read_without_numbers_or_a_penalty_without_context_is_a_bug():
    with pytest.raises(ValueError, match="one uniform number for each row"):
        read_logits(random_logits(1), [Sample(rows(1), Law(temperature=1.0))])
    with pytest.raises(ValueError, match="reads the context needs one a row"):
        read_logits(random_logits(1), [Sample(rows(1), Law(repetition_penalty=2.0))])


def test_log_probabilities_are_of_the_logits_as_they_are_whatever_is_drawn():
    logits = random_logits(2)
    law = Law(temperature=0.5, top_k=1, logit_bias=((7, 100.0),))
    [reading] = read_logits(logits, [Sample(rows(2), law, np.array([0.1, 0.5]), logprobs=4)])
    want = logits.log_softmax(1)
    assert reading.tokens.tolist() == [7, 7]
    assert reading.logprobs.chosen == pytest.approx(want[:, 7].tolist())
    assert reading.logprobs.tokens.tolist() == want.topk(4).indices.tolist()
    assert np.allclose(reading.logprobs.likeliest, want.topk(4).values)


def test_rows_that_do_not_ask_for_log_probabilities_get_none():
    asking, other = read_logits(random_logits(3), [Sample(rows(1), logprobs=2), Sample(rows(2))])
    assert asking.logprobs.likeliest.shape == (1, 2)
    assert other.logprobs is None
