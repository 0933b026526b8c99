from __future__ import annotations

import numpy as np
import pytest

from chordal.errors import InputError
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.testing import CountingModel, TableModel, chi_square, random_prompt, sample_joint

LAWS = [
    Law(),
    Law(temperature=0.9),
    Law(temperature=1.2, top_p=0.9, repetition_penalty=1.5),
    Law(repetition_penalty=1.5),
]
PROMPT = np.array([0, 1, 0, 1, 0])


@pytest.fixture
def pair(tiny):
    """A target and an unlike draft model."""
    return {"target": tiny("causal"), "draft": tiny("causal", seed=1)}


@pytest.fixture
def twins(tiny):
    """A target and a draft model that is the same."""
    return {"target": tiny("causal"), "draft": tiny("causal", window=65)}


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("settings", [{"min_confidence": 0.0}, {"num_draft": 3}, {"schedule": "heuristic"}])
def test_followed_drafts_give_the_text_of_plain_decoding(decode, prompts, pair, law, settings):
    given = {"prompts": prompts(5), "law": law, "seeds": range(5), "max_new_tokens": 12}
    got = decode(pair, "draft_model", {**settings, "acceptance": "follow"}, **given)
    want = decode(pair["target"], "autoregressive", **given)
    assert [seq.output.tolist() for seq in got] == [seq.output.tolist() for seq in want]


@pytest.mark.parametrize(
    "settings", [{"min_confidence": 0.0}, {"min_confidence": 0.5}, {"schedule": "heuristic"}]
)
def test_greedy_text_is_that_of_plain_decoding(decode, prompts, pair, settings):
    given = {"prompts": prompts(5), "max_new_tokens": 12}
    got, want = (
        decode(pair, "draft_model", settings, **given),
        decode(pair["target"], "autoregressive", **given),
    )
    assert [seq.output.tolist() for seq in got] == [seq.output.tolist() for seq in want]


@pytest.mark.parametrize("decoder", ["draft_model", "pearl", "rsd"])
def test_a_draft_model_with_a_shorter_window_changes_no_text_up_to_the_end_of_the_targets(
    decode, prompts, tiny, decoder
):
    models = {"target": tiny("causal"), "draft": tiny("causal", seed=1, window=16)}
    [prompt] = prompts(1)
    for num in (len(prompt), 40):  # that fits the draft's window, or does not
        prompt = np.resize(prompt, num)
        given = {"prompts": [prompt], "max_new_tokens": models["target"].window - num}
        [got], [want] = decode(models, decoder, **given), decode(tiny("causal"), "autoregressive", **given)
        assert got.error is None
        assert got.output.tolist() == want.output.tolist()


@pytest.mark.parametrize("law", [Law(temperature=1.0), Law(temperature=0.7, top_k=3)], ids=str)
def test_three_sampled_tokens_have_the_law_of_the_target(law):
    """Joint counts: acceptances that share a number would pass for each position by itself."""
    target = TableModel(4, seed=0)
    models = {"target": target, "draft": TableModel(4, seed=1)}
    decoder = make_decoder("draft_model", {"min_confidence": 0.0, "num_draft": 2})
    counts = sample_joint(decoder, models, PROMPT, length=3, runs=3000, law=law)
    want = sample_joint(make_decoder("autoregressive"), target, PROMPT, length=3, runs=3000, law=law)
    if law.top_k == 0:
        assert chi_square(counts, target.joint(PROMPT, 3)) > 1e-6
    assert set(map(tuple, np.argwhere(counts))) <= set(map(tuple, np.argwhere(want))) | {
        cell for cell in map(tuple, np.argwhere(counts)) if counts[cell] < 20
    }


@pytest.mark.parametrize(
    "settings", [{"lenience": 0.3}, {"acceptance": "typical", "eps": 0.01, "delta": 0.01}]
)
def test_lossy_rules_say_so_and_have_another_law(settings):
    target = TableModel(4, seed=0, spread=2.0)
    models = {"target": target, "draft": TableModel(4, seed=1, spread=2.0)}
    decoder = make_decoder("draft_model", {"min_confidence": 0.0, **settings})
    assert decoder.promise == "approximate"
    assert make_decoder("draft_model").promise == "exact"
    counts = sample_joint(decoder, models, PROMPT, length=2, runs=2000, law=Law(temperature=1.0))
    assert chi_square(counts, target.joint(PROMPT, 2)) < 1e-6


@pytest.mark.parametrize("law", [Law(), Law(temperature=1.0)], ids=str)
@pytest.mark.parametrize("acceptance", ["ratio", "follow"])
def test_a_draft_model_that_is_the_target_is_always_right(decode, twins, law, acceptance):
    settings = {"num_draft": 4, "min_confidence": 0.0, "acceptance": acceptance}
    [seq] = decode(twins, "draft_model", settings, prompts=[random_prompt(5)], max_new_tokens=15, law=law)
    assert seq.stats.forwards["target"] == 3
    assert seq.stats.accepted_tokens == seq.stats.draft_tokens == 12
    # Behind a draft that was kept whole the draft model feeds two tokens in one pass.
    assert seq.stats.forwards["draft"] == 12
    assert seq.stats.positions_fed["draft"] == 5 + 3 + 2 * (2 + 3)


def test_disjoint_models_commit_one_token_a_pass_and_keep_the_law():
    target, draft = TableModel(4, seed=0), TableModel(4, seed=1)
    target.table_VVV[..., 2:], draft.table_VVV[..., :2] = -1e9, -1e9
    decoder = make_decoder("draft_model", {"min_confidence": 0.0})
    models = {"target": target, "draft": draft}
    counts = sample_joint(decoder, models, PROMPT, length=2, runs=2000, law=Law(temperature=1.0))
    assert chi_square(counts, target.joint(PROMPT, 2)) > 1e-6


def test_a_draft_ends_behind_the_first_token_of_little_confidence(decode, pair):
    counting = CountingModel(pair["target"])
    settings = {"num_draft": 6, "min_confidence": 1.0}
    models = {"target": counting, "draft": pair["draft"]}
    [seq] = decode(models, "draft_model", settings, prompts=[random_prompt(5)], max_new_tokens=12)
    # The unsure token itself is verified too.
    assert {len(call[0][1].read.rows) for call in counting.calls[:-1]} == {2}
    assert seq.stats.draft_tokens == seq.stats.forwards["draft"]


def test_the_heuristic_grows_with_right_drafts_and_shrinks_with_wrong_ones(decode, pair, twins):
    settings = {"schedule": "heuristic", "min_confidence": 0.0, "num_draft": 99}
    counting = CountingModel(twins["target"])
    given = {"prompts": [random_prompt(5)], "max_new_tokens": 40}
    decode({**twins, "target": counting}, "draft_model", settings, **given)
    assert [len(call[0][1].read.rows) - 1 for call in counting.calls] == [5, 7, 9, 11, 3]
    counting = CountingModel(pair["target"])
    decode({**pair, "target": counting}, "draft_model", settings, **{**given, "max_new_tokens": 9})
    assert [len(call[0][1].read.rows) - 1 for call in counting.calls][:5] == [5, 4, 3, 2, 1]


def test_a_draft_ends_with_a_stop_token(decode, twins):
    [plain] = decode(twins["target"], "autoregressive", prompts=[random_prompt(5)], max_new_tokens=9)
    eos = int(plain.output[3])
    first = plain.output.tolist().index(eos)
    counting = CountingModel(twins["draft"])
    models = {**twins, "draft": counting}
    settings = {"num_draft": 8, "min_confidence": 0.0}
    [seq] = decode(
        models, "draft_model", settings, prompts=[random_prompt(5)], max_new_tokens=9, eos_ids=(eos,)
    )
    assert seq.output.tolist() == plain.output[: first + 1].tolist()
    assert len(counting.calls) == first + 1


def test_what_cannot_be_is_refused(tiny, decode):
    for settings in (
        {"num_draft": -1},
        {"min_confidence": 1.5},
        {"lenience": 0.0},
        {"eps": 2.0},
        {"lenience": 0.5, "acceptance": "follow"},
    ):
        with pytest.raises(InputError, match=next(iter(settings))):
            make_decoder("draft_model", settings)
    with pytest.raises(InputError, match="draft_model needs a draft model beside the target; load one with"):
        decode(tiny("causal"), "draft_model", prompts=[random_prompt(3)])
