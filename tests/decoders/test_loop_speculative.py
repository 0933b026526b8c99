from __future__ import annotations

import pytest

from chordal.errors import InputError
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.testing import TINY_LOOPS, random_prompt, tiny_model

LAWS = [Law(), Law(temperature=0.9), Law(temperature=1.2, top_p=0.9, repetition_penalty=1.5)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(arch="looped")


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("decoder", ["loop_speculative", "prompt_lookup"])
def test_the_text_is_that_of_plain_decoding(decode, prompts, model, decoder, law):
    given = {"prompts": prompts(5), "law": law, "seeds": range(5), "max_new_tokens": 12}
    got, want = decode(model, decoder, **given), decode(model, "autoregressive", **given)
    for one, other in zip(got, want, strict=True):
        assert one.output.tolist() == other.output.tolist()


def test_drafts_of_all_loops_are_all_right(decode, model):
    settings = {"draft_loops": TINY_LOOPS, "num_draft": 3}
    [seq] = decode(model, "loop_speculative", settings, prompts=[random_prompt(5)], max_new_tokens=9)
    assert seq.stats.draft_tokens == seq.stats.accepted_tokens == 6
    # The prompt's pass, then twice three drafts and a verification: 1 + 4 + 4 tokens.
    assert seq.committed_at[5:].tolist() == [1, 5, 5, 5, 5, 9, 9, 9, 9]


def test_loops_are_counted_where_passes_mislead(decode, model):
    settings = {"draft_loops": 1, "num_draft": 2}
    [seq] = decode(model, "loop_speculative", settings, prompts=[random_prompt(5)], max_new_tokens=9)
    num_verified = seq.stats.forwards["target"] - seq.stats.draft_tokens
    assert seq.stats.draft_tokens >= seq.stats.accepted_tokens > 0
    assert seq.stats.loops == num_verified * TINY_LOOPS + seq.stats.draft_tokens


def test_without_drafts_it_is_plain_decoding(decode, model):
    [seq] = decode(model, "loop_speculative", {"num_draft": 0}, prompts=[random_prompt(5)], max_new_tokens=6)
    assert seq.committed_at[5:].tolist() == [1, 2, 3, 4, 5, 6]


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="loop_speculative needs a looped model; this one is causal"):
        make_decoder("loop_speculative").check(tiny_model().family)
    for settings in ({"num_draft": -1}, {"draft_loops": 0}):
        with pytest.raises(InputError, match=f"{next(iter(settings))} must be"):
            make_decoder("loop_speculative", settings)
