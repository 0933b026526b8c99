from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from chordal import engine
from chordal.engine import Engine
from chordal.errors import InputError
from chordal.models.family import Family
from chordal.ops.sampling import Law
from chordal.registry import decoder_class, decoder_names, make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import Alphabet, ToyModel, random_prompt, tiny_model

LAW = Law(temperature=1.0)
EOS = (3, 17)
PROMPT = np.resize(random_prompt(3), 9)


class Dice(ToyModel):
    """Ends a text with the chance `e` at every step, whatever was said."""

    def __init__(self, e):
        super().__init__(Family(eos_ids=(0,)), 3, window=160)
        self.chances = np.array([e, (1 - e) / 2, (1 - e) / 2])

    def logits(self, position, view):
        return np.log(self.chances)


def run(models, decoder, settings=None, *, seeds, law=LAW, max_new_tokens=30, eos_ids=EOS):
    runner, made = Engine(models), make_decoder(decoder, settings)
    seqs = [
        Sequence(
            prompt=PROMPT,
            family=runner.target.family,
            stop=StopRules(max_new_tokens=max_new_tokens, eos_ids=eos_ids),
            law=law,
            seed=seed,
            detokenize=Alphabet().decode,
        )
        for seed in seeds
    ]
    for seq in seqs:
        runner.submit(made, seq)
    runner.run()
    for seq in seqs:
        if seq.error is not None:
            raise seq.error
    assert runner.num_live == 0
    return seqs


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(seed=seed) for name, seed in (("target", 5), ("draft", 1), ("middle", 2))}


@pytest.fixture(scope="module")
def solo(models):
    """What plain decoding gives under each of 40 seeds: very short texts, long ones, and unfinished ones."""
    seqs = run(models, "autoregressive", seeds=range(40))
    assert len({seq.finish_reason for seq in seqs}) == 2
    return seqs


def finishers(seqs, counts=lambda seq: True):
    """Those that finished, the shortest first, of equals the first."""
    return sorted(
        (seq for seq in seqs if seq.finish_reason == "stop" and counts(seq)),
        key=lambda seq: (len(seq.output), seq.seed),
    )


@pytest.mark.parametrize(("num", "mean", "runs", "sigma"), [(1, 10.0, 600, 9.5), (4, 2.908, 600, 2.36)])
def test_the_winner_is_as_short_as_chance_has_it(num, mean, runs, sigma):
    """Texts end at each step with chance 0.1: 1 / (1 - 0.9^n) tokens; five standard errors."""
    seqs = run(
        Dice(0.1),
        "first_finish",
        {"num_samples": num},
        seeds=range(0, num * runs, num),
        max_new_tokens=120,
        eos_ids=(0,),
    )
    lengths = [len(seq.output) for seq in seqs]
    assert np.mean(lengths) == pytest.approx(mean, abs=5 * sigma / runs**0.5)


def test_one_sample_is_plain_decoding(models, solo):
    for seq, want in zip(run(models, "first_finish", {"num_samples": 1}, seeds=range(40)), solo, strict=True):
        assert seq.output.tolist() == want.output.tolist()
        assert seq.stats.positions_fed == want.stats.positions_fed


EXACT = [name for name in decoder_names() if decoder_class(name).promise == "exact"]


@pytest.mark.parametrize("inner", [name for name in EXACT if "causal" in decoder_class(name).needs])
def test_the_winner_is_the_shortest_of_the_solo_runs(models, inner):
    """Whatever decodes the samples, so that who is ahead by luck of its drafts does not win by it."""
    starts = range(0, 15, 3)
    solo = run(models, inner, seeds=range(17))
    seqs = run(models, "first_finish", {"num_samples": 5, "decoder": inner}, seeds=starts)
    wins = Counter()
    for start, seq in zip(starts, seqs, strict=True):
        first, *_ = [*finishers(solo[start : start + 5]), solo[start]]
        assert (seq.output.tolist(), seq.finish_reason) == (first.output.tolist(), first.finish_reason)
        wins[first.seed - start] += 1
    assert len(wins) > 1


@pytest.mark.parametrize("num", [1, 2, 4])
def test_the_race_costs_the_passes_of_the_winner(models, num):
    [seq] = run(models, "first_finish", {"num_samples": num}, seeds=[3])
    assert seq.stats.forwards == {"target": len(seq.output)}
    assert seq.stats.rows == num * len(seq.output)
    # The prompt but its last token once, and all but the last token of each sample.
    assert seq.stats.positions_fed == {"target": len(PROMPT) - 1 + num * len(seq.output)}


def test_nothing_is_said_until_the_winner_is_known(models):
    events = []
    runner = Engine(models)
    seq = Sequence(
        prompt=PROMPT,
        family=runner.target.family,
        stop=StopRules(max_new_tokens=30, eos_ids=EOS),
        law=LAW,
        listeners=[lambda _, event: events.append(event)],
    )
    runner.submit(make_decoder("first_finish"), seq)
    runner.run()
    assert [event.kind for event in events] == ["commit"]
    assert events[0].tokens.tolist() == seq.output.tolist()


@pytest.mark.parametrize("min_tokens", [4, 99])
def test_a_finish_that_is_too_short_does_not_count(models, solo, min_tokens):
    """Where none counts, an unfinished text is given; where all finished, the first that did."""
    starts = range(0, 36, 2)
    seqs = run(models, "first_finish", {"num_samples": 5, "min_tokens": min_tokens}, seeds=starts)
    is_other = 0
    for start, seq in zip(starts, seqs, strict=True):
        every = finishers(solo[start : start + 5])
        counting = [one for one in every if len(one.output) >= min_tokens]
        unfinished = [one for one in solo[start : start + 5] if one.finish_reason == "length"]
        first = [*counting, *unfinished, *every][0]
        assert (seq.output.tolist(), seq.finish_reason) == (first.output.tolist(), first.finish_reason)
        is_other += first is not every[0]
    assert is_other > 1


def test_a_finish_without_an_answer_does_not_count(models, solo):
    pattern = "[a-e][a-j]"
    starts = range(0, 36, 2)
    seqs = run(models, "first_finish", {"num_samples": 5, "answer": pattern}, seeds=starts)
    is_other = 0
    for start, seq in zip(starts, seqs, strict=True):
        every = finishers(solo[start : start + 5])
        if counting := [one for one in every if re.search(pattern, one.text)]:
            assert seq.output.tolist() == counting[0].output.tolist()
            is_other += counting[0] is not every[0]
    assert is_other > 1


def test_a_long_race_is_not_taken_for_a_loop_that_never_decides(models, monkeypatch):
    monkeypatch.setattr(engine, "_MAX_IDLE_PASSES", 5 - 2 * 30)
    [seq] = run(models, "first_finish", seeds=[2], eos_ids=())
    assert seq.stats.forwards == {"target": 30}


def test_unfinished_samples_give_the_first_one_and_say_so(models, solo):
    [seq] = run(models, "first_finish", seeds=[2], eos_ids=())
    [want] = run(models, "autoregressive", seeds=[2], eos_ids=())
    assert (seq.output.tolist(), seq.finish_reason) == (want.output.tolist(), "length")


@pytest.mark.parametrize(("num", "num_finishers"), [(5, 5), (5, 3), (6, 4)])
def test_the_first_finishers_vote(models, solo, num, num_finishers):
    """With as many finishers as samples this is majority voting."""
    pattern = "^.*?([a-z])"  # the first letter: few answers, so that some agree
    settings = {"num_samples": num, "num_finishers": num_finishers, "answer": pattern}
    starts = range(0, 34, 2)
    seqs = run(models, "first_finish", settings, seeds=starts)
    is_outvoted = 0
    for start, seq in zip(starts, seqs, strict=True):
        voters = finishers(solo[start : start + num], lambda one: re.search(pattern, one.text))
        voters = voters[:num_finishers]
        answers = [re.search(pattern, one.text)[1] for one in voters]
        most = max(Counter(answers).values())
        winner = next(one for one, said in zip(voters, answers, strict=True) if answers.count(said) == most)
        assert seq.output.tolist() == winner.output.tolist()
        is_outvoted += winner is not voters[0]
        assert seq.alternatives[0].tokens.tolist() == seq.output.tolist()
        assert len(seq.alternatives) == len(voters)
        assert seq.alternatives[0].score == pytest.approx(np.log(most / len(voters)))
    assert is_outvoted > 0


def test_samples_do_not_race_where_nothing_is_drawn(models):
    [seq] = run(models, "first_finish", seeds=[0], law=Law())
    [plain] = run(models, "autoregressive", seeds=[0], law=Law())
    assert seq.output.tolist() == plain.output.tolist()
    assert seq.stats.positions_fed == plain.stats.positions_fed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_samples": 0}, "num_finishers must be at least 1 and at most num_samples"),
        ({"num_samples": 2, "num_finishers": 3}, "got 3 and 2"),
        ({"min_tokens": 0}, "min_tokens must be at least 1"),
        ({"answer": "("}, "answer must be a regular expression"),
        ({"decoder": "promt_lookup"}, "Did you mean prompt_lookup"),
        ({"decoder": "first_finish"}, "decoder must be an exact one; first_finish is approximate"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        make_decoder("first_finish", settings)
