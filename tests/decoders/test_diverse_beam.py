from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from chordal.decoders.diverse_beam import DiverseBeam, DiverseBeamConfig, search
from chordal.engine import Engine
from chordal.errors import InputError
from chordal.models.family import Family
from chordal.ops.sampling import Law, penalize_repetition
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import Alphabet, CountingModel, TableModel, ToyModel, random_prompt

EOS = tuple(range(3, 27, 4))


class Keeps(DiverseBeam):
    """Keeps what the search of its last sequence found, with the penalised scores."""

    def decode(self, seq):
        self.found = yield from search(seq, self.config)
        seq.append(np.array(self.found[0].tokens[seq.frontier - seq.num_prompt :]))


class Fixed(ToyModel):
    """Gives every position the same probabilities, whatever came before."""

    def __init__(self, *probs):
        super().__init__(Family(kind="causal"), len(probs))
        self.known = np.log(probs)

    def logits(self, position, view):
        return self.known


@pytest.fixture
def find(decode):
    """Gives the hypotheses of a prompt."""

    def find(model, prompt, length, eos_ids=(), **settings):
        decoder = Keeps(DiverseBeamConfig(**settings))
        [seq] = decode(model, decoder, prompts=[prompt], max_new_tokens=length, eos_ids=eos_ids)
        assert tuple(seq.output) == decoder.found[0].tokens, "what was committed early could still change"
        return decoder.found

    return find


@pytest.fixture
def logprobs(cacheless):
    """Gives the log-probabilities `[V]` of what follows a text, by transformers alone and without a cache."""

    def logprobs(text):
        causal = torch.ones(len(text), len(text)).tril().bool()
        return cacheless(text, causal)[-1].log_softmax(-1).numpy()

    return logprobs


def table_logprobs(model):
    """Gives the same of a table."""

    def logprobs(text):
        before = text[-2] if len(text) > 1 else model.vocab_size
        return torch.from_numpy(model.table_VVV[before, text[-1]]).log_softmax(-1).numpy()

    return logprobs


def reference(logprobs, prompt, length, eos_ids=(), **settings):
    """Write the search out: whole texts, the whole vocabulary, no cache. Gives the lists of the groups."""
    config = DiverseBeamConfig(**settings)
    width = config.num_beams // config.num_groups
    running = [[(0.0, 0.0, ())] for _ in range(config.num_groups)]
    ended = [[] for _ in running]

    def rank(one):
        return one[0] / len(one[2]) ** config.length_penalty

    for at in range(1, length + 1):
        chosen = Counter()
        for g in range(config.num_groups):
            every = []
            for penalized, score, text in running[g]:
                for token, logprob in enumerate(logprobs([*prompt, *text])):
                    is_exempt = token in eos_ids and not config.penalize_eos
                    penalty = 0 if is_exempt else config.diversity * chosen[token]
                    every.append((penalized + logprob - penalty, score + logprob, (*text, token)))
            every.sort(key=lambda one: -one[0])
            new = [one for one in every[:width] if one[2][-1] in eos_ids or at == length]
            running[g] = [one for one in every if one[2][-1] not in eos_ids and at < length][:width]
            ended[g] = sorted(ended[g] + new, key=lambda one: -rank(one))[:width]
            if running[g] and len(ended[g]) == width:
                late = length if config.early_stopping == "never" and config.length_penalty > 0 else at
                hoped = running[g][0][0] / late**config.length_penalty
                if config.early_stopping is True or hoped <= rank(ended[g][-1]):
                    running[g] = []
            # Before the next group is looked at, which is put off what this one has just chosen.
            chosen.update(one[2][-1] for one in new + running[g])
    return ended


def by_group(found, num_groups):
    """Give what each group kept as (text, penalised score, score), by text."""
    return [
        sorted((one.tokens, one.penalized, one.score) for one in found if one.group == group)
        for group in range(num_groups)
    ]


def texts(groups):
    return [[one[0] for one in group] for group in groups]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_one_group_gives_the_beams_and_scores_of_transformers(
    tiny, plain, find, prompts, num_beams, length_penalty, early_stopping
):
    settings = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
    for prompt in prompts(8):
        given = torch.from_numpy(prompt)[None]
        want = plain.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=8,
            eos_token_id=list(EOS),
            pad_token_id=EOS[0],
            do_sample=False,
            num_return_sequences=num_beams,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        found = find(tiny("causal"), prompt, 8, EOS, num_groups=1, **settings)
        for one, row, score in zip(found, want.sequences, want.sequences_scores, strict=True):
            num = len(one.tokens)
            assert list(one.tokens) == row[len(prompt) :][:num].tolist()
            assert (row[len(prompt) :][num:] == EOS[0]).all()
            assert one.score == one.penalized
            assert one.score / num**length_penalty == pytest.approx(float(score), abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 6, "num_groups": 3, "diversity": 1.5},
        {"num_beams": 3, "num_groups": 3, "diversity": 0.2, "penalize_eos": False},
        {"num_beams": 6, "num_groups": 2, "length_penalty": 1.0, "early_stopping": True},
        {"num_beams": 4, "num_groups": 4, "length_penalty": 1.0, "early_stopping": "never"},
        {"num_beams": 4, "num_groups": 2, "length_penalty": -1.0, "diversity": 3.0},
        {"num_beams": 5, "num_groups": 1, "length_penalty": 2.0},
    ],
    ids=str,
)
def test_groups_find_what_the_search_finds_written_out(tiny, find, logprobs, prompts, settings):
    """On a transformer, whose cache must be right, and on tables where texts often meet and end."""
    cases = [(tiny("causal"), logprobs, prompt, EOS) for prompt in prompts(2, seed=1)]
    for seed in range(6):
        table = TableModel(5, seed=seed)
        cases.append((table, table_logprobs(table), np.array([seed % 5, 1]), (2,) if seed % 2 else ()))
    num_groups = settings.get("num_groups", 2)
    for model, law, prompt, eos_ids in cases:
        want = reference(law, prompt, 6, eos_ids, **settings)
        found = find(model, prompt, 6, eos_ids, **settings)
        got = by_group(found, num_groups)
        for mine, theirs in zip(got, want, strict=True):
            assert [text for text, *_ in mine] == sorted(text for *_, text in theirs)
            scores = {text: both for *both, text in theirs}
            for text, *both in mine:
                assert both == pytest.approx(scores[text], abs=1e-5)
        ranks = [one.score / len(one.tokens) ** settings.get("length_penalty", 0) for one in found]
        assert ranks == sorted(ranks, reverse=True)


@pytest.mark.parametrize(("diversity", "second"), [(0.4, 0), (0.5, 0), (0.52, 1), (1.0, 1)])
def test_a_second_group_leaves_the_best_token_from_log_of_the_ratio_on(find, diversity, second):
    """Probabilities .5, .3, .2: log(.5 / .3) = .511."""
    found = find(Fixed(0.5, 0.3, 0.2), [0], 1, num_beams=2, num_groups=2, diversity=diversity)
    assert texts(by_group(found, 2)) == [[(0,)], [(second,)]]
    [mine] = by_group(found, 2)[1]
    assert mine[2] == pytest.approx(math.log((0.5, 0.3)[second]))
    assert mine[1] == pytest.approx(mine[2] - (diversity if second == 0 else 0))


def test_with_a_large_diversity_groups_of_one_beam_differ_at_every_step(tiny, find):
    found = find(tiny("causal"), random_prompt(5), 9, num_beams=6, num_groups=6, diversity=1e6)
    steps = zip(*(one.tokens for one in found), strict=True)
    assert [len(set(step)) for step in steps] == [6] * 9


def test_without_diversity_every_group_is_a_search_of_its_own_width(tiny, find):
    [alone] = by_group(find(tiny("causal"), random_prompt(5), 9, EOS, num_beams=3, num_groups=1), 1)
    found = find(tiny("causal"), random_prompt(5), 9, EOS, num_beams=9, num_groups=3, diversity=0.0)
    assert by_group(found, 3) == [alone] * 3


def test_a_group_depends_on_earlier_groups_only(tiny, find):
    """Two beams a group: what four groups find begins with what three, two and one find."""
    every = {
        num: by_group(
            find(tiny("causal"), random_prompt(4), 8, EOS, num_beams=2 * num, num_groups=num, diversity=0.7),
            num,
        )
        for num in (1, 2, 3, 4)
    }
    for num, groups in every.items():
        assert texts(groups) == texts(every[4])[:num]
    more = find(tiny("causal"), random_prompt(4), 8, EOS, num_beams=8, num_groups=4, diversity=5.0)
    assert texts(by_group(more, 4))[0] == texts(every[1])[0]
    assert texts(by_group(more, 4))[1:] != texts(every[4])[1:]


def test_enough_beams_find_all_texts_in_order(find):
    """4 ** 3 beams for 3 tokens of 4: nothing is left out, and the scores are the law of the model."""
    model, prompt = TableModel(), np.array([0, 1])
    found = find(model, prompt, 3, num_beams=64, num_groups=1)
    joint = model.joint(prompt, 3)
    order = np.argsort(-joint, axis=None)
    want = np.stack(np.unravel_index(order, joint.shape), 1)
    assert [one.tokens for one in found] == [tuple(row) for row in want.tolist()]
    assert np.exp([one.score for one in found]) == pytest.approx(joint.ravel()[order], rel=1e-5)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_one_beam_is_greedy_decoding(tiny, decode, prompts, penalty):
    run = {
        "prompts": prompts(6),
        "law": Law(repetition_penalty=penalty),
        "eos_ids": EOS,
        "max_new_tokens": 12,
    }
    plain = decode(tiny("causal"), "autoregressive", **run)
    seqs = decode(tiny("causal"), "diverse_beam", {"num_beams": 1, "num_groups": 1}, **run)
    assert [seq.output.tolist() for seq in seqs] == [seq.output.tolist() for seq in plain]
    assert [seq.stats.forwards for seq in seqs] == [seq.stats.forwards for seq in plain]
    assert [seq.finish_reason for seq in seqs] == [seq.finish_reason for seq in plain]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_alternatives_carry_their_log_likelihood_and_the_first_is_the_result(
    tiny, decode, cacheless, penalty
):
    """Without what diversity took off; with a repetition penalty, that of the law it makes."""
    settings = {"num_beams": 6, "num_groups": 3, "diversity": 2.0}
    law, prompt = Law(repetition_penalty=penalty), random_prompt(5, 2)
    run = {"prompts": [prompt], "law": law, "eos_ids": EOS, "max_new_tokens": 7}
    [seq] = decode(tiny("causal"), "diverse_beam", settings, **run)
    assert len(seq.alternatives) == 6
    assert seq.alternatives[0].tokens.tolist() == seq.output.tolist()
    for one in seq.alternatives:
        assert one.finish_reason == ("stop" if one.tokens[-1] in EOS else "length")
        text, total = prompt, 0.0
        for token in one.tokens:
            row = cacheless(text, torch.ones(len(text), len(text)).tril().bool())[-1]
            row = penalize_repetition(row, torch.from_numpy(np.unique(text)), penalty)
            total += float(row.log_softmax(-1)[token])
            text = np.append(text, token)
        assert one.score == pytest.approx(total)


@pytest.mark.parametrize(
    ("penalize_eos", "second"), [(True, (1, 0)), (False, (0,))], ids=["penalised", "exempt"]
)
def test_a_stop_token_is_put_off_like_others_unless_it_is_exempt(find, penalize_eos, second):
    """The first group ends at once; the second may too, or has to say something else first."""
    model = Fixed(0.5, 0.3, 0.2)
    found = find(
        model, [1], 3, eos_ids=(0,), num_beams=2, num_groups=2, diversity=1.0, penalize_eos=penalize_eos
    )
    assert texts(by_group(found, 2)) == [[(0,)], [second]]


def test_a_stop_string_ends_texts_of_the_search_as_a_stop_token_does(tiny):
    settings = {"num_beams": 4, "num_groups": 2, "diversity": 1.0}
    found = []
    [letter] = [3]
    for stops in ({"eos_ids": (letter,)}, {"stop_strings": (Alphabet.letters[letter],)}):
        model = tiny("causal")
        seq = Sequence(
            prompt=random_prompt(6, 1),
            family=model.family,
            stop=StopRules(max_new_tokens=10, **stops),
            detokenize=Alphabet().decode,
        )
        engine = Engine(model)
        engine.submit(make_decoder("diverse_beam", settings), seq)
        engine.run()
        found.append([(one.tokens.tolist(), one.text, one.score) for one in seq.alternatives])
    assert found[0] == found[1]
    assert any(tokens[-1] == letter for tokens, *_ in found[0])


def test_slots_of_branches_that_died_are_used_again(tiny, find):
    """A row is never larger than the largest tree, and no beam gets a slot that another one sees."""
    counting, prompt = CountingModel(tiny("causal")), random_prompt(5)
    find(counting, prompt, 30, num_beams=6, num_groups=3)
    passes = [forward for [(_, forward)] in counting.calls][1:]
    assert len(passes) == 29
    trees = [int(forward.sees.seen.any(0).sum()) for forward in passes]
    assert max(int(forward.slots.max()) for forward in passes) + 1 == max(trees)
    assert max(trees) < len(prompt) + sum(len(forward.tokens) for forward in passes)
    for at, forward in enumerate(passes):
        assert (forward.sees.seen[:, forward.slots] == np.eye(len(forward.slots))).all()
        assert (forward.sees.seen.sum(1) == len(prompt) + at + 1).all()


def test_groups_with_one_text_feed_it_once(tiny, find):
    counting = CountingModel(tiny("causal"))
    find(counting, random_prompt(5), 6, num_beams=8, num_groups=4, diversity=0.0)
    assert [len(forward.tokens) for [(_, forward)] in counting.calls] == [5, 2, 2, 2, 2, 2]


def test_what_all_texts_begin_with_is_committed_before_the_search_ends(decode):
    """One parent in time has all the beams, while their ends still differ."""
    model, events = TableModel(6, seed=2), []
    [seq] = decode(
        model,
        "diverse_beam",
        {"num_beams": 4, "num_groups": 1},
        prompts=[[0, 1]],
        max_new_tokens=20,
        listeners=[lambda _, event: events.append((event.forward, len(event.tokens)))],
    )
    assert all(num > 0 for _, num in events)
    assert sum(num for forward, num in events if forward < 10) == 8
    assert len({tuple(one.tokens) for one in seq.alternatives}) > 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_beams": 0}, "at least 1"),
        ({"num_beams": 5}, "divide"),
        ({"num_groups": 0}, "divide"),
        ({"diversity": -0.1}, "diversity"),
        ({"diversity": math.inf}, "diversity"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"early_stopping": "always"}, "never"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, told):
    with pytest.raises(InputError, match=told):
        make_decoder("diverse_beam", settings)
