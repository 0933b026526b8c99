from __future__ import annotations

import numpy as np
import pytest

from chordal.decoders.token_recycling import PUBLISHED_TREE, TokenRecycling
from chordal.errors import InputError
from chordal.models.family import Family
from chordal.ops import tree
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.testing import CountingModel, TableModel, ToyModel, chi_square, random_prompt, sample_joint

SETTINGS = [
    {},
    {"recycle_prompt": 0},
    {"recycle_prompt": 3, "tree": "3/2,1,0/1,0,1"},
    {"tree": "1/1/1", "num_candidates": 1},
    {"scope": "session", "num_candidates": 40},
]
LAWS = [Law(), Law(temperature=1.0), Law(temperature=0.8, top_p=0.7, repetition_penalty=1.3)]


class Counts(ToyModel):
    """Continues 0 1 2 ... n - 1 0 1 2 ... for ever."""

    def __init__(self, n):
        super().__init__(Family(), n, window=256)

    def logits(self, position, view):
        return 5.0 * np.eye(self.vocab_size)[(view[position] + 1) % self.vocab_size]


def garbage(decoder):
    """Fill the table of a session with nonsense."""
    rng = np.random.default_rng(0)
    decoder._table.write(np.arange(29), rng.integers(0, 29, (29, decoder.config.num_candidates)))
    return decoder


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_output_equals_plain_decoding(tiny, decode, settings, law):
    given = [np.resize(random_prompt(3 + seed, seed), 9 - 2 * seed) for seed in range(4)]
    run = {"prompts": given, "max_new_tokens": 14, "law": law, "seeds": range(4)}
    plain = decode(tiny("causal"), "autoregressive", **run)
    seqs = decode(tiny("causal"), "token_recycling", settings, **run)
    assert [seq.output.tolist() for seq in seqs] == [seq.output.tolist() for seq in plain]
    assert sum(seq.stats.draft_tokens for seq in seqs) > 0


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_table_of_nonsense_changes_no_output(tiny, decode, law):
    run = {"prompts": [random_prompt(5, 1), random_prompt(8, 2)], "max_new_tokens": 14, "law": law}
    plain = decode(tiny("causal"), "autoregressive", **run)
    decoder = garbage(make_decoder("token_recycling", {"scope": "session", "recycle_prompt": 0}))
    seqs = decode(tiny("causal"), decoder, **run)
    assert [seq.output.tolist() for seq in seqs] == [seq.output.tolist() for seq in plain]
    assert all(seq.stats.draft_tokens > 80 for seq in seqs)


def test_sampled_output_has_the_law_of_the_model():
    """All 64 continuations of 3 tokens, 1,500 runs; chi-square, false alarm once in a million."""
    model, prompt = TableModel(seed=5), np.array([0, 1, 2, 0, 1])
    law = Law(temperature=1.0)
    counts = sample_joint(make_decoder("token_recycling"), model, prompt, 3, 1500, law)
    assert chi_square(counts, model.joint(prompt, 3)) > 1e-6


def test_the_published_tree_has_its_shape():
    parents = tree.parse(PUBLISHED_TREE)
    assert np.bincount(tree.depths(parents)).tolist() == [0, 8, 21, 25, 15, 8, 3]
    assert len(set(range(80)) - set(parents.tolist())) == 40  # leaves
    ranks = tree.ranks(parents)
    paths = [tuple(ranks[tree.path(parents, node)].tolist()) for node in range(80)]
    assert paths == sorted(paths, key=lambda path: (len(path), path))
    assert len(set(paths)) == 80
    assert (0, 0, 0, 0, 0, 1) in paths


def test_a_node_sees_the_text_and_its_ancestors(tiny, decode):
    """In the tree 2/2,1/1,1,0 the node of ranks 0 1 0 is the seventh: it sees nodes 0, 3 and itself."""
    model = CountingModel(tiny("causal"))
    decoder = garbage(
        make_decoder("token_recycling", {"tree": "2/2,1/1,1,0", "scope": "session", "recycle_prompt": 0})
    )
    decode(model, decoder, prompts=[random_prompt(5)], max_new_tokens=5)
    [(_, forward)] = model.calls[0]
    assert forward.positions.tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 6, 6, 7, 7]
    sees, row = forward.sees, 5 + 6
    assert (sees.start[row], sees.end[row]) == (0, 5)
    assert np.flatnonzero(sees.own[row]).tolist() == [5, 5 + 3, 5 + 6]


def test_a_hot_table_gives_seven_tokens_a_pass(decode):
    """The prompt shows every token; then each pass accepts the six levels of the published tree."""
    settings = {"prompts": [np.arange(12)], "max_new_tokens": 70}
    [seq] = decode(Counts(12), "token_recycling", **settings)
    assert seq.output.tolist() == np.resize(np.arange(12), 70).tolist()
    # The prompt; its last token, behind which nothing is known yet, costs one more.
    assert seq.stats.forwards["target"] == 1 + 1 + 10
    [seq] = decode(Counts(12), "token_recycling", {"recycle_prompt": 0}, **settings)
    assert seq.stats.forwards["target"] > 1 + 10


def test_only_the_last_tokens_of_a_prompt_are_recycled(decode):
    model = CountingModel(Counts(12))
    decoder = make_decoder("token_recycling", {"recycle_prompt": 4, "scope": "session"})
    decode(model, decoder, prompts=[np.arange(12)], max_new_tokens=1)
    [(_, first)], [(_, second)] = model.calls[:2]
    assert first.tokens.tolist() == list(range(11))
    assert first.read.rows.tolist() == [7, 8, 9, 10]
    assert second.tokens.tolist() == [11]
    known = decoder._table.read(np.arange(12), np.zeros(12, np.int64))
    assert known.tolist() == [-1] * 7 + [8, 9, 10, 11, 0]


def test_a_prompt_of_one_token_has_nothing_to_recycle(decode):
    [seq] = decode(Counts(12), "token_recycling", prompts=[np.array([3])], max_new_tokens=1)
    assert seq.stats.forwards["target"] == 1


def test_a_session_drafts_better_the_second_time(tiny, decode):
    decoder = make_decoder("token_recycling", {"scope": "session", "recycle_prompt": 0})
    run = {"prompts": [random_prompt(9)], "max_new_tokens": 24}
    [first] = decode(tiny("causal"), decoder, **run)
    [second] = decode(tiny("causal"), decoder, **run)
    assert second.output.tolist() == first.output.tolist()
    assert second.stats.forwards["target"] < first.stats.forwards["target"]
    decoder.reset()
    [third] = decode(tiny("causal"), decoder, **run)
    assert third.stats.forwards == first.stats.forwards


def test_a_request_learns_nothing_from_others(tiny, decode):
    decoder = make_decoder("token_recycling")
    run = {"prompts": [random_prompt(9)], "max_new_tokens": 24}
    [first] = decode(tiny("causal"), decoder, **run)
    [second] = decode(tiny("causal"), decoder, **run)
    assert second.stats.forwards == first.stats.forwards
    assert second.stats.draft_tokens == first.stats.draft_tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 7}, "largest child count of the tree, 8; got 7"),
        ({"tree": ""}, "at least one node"),
        ({"tree": "0"}, "at least one node"),
        ({"tree": "2/1"}, "level 1 has 2 nodes"),
        ({"recycle_prompt": -1}, "at least 0; got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_decoder("token_recycling", settings)


def test_only_a_session_remembers():
    assert not TokenRecycling().remembers
    assert make_decoder("token_recycling", {"scope": "session"}).remembers
