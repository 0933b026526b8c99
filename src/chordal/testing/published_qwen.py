"""Tiny checkpoints of the published diffusion models that are built on Qwen2 and Qwen3.

Each has the keys, weight names, files and odd spellings of the real one; only sizes and token ids are
small. Dream's Base, Instruct and Coder are alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from chordal.testing.published import (
    NUM_BYTES,
    added_tokens,
    byte_vocabulary,
    changed,
    random_weights,
    special_ids,
    write_checkpoint,
)

# More than there are tokens, as published.
_VOCAB_SIZE = 320

# The last is never used: Qwen's tokenizers split numbers into digits first.
_MERGES = ["t h", "th e", "\u0120 the", "1 2"]
_FIRST_SPECIAL = NUM_BYTES + len(_MERGES)

_CHAT = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_QWEN3 = *_CHAT, "<tool_response>", "</tool_response>", "<think>", "</think>"

_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def write_dream(folder: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a Dream: a Qwen2 whose tokenizer is a class of its own, without a tokenizer.json.

    Args:
        folder: Where to.
        dtype: Of its weights.
        **changes: To its config.json; None removes a key.
    """
    special = (*_CHAT, "<|beginoftext|>", "<|mask|>")
    ids = special_ids(special, first=_FIRST_SPECIAL)
    end = ids["<|endoftext|>"]
    config = {
        "_name_or_path": "Dream-org/Dream-v0-Instruct-7B",
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        "bos_token_id": end,
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "mask_token_id": ids["<|mask|>"],
        "max_position_embeddings": 256,
        "max_window_layers": 3,
        "model_type": "Dream",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": end,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": _VOCAB_SIZE,
    }
    generation = {
        "_from_model_config": True,
        "alg": "origin",
        "alg_temp": None,
        "bos_token_id": end,
        "eos_token_id": end,
        "eps": 0.001,
        "mask_token_id": None,
        "output_history": False,
        "pad_token_id": end,
        "steps": 512,
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
        "transformers_version": "4.46.2",
    }
    tokenizer = _tokenizer_config(
        special,
        additional=("<|beginoftext|>", "<|mask|>"),
        auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        bos_token="<|beginoftext|>",
        chat_template=_TEMPLATE,
        mask_token="<|mask|>",
        tokenizer_class="DreamTokenizer",
    )
    files = {
        **_tokenizer_files(special),
        "tokenizer_config.json": tokenizer,
        "special_tokens_map.json": {
            "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
            "bos_token": "<|beginoftext|>",
            "eos_token": "<|endoftext|>",
            "mask_token": "<|mask|>",
            "pad_token": "<|endoftext|>",
        },
        "generation_config.json": generation,
    }
    return _write(folder, changed(config, changes), "qwen2", files, dtype, shards=4)


def write_sdar(folder: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a dense SDAR: a Qwen3 whose block length is in no file and whose mask has two spellings.

    Args:
        folder: Where to.
        dtype: Of its weights.
        **changes: To its config.json; None removes a key.
    """
    special = (*_QWEN3, "<|MASK|>")
    end = special_ids(special, first=_FIRST_SPECIAL)["<|endoftext|>"]
    config = {
        "architectures": ["SDARForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_implementation": "flex_attention",
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "bos_token_id": end,
        "debug": False,
        "eos_token_id": end,
        "ep_size": 1,
        "fuse_cross_entropy": True,
        "head_dim": 32,  # as in the 4B one, heads are wider than the hidden size together
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "max_window_layers": 3,
        "micro_forward": False,
        "model_type": "sdar",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "skip_checkpoint": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.4",
        "use_cache": False,
        "use_deepep": False,
        "use_sliding_window": False,
        "vocab_size": _VOCAB_SIZE,
    }
    code = {"AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", None]}
    files = {
        **_sdar_files(special, spelling="<MASK>", auto_map=code, chat_template=_TEMPLATE),
        "generation_config.json": _qwen_generation_config(do_sample=True, temperature=0.6, top_p=0.95),
    }
    return _write(folder, changed(config, changes), "qwen3", files, dtype, shards=1)


def write_sdar_moe(folder: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write an SDAR-MoE: a Qwen3-MoE with a weight for each expert and a file for each layer.

    Args:
        folder: Where to.
        dtype: Of its weights.
        **changes: To its config.json; None removes a key.
    """
    special = (*_QWEN3, "<|MASK|>")
    end = special_ids(special, first=_FIRST_SPECIAL)["<|endoftext|>"]
    config = {
        "architectures": ["SDARMoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
            "AutoModel": "modeling_sdar_moe.SDARMoeModel",
            "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
        },
        "bos_token_id": end,
        "decoder_sparse_step": 1,
        "eos_token_id": end,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "max_window_layers": 3,
        "mlp_only_layers": [],
        "model_type": "sdar_moe",
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": _VOCAB_SIZE,
    }
    files = {
        **_sdar_files(special, spelling="<|MASK|>", extra_special_tokens={}, padding_side="right"),
        "chat_template.jinja": _TEMPLATE,
        "generation_config.json": _qwen_generation_config(do_sample=True, temperature=0.6, top_p=0.95),
    }
    return _write(folder, changed(config, changes), "qwen3_moe", files, dtype, shards="by layer")


def write_fast_dllm_v2(
    folder: Path,
    *,
    size: Literal["7B", "1.5B"] = "7B",
    has_head: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> Path:
    """Write a Fast-dLLM v2: a Qwen2 that names its mask as an added token and nowhere else.

    Args:
        folder: Where to.
        size: The 1.5B one has tied embeddings and one key less.
        has_head: Whether `lm_head.weight` is stored; if tied, as a copy of the embedding.
        dtype: Of its weights.
        **changes: To its config.json; None removes a key.
    """
    special = (*_CHAT, "|<MASK>|")
    ids = special_ids(special, first=_FIRST_SPECIAL)
    config = {
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
            "AutoModel": "modeling.Fast_dLLM_QwenModel",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
        },
        "bd_size": 8,
        "bos_token_id": ids["<|endoftext|>"],
        "conplemenrary_mask": True,
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_types": ["full_attention"] * 3,
        "max_position_embeddings": 256,
        "max_window_layers": 3,
        "model_type": "Fast_dLLM_Qwen",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": ids["<|im_end|>"],
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": size == "1.5B",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.53.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": _VOCAB_SIZE,
    }
    if size == "1.5B":
        del config["conplemenrary_mask"]
    generation = _qwen_generation_config(do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.05)
    files = {
        **_tokenizer_files(special),
        "tokenizer.json": _tokenizer_json(special),
        "tokenizer_config.json": _tokenizer_config(
            special,
            additional=("|<MASK>|",),
            eos_token="<|im_end|>",
            extra_special_tokens={},
            padding_side="right",
        ),
        "special_tokens_map.json": {
            "additional_special_tokens": ["|<MASK>|"],
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
        "chat_template.jinja": _TEMPLATE,
        "generation_config.json": generation,
    }
    shards = 1 if size == "1.5B" else 4
    return _write(folder, changed(config, changes), "qwen2", files, dtype, shards=shards, has_head=has_head)


def write_wedlm(
    folder: Path, *, size: Literal["8B", "7B"] = "8B", dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Write a WeDLM, whose mask is a number in its config.json and has no text of its own.

    Args:
        folder: Where to.
        size: The 8B one is a Qwen3, the 7B one a Qwen2.
        dtype: Of its weights.
        **changes: To its config.json; None removes a key.
    """
    special = _QWEN3 if size == "8B" else (*_CHAT, "<tool_call>")
    ids = special_ids(special, first=_FIRST_SPECIAL)
    end = ids["<|endoftext|>"]
    config = {
        "architectures": ["WeDLMForCausalLM"],
        "attention_bias": size == "7B",
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_wedlm.WeDLMConfig",
            "AutoModel": "modeling_wedlm.WeDLMModel",
            "AutoModelForCausalLM": "modeling_wedlm.WeDLMForCausalLM",
        },
        "bos_token_id": None,
        "dtype": "bfloat16",
        "eos_token_id": end,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_types": ["full_attention"] * 3,
        "mask_token_id": _FIRST_SPECIAL + len(_CHAT),
        "max_position_embeddings": 256,
        "max_window_layers": 3,
        "model_type": "wedlm",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": end,
        "qk_norm": size == "8B",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": _VOCAB_SIZE,
    }
    files = {
        **_tokenizer_files(special),
        "tokenizer.json": _tokenizer_json(special),
        "tokenizer_config.json": _tokenizer_config(special, additional=_CHAT[1:], chat_template=_TEMPLATE),
        "special_tokens_map.json": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    }
    backbone = "qwen3" if size == "8B" else "qwen2"
    return _write(folder, changed(config, changes), backbone, files, dtype, shards=4)


def _write(
    folder: Path,
    config: Mapping[str, Any],
    backbone: str,
    files: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    shards: int | Literal["by layer"],
    has_head: bool = True,
) -> Path:
    """Write seeded weights under the names of Qwen's own checkpoints, and everything else."""
    weights = random_weights(_shapes(config, backbone), dtype=dtype)
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if not has_head:
        del weights["lm_head.weight"]
    if shards == "by layer":
        places = dict.fromkeys(weights, "others.safetensors")
        for name in weights:
            if name.startswith("model.layers."):
                places[name] = f"layer-{name.split('.')[2]}-ep-0-of-1.safetensors"
        return write_checkpoint(folder, config, weights, files, shards=places)
    return write_checkpoint(folder, config, weights, files, shards=shards)


def _shapes(config: Mapping[str, Any], backbone: str) -> dict[str, tuple[int, ...]]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}

    def mlp(name: str, inner: int) -> None:
        shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (inner, hidden)
        shapes[f"{name}.down_proj.weight"] = (hidden, inner)

    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes[f"{name}.input_layernorm.weight"] = (hidden,)
        for part, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            shapes[f"{name}.self_attn.{part}.weight"] = (rows, hidden)
            if backbone == "qwen2":
                shapes[f"{name}.self_attn.{part}.bias"] = (rows,)
        if backbone != "qwen2":
            shapes[f"{name}.self_attn.q_norm.weight"] = shapes[f"{name}.self_attn.k_norm.weight"] = (size,)
        shapes[f"{name}.self_attn.o_proj.weight"] = (hidden, query)
        shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
        if backbone == "qwen3_moe":
            shapes[f"{name}.mlp.gate.weight"] = (config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                mlp(f"{name}.mlp.experts.{expert}", config["moe_intermediate_size"])
        else:
            mlp(f"{name}.mlp", config["intermediate_size"])
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _vocabulary() -> dict[str, int]:
    merged = (pair.replace(" ", "") for pair in _MERGES)
    return byte_vocabulary() | {text: NUM_BYTES + index for index, text in enumerate(merged)}


def _tokenizer_files(special: Sequence[str]) -> dict[str, Any]:
    lines = "\n".join(_MERGES)
    return {
        "vocab.json": _vocabulary(),
        "merges.txt": f"#version: 0.2\n{lines}\n",
        "added_tokens.json": special_ids(special, first=_FIRST_SPECIAL),
    }


def _tokenizer_json(special: Sequence[str]) -> dict[str, Any]:
    """Give the content of a tokenizer.json with the pieces that Qwen's tokenizers cut a text into."""
    merges: Any = [tuple(pair.split()) for pair in _MERGES]
    tokenizer = transformers.Qwen2Tokenizer(_vocabulary(), merges).backend_tokenizer
    tokenizer.add_special_tokens(list(special))
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def _tokenizer_config(special: Sequence[str], *, additional: Sequence[str], **more: Any) -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added_tokens(special, first=_FIRST_SPECIAL),
        "additional_special_tokens": list(additional),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        **more,
    }


def _sdar_files(special: Sequence[str], *, spelling: str, **more: Any) -> dict[str, Any]:
    """Give SDAR's tokenizer files, of which only tokenizer_config.json says what the mask token is."""
    spelled = [spelling if token == "<|MASK|>" else token for token in special]
    config = _tokenizer_config(special, additional=(*_CHAT[1:], "<|MASK|>"), mask_token="<|MASK|>", **more)
    for token in config["added_tokens_decoder"].values():
        token["special"] = token["content"] in _CHAT
    return {
        **_tokenizer_files(spelled),
        "tokenizer.json": _tokenizer_json(spelled),
        "tokenizer_config.json": config,
        "special_tokens_map.json": {
            "additional_special_tokens": [*_CHAT[1:], spelling],
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
    }


def _qwen_generation_config(**more: Any) -> dict[str, Any]:
    """Give Qwen's own generation_config.json, which the diffusion models kept; its law is not theirs."""
    ids = special_ids(_CHAT, first=_FIRST_SPECIAL)
    end = ids["<|endoftext|>"]
    stops = [ids["<|im_end|>"], end]
    return {"bos_token_id": end, "eos_token_id": stops, "pad_token_id": end, "top_k": 20, **more}
