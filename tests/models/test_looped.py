"""A looped model: what its own forward computes, and what requests can ask of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.decoders.decoder import Decoder
from chordal.engine import Engine
from chordal.errors import CheckpointError, InputError
from chordal.forward import Causal, Forward, Hidden, Logits, Loops
from chordal.models.family import Family
from chordal.models.load import load_model
from chordal.models.looped import LoopedConfig, fresh_states, looped_family
from chordal.models.looped_runner import LoopedLanguageModel
from chordal.sequence import Sequence, StopRules
from chordal.testing import TINY_LOOPS, random_prompt, tiny_backbone, tiny_model

TEXT = random_prompt(9)


@pytest.fixture(scope="module")
def plain():
    return tiny_backbone("looped")


@pytest.fixture
def model():
    return tiny_model(arch="looped")


def ask(tokens=TEXT, start=0, loops=None, read=None):
    positions = np.arange(start, start + len(tokens))
    read = read or Logits(np.arange(len(tokens)))
    return Forward(tokens, positions, Causal(), read, slots=positions, loops=loops)


@torch.no_grad()
def logits_of(plain, tokens, **more):
    return plain(torch.as_tensor(tokens)[None], **more).logits[0]


def close(a, b):
    return torch.allclose(a.double(), b.double(), atol=1e-5)


def test_loops_repeat_the_core_on_the_same_embeddings(plain):
    """The formula of the paper, spelled out with the model's own parts."""
    inner, tokens = plain.model, torch.as_tensor(TEXT)[None]
    at = torch.arange(len(TEXT))[None]
    mask = torch.ones(len(TEXT), len(TEXT), dtype=torch.bool).tril()[None, None]

    def through(layers, x):
        for layer in layers:
            x = layer(x, attention_mask=mask, position_ids=at, position_embeddings=inner.rotary_emb(x, at))
        return x

    with torch.no_grad():
        e = through(inner.prelude, inner.embed_tokens(tokens))
        s = inner.fresh(at).double()
        for _ in range(3):
            s = through(inner.core, inner.adapter(torch.cat([inner.state_norm(s), e], -1)))
        want = plain.lm_head(inner.norm(through(inner.coda, s)))[0]
    assert close(logits_of(plain, TEXT, num_loops=3), want)


def test_the_number_of_loops_matters(plain):
    assert not close(logits_of(plain, TEXT, num_loops=1), logits_of(plain, TEXT))
    assert close(logits_of(plain, TEXT, num_loops=TINY_LOOPS), logits_of(plain, TEXT))


def test_a_text_fed_in_parts_gives_what_it_gives_whole(model, plain):
    first, second = model.run([(0, ask(TEXT[:5]))]), model.run([(0, ask(TEXT[5:], start=5))])
    assert close(torch.cat([first[0].logits, second[0].logits]), logits_of(plain, TEXT))


def test_a_request_may_ask_for_fewer_loops_or_more(model, plain):
    for count in (1, 3, TINY_LOOPS + 3):
        [reading] = model.run([(0, ask(loops=Loops(count)))])
        assert close(reading.logits, logits_of(plain, TEXT, num_loops=count))


def test_requests_of_unlike_loops_run_in_one_tick(model, plain):
    texts = [TEXT, TEXT[::-1].copy(), TEXT[:4]]
    counts = [2, None, 3]
    asked = [
        (row, ask(text, loops=count and Loops(count)))
        for row, (text, count) in enumerate(zip(texts, counts, strict=True))
    ]
    for reading, text, count in zip(model.run(asked), texts, counts, strict=True):
        assert close(reading.logits, logits_of(plain, text, num_loops=count))
        assert (reading.states is None) == (count is None)


def test_loops_go_on_from_the_states_of_an_earlier_reading(model, plain):
    [first] = model.run([(0, ask(loops=Loops(3)))])
    [second] = model.run([(0, ask(loops=Loops(2, states=first.states)))])
    assert close(second.logits, logits_of(plain, TEXT, num_loops=5))


def test_rows_behind_the_given_states_start_fresh(model, plain):
    at = torch.arange(len(TEXT))[None]
    states = plain.model.fresh(at).double()
    given = torch.full((4, 32), 0.5, dtype=torch.float64)
    states[0, :4] = given
    [reading] = model.run([(0, ask(loops=Loops(2, states=given)))])
    assert close(reading.logits, logits_of(plain, TEXT, num_loops=2, states=states))


def test_the_change_of_a_state_is_relative_to_what_it_has_become(model):
    [first] = model.run([(0, ask(loops=Loops(2)))])
    [second] = model.run([(0, ask(loops=Loops(1, states=first.states)))])
    moved = (second.states - first.states).norm(dim=1) / second.states.norm(dim=1)
    assert np.allclose(second.change, moved.numpy())
    assert second.change.min() > 1e-6


def test_embeddings_keep_a_share_of_the_earlier_ones(model):
    other = np.roll(TEXT, 1)
    [old], [new] = model.run([(0, ask(other, loops=Loops(1)))]), model.run([(0, ask(loops=Loops(1)))])
    mixed = Loops(1, embeds=old.embeds[:6], momentum=0.25)
    [reading] = model.run([(0, ask(loops=mixed))])
    assert close(reading.embeds[:6], 0.75 * new.embeds[:6] + 0.25 * old.embeds[:6])
    assert close(reading.embeds[6:], new.embeds[6:])


def test_noise_replaces_a_share_of_a_state_by_a_fresh_one(model):
    """And what changed is told from the state before the noise."""
    states = torch.full((3, 32), 0.5, dtype=torch.float64)
    keys, share = np.array([5, 6, 5]), np.array([0.5, 0.25, 0.0])
    fresh = torch.stack([fresh_states((32,), torch.Generator().manual_seed(key)) for key in keys.tolist()])
    weight = torch.from_numpy(share)[:, None]
    mixed = (1 - weight) * states + weight * fresh
    [noisy] = model.run([(0, ask(TEXT[:3], loops=Loops(1, states, share, keys)))])
    [given] = model.run([(0, ask(TEXT[:3], loops=Loops(1, mixed)))])
    assert close(noisy.states, given.states)
    moved = (noisy.states - states).norm(dim=1) / noisy.states.norm(dim=1)
    assert np.allclose(noisy.change, moved.numpy())


def test_a_position_always_starts_from_the_same_state(plain):
    at = torch.tensor([[3, 0, 3]])
    states = plain.model.fresh(at)[0]
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])
    everything = plain.model.fresh(torch.arange(64)[None])
    assert everything.std() == pytest.approx((2 / 5) ** 0.5, rel=0.05)
    assert everything.abs().max() <= 3 * (2 / 5) ** 0.5


def test_a_cache_may_keep_fewer_loops_apart(plain, model):
    """Then the last loops of earlier tokens are what later ones see; text fed at once cannot tell.

    So it is where all loops are kept apart and a pass has fewer than were kept.
    """
    all_kept = model
    few = tiny_backbone("looped")
    config = LoopedConfig(**(few.config.to_dict() | {"num_cached_loops": 1}))
    assert config.num_hidden_layers == 1 + 2 * 1 + 1
    few.model.config = few.config = config
    for at, layer in enumerate(few.model.coda):
        layer.self_attn.layer_idx = 3 + at
    model = LoopedLanguageModel(few, looped_family(Family(), config))
    [whole] = model.run([(0, ask())])
    assert close(whole.logits, logits_of(plain, TEXT))
    [last] = model.run([(0, ask(TEXT[8:], start=8))])
    assert not close(last.logits, logits_of(plain, TEXT)[8:])
    readings = []
    for one in (model, all_kept):
        one.run([(0, ask(TEXT[:8]))])
        readings += one.run([(0, ask(TEXT[8:], start=8, loops=Loops(1)))])
    assert close(readings[0].logits, readings[1].logits)


def test_hidden_states_by_layer_are_refused(model):
    with pytest.raises(InputError, match="hidden states by layer cannot be read"):
        model.run([(0, ask(read=Hidden(np.array([0]), (1,))))])


def test_a_checkpoint_says_how_often_it_loops(tokenizer, tmp_path, plain):
    plain.config.vocab_size = plain.model.embed_tokens.num_embeddings
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="float64")
    assert isinstance(loaded, LoopedLanguageModel)
    assert (loaded.family.kind, loaded.family.num_loops) == ("causal", TINY_LOOPS)
    assert loaded.family.offers == ("causal", "looped")
    [reading] = loaded.run([(0, ask())])
    assert close(reading.logits, logits_of(plain, TEXT))


def test_a_looped_model_of_another_kind_is_refused():
    with pytest.raises(CheckpointError, match=r"must be causal; chordal\.family is masked"):
        looped_family(Family(kind="masked", mask_id=1), LoopedConfig())


def test_loops_of_requests_that_run_together_are_not_added_up(model):
    class Pair(Decoder):
        name, family, promise, needs, paper, Config = "pair", "autoregressive", "exact", ("looped",), "-", int

        def decode(self, seq):
            asked = ask(seq.prompt, loops=Loops(1)), ask(seq.prompt, loops=Loops(3))
            readings = yield asked
            seq.append(readings[1].logits[-1:].argmax(1).numpy())

    seq = Sequence(prompt=TEXT, family=model.family, stop=StopRules(max_new_tokens=1))
    engine = Engine(model)
    engine.submit(Pair(), seq)
    engine.run()
    assert (seq.finish_reason, seq.stats.loops, seq.stats.rows) == ("length", 3, 2)
