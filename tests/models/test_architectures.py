"""Each architecture of transformers, saved, loaded and run against its own plain forward and `generate`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from chordal.decoders.autoregressive import Autoregressive
from chordal.decoders.prompt_lookup import PromptLookup
from chordal.engine import Engine
from chordal.errors import CheckpointError
from chordal.forward import Causal, Forward, Logits, Tree
from chordal.models.architecture import attention_reach, window_of
from chordal.models.load import load_model
from chordal.sequence import Sequence, StopRules

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
SLIDING, FULL = "sliding_attention", "full_attention"
TIED = {"tie_word_embeddings": True}

# All windows are shorter than the texts.
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", TIED),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1} | TIED,
    ),
    "qwen3": ("Qwen3", {"head_dim": 8} | TIED),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "gemma2": ("Gemma2", {"sliding_window": 5, "head_dim": 8, "query_pre_attn_scalar": 8} | TIED),
    "gemma3": (
        "Gemma3Text",
        {"sliding_window": 4, "layer_types": [SLIDING, FULL], "head_dim": 8, "query_pre_attn_scalar": 8}
        | TIED,
    ),
    "phi3": ("Phi3", {"sliding_window": 7}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 5, "layer_types": [SLIDING, FULL]}),
    "gpt_neox": ("GPTNeoX", {}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "head_dim": 8} | EXPERTS),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "sliding_window": 5, "head_dim": 8} | EXPERTS),
    "cohere": ("Cohere", {"logit_scale": 0.5} | TIED),
    "granite": ("Granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0} | TIED),
    "glm4_moe": ("Glm4Moe", {"head_dim": 8, "n_shared_experts": 1} | ROUTED),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "n_shared_experts": 1,
        }
        | ROUTED,
    ),
    "llama4": (
        "Llama4Text",
        {"attention_chunk_size": 6, "layer_types": ["chunked_attention", FULL], "head_dim": 8}
        | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
    ),
    "gpt2": ("GPT2", TIED),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32} | TIED),
    "falcon": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False} | TIED),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.5}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
    "starcoder2": ("Starcoder2", {"sliding_window": 6} | TIED),
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
every_tied_one = pytest.mark.parametrize(
    "name", [name for name, (_, more) in ARCHITECTURES.items() if more.get("tie_word_embeddings")]
)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """Give a seeded model of an architecture, and the folder it is saved in."""

    @functools.cache
    def save(name):
        kind, settings = ARCHITECTURES[name]
        config_class = getattr(transformers, f"{kind}Config")
        config = config_class(**(SHAPE | {"vocab_size": len(tokenizer)} | settings))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            own = transformers.AutoModelForCausalLM.from_config(config).float().eval()
            for weight in own.parameters():
                # Large enough that texts differ and depend on the context, embeddings less than the rest.
                if weight.dim() > 1:
                    torch.nn.init.normal_(weight, std=0.05 if len(tokenizer) in weight.shape else 0.4)
        folder = tmp_path_factory.mktemp("architectures") / name
        own.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return own, folder

    return save


@pytest.fixture(scope="module")
def loaded(saved):
    """Give the model that a folder is loaded as."""
    return functools.cache(lambda name: load_model(saved(name)[1], max_rows=8))


def random_tokens(model, num, seed=0):
    return np.random.default_rng([seed, num]).integers(5, model.vocab_size, num)


def own_logits(own, tokens):
    with torch.inference_mode():
        return own(torch.from_numpy(tokens)[None], use_cache=False).logits[0]


def feed(tokens, start):
    at = np.arange(start, start + len(tokens))
    return Forward(tokens, at, Causal(), Logits(np.arange(len(tokens))), slots=at)


def decode(model, decoder, prompts, length):
    """Decode prompts together and give the tokens of each."""
    engine, stop = Engine(model), StopRules(max_new_tokens=length, eos_ids=())
    seqs = [engine.submit(decoder, Sequence(prompt, family=model.family, stop=stop)) for prompt in prompts]
    engine.run()
    return [seq.output.tolist() for seq in seqs]


@every_architecture
def test_logits_in_one_pass_in_pieces_and_along_a_tree_are_its_own(saved, loaded, name):
    own, model = saved(name)[0], loaded(name)
    tokens = random_tokens(model, 24)
    want = own_logits(own, tokens)

    def assert_own(got, expected):
        assert (got - expected).abs().max() < 1e-4 * want.abs().max()

    [whole] = model.run([(0, feed(tokens, 0))])
    assert_own(whole.logits, want)
    for start, end in itertools.pairwise((0, 9, 10, 11, 24)):
        [piece] = model.run([(1, feed(tokens[start:end], start))])
        assert_own(piece.logits, want[start:end])
    # Two continuations of the same 20 tokens, of which the second goes on as the text does.
    nodes = np.r_[random_tokens(model, 1, seed=1), tokens[20:]]
    positions = np.r_[20, np.arange(20, 24)]
    tree = Forward(nodes, positions, Tree(20, (-1, -1, 1, 2, 3)), Logits(np.arange(5)))
    [branches] = model.run([(0, tree)])
    assert_own(branches.logits[1:], want[20:])
    assert_own(branches.logits[:1], own_logits(own, np.r_[tokens[:20], nodes[0]])[-1:])
    for row in (0, 1):
        model.free_row(row)


@every_architecture
def test_texts_decoded_together_are_those_of_generate_alone(saved, loaded, name):
    own, model = saved(name)[0], loaded(name)
    prompts = [random_tokens(model, num) for num in (1, 6, 17)]
    want = [
        own.generate(
            torch.from_numpy(prompt)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=14,
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert decode(model, Autoregressive(), prompts, 14) == want
    # The model says something, and not the same whatever was said before.
    assert len(set(itertools.chain(*want))) > 10
    assert len({output[-1] for output in want}) > 1


@every_architecture
def test_a_blend_of_one_token_is_that_token(loaded, name):
    """Scaled embeddings too are scaled once."""
    model = loaded(name)
    tokens, others = random_tokens(model, 12), random_tokens(model, 12, seed=1)
    blend = np.stack([others, tokens], 1), np.tile([0.0, 1.0], (12, 1))
    [plain] = model.run([(0, feed(tokens, 0))])
    [mixed] = model.run([(0, dataclasses.replace(feed(others, 0), blend=blend))])
    assert torch.equal(mixed.logits, plain.logits)
    model.free_row(0)


@every_architecture
def test_drafts_change_nothing(loaded, name):
    model = loaded(name)
    prompts = [np.tile(random_tokens(model, num), 3) for num in (2, 5)]
    plain = decode(model, Autoregressive(), prompts, 12)
    # Of what has been said already, so that some is kept and some is not.
    prompts = [np.r_[prompt, text, prompt] for prompt, text in zip(prompts, plain, strict=True)]
    plain = decode(model, Autoregressive(), prompts, 12)
    assert decode(model, PromptLookup(), prompts, 12) == plain


@every_tied_one
def test_tied_embeddings_are_stored_once_and_shared(saved, loaded, name):
    _, folder = saved(name)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert sum(weight.startswith(("lm_head", "embed_out")) for weight in file.keys()) == 0  # noqa: SIM118
    model = loaded(name).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_window_that_the_architecture_has_no_use_for_is_none():
    """Its keys used to be believed in every config."""
    stray = {"sliding_window": 4, "layer_types": [SLIDING] * 2, "num_hidden_layers": 2}
    assert attention_reach(transformers.LlamaConfig(**stray)) == {FULL: None}
    assert attention_reach(transformers.Qwen2Config(**stray, use_sliding_window=True)) == {SLIDING: 4}
    assert attention_reach(transformers.Qwen2Config(sliding_window=4)) == {FULL: None}


def test_a_window_ends_where_positions_would_turn_otherwise():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    shape = SHAPE | {"original_max_position_embeddings": 32}
    config = transformers.Phi3Config(**shape, rope_parameters=rope | {"rope_theta": 1e4})
    assert window_of(config) == 32
    assert window_of(transformers.Phi3Config(**SHAPE)) == 96


# What is refused.


@pytest.fixture
def refuse(saved, tmp_path):
    """Give the one line that a folder with another config is refused with."""

    def refuse(config):
        _, good = saved("llama")
        folder = shutil.copytree(good, tmp_path / config.model_type)
        config.save_pretrained(folder)
        with pytest.raises(CheckpointError) as error:
            load_model(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    return refuse


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("Mamba", {}, "MambaForCausalLM keeps a running state"),
        ("RecurrentGemma", {}, "RecurrentGemmaForCausalLM keeps a running state"),
        ("Lfm2", {"layer_types": ["conv", FULL]}, "lfm2 has layers of the kind conv"),
        ("DeepseekV32", {}, "deepseek_v32 has layers of the kind indexed_attention"),
        ("Bart", {}, "BartForCausalLM is not a decoder-only language model."),
        ("Bert", {}, "BertLMHeadModel is not a decoder-only language model."),
        ("T5", {}, "no causal language model of transformers"),
        ("Bloom", {}, "BloomForCausalLM has no use for position_ids, so its tokens cannot be placed freely."),
        ("Falcon", {"alibi": True}, "FalconForCausalLM has no use for position_ids"),
        ("Mpt", {}, "MptForCausalLM has no use for position_ids"),
    ],
)
def test_what_slots_and_positions_cannot_express_is_refused(refuse, kind, settings, reason):
    shape = {"num_hidden_layers": 2} if "layer_types" in settings else {}
    assert reason in refuse(getattr(transformers, f"{kind}Config")(**shape, **settings))


def test_an_architecture_that_goes_by_where_keys_lie_is_refused(tokenizer, tmp_path):
    """GPT-Neo has masks of its own, cut from the triangle of all slots."""
    config = transformers.GPTNeoConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
    )
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match="GPTNeoForCausalLM gives other logits when its tokens are placed freely"
    ):
        load_model(tmp_path)
