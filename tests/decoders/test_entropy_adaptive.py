from __future__ import annotations

import numpy as np
import pytest

from chordal.engine import Engine
from chordal.errors import InputError
from chordal.models.family import Family
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import CountingModel, ToyModel, random_prompt

PROMPT = random_prompt(7)
LAWS = [Law(), Law(temperature=0.8), Law(temperature=1.1, top_k=8, repetition_penalty=1.3)]
NEVER = float("inf")


class Script(ToyModel):
    """A text behind a prompt of one token; tokens `start` to `end` - 1 have 3 bits, the others none."""

    def __init__(self, start=20, end=40):
        super().__init__(Family(), 8, window=96)
        self.start, self.end = start, end

    def logits(self, position, view):
        return np.full(8, 5.0) if self.start <= position < self.end else 1e3 * np.eye(8)[1]


def run(models, decoder="entropy_adaptive", settings=None, *, prompt=PROMPT, law=LAWS[0], length=30, seed=4):
    engine = Engine(models)
    stop = StopRules(max_new_tokens=length)
    seq = Sequence(prompt=prompt, family=engine.target.family, stop=stop, law=law, seed=seed)
    engine.submit(make_decoder(decoder, settings), seq)
    engine.run()
    if seq.error is not None:
        raise seq.error
    return seq


class Pair:
    """Two counting models that remember in which order they were asked."""

    def __init__(self, target, draft):
        self.models = {"target": CountingModel(target), "draft": CountingModel(draft)}
        self.asks = []
        for name, model in self.models.items():
            model.calls = _Log(self.asks, name)

    @property
    def writers(self):
        """Which model wrote each token, one letter each; a token that was drawn again counts once."""
        wrote = {int(ask.positions[-1]) + 1: name for name, ask in self.asks}
        return "".join(wrote[position][0] for position in sorted(wrote))


class _Log(list):
    def __init__(self, asks, name):
        super().__init__()
        self.asks, self.name = asks, name

    def append(self, call):
        super().append(call)
        self.asks += [(self.name, ask) for _, ask in call]


@pytest.fixture
def pair(tiny):
    return Pair(tiny("causal"), tiny("causal", seed=1))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_an_infinite_threshold_leaves_all_to_the_draft_model(pair, tiny, law):
    seq = run(pair.models, settings={"threshold": NEVER}, law=law)
    alone = run(tiny("causal", seed=1), "autoregressive", law=law)
    assert seq.output.tolist() == alone.output.tolist()
    assert seq.stats.forwards == {"draft": 30}
    assert seq.stats.to_dict()["tokens_per_forward"] == 0


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_at_threshold_0_a_target_that_starts_writes_all(pair, tiny, law):
    seq = run(pair.models, settings={"threshold": 0, "start": "target"}, law=law)
    alone = run(tiny("causal"), "autoregressive", law=law)
    assert seq.output.tolist() == alone.output.tolist()
    assert seq.stats.forwards == {"target": 30}


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_at_threshold_0_the_target_goes_on_behind_the_first_run(pair, tiny, law):
    seq = run(pair.models, settings={"threshold": 0}, law=law)
    first = run(tiny("causal", seed=1), "autoregressive", law=law, length=10).output
    prompt = np.concatenate([PROMPT, first])
    rest = run(tiny("causal"), "autoregressive", law=law, prompt=prompt, length=20).output
    assert seq.output.tolist() == [*first, *rest]
    assert pair.writers == "d" * 10 + "t" * 20


@pytest.mark.parametrize(
    ("settings", "writers"),
    [
        # The mean is 6/5 with token 21 and 3/5 with token 43.
        ({}, "d" * 22 + "t" * 22 + "d" * 16),
        ({"redo": True}, "d" * 21 + "t" * 22 + "d" * 17),
        ({"window": 1}, "d" * 21 + "t" * 20 + "d" * 19),
        ({"min_run": 30}, "d" * 30 + "t" * 30),
        ({"threshold_down": 0.5}, "d" * 22 + "t" * 23 + "d" * 15),
        ({"threshold": 2.9, "threshold_down": 1.0}, "d" * 25 + "t" * 19 + "d" * 16),
        # 42/34 with token 33. Then 60/40 as long as the window holds the text; emptied, 18/15 with token 48.
        ({"threshold": 1.22, "window": 40}, "d" * 34 + "t" * 26),
        ({"threshold": 1.22, "window": 40, "clear_window": True}, "d" * 34 + "t" * 15 + "d" * 11),
    ],
    ids=str,
)
def test_the_switches_are_where_the_entropies_say(settings, writers):
    pair = Pair(Script(), Script())
    run(pair.models, settings={"threshold": 1.0} | settings, prompt=np.array([1]), length=60)
    assert pair.writers == writers


@pytest.mark.parametrize("redo", [False, True])
@pytest.mark.parametrize("min_run", [1, 4])
def test_no_two_switches_are_closer_than_the_shortest_run(pair, min_run, redo):
    settings = {"threshold": 2.6, "min_run": min_run, "window": 1, "redo": redo}
    run(pair.models, settings=settings, law=LAWS[1], length=50)
    runs = pair.writers.replace("td", "t d").replace("dt", "d t").split()
    assert len(runs) > 3
    assert all(len(one) >= min_run for one in runs[:-1])


def test_a_switch_feeds_what_the_other_model_wrote_and_no_more(pair):
    seq = run(pair.models, settings={"threshold": 2.6, "min_run": 3, "window": 2}, law=LAWS[1], length=50)
    num_seen = {"target": 0, "draft": 0}
    for name, ask in pair.asks:
        end = int(ask.positions[-1]) + 1
        assert ask.positions.tolist() == list(range(num_seen[name], end))
        assert ask.tokens.tolist() == seq.tokens[num_seen[name] : end].tolist()
        num_seen[name] = end
    assert len(set(pair.writers)) == 2


def test_each_token_is_the_one_its_writer_gives_without_a_cache(pair, tiny):
    seq = run(pair.models, settings={"threshold": 2.6, "min_run": 2, "window": 2}, law=LAWS[1], length=40)
    cold = {"t": tiny("causal"), "d": tiny("causal", seed=1)}
    for number, writer in enumerate(pair.writers):
        prompt = seq.tokens[: len(PROMPT) + number]
        alone = run(cold[writer], "autoregressive", prompt=prompt, law=LAWS[1], length=1)
        assert alone.output[0] == seq.output[number]


def test_the_law_of_the_request_changes_no_entropy():
    """A penalty, a cut and a temperature all change the law, and the switches stay where they are."""
    law = Law(temperature=0.2, top_k=1, repetition_penalty=5.0)
    pair = Pair(Script(), Script())
    settings = {"threshold": 2.95, "window": 1}
    run(pair.models, settings=settings, prompt=np.array([1]), length=60, law=law)
    assert pair.writers == "d" * 21 + "t" * 20 + "d" * 19


def test_of_a_token_drawn_again_the_second_entropy_counts():
    """The target is always sure. Tokens 17 to 21 had 0 0 0 3 3 and have 0 0 0 3 0, and so on."""
    pair = Pair(Script(0, 0), Script())
    settings = {"threshold": 1.0, "redo": True, "min_run": 1}
    run(pair.models, settings=settings, prompt=np.array([1]), length=27)
    assert pair.writers == "d" * 21 + "tdttdt"


def test_a_token_drawn_again_costs_one_pass_more(pair):
    settings = {"threshold": 0, "redo": True}
    seq = run(pair.models, settings=settings)
    assert pair.writers == "d" * 10 + "t" * 20
    assert seq.stats.forwards == {"draft": 11, "target": 20}


def test_an_engine_without_a_draft_model_is_refused(tiny):
    with pytest.raises(InputError, match="needs a draft model"):
        run(tiny("causal"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 0}, "at least 1; got 0 and 10"),
        ({"min_run": 0}, "at least 1; got 5 and 0"),
        ({"threshold": 0.5, "threshold_down": 0.6}, "threshold_down must be at most threshold; got 0.6"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        make_decoder("entropy_adaptive", settings)
