"""Tiny checkpoints in the layouts of LLaDA, iLLaDA, LLaDA-MoE and LLaDA2.

Every key of the published config.json is there, with small sizes; where a published file is not known
word for word, a comment says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from chordal.testing.published import (
    NUM_BYTES,
    added_tokens,
    byte_tokenizer,
    changed,
    random_weights,
    write_checkpoint,
)

Shapes = dict[str, tuple[int, ...]]

_LLADA_TOKENS = (
    "<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mdm_mask|>", "<role>", "</role>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
_ILLADA_TOKENS = ("<[MASK]>", "<[BOS]>", "<[EOS]>")
_ILLADA_FIRST = 5
_MOE_TOKENS = ("<|startoftext|>", "<|endoftext|>", "[CLS]", "<|mask|>", "<role>", "</role>", "<|role_end|>")

# More rows than tokens, as published.
_NUM_ROWS = 272

# It always opens the answer, asked or not.
_LLADA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
_MOE_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<role>SYSTEM</role>detailed thinking off<|role_end|>' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'HUMAN' if message['role'] == 'user' else message['role'] | upper %}"
    "{{ '<role>' + role + '</role>' + message['content'] + '<|role_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)

_LLADA_CONFIG: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": _NUM_ROWS,
    "eos_token_id": 257,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 260,
    "max_sequence_length": 128,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": 257,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": _NUM_ROWS,
    "weight_tying": False,
}

# Known are the architecture, the sizes, that the head is tied, and what the model's code reads.
_ILLADA_CONFIG: dict[str, Any] = {
    "architectures": ["ILLaDAForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_illada.ILLaDAConfig",
        "AutoModel": "modeling_illada.ILLaDAForCausalLM",
        "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
    },
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 56,
    "layer_norm_eps": None,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "illada",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "pad_token_id": None,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "transformers_version": "4.57.1",
    "vocab_size": _NUM_ROWS,
}

# The keys are those of its config class; the values of the router's are not known.
_LLADA_MOE_CONFIG: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_lladamoe.LLaDAConfig",
        "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
        "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
    },
    "clip_qkv": None,
    "dense_intermediate_size": 96,
    "eos_token_id": 257,
    "expert_intermediate_size": 24,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "max_position_embeddings": 128,
    "model_type": "llada",
    "moe_layer_freq": [1, 1],
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": None,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "pad_token_id": 257,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 1,
    "router_aux_loss_coef": 0.01,
    "router_num_group": None,
    "router_topk_group": None,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.2",
    "use_cache": False,
    "vocab_size": _NUM_ROWS,
}

_LLADA2_CONFIG: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "dtype": "bfloat16",
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "max_window_layers": 28,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 8,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": 257,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "rotary_dim": 8,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "transformers_version": "4.57.1",
    "use_bias": False,
    "use_cache": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False,
    "vocab_size": _NUM_ROWS,
}


def write_llada(folder: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a checkpoint like LLaDA-8B-Base, -Instruct and LLaDA-1.5.

    Args:
        folder: Where to.
        dtype: Of its weights.
        **changes: To its config.json; None removes a key.
    """
    config = changed(_LLADA_CONFIG, changes)
    width, inner, rows = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    kv_width = width // config["n_heads"] * config["n_kv_heads"]
    shapes: Shapes = {"model.transformer.wte.weight": (rows, width)}
    for layer in range(config["n_layers"]):
        shapes |= {
            f"model.transformer.blocks.{layer}.{name}.weight": shape
            for name, shape in {
                "q_proj": (width, width),
                "k_proj": (kv_width, width),
                "v_proj": (kv_width, width),
                "attn_out": (width, width),
                "ff_out": (width, inner),
                "ff_proj": (inner, width),
                "up_proj": (inner, width),
                "attn_norm": (width,),
                "ff_norm": (width,),
            }.items()
        }
    shapes["model.transformer.ln_f.weight"] = (width,)
    if not config["weight_tying"]:
        shapes["model.transformer.ff_out.weight"] = (rows, width)
    weights = random_weights(shapes, dtype=dtype)
    # No field says that the added token is the mask.
    files = _tokenizer_files(
        _LLADA_TOKENS,
        add_bos_token=False,
        add_eos_token=False,
        additional_special_tokens=["<role>", "</role>"],
        bos_token="<|startoftext|>",
        chat_template=_LLADA_TEMPLATE,
        cls_token="[CLS]",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    return write_checkpoint(folder, config, weights, files, shards=3)


def write_illada(
    folder: Path, *, has_head: bool = False, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Write a checkpoint like iLLaDA-8B-Base and -Instruct.

    Args:
        folder: Where to.
        has_head: Whether the output embedding is stored, though it is the input embedding.
        dtype: Of its weights.
        **changes: To its config.json; None removes a key.
    """
    config = changed(_ILLADA_CONFIG, changes)
    shapes = _llama_shapes(config)
    for layer in range(config["num_hidden_layers"]):
        shapes |= _mlp(f"model.layers.{layer}.mlp", config["intermediate_size"], config["hidden_size"])
    weights = random_weights(shapes, dtype=dtype)
    if has_head:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    # Neither a field for the mask token nor a chat template is known.
    files = _tokenizer_files(_ILLADA_TOKENS, first=_ILLADA_FIRST, bos_token="<[BOS]>", eos_token="<[EOS]>")
    return write_checkpoint(folder, config, weights, files)


def write_llada_moe(folder: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a checkpoint like LLaDA-MoE-7B-A1B-Base and -Instruct.

    Args:
        folder: Where to.
        dtype: Of its weights.
        **changes: To its config.json; None removes a key.
    """
    config = changed(_LLADA_MOE_CONFIG, changes)
    width, head_dim = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    shapes = _llama_shapes(config)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        if not config["moe_layer_freq"][layer]:
            shapes |= _mlp(f"{at}.mlp", config["dense_intermediate_size"], width)
            continue
        shapes[f"{at}.mlp.gate.weight"] = (config["num_experts"], width)
        for expert in range(config["num_experts"]):
            shapes |= _mlp(f"{at}.mlp.experts.{expert}", config["expert_intermediate_size"], width)
    shapes["lm_head.weight"] = (config["vocab_size"], width)
    weights = random_weights(shapes, dtype=dtype)
    return write_checkpoint(folder, config, weights, _moe_tokenizer_files())


def write_llada2(folder: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a checkpoint like those of LLaDA2.0 and LLaDA2.1, whose expert biases are always float32.

    Args:
        folder: Where to.
        dtype: Of its weights.
        **changes: To its config.json; None removes a key.
    """
    config = changed(_LLADA2_CONFIG, changes)
    width, head_dim, experts = config["hidden_size"], config["head_dim"], config["num_experts"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    inner, rows = config["moe_intermediate_size"], (heads + 2 * kv_heads) * head_dim
    shapes: Shapes = {"model.word_embeddings.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (width,),
            f"{at}.attention.query_key_value.weight": (rows, width),
            **({f"{at}.attention.query_key_value.bias": (rows,)} if config["use_qkv_bias"] else {}),
            f"{at}.attention.query_layernorm.weight": (head_dim,),
            f"{at}.attention.key_layernorm.weight": (head_dim,),
            f"{at}.attention.dense.weight": (width, heads * head_dim),
            f"{at}.post_attention_layernorm.weight": (width,),
        }
        if layer < config["first_k_dense_replace"]:
            shapes |= _mlp(f"{at}.mlp", config["intermediate_size"], width)
            continue
        shapes |= {f"{at}.mlp.gate.weight": (experts, width), f"{at}.mlp.gate.expert_bias": (experts,)}
        for expert in range(experts):
            shapes |= _mlp(f"{at}.mlp.experts.{expert}", inner, width)
        shapes |= _mlp(f"{at}.mlp.shared_experts", inner * config["num_shared_experts"], width)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}
    weights = random_weights(shapes, dtype=dtype, float32="expert_bias")
    files = _moe_tokenizer_files(mask_token="<|mask|>")
    files["generation_config.json"] = {"pad_token_id": config["pad_token_id"]}
    return write_checkpoint(folder, config, weights, files, shards=3)


def _mlp(at: str, inner: int, width: int) -> Shapes:
    return {
        f"{at}.gate_proj.weight": (inner, width),
        f"{at}.up_proj.weight": (inner, width),
        f"{at}.down_proj.weight": (width, inner),
    }


def _llama_shapes(config: dict[str, Any]) -> Shapes:
    """Give what a layout has in common with Llama: all but the second half of a layer and the head."""
    width = config["hidden_size"]
    kv_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (width,),
            f"{at}.self_attn.q_proj.weight": (width, width),
            f"{at}.self_attn.k_proj.weight": (kv_width, width),
            f"{at}.self_attn.v_proj.weight": (kv_width, width),
            f"{at}.self_attn.o_proj.weight": (width, width),
            f"{at}.post_attention_layernorm.weight": (width,),
        }
    return shapes | {"model.norm.weight": (width,)}


def _moe_tokenizer_files(**fields: Any) -> dict[str, Any]:
    return _tokenizer_files(
        _MOE_TOKENS,
        add_bos_token=False,
        add_eos_token=False,
        bos_token="<|startoftext|>",
        chat_template=_MOE_TEMPLATE,
        cls_token="[CLS]",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        **fields,
    )


def _tokenizer_files(tokens: tuple[str, ...], *, first: int = NUM_BYTES, **fields: Any) -> dict[str, Any]:
    config = {
        "added_tokens_decoder": added_tokens(tokens, first=first),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": byte_tokenizer(tokens, first=first),
        "tokenizer_config.json": dict(sorted((config | fields).items())),
    }
