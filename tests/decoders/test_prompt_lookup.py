from __future__ import annotations

import numpy as np
import pytest

from chordal.errors import InputError
from chordal.models.family import Family
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.testing import TableModel, ToyModel, chi_square, random_prompt, sample_joint

SETTINGS = [
    {},
    {"num_draft": 0},
    {"num_draft": 1},
    {"max_ngram": 1},
    {"max_ngram": 2, "min_ngram": 2},
    {"max_ngram": 5, "match": "first"},
]
LAWS = [
    Law(),
    Law(temperature=0.7),
    Law(temperature=1.0, top_k=3),
    Law(temperature=1.0, top_p=0.6),
    Law(temperature=0.8, min_p=0.3),
    Law(temperature=0.5, repetition_penalty=1.3),
]


class Counts(ToyModel):
    """Continues 0 1 2 ... n - 1 0 1 2 ... for ever; `anti` adds 2, so what is copied is always wrong."""

    def __init__(self, n, *, anti=False):
        super().__init__(Family(), 3 * n, window=256)
        self.n, self.step = n, 2 if anti else 1

    def logits(self, position, view):
        return 5.0 * np.eye(self.vocab_size)[(view[position] + self.step) % self.n]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_output_equals_plain_decoding(tiny, decode, settings, law):
    """Prompts that repeat themselves, so that there is something to look up."""
    given = [np.resize(random_prompt(3 + seed, seed), 11) for seed in range(4)]
    run = {"prompts": given, "max_new_tokens": 16, "law": law, "seeds": range(4)}
    plain = decode(tiny("causal"), "autoregressive", **run)
    seqs = decode(tiny("causal"), "prompt_lookup", settings, **run)
    assert [seq.output.tolist() for seq in seqs] == [seq.output.tolist() for seq in plain]
    if settings.get("num_draft") != 0:
        assert sum(seq.stats.draft_tokens for seq in seqs) > 0


def test_sampled_output_has_the_law_of_the_model():
    """All 64 continuations of 3 tokens, 1,500 runs; chi-square, false alarm once in a million."""
    model, prompt = TableModel(seed=5), np.array([0, 1, 2, 0, 1, 3, 0, 1])
    law = Law(temperature=1.0)
    counts = sample_joint(make_decoder("prompt_lookup"), model, prompt, 3, 1500, law)
    assert chi_square(counts, model.joint(prompt, 3)) > 1e-6


@pytest.mark.parametrize(("num_draft", "forwards"), [(0, 60), (1, 30), (5, 10), (10, 6), (19, 3), (99, 6)])
def test_a_text_that_repeats_the_prompt_takes_few_forwards(decode, num_draft, forwards):
    """Each forward commits its draft and one more; behind the latest match only 10 tokens can be copied."""
    [seq] = decode(
        Counts(10),
        "prompt_lookup",
        {"num_draft": num_draft, "match": "first" if num_draft < 20 else "last"},
        prompts=[np.resize(np.arange(10), 40)],
        max_new_tokens=60,
    )
    assert seq.output.tolist() == np.resize(np.arange(10), 60).tolist()
    assert seq.stats.forwards["target"] == forwards
    assert seq.stats.accepted_tokens == seq.stats.draft_tokens == 60 - forwards


def test_a_text_that_never_repeats_costs_what_plain_decoding_costs(decode):
    prompt = np.array([28, 3, 27, 9])
    run = {"prompts": [prompt], "max_new_tokens": 6}
    [plain] = decode(Counts(30), "autoregressive", **run)
    [seq] = decode(Counts(30), "prompt_lookup", **run)
    assert seq.output.tolist() == plain.output.tolist() == [10, 11, 12, 13, 14, 15]
    assert (seq.stats.draft_tokens, seq.stats.forwards) == (0, {"target": 6})
    assert seq.stats.positions_fed == plain.stats.positions_fed


def test_wrong_copies_cost_no_forward(decode):
    prompt = np.resize(np.arange(9), 30)
    [seq] = decode(
        Counts(9, anti=True), "prompt_lookup", {"max_ngram": 1}, prompts=[prompt], max_new_tokens=9
    )
    assert seq.stats.draft_tokens > 0
    assert (seq.stats.accepted_tokens, seq.stats.forwards) == (0, {"target": 9})


@pytest.mark.parametrize(("match", "accepted"), [("last", 3), ("first", 2)])
def test_match_says_which_occurrence_is_copied(decode, match, accepted):
    """7 is followed by 1 at first and by 8 later; the model goes on with 8, then both copy 9 10."""
    prompt = np.array([7, 1, 2, 3, 4, 7, 8, 9, 10, 7])
    settings = {"max_ngram": 1, "match": match, "num_draft": 3}
    [seq] = decode(Counts(30), "prompt_lookup", settings, prompts=[prompt], max_new_tokens=4)
    assert seq.output.tolist() == [8, 9, 10, 11]
    assert seq.stats.accepted_tokens == accepted


@pytest.mark.parametrize(
    "settings", [{"num_draft": -1}, {"max_ngram": 0}, {"min_ngram": 0}, {"min_ngram": 4}], ids=str
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match="at least"):
        make_decoder("prompt_lookup", settings)
