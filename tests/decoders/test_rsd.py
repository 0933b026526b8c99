from __future__ import annotations

import numpy as np
import pytest

from chordal.decoders.rsd import RSD, RSDConfig
from chordal.errors import InputError
from chordal.ops import tree
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.testing import TableModel, chi_square, random_prompt, sample_joint

SETTINGS = [
    {},
    {"beam_width": 2, "depth": 3},
    {"tree": "constant", "widths": "3,2,1"},
    {"tree": "constant", "widths": "2,2", "rule": "independent"},
    {"tree": "constant", "widths": "2,2", "rule": "k_seq"},
]
PROMPT = np.array([0, 1, 0, 1, 0])
WARM = Law(temperature=1.0)


@pytest.fixture
def pair(tiny):
    return {"target": tiny("causal"), "draft": tiny("causal", seed=1)}


def drafts(decode, models, settings, **given):
    """Decode one prompt and give the drafts of its rounds."""
    events = []
    [seq] = decode(models, "rsd", settings, listeners=[lambda _, event: events.append(event)], **given)
    return seq, [event for event in events if event.kind == "draft"]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_greedy_text_is_that_of_plain_decoding(decode, prompts, pair, settings):
    for law in (Law(), Law(repetition_penalty=1.4)):
        given = {"prompts": prompts(5), "max_new_tokens": 12, "law": law}
        got, want = decode(pair, "rsd", settings, **given), decode(pair["target"], "autoregressive", **given)
        assert [seq.output.tolist() for seq in got] == [seq.output.tolist() for seq in want]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_three_sampled_tokens_have_the_law_of_the_target(settings):
    target = TableModel(3, seed=0)
    models = {"target": target, "draft": TableModel(3, seed=1)}
    counts = sample_joint(make_decoder("rsd", settings), models, PROMPT % 3, length=3, runs=1500, law=WARM)
    assert chi_square(counts, target.joint(PROMPT % 3, 3)) > 1e-6


@pytest.mark.parametrize("settings", [{"beam_width": 3, "depth": 2}, {"tree": "constant", "widths": "2,2"}])
def test_children_judged_in_another_order_have_another_law(monkeypatch, settings):
    """The measured bias of reversed children; without it the test above could not fail."""
    monkeypatch.setattr(tree, "children", lambda parents, node: np.flatnonzero(parents == node)[::-1])
    target = TableModel(3, seed=0)
    models = {"target": target, "draft": TableModel(3, seed=1)}
    counts = sample_joint(make_decoder("rsd", settings), models, PROMPT % 3, length=3, runs=1500, law=WARM)
    assert chi_square(counts, target.joint(PROMPT % 3, 3)) < 1e-6


def test_a_beam_keeps_so_many_nodes_of_each_level_and_each_has_its_parent_in_the_last(decode, pair):
    settings = {"beam_width": 3, "depth": 4}
    seq, rounds = drafts(decode, pair, settings, prompts=[random_prompt(5)], max_new_tokens=20, law=WARM)
    assert len(rounds) > 2
    for event in rounds:
        levels = event.positions - event.positions[0] + 1
        room = seq.limit - event.positions[0] - 1
        assert np.bincount(levels)[1:].tolist() == [3] * min(4, room)
        assert (levels == tree.depths(event.parents)).all()


def test_a_constant_tree_branches_as_its_widths_say_and_no_parent_has_a_token_twice(decode, pair):
    settings = {"tree": "constant", "widths": "3,2,1"}
    _, rounds = drafts(decode, pair, settings, prompts=[random_prompt(5)], max_new_tokens=12, law=WARM)
    parents = rounds[0].parents
    assert np.bincount(tree.depths(parents))[1:].tolist() == [3, 6, 6]
    for event in rounds:
        for node in range(-1, len(event.tokens)):
            tokens = event.tokens[event.parents == node].tolist()
            assert len(tokens) == len(set(tokens))


def test_a_tree_of_all_tokens_is_always_right(decode):
    """When the children are all that the draft can say, one of them is accepted."""
    models = {"target": TableModel(3, seed=0), "draft": TableModel(3, seed=1)}
    settings = {"tree": "constant", "widths": "3,3"}
    given = {"prompts": [PROMPT % 3] * 20, "seeds": range(20), "law": WARM}
    for seq in decode(models, "rsd", settings, max_new_tokens=9, **given):
        assert seq.stats.forwards["target"] == 3


def test_tokens_that_the_law_cuts_are_not_offered(decode, pair):
    settings = {"tree": "constant", "widths": "5,2"}
    law = Law(temperature=1.0, top_k=2)
    _, rounds = drafts(decode, pair, settings, prompts=[random_prompt(5)], max_new_tokens=8, law=law)
    assert np.bincount(tree.depths(rounds[0].parents))[1:].tolist() == [2, 4]


def test_more_candidates_are_accepted_in_the_order_of_the_literature(decode):
    """Without replacement more than K-SEQ, more than multi-step rejection: .764, .75, .72 of one token."""
    models = {"target": TableModel(4, seed=0), "draft": TableModel(4, seed=1)}
    target, draft = np.log([0.1, 0.2, 0.3, 0.4]), np.log([0.4, 0.3, 0.2, 0.1])
    models["target"].table_VVV[:], models["draft"].table_VVV[:] = target, draft
    shares = {}
    for rule, chance in (("recursive", 107 / 140), ("k_seq", 0.75), ("independent", 0.72)):
        settings = {"tree": "constant", "widths": "2", "rule": rule}
        given = {"prompts": [PROMPT] * 800, "seeds": range(800), "law": WARM}
        seqs = decode(models, "rsd", settings, max_new_tokens=2, **given)
        shares[rule] = np.mean([seq.stats.forwards["target"] == 1 for seq in seqs])
        assert abs(shares[rule] - chance) < 5 * np.sqrt(0.25 / 800)


def test_the_draft_model_takes_one_pass_a_level(decode, pair):
    [seq] = decode(pair, "rsd", {"depth": 3}, prompts=[random_prompt(5)], max_new_tokens=4)
    assert seq.stats.forwards["draft"] == sum(min(3, 4 - done - 1) for done in rounds_of(seq))


def rounds_of(seq):
    """How many tokens were there before each pass of the target."""
    counts = np.bincount(seq.committed_at[seq.num_prompt :])[1:]
    return [0, *np.cumsum(counts)[:-1].tolist()]


def test_what_cannot_be_is_refused():
    for settings, words in (
        ({"beam_width": 0}, "beam_width must be"),
        ({"depth": -1}, "depth at least 0"),
        ({"widths": "3,x"}, "widths must be whole numbers"),
        ({"widths": "0,1"}, "widths must be whole numbers"),
        ({"tree": "constant", "widths": "300,300"}, "fewer than 65536"),
        ({"rule": "k_seq"}, "needs tree=constant"),
    ):
        with pytest.raises(InputError, match=words):
            make_decoder("rsd", settings)
    assert RSD(RSDConfig(depth=0)).promise == "exact"
