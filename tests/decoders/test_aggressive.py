from __future__ import annotations

import numpy as np
import pytest

from chordal.engine import Engine
from chordal.errors import InputError
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import Alphabet, random_prompt

LAWS = [Law(), Law(temperature=1.0), Law(temperature=0.5, top_p=0.8, repetition_penalty=1.3)]
SETTINGS = [
    {},
    {"start": 0},
    {"start": 0, "match": "unique"},
    {"start": 2, "end": -2, "num_draft": 3},
    {"num_draft": 0},
    {"max_ngram": 1},
]
EOS = 29


@pytest.fixture
def edit(decode, rule_model):
    """Decodes a source into an answer that ends with EOS, and gives the sequence."""

    def edit(source, answer, **settings):
        script = [*answer, EOS]
        prompt = np.array([20, *source])

        def rule(position, token):
            return script[min(max(position + 1 - len(prompt), 0), len(answer))]

        settings = {"start": 1, **settings}
        [seq] = decode(
            rule_model(rule), "aggressive", settings, prompts=[prompt], max_new_tokens=40, eos_ids=(EOS,)
        )
        assert seq.output.tolist() == script
        return seq

    return edit


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_output_equals_plain_decoding(tiny, decode, settings, law):
    """The source is what plain decoding gives, with every fourth token replaced."""
    model = tiny("causal")
    heads = [random_prompt(4, seed) for seed in range(4)]
    run = {"max_new_tokens": 12, "law": law, "seeds": range(4)}
    sources = [seq.output for seq in decode(model, "autoregressive", prompts=heads, **run)]
    for source in sources:
        source[3::4] = (source[3::4] + 1) % 29
    given = [np.concatenate([head, source]) for head, source in zip(heads, sources, strict=True)]
    plain = decode(model, "autoregressive", prompts=given, **run)
    seqs = decode(model, "aggressive", settings, prompts=given, **run)
    assert [seq.output.tolist() for seq in seqs] == [seq.output.tolist() for seq in plain]
    if settings.get("num_draft") != 0:
        assert sum(seq.stats.draft_tokens for seq in seqs) > 0


@pytest.mark.parametrize("match", ["unique", "next"])
def test_a_source_that_is_repeated_takes_one_forward_its_end_included(edit, match):
    seq = edit([1, 2, 3, 4], [1, 2, 3, 4], match=match)
    assert seq.stats.forwards["target"] == 1
    assert seq.stats.accepted_tokens == seq.stats.draft_tokens == 4


@pytest.mark.parametrize(("match", "forwards"), [("unique", 3), ("next", 2)])
def test_a_replaced_token_costs_the_forwards_until_the_output_joins_again(edit, match, forwards):
    """a b x; then d, which a unique run could not foresee; then the end."""
    seq = edit([1, 2, 3, 4], [1, 2, 9, 4], match=match)
    assert seq.stats.forwards["target"] == forwards


@pytest.mark.parametrize(("num_draft", "forwards"), [(0, 31), (1, 16), (9, 4), (30, 1), (99, 1)])
def test_no_draft_is_longer_than_allowed(edit, num_draft, forwards):
    seq = edit(np.resize(np.arange(19), 30), np.resize(np.arange(19), 30), num_draft=num_draft)
    assert seq.stats.forwards["target"] == forwards


def first_draft(tiny, text, settings):
    """Give the text that is drafted first for a prompt of one letter a token."""
    events = []
    model = tiny("causal")
    seq = Sequence(
        prompt=np.array(Alphabet()(text)["input_ids"]),
        family=model.family,
        stop=StopRules(max_new_tokens=30),
        detokenize=Alphabet().decode,
        listeners=[lambda _, event: events.append(event)],
    )
    engine = Engine(model)
    engine.submit(make_decoder("aggressive", settings), seq)
    engine.step()
    if seq.error is not None:
        raise seq.error
    return Alphabet().decode(events[0].tokens) if events[0].kind == "draft" else ""


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        ({}, ""),
        ({"start": "fix "}, "the cat. done"),
        ({"start": "fix ", "end": "."}, "the cat"),
        ({"start": 4}, "the cat. done"),
        ({"start": -4}, "done"),
        ({"start": 4, "end": -6}, "the cat"),
        ({"start": 5, "end": "t"}, "he ca"),
        ({"start": -11, "end": "t"}, "e ca"),
        ({"start": "x", "end": "q"}, "fix the cat. done"),
        ({"start": "nothing"}, "fix the cat. done"),
        ({"start": "done"}, ""),
        ({"start": 99}, ""),
    ],
    ids=str,
)
def test_the_source_lies_between_the_marks(tiny, settings, source):
    expected = source if settings.get("start") != "x" else " the cat. done"
    assert first_draft(tiny, "fix the cat. done", settings) == expected


@pytest.mark.parametrize(
    "settings", [{"num_draft": -1}, {"max_ngram": 0}, {"start": ""}, {"end": ""}], ids=str
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(InputError, match=r"at least|empty"):
        make_decoder("aggressive", settings)
