from __future__ import annotations

import collections

import numpy as np
import pytest

from chordal.drafters.ngram_model import NgramModel
from chordal.errors import InputError

TEXT = np.array([5, 6, 7, 5, 6, 8, 5, 6, 7, 9])


def test_probabilities_are_shares_of_what_followed():
    model = NgramModel.count([TEXT], max_ngram=4)
    got = model.probs(np.array([5, 6]), np.array([7, 8, 9]))
    np.testing.assert_allclose(got, [[2 / 3, 1 / 3, 0], [2 / 3, 1 / 3, 0], [0, 0, 0]])
    got = model.probs(np.array([1, 7, 5, 6]), np.array([8, 7]))
    np.testing.assert_allclose(got, [[1 / 3, 2 / 3], [1 / 3, 2 / 3], [1, 0]])


def test_tables_equal_counts_made_one_by_one():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 4, length) for length in (0, 1, 2, 40, 300)]
    model, tokens = NgramModel.count(texts, max_ngram=5), np.arange(5)
    for tail in rng.integers(0, 4, (50, 4)):
        for size, got in enumerate(model.probs(tail, tokens), 1):
            counts = collections.Counter(
                int(text[at + size])
                for text in texts
                for at in range(len(text) - size)
                if (text[at : at + size] == tail[-size:]).all()
            )
            total = max(1, counts.total())
            np.testing.assert_allclose(got, [counts[token] / total for token in tokens])


def test_no_ngram_reaches_from_one_text_into_the_next():
    model = NgramModel.count([np.array([1, 2]), np.array([3, 4])], max_ngram=2)
    assert model.probs(np.array([2]), np.array([3])).tolist() == [[0]]
    assert model.probs(np.array([3]), np.array([4])).tolist() == [[1]]


@pytest.mark.parametrize("tail", [[], [9], [1, 2, 3]])
def test_what_was_never_seen_has_no_probability(tail):
    model = NgramModel.count([np.array([1, 2])], max_ngram=3)
    assert model.probs(np.array(tail, np.int64), np.array([1, 2])).tolist() == [[0, 0], [0, 0]]


def test_order_matters():
    model = NgramModel.count([np.array([1, 2, 3])], max_ngram=3)
    assert model.probs(np.array([1, 2]), np.array([3]))[1].tolist() == [1]
    assert model.probs(np.array([2, 1]), np.array([3]))[1].tolist() == [0]


def test_of_too_many_ngrams_the_most_frequent_stay():
    model = NgramModel.count([TEXT], max_ngram=2, max_entries=2)
    assert [len(table.keys) for table in model.tables] == [2]
    np.testing.assert_allclose(model.probs(np.array([5]), np.array([6])), [[1]])
    np.testing.assert_allclose(model.probs(np.array([6]), np.array([7, 8])), [[1, 0]])


def test_tables_survive_a_file(tmp_path):
    model = NgramModel.count([TEXT], max_ngram=4)
    model.save(tmp_path / "ngrams")
    again = NgramModel.load(tmp_path / "ngrams")
    assert len(again.tables) == 3
    tail, tokens = np.array([7, 5, 6]), np.arange(10)
    assert np.array_equal(again.probs(tail, tokens), model.probs(tail, tokens))


@pytest.mark.parametrize("content", [b"", b"no tables", None])
def test_a_file_that_holds_something_else_is_refused(tmp_path, content):
    path = tmp_path / "tables.npz"
    if content is None:
        np.savez(path, weights=np.arange(3), keys_1=np.arange(3))
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"tables.npz must hold n-grams; write it with NgramModel.save"):
        NgramModel.load(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read n-grams from .*none.npz: No such file"):
        NgramModel.load(tmp_path / "none.npz")


@pytest.mark.parametrize("settings", [{"max_ngram": 1}, {"max_entries": 0}])
def test_sizes_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match="at least"):
        NgramModel.count([TEXT], **settings)
