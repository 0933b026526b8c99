"""What the tests of decoders share: tiny models, their logits without any cache, and a way to decode."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.engine import Engine
from chordal.models.family import Family
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import TINY_MASK, ToyModel, random_prompt, tiny_backbone, tiny_model


@pytest.fixture(scope="session")
def tiny():
    """Makes a tiny model of a kind, once for each set of arguments."""
    made = {}

    def tiny(kind, **settings):
        key = kind, *sorted(settings.items())
        if key not in made:
            made[key] = tiny_model(kind, **settings)
        return made[key]

    return tiny


@pytest.fixture(scope="session")
def plain():
    """The transformers model behind `tiny(..., seed=0)`, untouched by us."""
    return tiny_backbone()


@pytest.fixture(scope="session")
def cacheless(plain):
    """Gives the logits `[T, V]` of a text in one forward pass of transformers alone, without a cache.

    The mask `[T, T]` defaults to full attention. No logit is changed, not even that of the mask token.
    """

    @torch.no_grad()
    def cacheless(tokens, can_attend=None):
        if can_attend is None:
            can_attend = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
        ids = torch.as_tensor(np.asarray(tokens))[None]
        return plain(input_ids=ids, attention_mask=can_attend[None, None], use_cache=False).logits[0]

    return cacheless


@pytest.fixture(scope="session")
def decode():
    """Decodes prompts together through a new engine, of one model or several, and gives their sequences."""

    def decode(
        model,
        decoder,
        settings=None,
        *,
        prompts,
        max_new_tokens=8,
        law=Law(),  # noqa: B008  it is frozen
        seeds=None,
        eos_ids=(),
        listeners=(),
    ):
        decoder = make_decoder(decoder, settings)
        engine = Engine(model)
        seqs = [
            Sequence(
                prompt=np.asarray(prompt),
                family=engine.target.family,
                stop=StopRules(max_new_tokens=max_new_tokens, eos_ids=eos_ids),
                law=law,
                seed=seeds[index] if seeds is not None else 0,
                listeners=list(listeners),
            )
            for index, prompt in enumerate(prompts)
        ]
        for seq in seqs:
            engine.submit(decoder, seq)
        engine.run()
        for seq in seqs:
            if seq.error is not None:
                raise seq.error
        return seqs

    return decode


class _RuleModel(ToyModel):
    def __init__(self, rule, vocab_size):
        super().__init__(Family(kind="causal"), vocab_size, window=256)
        self.rule = rule

    def logits(self, position, view):
        return 5.0 * np.eye(self.vocab_size)[self.rule(position, view[position])]


@pytest.fixture(scope="session")
def rule_model():
    """Makes a toy whose next token is a function of the position and the token there."""

    def rule_model(rule, vocab_size=30):
        return _RuleModel(rule, vocab_size)

    return rule_model


@pytest.fixture(scope="session")
def prompts():
    """Makes a number of prompts of one to nine letters."""

    def prompts(count, seed=0):
        return [random_prompt(1 + (3 * index + seed) % 9, seed=100 * seed + index) for index in range(count)]

    return prompts


@pytest.fixture(scope="session")
def assert_same_commits():
    """Compares sequences with a reference: the tokens, and the forward pass that committed each."""

    def assert_same_commits(seqs, references):
        for seq, (tokens, forwards) in zip(seqs, references, strict=True):
            assert seq.output.tolist() == list(tokens)
            assert seq.committed_at[seq.num_prompt : seq.limit].tolist() == list(forwards)
            assert TINY_MASK not in seq.output

    return assert_same_commits
