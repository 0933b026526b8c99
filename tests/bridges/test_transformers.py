from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers

from chordal.bridges.transformers import with_drafter
from chordal.drafters.draft import Draft, Drafter
from chordal.drafters.ngram import NgramDrafter
from chordal.errors import InputError
from chordal.models.checkpoint import zoo_dir

PROMPT = "rename total to flag:\ndef load(total, size):\n    total = size + total\n    return total"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(zoo_dir() / "tiny-ar")


@pytest.fixture(scope="module")
def model():
    path = zoo_dir() / "tiny-ar"
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture
def inputs(tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    tokens = torch.tensor([ids["input_ids"]])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0}


@pytest.fixture
def passes(model):
    """Count forward passes; a view shares its model's hooks."""
    counted = []
    handle = model.register_forward_hook(lambda *_: counted.append(1))
    yield counted
    handle.remove()


class Scripted(Drafter):
    """Propose what it is told to, and remember what it hears."""

    candidates = 3

    def __init__(self, script=lambda text: Draft.chain(text[:0])):
        self.script, self.texts, self.budgets, self.outcomes = script, [], [], []

    def propose(self, text, budget):
        self.texts.append(text)
        self.budgets.append(budget)
        return self.script(text)

    def observe(self, outcome):
        self.outcomes.append(outcome)


def knows(tokens, *, wrong_after=None):
    """Draft a known text to its end, with a wrong token in place."""

    def script(text):
        draft = np.array(tokens[len(text) :])
        if wrong_after is not None and len(draft) > wrong_after:
            draft[wrong_after] += 1
        return Draft.chain(draft)

    return script


def test_the_text_is_the_models_own_in_fewer_passes(model, inputs, passes):
    plain = model.generate(**inputs, max_new_tokens=64)
    num_plain = len(passes)
    drafted = with_drafter(model, lambda: NgramDrafter(3)).generate(**inputs, max_new_tokens=64)
    assert torch.equal(drafted, plain)
    assert 0 < len(passes) - num_plain < 3 / 4 * num_plain


@pytest.mark.parametrize("num_new", [1, 2, 5, 13])
def test_a_draft_never_leads_beyond_the_length_or_the_stop_token(model, inputs, num_new):
    end = model.generation_config.eos_token_id
    whole = model.generate(**inputs, max_new_tokens=64)
    assert whole[0, -1] == end
    known = [*whole[0].tolist(), *[7] * 10]
    view = with_drafter(model, lambda: Scripted(knows(known)))
    assert torch.equal(view.generate(**inputs, max_new_tokens=64), whole)
    start = inputs["input_ids"].shape[1]
    cut = view.generate(**inputs, max_new_tokens=num_new)
    assert torch.equal(cut, whole[:, : start + num_new])


def test_the_drafter_hears_what_became_of_each_draft(model, inputs):
    more = {"max_new_tokens": 20, "eos_token_id": None}
    whole = model.generate(**inputs, **more)[0].tolist()
    drafter = Scripted(knows(whole, wrong_after=3))
    with_drafter(model, lambda: drafter, num_draft=6).generate(**inputs, **more)
    start = inputs["input_ids"].shape[1]
    assert drafter.budgets == [6, 6, 6, 6, 3]
    assert [len(text) for text in drafter.texts] == [start, start + 4, start + 8, start + 12, start + 16]
    for text, outcome in zip(drafter.texts, drafter.outcomes, strict=True):
        at = len(text)
        assert outcome.root == text[-1]
        assert outcome.kept.tolist() == [0, 1, 2]
        assert outcome.reading.tokens[:4].tolist() == whole[at : at + 4]
        assert len(outcome.reading.tokens) == len(outcome.draft) + 1
        assert outcome.reading.candidates.shape == (len(outcome.draft) + 1, 3)
        assert outcome.reading.candidates[:4, 0].tolist() == whole[at : at + 4]


def test_each_call_has_a_drafter_of_its_own(model, inputs):
    made = []

    def make():
        made.append(Scripted())
        return made[-1]

    view = with_drafter(model, make)
    for _ in range(2):
        view.generate(**inputs, max_new_tokens=3)
    assert len(made) == 2
    assert all(len(drafter.texts) == 2 for drafter in made)  # the last token needs no draft


def test_settings_of_a_call_still_ask_the_drafter(model, inputs):
    drafter = Scripted()
    settings = transformers.GenerationConfig(max_new_tokens=4, do_sample=True, top_k=1, pad_token_id=0)
    del inputs["pad_token_id"]
    sampled = with_drafter(model, lambda: drafter).generate(**inputs, generation_config=settings)
    assert torch.equal(sampled, model.generate(**inputs, max_new_tokens=4, pad_token_id=0))
    assert len(drafter.texts) == 3


def test_sampled_text_has_the_models_law(model, inputs):
    """Of 600 draws of two tokens from a flat law, the drafted pair is drawn as often as it is due.

    The share of a pair of probability p deviates by more than 5 sqrt(p (1 - p) / 600) once in 10**6.
    """
    start = inputs["input_ids"].shape[1]
    more = {"do_sample": True, "temperature": 8.0, "top_k": 4, "max_new_tokens": 2, "eos_token_id": None}
    with torch.no_grad():
        first = (model(inputs["input_ids"]).logits[0, -1].topk(4).values / 8).softmax(-1)
        best = model(inputs["input_ids"]).logits[0, -1].argmax()
        text = torch.cat([inputs["input_ids"], best[None, None]], 1)
        second = (model(text).logits[0, -1].topk(4).values / 8).softmax(-1)
    due = float(first[0] * second[0])
    view = with_drafter(model, lambda: Scripted(knows([*text[0].tolist(), 0])))
    pair = model.generate(**inputs, max_new_tokens=2, eos_token_id=None)[0, start:].tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [view.generate(**inputs, **more)[0, start:].tolist() for _ in range(600)]
    assert abs(drawn.count(pair) / 600 - due) < 5 * (due * (1 - due) / 600) ** 0.5


def test_the_model_stays_as_it_was(model):
    kind, settings = type(model), copy.deepcopy(model.generation_config)
    view = with_drafter(model, Scripted)
    assert type(model) is kind
    assert model.generation_config == settings
    assert type(view).__name__ == kind.__name__
    assert view.lm_head is model.lm_head


def test_what_is_no_chain_of_chosen_tokens_is_refused(model, inputs):
    for draft in (
        Draft(np.array([5, 6]), np.array([-1, -1])),
        Draft(np.array([5]), np.array([-1]), laws={-1: torch.ones(4) / 4}),
        (part for part in ()),
    ):
        view = with_drafter(model, lambda draft=draft: Scripted(lambda text: draft))
        with pytest.raises(InputError, match="chains of chosen tokens; Scripted"):
            view.generate(**inputs, max_new_tokens=8)
    with pytest.raises(InputError, match="at least 1; got 0"):
        with_drafter(model, Scripted, num_draft=0)
