from __future__ import annotations

import numpy as np
import pytest

from chordal.drafters.ngram_model import NgramModel
from chordal.errors import InputError
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.testing import TableModel, chi_square, random_prompt, sample_joint

SETTINGS = [
    {},
    {"num_draft": 1},
    {"num_draft": 9, "num_iterations": 20},
    {"learn_prompt": False, "window": 4},
    {"num_paths": 2, "max_nodes": 3, "num_successors": 1, "max_pairs": 4},
    {"scope": "session", "exploration": 0.0, "exploration_base": 1.0, "increment": 1.0, "max_score": 2.0},
]
LAWS = [Law(), Law(temperature=1.0), Law(temperature=0.8, top_p=0.7, repetition_penalty=1.3)]


@pytest.fixture
def corpus(tmp_path):
    """Writes texts as a corpus and gives its path."""

    def corpus(*texts, max_ngram=3):
        path = tmp_path / "corpus.npz"
        NgramModel.count([np.asarray(text) for text in texts], max_ngram=max_ngram).save(path)
        return str(path)

    return corpus


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_output_equals_plain_decoding(tiny, decode, settings, law):
    """Prompts that repeat themselves, so that there is something to learn."""
    given = [np.resize(random_prompt(3 + seed, seed), 11) for seed in range(4)]
    run = {"prompts": given, "max_new_tokens": 14, "law": law, "seeds": range(4)}
    plain = decode(tiny("causal"), "autoregressive", **run)
    seqs = decode(tiny("causal"), "aded", settings, **run)
    assert [seq.output.tolist() for seq in seqs] == [seq.output.tolist() for seq in plain]
    if settings.get("learn_prompt", True):
        assert sum(seq.stats.draft_tokens for seq in seqs) > 0


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_corpus_changes_no_output_and_a_right_one_saves_passes(tiny, decode, corpus, law):
    prompt = random_prompt(5)
    run = {"prompts": [prompt], "max_new_tokens": 14, "law": law}
    [plain] = decode(tiny("causal"), "autoregressive", **run)
    wrong = corpus(np.random.default_rng(0).integers(0, 29, 4000))
    [seq] = decode(tiny("causal"), "aded", {"corpus": wrong}, **run)
    assert seq.output.tolist() == plain.output.tolist()
    assert seq.stats.draft_tokens > 14 * 10
    right = corpus(np.concatenate([prompt, plain.output]))
    [seq] = decode(tiny("causal"), "aded", {"corpus": right}, **run)
    assert seq.output.tolist() == plain.output.tolist()
    assert seq.stats.forwards["target"] <= 7


def test_sampled_output_has_the_law_of_the_model_where_one_token_is_proposed_too_often(corpus):
    """All 64 continuations of 3 tokens, 1,500 runs; chi-square, false alarm once in a million."""
    model, prompt = TableModel(seed=5), np.array([0, 1, 2, 0, 1])
    law = Law(temperature=1.0)
    pairs = [(first, second, 3) for first in range(4) for second in range(4)]
    decoder = make_decoder("aded", {"corpus": corpus(*pairs), "num_iterations": 10})
    counts = sample_joint(decoder, model, prompt, 3, 1500, law)
    assert chi_square(counts, model.joint(prompt, 3)) > 1e-6


def test_a_session_drafts_better_the_second_time(tiny, decode):
    decoder = make_decoder("aded", {"scope": "session"})
    run = {"prompts": [random_prompt(9)], "max_new_tokens": 24}
    [first] = decode(tiny("causal"), decoder, **run)
    [second] = decode(tiny("causal"), decoder, **run)
    assert second.output.tolist() == first.output.tolist()
    assert second.stats.forwards["target"] < first.stats.forwards["target"]
    decoder.reset()
    [third] = decode(tiny("causal"), decoder, **run)
    assert third.stats.forwards == first.stats.forwards


def test_a_request_learns_nothing_from_others(tiny, decode):
    decoder = make_decoder("aded")
    run = {"prompts": [random_prompt(9)], "max_new_tokens": 24}
    [first] = decode(tiny("causal"), decoder, **run)
    [second] = decode(tiny("causal"), decoder, **run)
    assert second.stats.forwards == first.stats.forwards
    assert second.stats.draft_tokens == first.stats.draft_tokens


def test_a_corpus_without_trigrams_is_refused(corpus):
    with pytest.raises(InputError, match="must hold n-grams of 3 tokens"):
        make_decoder("aded", {"corpus": corpus([1, 2, 3], max_ngram=2)})
    with pytest.raises(InputError, match="cannot read n-grams"):
        make_decoder("aded", {"corpus": "no/such/file.npz"})


@pytest.mark.parametrize(
    "settings",
    [
        {"num_draft": -1}, {"window": -1}, {"exploration": -0.1}, {"exploration": float("nan")},
        {"num_iterations": 0}, {"num_paths": 0}, {"max_nodes": 0}, {"num_successors": 0}, {"max_pairs": 0},
        {"exploration_base": 0.0}, {"increment": 0.0}, {"max_score": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    [name] = settings
    with pytest.raises(InputError, match=name):
        make_decoder("aded", settings)
