from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from chordal.decoders.decoder import Decoder
from chordal.engine import Engine
from chordal.errors import InputError
from chordal.forward import Causal, Forward, Logits
from chordal.generation import Model
from chordal.testing.tiny import random_prompt, tiny_model
from chordal.verification.verify import verify


class Copying(Decoder):
    """Drafts what followed the last token before, with nothing wrong or with one mistake of bookkeeping."""

    name = "copying"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    paper = "-"

    @dataclass(frozen=True)
    class Config:
        bug: str = ""

    def decode(self, seq):
        bug = self.config.bug
        num_cached = slot_shift = position_shift = 0
        while not seq.done:
            start = int(np.argmax(seq.committed == seq.committed[-1])) + 1
            draft = np.resize(seq.committed[start:] if start < seq.frontier else seq.committed[-1:], 3)
            tokens = np.concatenate([seq.committed[num_cached:], draft])
            at = num_cached + np.arange(len(tokens))
            rows = np.arange(len(tokens) - 4, len(tokens))
            reading = yield Forward(
                tokens,
                at + position_shift,
                Causal(),
                seq.sample(rows, at[rows] + 1),
                slots=at + slot_shift,
            )
            kept = int(np.cumprod(reading.tokens[:-1] == draft).sum())
            committed = reading.tokens[: kept + 1]
            if kept < 3:
                slot_shift += bug == "stale cache row"
                position_shift = int(bug == "wrong position")
                if bug == "one too many":
                    committed, kept = np.append(draft[: kept + 1], reading.tokens[kept + 1]), kept + 1
            num_cached = seq.frontier + kept
            seq.append(committed)


class Guessing(Decoder):
    """Drafts one token by the model itself, with nothing wrong or with one mistake of acceptance."""

    name = "guessing"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    paper = "-"

    @dataclass(frozen=True)
    class Config:
        bug: str = ""

    def decode(self, seq):
        bug = self.config.bug
        num_cached = 0
        while not seq.done:
            at = np.arange(num_cached, seq.frontier)
            read = Logits(at[-1:] - num_cached)
            first = yield Forward(seq.committed[num_cached:], at, Causal(), read, slots=at)
            # The law of the draft is flatter than p, or all on the best token.
            p = self._law(first, seq.law.temperature)
            q = self._law(first, 3.0)
            if bug == "redrawn root" or seq.law.is_greedy:
                q = np.eye(len(q))[p.argmax()]
            following = at[-1:] + 1
            draft = self._draw(q, seq.uniforms(following, "noise"))
            second = yield Forward(draft, following, Causal(), Logits(np.array([0])), slots=following)

            chance = p[draft] / q[draft] if bug != "naive acceptance" else p[draft] > 0.1
            if seq.uniforms(following, "accept") < chance:
                then = self._draw(
                    self._law(second, seq.law.temperature), seq.uniforms(following + 1, "token")
                )
                committed = np.append(draft, then)
            elif bug in ("redrawn root", "missing residual"):
                committed = self._draw(p, seq.uniforms(following, "token"))
            else:
                committed = self._draw(np.maximum(p - q, 0), seq.uniforms(following, "token"))
            num_cached = seq.frontier + len(committed) - 1
            seq.append(committed)

    def _law(self, reading, temperature):
        logits = reading.logits[0].double()
        return (logits / (temperature or 1e-9)).softmax(0).numpy()

    def _draw(self, law, uniform):
        return np.searchsorted(np.cumsum(law) / law.sum(), uniform, side="right")


@pytest.fixture(scope="module")
def make():
    """Give a tiny model of a type and kind, ready to generate."""

    @functools.cache
    def make(dtype=torch.float32, kind="causal", arch=None):
        return Model(Engine(tiny_model(kind, dtype=dtype, arch=arch, max_rows=64)))

    return make


def prompts(*seeds):
    """Give prompts that repeat themselves, so that lookups find something."""
    return [np.resize(random_prompt(3, seed), 9).tolist() for seed in seeds]


def _name(decoder):
    return decoder if isinstance(decoder, str) else decoder.name


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("decoder", ["autoregressive", "prompt_lookup", Copying(), Guessing()], ids=_name)
def test_an_exact_decoder_passes(make, dtype, decoder):
    found = verify(make(dtype), decoder, prompts(0, 1, 2), num_samples=40, max_new_tokens=12)
    assert found.is_exact
    assert found.greedy.num_same == 3 - len({one.prompt for one in found.greedy.divergences})
    assert dtype != torch.float32 or found.greedy.num_same == 3
    assert found.greedy.num_tokens > 30
    assert all(test.freedom > 5 for test in found.sampled.tests.values())


def test_an_exact_decoder_of_looped_models_passes(make):
    model = make(arch="looped")
    found = verify(model, "loop_speculative", prompts(0, 1), num_samples=20, max_new_tokens=8)
    assert (found.is_exact, found.plain) == (True, "autoregressive")


@DTYPES
@pytest.mark.parametrize("bug", ["stale cache row", "wrong position", "one too many"])
def test_a_bug_of_bookkeeping_is_found_in_greedy_texts(make, dtype, bug):
    found = verify(make(dtype), Copying(Copying.Config(bug)), prompts(0, 1, 2), num_samples=0)
    assert not found.is_exact
    assert found.greedy.num_bugs > 0
    assert found.sampled is None


@pytest.mark.parametrize("bug", ["naive acceptance", "redrawn root", "missing residual"])
def test_a_bug_of_acceptance_is_found_in_sampled_texts(make, bug):
    # Every one of these bugs gives p below 1e-5; the level is 5e-4.
    found = verify(
        make(), Guessing(Guessing.Config(bug)), prompts(0, 1, 2), num_samples=200, max_new_tokens=12
    )
    assert not found.is_exact
    assert found.greedy.num_same == 3
    assert "ranks" in found.sampled.failed


def test_in_half_precision_text_that_parts_at_a_tie_is_exact(make):
    """Of these prompts, prompt_lookup's text parts from plain decoding's; in float64 none does."""
    same = verify(make(torch.float64), "prompt_lookup", prompts(1, 7, 22), num_samples=0, max_new_tokens=40)
    assert (same.greedy.num_same, same.greedy.noise) == (3, None)
    found = verify(make(torch.bfloat16), "prompt_lookup", prompts(1, 7, 22), num_samples=0, max_new_tokens=40)
    assert found.greedy.num_ties == len(found.greedy.divergences) > 0
    assert found.is_exact
    assert found.greedy.tolerance == 2 * found.greedy.noise > 0
    for one in found.greedy.divergences:
        assert one.token != one.plain_token
        assert 0 <= abs(one.gap) <= one.shortfall <= found.greedy.tolerance


def test_an_approximate_decoder_is_compared_with_the_plain_one_of_its_kind(make):
    model, given = make(kind="masked"), prompts(0, 1)
    exact = verify(model, "threshold", given, config={"threshold": 2.0}, num_samples=20, max_new_tokens=6)
    assert (exact.promise, exact.plain, exact.is_exact) == ("approximate", "low_confidence", True)
    assert list(exact.sampled.tests) == ["branches"]
    hasty = verify(model, "threshold", given, config={"threshold": 0.0}, num_samples=0, max_new_tokens=6)
    assert not hasty.is_exact
    assert (hasty.greedy.noise, hasty.greedy.divergences[0].gap) == (None, None)
    same = verify(
        model,
        "low_confidence",
        given,
        config={"num_steps": 2},
        plain_config={"num_steps": 2},
        num_samples=0,
        max_new_tokens=6,
    )
    assert same.is_exact
    assert same.plain_settings["num_steps"] == 2


class Failing(Decoder):
    """Ends with an error."""

    name = "failing"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    paper = "-"
    Config = Copying.Config

    def decode(self, seq):
        at = np.arange(seq.num_prompt)
        yield Forward(seq.prompt, at, Causal(), slots=at)
        raise RuntimeError("planted")


def test_a_decoder_that_fails_is_not_exact_and_says_why(make):
    found = verify(make(), Failing(), prompts(0, 1), num_samples=20, max_new_tokens=4)
    assert not found.is_exact
    assert found.errors == {0: "RuntimeError: planted", 1: "RuntimeError: planted"}
    assert found.greedy.num_same == 0
    assert found.to_dict()["errors"][1] == {"prompt": 1, "error": "RuntimeError: planted"}


class Searching(Copying):
    """Draws nothing, as a search."""

    samples = False


def test_a_decoder_that_draws_nothing_is_compared_greedily_only(make):
    found = verify(make(), Searching(), prompts(0), num_samples=20, max_new_tokens=4)
    assert found.is_exact
    assert found.sampled is None


def test_the_report_is_plain_values_that_say_what_follows(make):
    found = verify(make(), Copying(Copying.Config("one too many")), prompts(0), num_samples=40)
    report = json.loads(json.dumps(found.to_dict()))
    assert report["is_exact"] is False
    assert report["settings"] == {"bug": "one too many"}
    assert report["greedy"]["num_bugs"] == len(report["greedy"]["divergences"]) > 1
    assert report["sampled"]["failed"] == list(found.sampled.failed)
    assert report["sampled"]["tests"]["ranks"].keys() == {"statistic", "freedom", "p_value"}


def test_progress_counts_every_text(make):
    seen = []
    verify(
        make(), "prompt_lookup", prompts(0, 1), num_samples=20, max_new_tokens=4,
        on_text=lambda *told: seen.append(told),
    )  # fmt: skip
    assert seen[-1] == (84, 84, "plain, sampled")
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_samples": 19}, "num_samples must be 0 or at least 20; got 19"),
        ({"false_alarm": 0}, "false_alarm must be between 0 and 1; got 0"),
        ({"temperature": -1}, "temperature"),
        ({"max_new_tokns": 3}, "max_new_tokens"),
        ({"config": {"num_drafts": 3}}, "num_draft"),
        ({"max_new_tokens": 64}, "window"),
    ],
)
def test_what_cannot_be_used_is_refused(make, settings, words):
    with pytest.raises(InputError, match=words):
        verify(make(), "prompt_lookup", prompts(0), **settings)
    assert not make().engine.has_work


def test_prompts_must_be_a_list_and_the_model_idle(make):
    for given in ("abc", []):
        with pytest.raises(InputError, match="prompts must be a list of at least one"):
            verify(make(), "prompt_lookup", given)
    stream = make().stream("abc")
    next(stream)
    with pytest.raises(InputError, match="must be idle"):
        verify(make(), "prompt_lookup", ["abc"])
    stream.close()
