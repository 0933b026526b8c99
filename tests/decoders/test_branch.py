from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from chordal.cursor import Cursor
from chordal.decoders.autoregressive import Autoregressive
from chordal.decoders.branch import Branches
from chordal.decoders.decoder import Decoder
from chordal.decoders.prompt_lookup import PromptLookup
from chordal.decoders.speculate import speculate
from chordal.drafters.draft import Draft, Drafter
from chordal.engine import Engine
from chordal.errors import InputError
from chordal.forward import Causal, Forward, Full, Sample, Together, Tree, Visible, Window
from chordal.models.family import Family
from chordal.ops.sampling import Law
from chordal.sequence import Sequence, StopRules
from chordal.testing import CountingModel, random_prompt

PROMPT = np.resize(random_prompt(4), 11)
LAW = Law(temperature=1.2)


class Oracle(Drafter):
    """Knows the text and offers it as the second child of each node, so that what is kept must move."""

    def __init__(self, text):
        self.text = text

    def propose(self, text, budget):
        rest = self.text[len(text) : len(text) + min(budget, 3)]
        tokens = np.stack([(rest + 1) % 29, rest], 1).ravel()
        parents = np.repeat(2 * np.arange(len(rest)) - 1, 2)
        return Draft(tokens, parents)


class DraftTrees(Decoder):
    """Speculates with trees that hold what plain decoding gives."""

    name, family, promise, needs, paper = "trees", "autoregressive", "exact", ("causal",), "-"

    @dataclasses.dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, texts):
        super().__init__()
        self.texts = texts

    def decode(self, seq):
        return speculate(seq, Oracle(self.texts[seq.seed]), num_draft=3)


class Shadowed(Decoder):
    """Plain decoding; at every step a second model, asked at the same time, guesses the next token."""

    name, family, promise, needs, paper = "shadowed", "autoregressive", "exact", ("causal",), "-"
    needs_models = ("draft",)

    @dataclasses.dataclass(frozen=True)
    class Config:
        pass

    def __init__(self):
        super().__init__()
        self.guesses = {}

    def decode(self, seq):
        target, draft = Cursor(), Cursor("draft")
        guesses = self.guesses.setdefault(seq.seed, [])
        while not seq.done:
            asked = tuple(cursor.feed(seq.committed).sample(seq) for cursor in (target, draft))
            token, guess = yield asked
            guesses.append(int(guess.tokens[0]))
            seq.append(token.tokens)


class SideBySide(Decoder):
    """Runs several decoders as branches to their ends; the first one's text is the result."""

    name, family, promise, needs, paper = "side_by_side", "autoregressive", "exact", ("causal",), "-"

    @dataclasses.dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, decoders):
        super().__init__()
        self.decoders, self.seqs = decoders, []

    def decode(self, seq):
        self.seqs = [sequence(number) for number in range(len(self.decoders))]
        running = [decoder.decode(one) for decoder, one in zip(self.decoders, self.seqs, strict=True)]
        branches = Branches(len(running), seq.num_prompt - 1)
        asked = {number: next(coroutine) for number, coroutine in enumerate(running)}
        while asked:
            placed = {number: branches.place(number, ask) for number, ask in asked.items()}
            readings = iter((yield tuple(item for one in placed.values() for item in one.items)))
            asked = {}
            for number, one in placed.items():
                try:
                    asked[number] = running[number].send(one.answer(readings))
                except StopIteration:
                    assert self.seqs[number].done
        seq.append(self.seqs[0].output)


def sequence(seed, length=14):
    stop = StopRules(max_new_tokens=length)
    return Sequence(prompt=PROMPT, family=Family(), stop=stop, law=LAW, seed=seed)


def run(model, decoder, seed=0):
    engine = Engine(model)
    seq = engine.submit(decoder, sequence(seed))
    engine.run()
    if seq.error is not None:
        raise seq.error
    return seq


@pytest.fixture
def solo(tiny):
    """The text of each seed, decoded alone."""
    return [run(tiny("causal"), Autoregressive(), seed).output for seed in range(4)]


def test_branches_of_unlike_decoders_give_what_each_gives_alone(tiny, solo):
    texts = [np.concatenate([PROMPT, output]) for output in solo]
    trees = DraftTrees(texts)
    both = SideBySide([Autoregressive(), trees, PromptLookup(), trees])
    run(tiny("causal"), both)
    assert [seq.output.tolist() for seq in both.seqs] == [output.tolist() for output in solo]
    assert both.seqs[1].stats.accepted_tokens > 6  # so the trees were compacted
    assert len({tuple(output) for output in solo}) == 4


def test_every_model_of_a_branch_has_caches_of_its_own(tiny, solo):
    models = {"target": tiny("causal"), "draft": tiny("causal", seed=1)}
    alone, together = Shadowed(), Shadowed()
    for seed in range(3):
        run(models, alone, seed)
    seq = run(models, SideBySide([together] * 3))
    assert together.guesses == alone.guesses
    assert seq.output.tolist() == solo[0].tolist()
    assert seq.stats.positions_fed == {"target": 10 + 3 * 14, "draft": 10 + 3 * 14}


def test_the_prompt_is_fed_once(tiny):
    counting = CountingModel(tiny("causal"))
    run(counting, SideBySide([Autoregressive()] * 3))
    first = [ask for _, ask in counting.calls[0]]
    assert [len(ask.tokens) for ask in first] == [11, 1, 1]
    slots = np.concatenate([ask.slots for call in counting.calls for _, ask in call])
    assert sorted(slots.tolist()) == list(range(10 + 3 * 14))


SPECS = [
    Causal(),
    Window(3),
    Full(9, hidden=np.array([2, 6])),
    Together(),
    Tree(6, (-1, 0, 0)),
    Visible(
        np.array([1, 5, 0]),
        np.array([3, 5, 7]),
        own=np.eye(3, dtype=bool),
        hidden=np.array([2]),
        seen=np.array([[0, 0, 0, 0, 1], [0, 0, 1, 0, 1], [1, 0, 0, 1, 0]], bool),
    ),
]


def seen_by(visible, slots):
    """The slots each row sees."""
    sets = []
    for row in range(len(visible.start)):
        seen = set(range(visible.start[row], visible.end[row]))
        seen -= set() if visible.hidden is None else set(visible.hidden.tolist())
        seen |= set() if visible.seen is None else set(np.flatnonzero(visible.seen[row]).tolist())
        seen |= set() if visible.own is None else set(slots[visible.own[row]].tolist())
        sets.append(seen)
    return sets


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_a_branch_sees_what_it_asked_to_see(spec):
    branches, slots = Branches(3, 4), np.array([6, 7, 8])
    ask = Forward(slots, slots, spec, slots=slots)
    [placed] = branches.place(1, ask).items
    assert placed.slots.tolist() == [11, 14, 17]
    visible = spec if isinstance(spec, Visible) else spec.visible(slots)
    want = [set(branches.slots(1, np.array(sorted(seen), int)).tolist()) for seen in seen_by(visible, slots)]
    assert seen_by(placed.sees, placed.slots) == want


def test_no_two_branches_share_a_slot_behind_the_shared_ones():
    branches = Branches(3, 4)
    slots = [branches.slots(branch, np.arange(9)) for branch in range(3)]
    assert all(one[:4].tolist() == [0, 1, 2, 3] for one in slots)
    assert sorted(np.concatenate([one[4:] for one in slots])) == list(range(4, 19))


def test_rows_that_are_cached_are_left_out_unless_they_are_read():
    branches, at = Branches(2, 4), np.arange(5)
    whole = branches.place(0, Forward(at, at, Causal(), Sample(np.array([4])), slots=at))
    assert whole.items[0].tokens.tolist() == [0, 1, 2, 3, 4]
    [rest] = branches.place(1, Forward(at, at, Causal(), Sample(np.array([2, 4])), slots=at)).items
    assert (rest.tokens.tolist(), rest.read.rows.tolist()) == ([2, 4], [0, 1])
    other = branches.place(1, Forward(at, at, Causal(), slots=at, model="draft"))
    assert len(other.items[0].tokens) == 5  # that model has cached nothing yet

    nothing = branches.place(1, Forward(at[:4], at[:4], Causal(), slots=at[:4]))
    assert nothing.items == ()
    assert nothing.answer(iter(())).tokens is None


def test_a_coroutine_beside_requests_is_rewritten_too():
    branches, at = Branches(2, 2), np.arange(3)

    def part():
        reading = yield Forward(at[:2], at[:2], Causal(), slots=at[:2], model="draft")
        assert reading.tokens is None
        reading = yield Forward(at[2:], at[2:], Causal(), slots=at[2:], model="draft")
        return reading

    branches.place(0, Forward(at, at, Causal(), slots=at, model="draft"))
    ask = Forward(at, at, Causal(), slots=at)
    placed = branches.place(1, (ask, part()))
    inner = placed.items[1]
    assert next(inner).slots.tolist() == [3]
    with pytest.raises(StopIteration) as end:
        inner.send("reading")
    assert end.value.value == "reading"
    assert placed.answer(iter(["first", "second"])) == ("first", "second")


def test_reading_without_writing_is_refused():
    ask = Forward(np.array([1]), np.array([4]), Together())
    with pytest.raises(InputError, match="cannot run in branches"):
        Branches(2, 3).place(0, ask)
