from __future__ import annotations

import numpy as np
import pytest

from chordal.drafters.ngram import NgramDrafter
from chordal.engine import Engine
from chordal.errors import InputError
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import CountingModel, random_prompt

LAWS = [Law(), Law(temperature=1.0, top_k=3), Law(temperature=0.5, repetition_penalty=1.3)]


def repeating(count=4):
    """Prompts that repeat themselves, so that there is something to copy."""
    return [np.resize(random_prompt(3 + seed, seed), 11) for seed in range(count)]


def counting(n, add=1):
    """A rule that continues 0 1 2 ... n - 1 0 1 2 ... for ever."""
    return lambda position, token: (token + add) % n


def decode_with_draft(target, draft, settings, given, *, max_new_tokens=16, listeners=()):
    engine = Engine({"target": target, "draft": draft})
    seqs = [
        Sequence(
            prompt=prompt,
            family=target.family,
            stop=StopRules(max_new_tokens=max_new_tokens),
            listeners=list(listeners),
        )
        for prompt in given
    ]
    for seq in seqs:
        engine.submit(make_decoder("copyspec", {"draft_model": True, **settings}), seq)
    engine.run()
    for seq in seqs:
        if seq.error is not None:
            raise seq.error
    return seqs


@pytest.mark.parametrize("ngram", [1, 2, 3, 5])
@pytest.mark.parametrize("num_copy", [0, 1, 10])
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_output_equals_plain_decoding(tiny, decode, ngram, num_copy, law):
    run = {"prompts": repeating(), "max_new_tokens": 16, "law": law, "seeds": range(4)}
    plain = decode(tiny("causal"), "autoregressive", **run)
    settings = {"ngram": ngram, "num_copy": num_copy, "adaptive": ngram == 2}
    seqs = decode(tiny("causal"), "copyspec", settings, **run)
    assert [seq.output.tolist() for seq in seqs] == [seq.output.tolist() for seq in plain]
    assert (sum(seq.stats.draft_tokens for seq in seqs) > 0) == (num_copy > 0)


@pytest.mark.parametrize("ngram", [2, 3])
@pytest.mark.parametrize(("num_copy", "num_draft"), [(0, 5), (1, 5), (10, 5), (10, 1), (10, 0), (4, 9)])
def test_greedy_output_with_a_draft_model_equals_plain_decoding(tiny, decode, ngram, num_copy, num_draft):
    plain = decode(tiny("causal"), "autoregressive", prompts=repeating(), max_new_tokens=16)
    settings = {"ngram": ngram, "num_copy": num_copy, "num_draft": num_draft}
    seqs = decode_with_draft(tiny("causal"), tiny("causal", seed=1), settings, repeating())
    assert [seq.output.tolist() for seq in seqs] == [seq.output.tolist() for seq in plain]
    assert (sum(seq.stats.forwards.get("draft", 0) for seq in seqs) > 0) == (num_draft > 0)


def test_the_draft_model_is_right_again_after_others_copied(tiny):
    """As its own draft model the target agrees with all of it, if its cache was brought up to date."""
    events = []
    model = tiny("causal")
    draft = CountingModel(tiny("causal"))
    given = repeating(3)
    for prompt in given:
        events.clear()
        draft.calls.clear()
        [seq] = decode_with_draft(
            model, draft, {"ngram": 1}, [prompt], listeners=[lambda _, event: events.append(event)]
        )
        lookup, sources = NgramDrafter(1, 1), []
        for event in events:
            if event.kind == "draft" and len(event.tokens):
                is_copy = len(lookup.propose(seq.tokens[: event.positions[0]], 10)) > 0
                sources.append("copy" if is_copy else "model")
                assert is_copy or event.num_accepted == len(event.tokens)
        assert {"copy", "model"} <= set(sources)
        # Nothing is fed twice but what had to be read or was rejected.
        cached: list[int] = []
        for [(_, ask)] in draft.calls:
            assert ask.slots[0] <= len(cached)
            behind = cached[ask.slots[0] :][: len(ask.tokens) - 1]
            assert behind == [] or behind[0] != ask.tokens[0] or len(ask.tokens) == 1
            cached = cached[: ask.slots[0]] + ask.tokens.tolist()


@pytest.mark.parametrize(("num_copy", "forwards"), [(0, 60), (1, 30), (5, 10), (10, 6), (19, 3)])
def test_a_text_that_repeats_the_prompt_takes_few_forwards(decode, rule_model, num_copy, forwards):
    """Each forward commits what it copied and one more."""
    run = {"prompts": [np.resize(np.arange(10), 40)], "max_new_tokens": 60}
    [seq] = decode(rule_model(counting(10)), "copyspec", {"num_copy": num_copy}, **run)
    assert seq.output.tolist() == np.resize(np.arange(10), 60).tolist()
    assert seq.stats.forwards["target"] == forwards
    assert seq.stats.accepted_tokens == seq.stats.draft_tokens == 60 - forwards


def test_a_text_that_never_repeats_costs_what_plain_decoding_costs(decode, rule_model):
    run = {"prompts": [np.array([28, 3, 27, 9])], "max_new_tokens": 6}
    [plain] = decode(rule_model(counting(30)), "autoregressive", **run)
    [seq] = decode(rule_model(counting(30)), "copyspec", {"ngram": 2}, **run)
    assert (seq.stats.draft_tokens, seq.stats.forwards) == (0, {"target": 6})
    assert seq.stats.positions_fed == plain.stats.positions_fed


def test_an_adaptive_length_wastes_less_on_copies_that_are_wrong(decode, rule_model):
    run = {"prompts": [np.resize(np.arange(9), 30)], "max_new_tokens": 9}
    drafted = {}
    for adaptive in (False, True):
        settings = {"ngram": 1, "adaptive": adaptive}
        [seq] = decode(rule_model(counting(9, add=2)), "copyspec", settings, **run)
        assert (seq.stats.accepted_tokens, seq.stats.forwards) == (0, {"target": 9})
        drafted[adaptive] = seq.stats.draft_tokens
    assert drafted[False] == 8 + 7 + 6 + 5 + 4 + 3 + 2 + 1
    assert drafted[True] == 8 + 7


@pytest.mark.parametrize(("match", "accepted"), [("last", 3), ("first", 2)])
def test_match_says_which_occurrence_is_copied(decode, rule_model, match, accepted):
    """7 is followed by 1 at first and by 8 later; the model goes on with 8, then both copy 9 10."""
    prompt = np.array([7, 1, 2, 3, 4, 7, 8, 9, 10, 7])
    settings = {"ngram": 1, "match": match, "num_copy": 3}
    [seq] = decode(rule_model(counting(30)), "copyspec", settings, prompts=[prompt], max_new_tokens=4)
    assert seq.output.tolist() == [8, 9, 10, 11]
    assert seq.stats.accepted_tokens == accepted


def test_a_draft_model_is_asked_for_only_if_it_is_to_be_used(tiny, decode):
    with pytest.raises(InputError, match="needs a draft model"):
        decode(tiny("causal"), "copyspec", {"draft_model": True}, prompts=repeating(1))
    assert decode(tiny("causal"), "copyspec", {"draft_model": False}, prompts=repeating(1))


@pytest.mark.parametrize("settings", [{"ngram": 0}, {"num_copy": -1}, {"num_draft": -1}], ids=str)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match="at least"):
        make_decoder("copyspec", settings)
