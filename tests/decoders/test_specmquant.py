from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest
import torch

from chordal.cursor import Cursor
from chordal.decoders.specmquant import SpecMQuant, SpecMQuantConfig
from chordal.drafters.draft import Draft, Drafter
from chordal.drafters.hierarchy import HierarchyDrafter
from chordal.errors import InputError
from chordal.ops import tree
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import CountingModel, TableModel, chi_square, random_prompt, sample_joint

SETTINGS = [
    *(
        {"min_draft": m, "num_draft": d, "draft": draft}
        for m in (2, 6)
        for d in (1, 3)
        for draft in ("ngram", "model")
    ),
    {"min_draft": 3, "num_draft": 2, "draft": "model", "width": 3},
    {"min_draft": 4, "num_draft": 0},
]
LAWS = [
    Law(),
    Law(temperature=0.9),
    Law(temperature=1.2, top_p=0.9, repetition_penalty=1.5),
    Law(repetition_penalty=1.5),
]
PROMPT = np.array([0, 1, 0, 1, 0])


@pytest.fixture
def trio(tiny):
    """A target, and a middle and a draft model unlike it and each other."""
    return {"target": tiny("causal"), "middle": tiny("causal", seed=1), "draft": tiny("causal", seed=2)}


@pytest.fixture
def twins(tiny):
    """A middle model that is the target, and a draft model unlike both."""
    return {"target": tiny("causal"), "middle": tiny("causal", window=65), "draft": tiny("causal", seed=2)}


class Random(Drafter):
    """Guesses trees of random tokens, of which one path may be right."""

    def __init__(self, text, seed=0):
        self.text, self.rng = text, np.random.default_rng(seed)

    def propose(self, text, budget):
        num = int(self.rng.integers(0, 9))
        tokens = self.rng.integers(0, 29, num)
        parents = np.array([int(self.rng.integers(-1, node)) for node in range(num)], np.int64)
        right = self.text[len(text) :][: num // 2]
        tokens[: len(right)], parents[: len(right)] = right, tree.chain(len(right))
        return Draft(tokens, parents)


def proposal(drafter, model, text, budget):
    """Run what a drafter proposes on one model, in row 0."""
    drafting = drafter.propose(text, budget)
    assert isinstance(drafting, Generator)
    reading = None
    while True:
        try:
            forward = drafting.send(reading)
        except StopIteration as stop:
            return stop.value
        [reading] = model.run([(0, forward)])


def write(decode, model, prompt, num, law=Law()):  # noqa: B008  it is frozen
    """Continue a prompt by plain decoding."""
    [seq] = decode(model, "autoregressive", prompts=[prompt], max_new_tokens=num, law=law)
    return np.concatenate([prompt, seq.output])


# What comes out.


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_greedy_text_is_that_of_plain_decoding(decode, prompts, trio, twins, settings):
    for models in (trio, twins):
        given = {"prompts": prompts(5), "max_new_tokens": 20}
        got = decode(models, "specmquant", settings, **given)
        want = decode(models["target"], "autoregressive", **given)
        assert [seq.output.tolist() for seq in got] == [seq.output.tolist() for seq in want]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("settings", SETTINGS[1::3], ids=str)
def test_followed_drafts_give_the_text_of_plain_decoding(decode, prompts, trio, law, settings):
    given = {"prompts": prompts(5), "law": law, "seeds": range(5), "max_new_tokens": 12}
    got = decode(trio, "specmquant", {**settings, "acceptance": "follow"}, **given)
    want = decode(trio["target"], "autoregressive", **given)
    assert [seq.output.tolist() for seq in got] == [seq.output.tolist() for seq in want]


@pytest.mark.parametrize(
    "settings",
    [
        {"min_draft": 2, "num_draft": 2},
        {"min_draft": 1, "num_draft": 2, "draft": "model"},
        {"min_draft": 2, "num_draft": 1, "draft": "model", "width": 2},
    ],
    ids=str,
)
def test_three_sampled_tokens_have_the_law_of_the_target(settings):
    """All 64 continuations, 3,000 runs; chi-square, false alarm once in a million."""
    target, middle, draft = (TableModel(4, seed=seed) for seed in range(3))
    models = {"target": target, "middle": middle, "draft": draft}
    counts = sample_joint(make_decoder("specmquant", settings), models, PROMPT, 3, 3000, Law(temperature=1.0))
    assert chi_square(counts, target.joint(PROMPT, 3)) > 1e-6


def test_drafts_that_are_drawn_with_the_numbers_of_the_target_bend_the_law(monkeypatch):
    """What the ratio rule must not be given; without it the test above could not fail."""
    own = Sequence.uniforms

    def uniforms(seq, positions, purpose, draw=0):
        return own(seq, positions, "token" if purpose == "draft" else purpose, draw)

    monkeypatch.setattr(Sequence, "uniforms", uniforms)
    target, middle = TableModel(4, seed=0), TableModel(4, seed=1)
    decoder = make_decoder("specmquant", {"min_draft": 2, "num_draft": 2})
    models = {"target": target, "middle": middle}
    counts = sample_joint(decoder, models, PROMPT, 3, 3000, Law(temperature=1.0))
    assert chi_square(counts, target.joint(PROMPT, 3)) < 1e-6


# The middle model's text is its own.


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("law", [Law(), Law(temperature=1.0), Law(repetition_penalty=1.5)], ids=str)
def test_what_is_guessed_changes_how_long_a_draft_is_and_not_what_it_says(tiny, decode, law, seed):
    """Random trees against no guesses at all."""
    model, prompt = tiny("causal", seed=1), random_prompt(5, seed)
    seq = Sequence(prompt=prompt, family=model.family, stop=StopRules(max_new_tokens=40), law=law, seed=seed)
    silent = HierarchyDrafter(seq, Random(prompt), min_draft=12, num_draft=0)
    want = proposal(silent, model, prompt, 12)
    assert len(want) == 12
    if law.is_greedy:
        own = write(decode, model, prompt, 12, law)
        assert want.tokens.tolist() == own[5:].tolist()

    guesses = Random(np.concatenate([prompt, want.tokens]), seed)
    drafter = HierarchyDrafter(seq, guesses, min_draft=4, num_draft=3)
    got = proposal(drafter, model, prompt, 12)
    assert 4 <= len(got) <= 7
    assert got.tokens.tolist() == want.tokens[: len(got)].tolist()
    if not law.is_greedy:
        assert sorted(got.laws) == list(range(-1, len(got) - 1))
        for node, law_V in got.laws.items():
            torch.testing.assert_close(law_V, want.laws[node], rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("law", [Law(), Law(temperature=1.0)], ids=str)
def test_a_round_is_one_pass_of_the_target_over_a_draft_of_the_length_that_is_set(
    decode, twins, settings, law
):
    counting = CountingModel(twins["target"])
    prompt, length = np.resize(random_prompt(5), 15), 40
    models = {**twins, "target": counting}
    [seq] = decode(models, "specmquant", settings, prompts=[prompt], max_new_tokens=length, law=law)
    drafts = [len(call[0][1].read.rows) - 1 for call in counting.calls]
    shortest, longest = settings["min_draft"], settings["min_draft"] + settings["num_draft"]
    assert all(shortest <= num <= longest for num in drafts[:-1])
    # The middle model is the target, so that all of a draft is kept, and one token behind it.
    assert sum(drafts) + len(drafts) == length
    assert seq.stats.accepted_tokens == seq.stats.draft_tokens == sum(drafts)


def test_right_guesses_spare_passes_of_the_middle_model(tiny, decode):
    """A draft model that is the middle model: num_draft + 1 of its tokens a pass."""
    middle = tiny("causal", seed=1)
    models = {"target": tiny("causal"), "middle": middle, "draft": tiny("causal", seed=1, window=65)}
    given = {"prompts": [random_prompt(5)], "max_new_tokens": 30}
    for law in (Law(), Law(temperature=1.0)):
        for acceptance in ("ratio", "follow"):
            passes = {}
            for num in (0, 2):
                settings = {"draft": "model", "min_draft": 6, "num_draft": num, "acceptance": acceptance}
                [seq] = decode(models, "specmquant", settings, law=law, **given)
                passes[num] = seq.stats.forwards["middle"] / seq.stats.forwards["target"]
            assert passes[0] > 5
            assert passes[2] <= 2


# What is cached.


class Recording(CountingModel):
    """Knows which token was written to each slot of row 0."""

    def __init__(self, model):
        super().__init__(model)
        self.slots = {}

    def move_slots(self, moves):
        for row, source, target in moves:
            if row == 0:
                moved = [self.slots[slot] for slot in source.tolist()]
                self.slots.update(zip(target.tolist(), moved, strict=True))
        super().move_slots(moves)

    def run(self, requests):
        for row, forward in requests:
            if row == 0:
                self.slots.update(zip(forward.slots.tolist(), forward.tokens.tolist(), strict=True))
        return super().run(requests)

    def held(self, text):
        """How many tokens of a text stand in the first slots."""
        num = 0
        while num < len(text) and self.slots.get(num) == text[num]:
            num += 1
        return num

    def states(self, row, num):
        layers = self.model.cache.slot_layers
        return torch.cat([torch.stack([one.keys[row, :, :num], one.values[row, :, :num]]) for one in layers])


@pytest.mark.parametrize("agree", ["always", "sometimes", "never"])
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3], SETTINGS[6], SETTINGS[8]], ids=str)
def test_after_every_round_both_caches_are_those_of_a_cold_pass(tiny, decode, settings, agree):
    """Whole, part and nothing of the drafts accepted, so that the middle model lags in every way it can."""
    seed = {"always": 0, "sometimes": 1, "never": 3}[agree]
    law = Law(temperature=1.0) if agree == "sometimes" else Law()
    models = {
        "target": Recording(tiny("causal", window=66)),
        "middle": Recording(tiny("causal", window=66, seed=seed)),
        "draft": tiny("causal", seed=2),
    }
    accepted = []

    def check(seq, event):
        if event.kind == "draft":
            accepted.append(event.num_accepted / len(event.tokens))
            return
        text = seq.committed
        for name, model in models.items():
            if name != "draft":
                num = model.held(text)
                # The middle model has read what was committed before; the target all but the last token.
                behind = 1 if name == "target" else len(event.tokens)
                assert seq.done or num >= len(text) - behind
                model.model.run([(1, Cursor().feed(text[:num]).read(None))])
                torch.testing.assert_close(model.states(0, num), model.states(1, num), rtol=0, atol=1e-9)
                model.model.free_row(1, clear=True)

    given = {"prompts": [random_prompt(6)], "max_new_tokens": 24, "law": law, "listeners": [check]}
    decode(models, "specmquant", settings, **given)
    assert len(accepted) > 2
    if agree == "always":
        assert min(accepted) == 1
    elif agree == "never":
        assert min(accepted) == 0
    else:
        assert len({*accepted}) > 1


def test_a_draft_ends_with_a_stop_token(tiny, decode):
    model, prompt = tiny("causal"), random_prompt(5)
    text = write(decode, model, prompt, 9)
    eos = int(text[5 + 3])
    first = text[5:].tolist().index(eos)
    stop = StopRules(max_new_tokens=40, eos_ids=(eos,))
    seq = Sequence(prompt=prompt, family=model.family, stop=stop)
    drafter = HierarchyDrafter(seq, Random(text), min_draft=8, num_draft=4)
    assert proposal(drafter, model, prompt, 30).tokens.tolist() == text[5 : 5 + first + 1].tolist()


def test_what_cannot_be_is_refused(tiny, decode):
    for settings, words in (
        ({"min_draft": 0}, "min_draft must be"),
        ({"num_draft": -1}, "num_draft at least 0"),
        ({"width": 0}, "width and max_ngram"),
        ({"max_ngram": 0}, "width and max_ngram"),
        ({"width": 2}, "width=2 is for draft=model"),
    ):
        with pytest.raises(InputError, match=words):
            make_decoder("specmquant", settings)
    with pytest.raises(InputError, match="specmquant needs a middle model"):
        decode(tiny("causal"), "specmquant", prompts=[random_prompt(3)])
    assert SpecMQuant().needs_models == ("middle",)
    assert SpecMQuant(SpecMQuantConfig(draft="model")).needs_models == ("middle", "draft")
