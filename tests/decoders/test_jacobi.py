from __future__ import annotations

import numpy as np
import pytest

from chordal.errors import InputError
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.testing import TableModel, chi_square, random_prompt, sample_joint

PLAIN = {"ngram": 2, "num_branches": 0}
SETTINGS = [
    {},
    PLAIN,
    {**PLAIN, "window": 1},
    {**PLAIN, "window": 30},
    {**PLAIN, "recycle": 4},
    {"window": 3, "ngram": 3, "num_branches": 2},
    {"window": 1, "ngram": 4},
    {"window": 4, "ngram": 6, "num_branches": 1, "recycle": 2, "learn_text": False},
]
LAWS = [
    Law(),
    Law(temperature=0.7),
    Law(temperature=1.0, top_p=0.6),
    Law(temperature=0.5, repetition_penalty=1.3),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_output_equals_plain_decoding(tiny, decode, settings, law):
    given = [random_prompt(1 + 3 * seed, seed) for seed in range(4)]
    run = {"prompts": given, "max_new_tokens": 16, "law": law, "seeds": range(4)}
    plain = decode(tiny("causal"), "autoregressive", **run)
    seqs = decode(tiny("causal"), "jacobi", settings, **run)
    assert [seq.output.tolist() for seq in seqs] == [seq.output.tolist() for seq in plain]
    assert max(seq.stats.forwards["target"] for seq in seqs) <= 16


def test_sampled_output_has_the_law_of_the_model():
    """All 64 continuations of 3 tokens, 1,500 runs; chi-square, false alarm once in a million."""
    model, prompt = TableModel(seed=5), np.array([0, 1, 2, 0, 1, 3, 0, 1])
    decoder = make_decoder("jacobi", {"window": 3, "ngram": 3})
    counts = sample_joint(decoder, model, prompt, 3, 1500, Law(temperature=1.0))
    assert chi_square(counts, model.joint(prompt, 3)) > 1e-6


@pytest.mark.parametrize("law", [Law(), Law(temperature=0.01)], ids=str)
@pytest.mark.parametrize("window", [2, 8, 20])
def test_where_each_token_is_one_more_a_guess_is_right_only_behind_the_right_token(
    decode, rule_model, window, law
):
    """Tokens of a text that never repeats are wrong everywhere, so each pass settles one position."""
    model = rule_model(lambda position, token: token + 1, vocab_size=64)
    run = {"prompts": [np.array([3, 4, 5])], "max_new_tokens": 20, "law": law}
    [seq] = decode(model, "jacobi", {**PLAIN, "window": window}, **run)
    assert seq.output.tolist() == list(range(6, 26))
    assert seq.stats.forwards["target"] == 20


@pytest.mark.parametrize("window", [1, 4, 9])
def test_a_model_that_says_one_thing_takes_two_passes(decode, rule_model, window):
    """The first draws it everywhere, the second accepts the whole window."""
    model = rule_model(lambda position, token: 3)
    run = {"prompts": [np.array([5])], "max_new_tokens": window + 1}
    [seq] = decode(model, "jacobi", {**PLAIN, "window": window}, **run)
    assert seq.output.tolist() == [3] * (window + 1)
    assert seq.stats.forwards["target"] == 2


def test_a_model_that_looks_at_the_position_only_settles_at_once(decode, rule_model):
    """Whatever is guessed, what is drawn is right one pass later, the whole window of it."""
    model = rule_model(lambda position, token: (7 * position + 3) % 30)
    run = {"prompts": [np.array([1, 2])], "max_new_tokens": 33}
    [seq] = decode(model, "jacobi", {**PLAIN, "window": 17}, **run)
    assert seq.stats.forwards["target"] < 10


def test_ngrams_of_the_window_save_passes_once_the_text_comes_back_to_them(decode, rule_model):
    """Single guesses lag behind a text that counts; n-grams of them are right when it begins again."""
    model = rule_model(lambda position, token: (token + 1) % 12)
    run = {"prompts": [np.array([0, 1])], "max_new_tokens": 40}
    [lookahead] = decode(model, "jacobi", {"learn_text": False}, **run)
    assert lookahead.output.tolist() == np.resize(np.roll(np.arange(12), -2), 40).tolist()
    assert lookahead.stats.forwards["target"] < 20


@pytest.mark.parametrize(("learn_text", "forwards"), [(True, 4), (False, 20)])
def test_ngrams_of_the_prompt_are_known_if_asked(decode, rule_model, learn_text, forwards):
    """Each then gives four tokens, and the pass one more."""
    model = rule_model(lambda position, token: (token + 1) % 12)
    run = {"prompts": [np.resize(np.arange(12), 24)], "max_new_tokens": 20}
    [seq] = decode(model, "jacobi", {"window": 1, "learn_text": learn_text}, **run)
    assert seq.stats.forwards["target"] == forwards


@pytest.mark.parametrize(
    "settings", [{"window": 0}, {"ngram": 1}, {"num_branches": -1}, {"recycle": -1}], ids=str
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match="at least"):
        make_decoder("jacobi", settings)
