from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.drafters.ngram_model import NgramModel
from chordal.engine import Engine
from chordal.errors import InputError
from chordal.forward import Reading
from chordal.models.family import Family
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import CountingModel, random_prompt


def make_sequence(prompt, max_new_tokens=8, *, eos_ids=(), **more):
    stop = StopRules(max_new_tokens=max_new_tokens, eos_ids=eos_ids)
    return Sequence(prompt=np.asarray(prompt), family=Family(), stop=stop, **more)


def answer(seq, settings, laws):
    """Answer each request with the next law, tokens with their probabilities, and list the requests."""
    coroutine = make_decoder("superposed", {"rerank": False, **settings}).decode(seq)
    asked = [next(coroutine)]
    for law in laws:
        tokens, probs = zip(*sorted(law.items(), key=lambda pair: -pair[1]), strict=True)
        asked.append(step(coroutine, Reading(tokens=np.array([tokens]), probs=np.array([probs]))))
        if asked[-1] is None:
            return asked[:-1]
    return asked


def step(coroutine, reading):
    """Give the next request, None at the end."""
    try:
        return coroutine.send(reading)
    except StopIteration:
        return None


def texts(seq):
    return [other.tokens.tolist() for other in seq.alternatives]


@pytest.fixture
def bigrams(tmp_path):
    """Write tables in which 7 is followed by 1, and 8 by 2."""
    path = tmp_path / "bigrams.npz"
    NgramModel.count([np.array([7, 1]), np.array([8, 2])], max_ngram=2).save(path)
    return str(path)


# Against plain decoding.


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "restart_every": 3}], ids=str)
@pytest.mark.parametrize("eos_ids", [(), tuple(range(8)), tuple(range(0, 32, 2))], ids=str)
def test_one_draft_without_ngrams_is_greedy_decoding(tiny, decode, prompts, settings, eos_ids):
    run = {"prompts": prompts(12), "max_new_tokens": 12, "eos_ids": eos_ids}
    plain = decode(tiny("causal"), "autoregressive", **run)
    seqs = decode(
        tiny("causal"), "superposed", {"num_drafts": 1, "alpha": 0.0, "rerank": False, **settings}, **run
    )
    for seq, want in zip(seqs, plain, strict=True):
        assert seq.output.tolist() == want.output.tolist()
        assert (seq.finish_reason, seq.stop_reason) == (want.finish_reason, want.stop_reason)
        assert seq.committed_at.tolist() == want.committed_at.tolist()
        assert seq.stats.forwards == want.stats.forwards


def test_a_restart_at_every_position_makes_the_best_draft_greedy(tiny, decode, prompts):
    run = {"prompts": prompts(8), "max_new_tokens": 10}
    plain = decode(tiny("causal"), "autoregressive", **run)
    settings = {"alpha": 0.0, "restart_every": 1, "rerank": False}
    seqs = decode(tiny("causal"), "superposed", settings, **run)
    assert [seq.output.tolist() for seq in seqs] == [seq.output.tolist() for seq in plain]


def test_what_is_read_behind_a_restart_is_what_the_best_draft_alone_gives(tiny, cacheless):
    """Nothing of the mixtures that were cached before is left."""
    model, seq = tiny("causal"), make_sequence(random_prompt(5), 9)
    coroutine = make_decoder("superposed", {"temperature": 1.0, "restart_every": 3, "rerank": False}).decode(
        seq
    )
    ask, text, restarts = next(coroutine), seq.prompt, []
    while not seq.done:
        [reading] = model.run([(0, ask)])
        if ask.blend is None and ask.positions[0] > 0:
            restarts.append(ask.positions.tolist())
            text = np.concatenate([text, ask.tokens])
            logits = cacheless(text, torch.ones(len(text), len(text), dtype=torch.bool).tril())[-1]
            want = logits.softmax(0).topk(9)
            assert reading.tokens[0].tolist() == want.indices.tolist()
            np.testing.assert_allclose(reading.probs[0], want.values)
        ask = step(coroutine, reading)
    model.free_row(0)
    assert restarts == [[5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize("alpha", [0.0, 0.54])
def test_the_best_text_comes_close_to_the_best_there_is_as_the_temperature_sharpens(
    tiny, decode, cacheless, alpha
):
    """Mean gap to the most likely text of four tokens that a wide beam of exact passes finds, in nats."""
    given = [random_prompt(6, seed) for seed in range(6)]
    best = [beam_search(cacheless, prompt, 4, 16) for prompt in given]
    gaps = []
    for temperature in (4.0, 0.5, 0.06):
        settings = {"alpha": alpha, "temperature": temperature, "num_candidates": 12, "rerank": False}
        seqs = decode(tiny("causal"), "superposed", settings, prompts=given, max_new_tokens=4)
        likelihoods = [likelihood(cacheless, seq.prompt, seq.output) for seq in seqs]
        gaps.append(np.mean(best) - np.mean(likelihoods))
    assert gaps[0] > gaps[1] > gaps[2] >= -1e-9


def likelihood(cacheless, prompt, output):
    """Log-likelihood of a continuation under the model, without cache or superposition."""
    text = np.concatenate([prompt, output])
    logits = cacheless(text, torch.ones(len(text), len(text), dtype=torch.bool).tril())
    log_probs = logits[len(prompt) - 1 : -1].log_softmax(1)
    return float(log_probs.gather(1, torch.as_tensor(output)[:, None]).sum())


def beam_search(cacheless, prompt, length, width):
    """Log-likelihood of the best continuation that a beam finds."""
    beam = [(0.0, [])]
    for _ in range(length):
        longer = []
        for score, tokens in beam:
            text = np.array([*prompt, *tokens])
            logits = cacheless(text, torch.ones(len(text), len(text), dtype=torch.bool).tril())[-1]
            log_probs = logits.log_softmax(0).tolist()
            longer += [(score + log_prob, [*tokens, token]) for token, log_prob in enumerate(log_probs)]
        beam = sorted(longer, reverse=True)[:width]
    return beam[0][0]


# Drafts.


def test_the_hand_example_goes_on_with_the_token_each_draft_knows(bigrams):
    """Drafts 7 and 8 with shares .75 and .25; p = (.5, .5) for 1 and 2; 7 is followed by 1, 8 by 2."""
    seq = make_sequence([0], 2)
    settings = {"num_drafts": 2, "alpha": 0.5, "temperature": 1.0, "ngrams": bigrams, "backoff": 0.0}
    # The first law counts with the power 1 - alpha: (.9 / .1) ** .5 = .75 / .25.
    prefill, superposed = answer(seq, settings, [{7: 0.9, 8: 0.1}, {1: 0.5, 2: 0.5}])
    assert (prefill.tokens.tolist(), prefill.blend) == ([0], None)
    ids, weights = superposed.blend
    assert ids.tolist() == [[7, 8]]
    np.testing.assert_allclose(weights, [[0.75, 0.25]])
    assert superposed.positions.tolist() == superposed.slots.tolist() == [1]
    assert texts(seq) == [[7, 1], [8, 2]]
    first, second = (other.score for other in seq.alternatives)
    assert first - second == pytest.approx(np.log(3))
    assert seq.output.tolist() == [7, 1]


def test_without_ngrams_the_best_draft_takes_the_best_token_and_the_next_best():
    seq = make_sequence([0], 2)
    settings = {"num_drafts": 2, "alpha": 0.0, "temperature": 1.0}
    answer(seq, settings, [{7: 0.75, 8: 0.25}, {1: 0.6, 2: 0.4}])
    assert texts(seq) == [[7, 1], [7, 2]]
    np.testing.assert_allclose([other.score for other in seq.alternatives], np.log([0.45, 0.3]))


def test_the_weights_are_those_of_the_drafts_that_are_alive():
    """8 ends its text, so 7 and 9 share the next input."""
    seq = make_sequence([0], 4, eos_ids=(8,))
    settings = {"num_drafts": 2, "alpha": 0.0, "temperature": 1.0}
    asked = answer(seq, settings, [{7: 0.5, 8: 0.3, 9: 0.2}])
    ids, weights = asked[1].blend
    assert ids.tolist() == [[7, 9]]
    np.testing.assert_allclose(weights, [[5 / 7, 2 / 7]])


@pytest.mark.parametrize("num_drafts", [1, 2, 3, 8])
def test_a_position_costs_one_forward_however_many_drafts(tiny, decode, prompts, num_drafts):
    counting = CountingModel(tiny("causal"))
    settings = {"num_drafts": num_drafts, "rerank": False}
    [seq] = decode(counting, "superposed", settings, prompts=prompts(1, seed=1), max_new_tokens=9)
    assert seq.stats.forwards == {"target": 9}
    assert seq.stats.positions_fed == {"target": seq.num_prompt + 8}
    assert len(seq.alternatives) == num_drafts
    assert all(len(other.tokens) == 9 for other in seq.alternatives)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"num_drafts": 6, "alpha": 0.0}], ids=str)
def test_drafts_differ_at_every_length(tiny, decode, prompts, settings):
    for length in range(1, 8):
        for seq in decode(tiny("causal"), "superposed", settings, prompts=prompts(6), max_new_tokens=length):
            found = [tuple(tokens) for tokens in texts(seq)]
            assert len(found) == len(set(found)) == settings.get("num_drafts", 3)


@pytest.mark.parametrize("rerank", [True, False])
def test_the_result_is_the_first_alternative_and_the_others_score_less(tiny, decode, prompts, rerank):
    run = {"prompts": prompts(8), "max_new_tokens": 10, "eos_ids": tuple(range(0, 32, 5))}
    for seq in decode(tiny("causal"), "superposed", {"rerank": rerank}, **run):
        assert texts(seq)[0] == seq.output.tolist()
        scores = [other.score for other in seq.alternatives]
        assert scores == sorted(scores, reverse=True)
        for other in seq.alternatives:
            assert (other.finish_reason == "stop") is (int(other.tokens[-1]) in run["eos_ids"])


def test_what_all_drafts_share_is_committed_before_the_end():
    """7 is certain at first, and then two tokens are as good."""
    seq, heard = make_sequence([0], 3), []
    seq.listeners.append(lambda _, event: heard.append(event.tokens.tolist()))
    settings = {"num_drafts": 2, "alpha": 0.0, "temperature": 1.0}
    answer(seq, settings, [{7: 1.0}, {1: 0.6, 2: 0.4}, {3: 0.9, 4: 0.1}])
    assert heard == [[7], [1, 3]]
    assert texts(seq) == [[7, 1, 3], [7, 2, 3]]


def test_reranked_texts_are_ordered_by_what_the_model_gives_each_alone(tiny, decode, prompts, cacheless):
    """One pass more; texts of unlike lengths are compared by the token."""
    run = {"prompts": prompts(8), "max_new_tokens": 6, "eos_ids": tuple(range(0, 32, 6))}
    plain = decode(tiny("causal"), "superposed", {"temperature": 1.0, "rerank": False}, **run)
    seqs = decode(tiny("causal"), "superposed", {"temperature": 1.0}, **run)
    for seq, other in zip(seqs, plain, strict=True):
        assert sorted(texts(seq)) == sorted(texts(other))
        scores = [one.score for one in seq.alternatives]
        assert scores == sorted(scores, reverse=True)
        want = [likelihood(cacheless, seq.prompt, one.tokens) / len(one.tokens) for one in seq.alternatives]
        np.testing.assert_allclose(scores, want)
        assert seq.output.tolist() == texts(seq)[0]
        assert seq.stats.forwards["target"] == other.stats.forwards["target"] + 1
    assert any(texts(seq) != texts(other) for seq, other in zip(seqs, plain, strict=True))
    assert any(len({len(one) for one in texts(seq)}) > 1 for seq in seqs)


# Ends.


def test_a_text_that_ended_waits_while_another_may_become_second_best():
    """9 alone at .4 and 7 9 at .06 have ended; 7 1 2 is at .27."""
    seq = make_sequence([0], 8, eos_ids=(9,))
    settings = {"num_drafts": 2, "alpha": 0.0, "temperature": 1.0}
    answer(seq, settings, [{7: 0.6, 9: 0.4}, {1: 0.9, 9: 0.1}, {2: 0.5, 3: 0.3}])
    assert not seq.done
    assert seq.output.tolist() == seq.alternatives == []


def test_no_pass_is_run_once_all_places_are_taken_by_texts_that_ended():
    seq = make_sequence([0], 8, eos_ids=(9,))
    settings = {"num_drafts": 2, "alpha": 0.0, "temperature": 1.0}
    laws = [{9: 0.6, 7: 0.4}, {9: 0.7, 1: 0.3}, {2: 1.0}]
    assert len(answer(seq, settings, laws)) == 2
    assert texts(seq) == [[9], [7, 9]]
    np.testing.assert_allclose([other.score for other in seq.alternatives], np.log([0.6, 0.28]))


def test_an_end_that_is_not_among_the_best_is_no_text():
    seq = make_sequence([0], 2, eos_ids=(9,))
    answer(seq, {"num_drafts": 1, "alpha": 0.0, "temperature": 1.0}, [{7: 0.6, 9: 0.4}, {1: 0.5, 2: 0.4}])
    assert texts(seq) == [[7, 1]]


def test_stop_strings_end_drafts_and_are_cut():
    """Each draft by itself: one holds the string, the other goes on to the limit."""
    seq = make_sequence([0], 3, detokenize=lambda tokens: "".join(chr(97 + token) for token in tokens))
    seq.stop = StopRules(max_new_tokens=3, stop_strings=("hb",))
    settings = {"num_drafts": 2, "alpha": 0.0, "temperature": 1.0}
    answer(seq, settings, [{7: 0.6, 8: 0.4}, {1: 1.0}, {2: 1.0}])
    assert [(other.text, other.finish_reason) for other in seq.alternatives] == [
        ("", "stop"),
        ("ibc", "length"),
    ]
    assert (seq.output.tolist(), seq.text, seq.stop_reason) == ([7, 1], "", "hb")


# N-grams.


def test_without_a_file_the_prompt_is_what_drafts_go_by():
    """p has no opinion; behind 5 the prompt has 6, behind 6 it has 7."""
    settings = {"num_drafts": 1, "temperature": 1.0}
    even = dict.fromkeys((3, 4, 5, 6, 7), 0.2)
    seq = make_sequence([5, 6, 7, 5], 2)
    answer(seq, settings, [even, even])
    assert seq.output.tolist() == [6, 7]
    seq = make_sequence([5, 6, 7, 5], 2)
    answer(seq, {**settings, "alpha": 0.0}, [even, even])
    assert seq.output.tolist() == [3, 3]


def test_a_restart_counts_what_has_been_written_too():
    """Of two ways on, the one that was taken before."""
    laws = [{6: 1.0}, {5: 1.0}, {3: 0.5, 6: 0.5}]
    for restart_every, last in ((2, 6), (None, 3)):
        seq = make_sequence([5], 3)
        answer(seq, {"num_drafts": 1, "temperature": 1.0, "restart_every": restart_every}, laws)
        assert seq.output.tolist() == [6, 5, last]


def test_drafts_of_one_prompt_do_not_hear_of_another(tiny, decode):
    given = [np.resize(random_prompt(3, seed), 9) for seed in range(4)]
    decoder = make_decoder("superposed", {"alpha": 0.9, "temperature": 1.0})
    alone = [decode(tiny("causal"), decoder, prompts=[prompt])[0] for prompt in given]
    together = decode(tiny("causal"), decoder, prompts=given)
    assert [texts(seq) for seq in together] == [texts(seq) for seq in alone]


def test_the_longest_ngram_is_a_setting(tmp_path):
    """Behind 1 mostly 3, behind 2 1 always 4."""
    path = tmp_path / "tables"
    NgramModel.count([np.array([1, 3])] * 9 + [np.array([2, 1, 4])], max_ngram=3).save(path)
    for max_ngram, best in ((2, 3), (3, 4), (6, 4)):
        seq = make_sequence([2, 1], 1)
        settings = {"num_drafts": 1, "temperature": 1.0, "ngrams": str(path), "max_ngram": max_ngram}
        answer(seq, settings, [{3: 0.5, 4: 0.5}])
        assert seq.output.tolist() == [best]


# What is refused.


def test_a_penalty_is_refused_for_texts_that_differ(tiny):
    seq = make_sequence([1, 2], law=Law(repetition_penalty=1.2))
    with pytest.raises(InputError, match=r"it takes no penalty, logit_bias or constraint\. Leave it out"):
        Engine(tiny("causal")).submit(make_decoder("superposed"), seq)


def test_a_temperature_of_the_request_is_refused(tiny):
    seq = make_sequence([1, 2], law=Law(temperature=0.5))
    with pytest.raises(InputError, match="superposed is a search and draws no tokens"):
        Engine(tiny("causal")).submit(make_decoder("superposed"), seq)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_drafts": 0},
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"temperature": 0.0},
        {"temperature": float("inf")},
        {"num_candidates": 2},
        {"max_ngram": 1},
        {"max_ngram": 7},
        {"backoff": -0.5},
        {"backoff": 0.6},
        {"restart_every": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    [name] = settings
    with pytest.raises(InputError, match=f"^{name} must be"):
        make_decoder("superposed", settings)


def test_a_file_of_ngrams_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="cannot read n-grams"):
        make_decoder("superposed", {"ngrams": str(tmp_path / "none.npz")})
