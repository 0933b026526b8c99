from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from chordal.ops.likelihood import mask_counts, token_logprobs


def test_tokens_are_scored_by_the_softmax_of_their_row():
    logits_NV = torch.tensor([[3.0, 1.0, 1.0], [1.0, 3.0, 1.0]]).log()

    logprobs, is_top = token_logprobs(logits_NV, np.array([0, 2]))

    assert logprobs.exp().tolist() == pytest.approx([0.6, 0.2])
    assert is_top.tolist() == [True, False]


def test_a_token_that_cannot_be_has_no_likelihood():
    logprobs, is_top = token_logprobs(torch.tensor([[0.0, -math.inf]]), np.array([1]))
    assert logprobs.tolist() == [-math.inf] and not is_top[0]


def test_counts_are_spread_evenly_from_where_they_begin():
    assert mask_counts(8, 4, 0.1).tolist() == [1, 3, 5, 7]
    assert mask_counts(8, 4, 0.95).tolist() == [8, 2, 4, 6]
    assert mask_counts(1, 3, 0.5).tolist() == [1, 1, 1]


@pytest.mark.parametrize("offset", [0, 0.31, 1 - 2**-53])
def test_a_multiple_of_the_length_has_every_count_equally_often(offset):
    assert sorted(mask_counts(5, 10, offset).tolist()) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("num_samples", [1, 3, 7])
def test_each_count_alone_is_uniform(num_samples):
    # Over a fine grid of offsets every sample has each of 4 counts a quarter of the time.
    grid = np.array([mask_counts(4, num_samples, (step + 0.5) / 840) for step in range(840)])
    assert all(np.bincount(column, minlength=5)[1:].tolist() == [210] * 4 for column in grid.T)
