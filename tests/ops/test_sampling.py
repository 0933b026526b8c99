from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chordal.errors import DecodingError, InputError
from chordal.ops.randomness import uniforms
from chordal.ops.sampling import Law, adjust, draw, entropy, guide, margin, penalize_repetition, transform
from chordal.testing import chi_square

NAN, INF = float("nan"), float("inf")
VOCAB_SIZE = 50

# Every combination, cut or not by each rule; 60 is more than the vocabulary.
LAWS = [
    Law(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.0, 0.3, 1.0, 1.7), (0, 1, 5, 60), (1.0, 0.9, 0.4), (0.0, 0.05, 0.6)
    )
]


def random_logits(rows, seed=0):
    return 3 * torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def cut(logits, **settings):
    """Which tokens of one row a law cuts."""
    row = torch.tensor([logits], dtype=torch.float32)
    return torch.isneginf(transform(row, [Law(**settings)]))[0].tolist()


def by_transformers(row, law):
    """What transformers' own warpers make of one row, in the order `generate` applies them."""
    warpers = [
        *([TemperatureLogitsWarper(law.temperature)] if law.temperature not in (0, 1) else []),
        *([TopKLogitsWarper(law.top_k)] if law.top_k else []),
        *([TopPLogitsWarper(law.top_p)] if law.top_p < 1 else []),
        *([MinPLogitsWarper(law.min_p)] if law.min_p else []),
    ]
    for warper in warpers:
        row = warper(None, row[None])[0]
    return row


def test_every_combination_equals_transformers_whatever_the_other_rows_ask():
    logits = random_logits(4 * len(LAWS))
    laws = 4 * LAWS
    got, want = transform(logits, laws), torch.stack(list(map(by_transformers, logits, laws)))
    assert torch.equal(got.isneginf(), want.isneginf())
    torch.testing.assert_close(got, want)
    assert {law.truncates for law in laws} == {True, False}


def test_a_row_among_others_is_bit_for_bit_the_row_alone():
    """A row that cuts nothing used to lose its least likely tokens beside one that does."""
    logits = 8 * random_logits(len(LAWS))
    alone = [transform(row[None], [law])[0] for row, law in zip(logits, LAWS, strict=True)]
    assert torch.equal(transform(logits, LAWS), torch.stack(alone))


def test_transform_leaves_its_input_as_it_is():
    logits = random_logits(len(LAWS))
    before = logits.clone()
    transform(logits, LAWS)
    for law in LAWS:
        transform(logits[:1], [law])
    assert torch.equal(logits, before)


def test_top_k_keeps_exactly_k_and_ties_go_to_the_lower_token():
    assert cut([1, 3, 2, 2, 2, 0], top_k=3) == [True, False, False, False, True, True]
    assert cut([5] * 1000, top_k=2) == [False, False, *[True] * 998]  # so many that sorting may swap them


def test_top_p_keeps_the_fewest_that_reach_it_and_ties_go_to_the_lower_token():
    logits = [math.log(p) for p in (0.125, 0.5, 0.125, 0.25)]
    assert cut(logits, top_p=0.74) == [True, False, True, False]
    assert cut(logits, top_p=0.8) == [False, False, True, False]
    assert cut([0, 0, 0, 0], top_p=0.5) == [False, False, True, True]  # two of .25 reach it
    assert cut(logits, top_p=1e-9) == [True, False, True, True]


def test_min_p_keeps_what_is_just_likely_enough():
    assert cut([3, 3, 2.9, 3], min_p=1) == [False, False, True, False]
    assert cut([0, math.log(0.51), math.log(0.49)], min_p=0.5) == [False, False, True]


def test_temperature_comes_before_every_cut():
    logits = [math.log(p) for p in (0.6, 0.3, 0.1)]
    assert cut(logits, top_p=0.6, temperature=1) == [False, True, True]
    assert cut(logits, top_p=0.6, temperature=3) == [False, False, True]
    assert cut(logits, min_p=0.4, temperature=1) == [False, False, True]
    assert cut(logits, min_p=0.4, temperature=3) == [False, False, False]


def test_temperature_zero_scores_as_one():
    logits = random_logits(2)
    laws = [Law(temperature=0, top_k=4), Law(temperature=1, top_k=4)]
    assert torch.equal(*transform(logits[:1].expand(2, -1), laws))


def test_a_temperature_near_zero_takes_the_most_likely_token():
    """Logits divided by so little used to overflow, and a token outside the vocabulary was drawn."""
    logits = random_logits(40)
    for temperature in (1e-6, 1e-30, 1e-39, 1e-46, 5e-324):
        drawn = draw(
            transform(logits, [Law(temperature=temperature)] * 40), torch.linspace(0, 0.99, 40).double()
        )
        assert torch.equal(drawn, logits.argmax(1))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty_equals_transformers(penalty):
    logits = random_logits(20)
    contexts = torch.randint(VOCAB_SIZE, (20, 30), generator=torch.Generator().manual_seed(1))
    got = [penalize_repetition(row, context, penalty) for row, context in zip(logits, contexts, strict=True)]
    want = RepetitionPenaltyLogitsProcessor(penalty)(contexts, logits.clone())
    torch.testing.assert_close(torch.stack(got), want)


def test_repetition_penalty_leaves_its_input_and_banned_tokens_as_they_are():
    logits = torch.tensor([2.0, -2.0, -INF, 1.0])
    got = penalize_repetition(logits, torch.tensor([0, 1, 2]), 2.0)
    assert got.tolist() == [1.0, -4.0, -INF, 1.0]
    assert logits.tolist() == [2.0, -2.0, -INF, 1.0]


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(3, -1)
    assert draw(logits, torch.tensor([0, 0.2, 0.69]).double()).tolist() == [0, 1, 1]
    # A token owns its lower edge.
    edges = torch.tensor([0, 0.2499, 0.25, 0.4999, 0.5, 0.75, 0.9999]).double()
    assert draw(torch.zeros(7, 4), edges).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_draw_never_takes_a_token_without_probability():
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor([0, 2**-53, 0.5, 1 - 2**-53]).double()
    for num_left in (1, 2, 7):
        logits = random_logits(400, num_left)
        logits[torch.rand(400, VOCAB_SIZE, generator=generator).argsort(1) >= num_left] = -INF
        drawn = draw(logits, edges.repeat(100))
        assert logits.gather(1, drawn[:, None]).isfinite().all()


def test_draw_takes_the_first_and_the_last_token_that_is_left_at_the_ends():
    logits = torch.tensor([[-INF, 1.0, 2.0, -INF, 1.0, -INF]]).expand(2, -1)
    assert draw(logits, torch.tensor([0, 1 - 2**-53]).double()).tolist() == [1, 4]


def test_draws_follow_the_law():
    """40,000 draws with the numbers a request would use; one false alarm in a million."""
    law = Law(temperature=2.0, top_k=8, top_p=0.95)
    [row] = transform(random_logits(1), [law])
    num = 40_000
    drawn = draw(row.expand(num, -1), torch.from_numpy(uniforms(1, "token", np.arange(num))))
    counts = np.bincount(drawn, minlength=VOCAB_SIZE)
    assert (counts > 0).sum() > 4
    assert chi_square(counts, row.double().softmax(0).numpy()) > 1e-6


def test_entropy_is_in_nats_and_knows_zero():
    probs = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(entropy(probs), torch.tensor([1.5 * math.log(2), 0.0, math.log(3)]))


def test_margin_is_between_the_two_largest():
    probs = torch.tensor([[0.2, 0.7, 0.1], [0.4, 0.2, 0.4], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(margin(probs), torch.tensor([0.5, 0.0, 1.0]))
    assert margin(torch.ones(2, 1)).tolist() == [1, 1]


def test_guidance_pushes_away_from_the_logits_without_a_prompt():
    given, without = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[0.0, 3.0, -1.0]])
    assert guide(given, without, 2.0).tolist() == [[3.0, 0.0, -1.0]]
    assert guide(given, without, 0.0).tolist() == given.tolist()
    assert guide(given, given, 5.0).tolist() == given.tolist()


def test_guidance_keeps_banned_tokens_banned():
    given, without = torch.tensor([[1.0, -INF]]), torch.tensor([[0.5, -INF]])
    assert guide(given, without, 1.5).tolist() == [[1.75, -INF]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0; got -0.1."),
        ({"temperature": INF}, "temperature must be a finite number of at least 0; got inf."),
        ({"temperature": NAN}, "temperature must be a finite number of at least 0; got nan."),
        ({"top_k": -1}, "top_k must be a whole number of at least 0; got -1."),
        ({"top_k": 2.5}, "top_k must be a whole number of at least 0; got 2.5."),
        ({"top_p": 0}, "top_p must be above 0 and at most 1; got 0."),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1; got 1.01."),
        ({"top_p": NAN}, "top_p must be above 0 and at most 1; got nan."),
        ({"min_p": -0.1}, "min_p must be between 0 and 1; got -0.1."),
        ({"min_p": 1.1}, "min_p must be between 0 and 1; got 1.1."),
        ({"min_p": NAN}, "min_p must be between 0 and 1; got nan."),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number above 0; got 0."),
        ({"repetition_penalty": INF}, "repetition_penalty must be a finite number above 0; got inf."),
        ({"repetition_penalty": NAN}, "repetition_penalty must be a finite number above 0; got nan."),
    ],
)
def test_a_law_out_of_range_says_what_must_hold_and_what_was_given(settings, message):
    with pytest.raises(InputError) as error:
        Law(**settings)
    assert str(error.value) == message


def test_a_law_knows_whether_it_draws_and_whether_it_cuts():
    assert Law().is_greedy
    assert not Law(temperature=1e-9).is_greedy
    assert [Law(**cuts).truncates for cuts in ({}, {"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1})] == [
        False,
        True,
        True,
        True,
    ]


# What is adjusted before temperature and truncation.


class Only:
    """A constraint that allows some tokens, and says which texts it was asked about."""

    def __init__(self, *tokens):
        self.tokens, self.asked = list(tokens), []

    def allowed(self, generated):
        self.asked.append(generated.tolist())
        mask = np.zeros(6, bool)
        mask[self.tokens] = True
        return mask


def adjusted(law, *contexts, num_prompt=0):
    rows = torch.arange(6.0).repeat(max(len(contexts), 1), 1)
    return adjust(rows, law, [np.array(context, np.int64) for context in contexts], num_prompt).tolist()


def test_presence_counts_once_and_frequency_each_time_and_the_prompt_not_at_all():
    law = Law(presence_penalty=0.5, frequency_penalty=0.25)
    assert adjusted(law, [0, 0, 3, 4, 3, 3], num_prompt=2) == [[0, 1, 2, 3 - 0.5 - 0.75, 4 - 0.75, 5]]


def test_penalties_may_be_negative():
    assert adjusted(Law(presence_penalty=-1.0, frequency_penalty=-0.5), [2, 2]) == [[0, 1, 4, 3, 4, 5]]


def test_a_bias_is_added_before_penalties():
    law = Law(logit_bias=((1, 3.0), (5, -2.0)), repetition_penalty=2.0)
    assert adjusted(law, [1, 2]) == [[0, 2, 1, 3, 4, 3]]


def test_every_row_is_adjusted_by_the_tokens_before_it():
    assert adjusted(Law(frequency_penalty=1.0), [1], [1, 1], []) == [
        [0, 0, 2, 3, 4, 5],
        [0, -1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
    ]


def test_a_constraint_is_asked_about_what_was_generated_and_leaves_the_rest_no_chance():
    constraint = Only(2, 4)
    found = adjusted(Law(constraint=constraint), [5, 5, 1], [5, 5], num_prompt=2)
    assert constraint.asked == [[1], []]
    assert found == [[-math.inf, -math.inf, 2, -math.inf, 4, -math.inf]] * 2


def test_a_constraint_that_allows_nothing_is_an_error_and_no_token():
    with pytest.raises(DecodingError, match="the constraint allows no token"):
        adjusted(Law(constraint=Only()), [1])


def test_a_law_that_reads_the_context_needs_one_a_row():
    with pytest.raises(ValueError, match="needs one a row"):
        adjusted(Law(presence_penalty=1.0))


def test_a_law_knows_whether_it_adjusts_and_whether_it_reads_the_context():
    assert not Law(temperature=1, top_k=3).adjusts
    assert Law(logit_bias=((1, 1.0),)).adjusts and not Law(logit_bias=((1, 1.0),)).reads_context
    for law in (Law(presence_penalty=1), Law(frequency_penalty=1), Law(constraint=Only())):
        assert law.adjusts and law.reads_context
        assert not law.unadjusted.adjusts
    assert Law(temperature=2, top_p=0.5, presence_penalty=1).unadjusted == Law(temperature=2, top_p=0.5)


def test_adjusting_leaves_its_input_as_it_is():
    given = torch.zeros(1, 6)
    adjust(given, Law(logit_bias=((1, 3.0),)), [], 0)
    assert given.tolist() == [[0.0] * 6]
