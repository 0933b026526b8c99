from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from chordal.decoders.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from chordal.decoders.low_confidence import LowConfidence, LowConfidenceConfig
from chordal.engine import Engine
from chordal.errors import DecodingError, InputError
from chordal.likelihood import LikelihoodConfig, loglikelihoods, max_scored
from chordal.ops.sampling import guide
from chordal.sequence import Sequence, StopRules
from chordal.testing import ideal
from chordal.testing.tiny import TINY_MASK, CountingModel, random_prompt, tiny_model
from chordal.testing.toys import TableModel

MONTE_CARLO = LikelihoodConfig(method="monte_carlo")
CHAIN = LikelihoodConfig(method="chain")
CONTEXTS = [np.array([1]), np.array([2, 0, 1]), np.array([0, 1, 2, 3, 3])]


def score(model, context, *continuations, config=None):
    [found] = loglikelihoods(Engine(model), [(context, [np.array(one) for one in continuations])], config)
    return found


def backbone(model, tokens, *, causal=False):
    """Give the logits of all rows without Chordal: nothing hidden but the mask token, which cannot be."""
    num = len(tokens)
    sees = torch.ones(1, 1, num, num, dtype=torch.bool)
    mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(
        ~(sees.tril() if causal else sees), -math.inf
    )
    with torch.inference_mode():
        logits = model.model(torch.from_numpy(tokens)[None], attention_mask=mask).logits[0]
        if model.family.mask_id is not None:
            logits[:, model.family.mask_id] = -math.inf
    return logits


def decode(model, decoder, context, num):
    engine = Engine(model)
    seq = engine.submit(decoder, Sequence(context, model.family, StopRules(max_new_tokens=num)))
    engine.run()
    return seq.output.copy()


# Causal models.


def test_continuations_have_the_probability_that_the_table_gives_them():
    model = TableModel(seed=3)
    continuations = list(itertools.product(range(4), repeat=3))
    for context in CONTEXTS:
        joint = model.joint(context, 3)
        found = score(model, context, *continuations)
        assert [one.logprob for one in found] == pytest.approx(
            [math.log(joint[one]) for one in continuations]
        )


def test_only_the_greedy_continuation_is_greedy():
    model = TableModel(seed=3)
    continuations = list(itertools.product(range(4), repeat=2))
    [greedy] = [
        one
        for one, like in zip(continuations, score(model, CONTEXTS[2], *continuations), strict=True)
        if like.is_greedy
    ]

    text = list(CONTEXTS[2])
    for _ in range(2):
        text.append(int(model.table_VVV[text[-2], text[-1]].argmax()))
    assert greedy == tuple(text[-2:])


@pytest.mark.parametrize("arch", ["qwen3", "olmo2", "qwen3_moe"])
def test_a_causal_model_is_scored_as_transformers_scores_it(arch):
    model = tiny_model(arch=arch)
    context, continuations = random_prompt(12), [random_prompt(length, seed=length) for length in (1, 5, 9)]
    continuations.append(np.append(continuations[1][:3], 7))  # begins as another does
    found = score(model, context, *continuations)
    for like, continuation in zip(found, continuations, strict=True):
        given = [
            backbone(model, np.append(context, continuation[:at]), causal=True)[-1]
            .log_softmax(0)[token]
            .item()
            for at, token in enumerate(continuation)
        ]
        assert like.logprob == pytest.approx(sum(given), abs=1e-9)


def test_a_context_is_computed_once_for_all_its_continuations():
    model = CountingModel(tiny_model())
    score(model, random_prompt(12), [1, 2, 3], [1, 2, 4], [1, 5], [6])
    # Behind the context 1 and 2: what a last token leads to is not asked.
    assert [len(asks) for asks in model.calls] == [1]
    assert len(model.calls[0][0][1].tokens) == 12 + 2


def test_many_texts_share_passes_and_keep_their_order():
    model = CountingModel(tiny_model(max_rows=4))
    texts = [(random_prompt(length), [random_prompt(3, seed=length)]) for length in (3, 9, 5, 7, 4, 8, 6, 10)]
    done = []
    together = loglikelihoods(
        Engine(model), texts, on_finish=lambda index, found: done.append((index, found))
    )

    assert len(model.calls) == 2
    alone = [score(tiny_model(), context, *continuations) for context, continuations in texts]
    for one, other in zip(together, alone, strict=True):
        assert one[0].logprob == pytest.approx(other[0].logprob, abs=1e-9)
    assert sorted(done, key=lambda pair: pair[0]) == list(enumerate(together))


def test_a_causal_text_may_be_one_longer_than_the_window():
    model = tiny_model(window=8)
    assert max_scored(model.family, 8) == 9
    assert score(model, random_prompt(4), random_prompt(5))[0].logprob < 0
    with pytest.raises(InputError, match="at most 9 tokens together; got 4 and 6"):
        score(model, random_prompt(4), random_prompt(6))


# Masked-diffusion models.


def test_every_order_gives_an_answer_of_an_ideal_model_its_probability():
    # A set of 3 in any order: with l of them hidden each has the probability 1 / l, whichever they are.
    model = ideal.IdealModel(ideal.shuffle(3))
    for config in (CHAIN, replace(MONTE_CARLO, num_samples=3), replace(MONTE_CARLO, num_samples=30)):
        [right] = score(model, model.prompt(0), [2, 0, 1], config=config)
        assert right.logprob == pytest.approx(-math.log(6))


def test_the_estimate_comes_close_with_more_samples():
    answers = ideal.insert_random(4)
    model = ideal.IdealModel(answers)
    gaps = []
    for num_samples in (5, 2000):
        config = replace(MONTE_CARLO, num_samples=num_samples, check_greedy=False, seed=1)
        [found] = score(model, model.prompt(0), answers[2], config=config)
        gaps.append(abs(found.logprob + math.log(len(answers))))
    assert gaps[1] < 0.05 < gaps[0]


def test_an_answer_that_cannot_be_is_impossible():
    model = ideal.IdealModel(ideal.shuffle(3))
    [wrong] = score(model, model.prompt(0), [2, 2, 1], config=CHAIN)
    assert wrong.logprob == -math.inf and not wrong.is_greedy


def test_shifted_logits_are_read_where_they_predict():
    shifted = ideal.IdealModel(ideal.shuffle(3), shift=1)
    for config in (CHAIN, replace(MONTE_CARLO, num_samples=3)):
        [found] = score(shifted, shifted.prompt(0), [2, 0, 1], config=config)
        assert found.logprob == pytest.approx(-math.log(6))


@pytest.mark.parametrize("cfg_scale", [0, 1.5])
def test_the_chain_hides_what_is_behind_a_token(cfg_scale):
    model, context, continuation = tiny_model("masked"), random_prompt(5), random_prompt(4)
    [found] = score(model, context, continuation, config=replace(CHAIN, cfg_scale=cfg_scale))

    logprob = 0.0
    for at, token in enumerate(continuation):
        known, hidden = np.append(context, continuation[:at]), np.full(4 - at, TINY_MASK)
        without = np.concatenate([np.full(5, TINY_MASK), continuation[:at], hidden])
        given = [backbone(model, tokens)[[5 + at]] for tokens in (np.append(known, hidden), without)]
        logprob += guide(*given, cfg_scale)[0].log_softmax(0)[token].item()
    assert found.logprob == pytest.approx(logprob, abs=1e-9)


def test_greedy_is_the_text_of_the_sampler_that_commits_one_token_a_pass():
    model, context = tiny_model("masked"), random_prompt(5)
    for config, settings in (
        (MONTE_CARLO, LowConfidenceConfig(block_length=None)),
        (CHAIN, LowConfidenceConfig(block_length=1)),
    ):
        text = decode(model, LowConfidence(settings), context, 4)
        other = text.copy()
        other[2] = (text[2] + 1) % 20
        fast = replace(config, num_samples=1)
        assert [one.is_greedy for one in score(model, context, text, other, config=fast)] == [True, False]
    assert not score(model, context, text, config=replace(fast, method="monte_carlo", check_greedy=False))[
        0
    ].is_greedy


def test_the_same_seed_gives_the_same_estimate_in_any_company():
    model, context, continuation = tiny_model("masked"), random_prompt(5), random_prompt(6)
    config = replace(MONTE_CARLO, num_samples=4)
    alone = score(model, context, continuation, config=config)[0].logprob
    texts = [(random_prompt(9), [random_prompt(2)]), (context, [random_prompt(3), continuation])]
    together = loglikelihoods(Engine(model), texts, config)[1][1].logprob
    other = score(model, context, continuation, config=replace(config, seed=1))[0].logprob
    assert together == pytest.approx(alone, abs=1e-9)
    assert other != pytest.approx(alone, abs=1e-3)


def test_a_single_token_takes_one_pass():
    model = CountingModel(tiny_model("masked"))
    score(model, random_prompt(5), [3], config=replace(MONTE_CARLO, check_greedy=False))
    assert len(model.calls) == 1


def test_more_samples_than_an_idle_decoder_may_take_are_taken():
    model = ideal.IdealModel(ideal.shuffle(2))
    config = replace(MONTE_CARLO, num_samples=1100, check_greedy=False)
    assert score(model, model.prompt(0), [1, 0], config=config)[0].logprob == pytest.approx(-math.log(2))


# Block-diffusion models.


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("num_context", [4, 6, 7])  # a block ends before, behind and inside the continuation
def test_the_continuations_of_a_block_model_make_a_law(num_context, shift):
    model = tiny_model("block", shift=shift)
    pairs = itertools.product(range(model.vocab_size), repeat=2)
    continuations = [pair for pair in pairs if TINY_MASK not in pair]
    context = random_prompt(num_context)
    found = loglikelihoods(Engine(model), [(context, [np.array(pair)]) for pair in continuations])
    assert sum(math.exp(one.logprob) for [one] in found) == pytest.approx(1)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("num_context", [3, 4, 10])
def test_greedy_text_of_a_block_model_is_what_it_writes_from_left_to_right(num_context, shift):
    model, context = tiny_model("block", shift=shift), random_prompt(num_context)
    text = decode(model, BlockDiffusion(BlockDiffusionConfig(order="left_to_right")), context, 9)
    other = text.copy()
    other[-1] = (text[-1] + 1) % 20
    assert [one.is_greedy for one in score(model, context, text, other)] == [True, False]


# What is refused.


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("masked_causal", None, "a masked_causal model has no likelihood"),
        ("uniform", None, "a uniform model has no likelihood"),
        ("causal", MONTE_CARLO, "taken by chain; got monte_carlo"),
        ("block", MONTE_CARLO, "taken by chain; got monte_carlo"),
        ("block", LikelihoodConfig(cfg_scale=1), "only masked models are guided"),
    ],
)
def test_what_has_no_likelihood_is_refused(kind, config, message):
    with pytest.raises(InputError, match=message):
        score(tiny_model(kind), random_prompt(4), [1], config=config)


@pytest.mark.parametrize(
    "settings", [{"method": "exact"}, {"num_samples": 0}, {"cfg_scale": -1}, {"cfg_scale": math.inf}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        LikelihoodConfig(**settings)


@pytest.mark.parametrize("text", [([], [[1]]), ([1], [[1], []])])
def test_empty_texts_are_refused(text):
    with pytest.raises(InputError, match="at least one token"):
        score(TableModel(), np.array(text[0], np.int64), *(np.array(one, np.int64) for one in text[1]))


def test_logits_that_are_not_finite_are_an_error_and_no_score():
    model = tiny_model("masked")
    model.model.get_output_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(DecodingError, match="not finite"):
        score(model, random_prompt(4), [1, 2], config=CHAIN)
