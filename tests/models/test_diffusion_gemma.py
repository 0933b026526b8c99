from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import DynamicCache, EntropyBoundSamplerConfig

import chordal
from chordal.errors import CheckpointError, InputError
from chordal.forward import Causal, Forward, Hidden, Logits, Together, Visible
from chordal.models.checkpoint import Checkpoint
from chordal.models.diffusion_gemma import DiffusionGemma, read_facts
from chordal.models.family import make_family
from chordal.models.load import load_model
from chordal.models.recognise import recognise
from chordal.ops.experts import Routing
from chordal.testing import TINY_SLIDING_WINDOW, TINY_VOCAB, tiny_backbone

LENGTH = 4  # of a canvas


def new_backbone(**settings):
    """Two sliding layers and two full ones, in turn."""
    return tiny_backbone("diffusion_gemma", num_layers=4, **settings)


@pytest.fixture(scope="module")
def theirs():
    """The transformers model, untouched by us."""
    return new_backbone()


@pytest.fixture
def ours():
    backbone = new_backbone()
    family = make_family(
        read_facts(backbone.config, {}), name="diffusion_gemma", vocab_size=TINY_VOCAB, eos_ids=()
    )
    return DiffusionGemma(backbone, family, name="tiny", max_rows=6)


def random_tokens(num, seed=0):
    return np.random.default_rng([seed, num]).integers(0, TINY_VOCAB, num)


def encode(tokens, start=0, read=None):
    at = np.arange(start, start + len(tokens))
    return Forward(tokens, at, Causal(), read, slots=at)


def refine(canvas, start, inject=None, read=None):
    """Ask for the logits of a canvas behind a prefix of `start` tokens."""
    num = len(canvas)
    sees = Visible(np.zeros(num, np.int64), np.full(num, start), np.ones((num, num), bool))
    return Forward(canvas, np.arange(start, start + num), sees, read or Logits(np.arange(num)), inject=inject)


def one(model, forward, row=0):
    return model.run([(row, forward)])[0].logits


@torch.no_grad()
def by_transformers(model, prefix, canvas, inject=None, cache=None):
    """Logits of a canvas behind a prefix, by the model's own forward pass over its own cache."""
    return model(
        input_ids=torch.from_numpy(prefix)[None],
        past_key_values=DynamicCache(config=model.config) if cache is None else cache,
        decoder_input_ids=torch.from_numpy(canvas)[None],
        self_conditioning_logits=None if inject is None else inject[None].to(model.dtype),
    ).logits[0]


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


W = TINY_SLIDING_WINDOW


@pytest.mark.parametrize("num_prompt", [1, W - 2, W - 1, W, W + 1, W + 3, 40])
def test_a_canvas_reads_what_transformers_reads_behind_any_prefix(ours, theirs, num_prompt):
    """Shorter than the sliding window, at its edge, and longer; then conditioned on itself."""
    prompt, canvas, other = random_tokens(num_prompt), random_tokens(LENGTH, 1), random_tokens(LENGTH, 2)
    ours.run([(0, encode(prompt))])
    first = one(ours, refine(canvas, num_prompt))
    assert_same(first, by_transformers(theirs, prompt, canvas))
    second = one(ours, refine(other, num_prompt, first / 0.7))
    assert_same(second, by_transformers(theirs, prompt, other, first / 0.7))
    assert (second - by_transformers(theirs, prompt, other)).abs().max() > 0.1


@pytest.mark.parametrize("length", [1, 3, W, 3 * W])
def test_a_canvas_may_be_longer_than_the_sliding_window(ours, theirs, length):
    prompt, canvas = random_tokens(2 * W), random_tokens(length, 1)
    ours.run([(0, encode(prompt))])
    assert_same(one(ours, refine(canvas, len(prompt))), by_transformers(theirs, prompt, canvas))


def test_canvas_after_canvas_reads_what_transformers_reads_over_its_growing_cache(ours, theirs):
    cache, start = DynamicCache(config=theirs.config), 0
    for seed, num in enumerate((3, LENGTH, LENGTH, 2 * W, LENGTH)):
        new, canvas = random_tokens(num, 10 + seed), random_tokens(LENGTH, 20 + seed)
        ours.run([(0, encode(new, start))])
        start += num
        assert_same(one(ours, refine(canvas, start)), by_transformers(theirs, new, canvas, cache=cache))


def test_a_prefix_may_be_encoded_in_pieces(ours, theirs):
    prompt, canvas = random_tokens(17), random_tokens(LENGTH, 1)
    for piece in np.split(np.arange(17), [1, 2, 9]):
        ours.run([(0, encode(prompt[piece], piece[0]))])
    assert_same(one(ours, refine(canvas, 17)), by_transformers(theirs, prompt, canvas))


def test_a_batch_of_unlike_lengths_reads_what_each_would_alone(ours, theirs):
    """Prompts, canvases and conditions of any kind beside each other, row 2 silent, in two ticks."""
    prompts = {row: random_tokens(num, row) for row, num in {0: 5, 1: 1, 3: 23, 4: 9}.items()}
    canvases = {
        0: random_tokens(4, 5),
        1: random_tokens(7, 6),
        3: random_tokens(2, 7),
        4: random_tokens(4, 8),
    }
    ours.run([(row, encode(prompt)) for row, prompt in prompts.items()])
    first = ours.run([(row, refine(canvas, len(prompts[row]))) for row, canvas in canvases.items()])
    for (row, canvas), reading in zip(canvases.items(), first, strict=True):
        assert_same(reading.logits, by_transformers(theirs, prompts[row], canvas))

    said = {row: 2 * reading.logits for row, reading in zip(canvases, first, strict=True) if row in (1, 4)}
    second = ours.run([(row, refine(c, len(prompts[row]), said.get(row))) for row, c in canvases.items()])
    for (row, canvas), reading in zip(canvases.items(), second, strict=True):
        assert_same(reading.logits, by_transformers(theirs, prompts[row], canvas, said.get(row)))


@torch.no_grad()
def test_a_batch_reads_what_transformers_reads_of_a_padded_one(ours, theirs):
    """Its padding stands before the prompts and is masked, by a mask of its own for sliding layers."""
    prompts = [random_tokens(num, num) for num in (3, 19, 8)]
    canvases = [random_tokens(LENGTH, seed) for seed in range(3)]
    padded, is_token = torch.zeros(2, 3, 19, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, -len(prompt) :], is_token[row, -len(prompt) :] = torch.from_numpy(prompt), 1
    want = theirs(
        input_ids=padded,
        attention_mask=is_token,
        decoder_input_ids=torch.from_numpy(np.stack(canvases)),
        decoder_attention_mask=torch.nn.functional.pad(is_token, (0, LENGTH), value=1).bool(),
    ).logits
    ours.run([(row, encode(prompt)) for row, prompt in enumerate(prompts)])
    got = ours.run([(row, refine(canvas, len(prompts[row]))) for row, canvas in enumerate(canvases)])
    for reading, logits in zip(got, want, strict=True):
        # Rotary embeddings are computed in float32, of positions that padding moves.
        torch.testing.assert_close(reading.logits, logits, rtol=0, atol=1e-3)


def test_prompts_and_canvases_run_in_one_tick(ours, theirs):
    """A canvas sees what its own row writes beside it, in whatever order they are asked for."""
    old, new = random_tokens(8), random_tokens(11, 1)
    canvases = [random_tokens(LENGTH, seed) for seed in (2, 3)]
    ours.run([(1, encode(old))])
    readings = ours.run([(0, refine(canvases[0], 11)), (1, refine(canvases[1], 8)), (0, encode(new))])
    assert_same(readings[0].logits, by_transformers(theirs, new, canvases[0]))
    assert_same(readings[1].logits, by_transformers(theirs, old, canvases[1]))
    assert readings[2].logits is None


def test_canvases_of_one_row_do_not_see_each_other(ours, theirs):
    prompt, canvases = random_tokens(9), [random_tokens(num, num) for num in (4, 2, 5)]
    ours.run([(0, encode(prompt))])
    for canvas, reading in zip(
        canvases, ours.run([(0, refine(canvas, 9)) for canvas in canvases]), strict=True
    ):
        assert_same(reading.logits, by_transformers(theirs, prompt, canvas))


def test_canvases_of_one_row_are_all_conditioned_or_none(ours, theirs):
    prompt, canvas = random_tokens(9), random_tokens(LENGTH, 1)
    ours.run([(0, encode(prompt))])
    said = torch.randn(2, LENGTH, TINY_VOCAB, generator=torch.Generator().manual_seed(0))
    readings = ours.run([(0, refine(canvas, 9, logits)) for logits in said])
    for reading, logits in zip(readings, said, strict=True):
        assert_same(reading.logits, by_transformers(theirs, prompt, canvas, logits))
    with pytest.raises(InputError, match="must all be conditioned on logits, or none"):
        ours.run([(0, refine(canvas, 9, said[0])), (0, refine(canvas, 9))])


def test_refining_leaves_the_cache_bit_for_bit(ours):
    ours.run([(0, encode(random_tokens(9)))])
    before = [(keys.clone(), values.clone()) for keys, values in ours.cache.held(slice(0, 1), 128)]
    ours.run([(0, refine(random_tokens(LENGTH), 9))])
    for (keys, values), (old_keys, old_values) in zip(ours.cache.held(slice(0, 1), 128), before, strict=True):
        assert keys.equal(old_keys)
        assert values.equal(old_values)


def test_a_canvas_that_would_share_experts_is_refused(ours):
    """The decoder used to take no notice of how a request is routed."""
    ours.run([(0, encode(random_tokens(9)))])
    with pytest.raises(InputError, match="cannot share experts while it refines a canvas"):
        ours.run([(0, dataclasses.replace(refine(random_tokens(LENGTH), 9), routing=Routing()))])


def test_a_canvas_that_would_blend_tokens_is_refused(ours):
    canvas = random_tokens(LENGTH)
    ours.run([(0, encode(random_tokens(9)))])
    with pytest.raises(InputError, match="cannot be fed several as one"):
        blend = canvas[:, None], np.ones((LENGTH, 1))
        ours.run([(0, dataclasses.replace(refine(canvas, 9), blend=blend))])


def test_a_canvas_alone_sees_no_prefix(ours):
    canvas = random_tokens(LENGTH)
    alone = Forward(canvas, np.arange(LENGTH), Together(), Logits(np.arange(LENGTH)))
    with pytest.raises(InputError, match="tiny refines a canvas behind a prefix; encode at least one token"):
        one(ours, alone)
    ours.run([(0, encode(random_tokens(9)))])
    first = one(ours, alone)
    ours.run([(0, encode(random_tokens(5, 1)))])
    assert_same(one(ours, alone), first)


@torch.no_grad()
def test_the_encoder_is_read_through_the_same_head(ours, theirs):
    prompt = random_tokens(15)
    got = one(ours, encode(prompt, read=Logits(np.arange(15))))
    text = theirs.model.encoder.language_model
    states = text(input_ids=torch.from_numpy(prompt)[None]).last_hidden_state[0]
    cap = theirs.config.text_config.final_logit_softcapping
    want = cap * torch.tanh(states @ theirs.model.decoder.embed_tokens.weight.T / cap)
    assert_same(got, want.float())
    assert got.abs().max() > 3


@torch.no_grad()
def test_hidden_states_of_a_canvas_are_those_of_the_decoder(ours, theirs):
    prompt, canvas = random_tokens(9), random_tokens(LENGTH, 1)
    ours.run([(0, encode(prompt))])
    [reading] = ours.run([(0, refine(canvas, 9, read=Hidden(np.array([3, 1]), (1, 4))))])
    want = theirs(
        input_ids=torch.from_numpy(prompt)[None],
        decoder_input_ids=torch.from_numpy(canvas)[None],
        output_hidden_states=True,
    ).hidden_states
    assert_same(reading.hidden, torch.stack([want[1][0, [3, 1]], want[4][0, [3, 1]]], 1))


def test_rows_move_and_are_freed(ours, theirs):
    prompt, canvas = random_tokens(9), random_tokens(LENGTH, 1)
    ours.run([(4, encode(prompt)), (1, encode(random_tokens(30)))])
    ours.move_row(4, 1)
    ours.free_row(4, clear=True)
    assert_same(one(ours, refine(canvas, 9), row=1), by_transformers(theirs, prompt, canvas))


def test_a_wrong_reach_of_its_layers_would_be_noticed(ours):
    given, own = ours.compare()
    assert_same(given, own)
    reach = {kind: 2 if size else None for kind, size in ours.architecture.reach.items()}
    ours.architecture = dataclasses.replace(ours.architecture, reach=reach)
    given, own = ours.compare()
    assert (given - own).abs().max() > 0.1


# Checkpoints.


@pytest.fixture(scope="session")
def folder(tokenizer, tmp_path_factory):
    """A checkpoint as transformers saves it, with the generation config of the published one."""
    folder = tmp_path_factory.mktemp("diffusion") / "gemma"
    backbone = new_backbone(dtype=torch.float32)
    # Not tied: what the encoder and the decoder scale their layers by.
    for at, layer in enumerate(
        [*backbone.model.encoder.language_model.layers, *backbone.model.decoder.layers]
    ):
        layer.layer_scalar.fill_(1 + at / 8)
    backbone.generation_config.update(
        max_denoising_steps=12,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.25),
        t_min=0.3,
        t_max=0.9,
        stability_threshold=2,
        confidence_threshold=0.5,
        eos_token_id=[5, 7],
    )
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_saved_model_loads_with_its_weights_and_facts(folder):
    model = load_model(folder)
    assert isinstance(model, DiffusionGemma)
    family = model.family
    assert (family.name, family.kind, family.mask_id, family.shift) == ("diffusion_gemma", "uniform", None, 0)
    assert (family.block_length, family.vocab_size, family.eos_ids) == (LENGTH, TINY_VOCAB, (5, 7))
    assert (model.window, model.vocab_size, model.dtype) == (64, TINY_VOCAB, torch.float32)
    assert family.settings == {
        "num_steps": 12,
        "entropy_bound": 0.25,
        "t_min": 0.3,
        "t_max": 0.9,
        "stability_threshold": 2,
        "confidence_threshold": 0.5,
    }
    stored = type(model.model).from_pretrained(folder)
    for (name, got), (_, want) in zip(
        model.model.state_dict().items(), stored.state_dict().items(), strict=True
    ):
        assert torch.equal(got, want), name
    assert model.model.model.encoder.language_model.layers[3].layer_scalar == 1 + 3 / 8
    assert model.model.model.decoder.layers[3].layer_scalar == 1 + 7 / 8

    prompt, canvas = random_tokens(12), random_tokens(LENGTH, 1)
    model.run([(0, encode(prompt))])
    torch.testing.assert_close(
        one(model, refine(canvas, 12)), by_transformers(stored, prompt, canvas), rtol=0, atol=1e-4
    )


def test_a_loaded_model_generates_with_the_settings_it_was_published_with(folder):
    model = chordal.load(folder)
    prompt = random_tokens(10).tolist()
    [result] = model.generate(prompt, max_new_tokens=8, ignore_eos=True)
    [same] = model.generate(
        prompt, decoder="renoise", config=dict(model.family.settings), max_new_tokens=8, ignore_eos=True
    )
    [other] = model.generate(prompt, decoder="renoise", max_new_tokens=8, ignore_eos=True)
    assert (result.decoder, result.error, len(result.tokens)) == ("renoise", None, 8)
    assert (result.tokens, result.stats["forwards"]) == (same.tokens, same.stats["forwards"])
    assert result.stats["forwards"] <= 2 * 12 + 1 < other.stats["forwards"]


@pytest.fixture
def damaged(folder, tmp_path):
    """The same without weights, to be damaged; what it is, is told without them."""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    return tmp_path


def test_what_the_files_leave_out_is_left_to_the_decoder(damaged):
    change(damaged / "generation_config.json", sampler_config=None, t_min=None, max_denoising_steps=None)
    family = recognise(Checkpoint.open(damaged)).family
    assert set(family.settings) == {"t_max", "stability_threshold", "confidence_threshold"}
    (damaged / "generation_config.json").unlink()
    assert recognise(Checkpoint.open(damaged)).family.settings == {}


@pytest.mark.parametrize(
    "sampler",
    [{"_cls_name": "OtherSamplerConfig", "entropy_bound": 0.1}, {"entropy_bound": 0.1}, "greedy", {}],
)
def test_another_sampler_is_refused(damaged, sampler):
    change(damaged / "generation_config.json", sampler_config=sampler)
    with pytest.raises(CheckpointError, match=r"generation_config.json: sampler_config must be an Entropy"):
        recognise(Checkpoint.open(damaged))


def test_an_encoder_that_is_not_causal_is_refused(damaged):
    text = json.loads((damaged / "config.json").read_text())["text_config"]
    change(damaged / "config.json", text_config=text | {"use_bidirectional_attention": "all"})
    with pytest.raises(CheckpointError, match=r"config.json: use_bidirectional_attention 'all' is not"):
        recognise(Checkpoint.open(damaged))


def test_images_in_the_text_change_nothing_for_text(damaged):
    """Attention among the tokens of an image is what "vision" adds."""
    text = json.loads((damaged / "config.json").read_text())["text_config"]
    change(damaged / "config.json", text_config=text | {"use_bidirectional_attention": "vision"})
    assert load_model(damaged).family.kind == "uniform"
