"""The published diffusion models that came with code of their own, as data.

Each is a backbone that transformers has, under other names and other config keys, with facts that no
config of transformers has a place for. A table entry says how to recognise one, how to read its config
as the backbone's, how its weights are called, and what decoding it takes; the code that came with the
checkpoint is never run. Where the checkpoint's own files state a fact, they are believed.

Sources: LLaDA (arXiv 2502.09992), LLaDA-MoE (2509.24389), LLaDA2 (2512.15745, 2602.08676), Dream
(2508.15487), SDAR (2510.06303), Fast-dLLM v2 (2509.26328), WeDLM (2512.22737).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chordal.errors import CheckpointError
from chordal.models.family import Kind
from chordal.models.weights import Rename, Split, WeightMap

Facts = Mapping[str, Any]


def _as_it_is(config: Facts) -> dict[str, Any]:
    """Read a config whose keys are the backbone's."""
    return {key: value for key, value in config.items() if key not in ("model_type", "architectures")}


@dataclass(frozen=True, kw_only=True)
class Published:
    """One family of published checkpoints.

    Attributes:
        name: Family name.
        architecture: What `architectures` of its config.json names.
        model_type: What `model_type` says; None where several families share one.
        backbone: What transformers calls the same computation, e.g. "Llama", from its config.json.
        needs: Keys its config.json must have.
        without: Keys it must not have, with what one of them makes of the model.
        only: Keys with the values that are supported, where others would compute something else;
            missing keys are as if they had the first.
        config: Reads its config.json as arguments of the backbone's config class.
        weights: Its weight map, from its config.json.
        kind: See `Family`, as the next two.
        shift: Of its logits.
        block_length: Where no file says it.
        block_key: Key of config.json that may say it.
        mask_token: Its mask token, for tokenizers that do not mark one.
        mask_id: The mask token where no file names one.
        stop_tokens: Tokens that end an answer besides what its files declare, where they exist.
        tokenizer: transformers class of its tokenizer files; None is what they name.
        settings: Settings of the default decoder, where the published ones are not ours.
    """

    name: str
    architecture: str
    model_type: str | None
    backbone: Callable[[Facts], str]
    needs: tuple[str, ...]
    without: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    config: Callable[[Facts], dict[str, Any]] = _as_it_is
    weights: Callable[[Facts], WeightMap] = lambda config: WeightMap()
    kind: Kind
    shift: int = 0
    block_length: int | None = None
    block_key: str | None = None
    mask_token: str | None = None
    mask_id: int | None = None
    stop_tokens: tuple[str, ...] = ()
    tokenizer: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def identify(config: Facts) -> Published | None:
    """Find the family of a config.json, None if it is none of the table's.

    Raises:
        CheckpointError: The config claims a family but is not like its checkpoints.
    """
    architectures = config.get("architectures") or ()
    model_type = config.get("model_type")
    found = [family for family in FAMILIES if family.architecture in architectures]
    found = found or [family for family in FAMILIES if family.model_type == model_type is not None]
    if not found:
        return None
    family = found[0]
    for key, meaning in family.without.items():
        if config.get(key) is not None:
            raise CheckpointError(
                f"config.json: {family.name} with {key} {config[key]!r} is not supported; {meaning}."
            )
    seen = f"architectures {list(architectures)}, model_type {model_type!r}"
    if missing := [key for key in family.needs if key not in config]:
        raise CheckpointError(
            f"config.json says {seen}, but a {family.name} checkpoint has {', '.join(family.needs)}; missing "
            f"here: {', '.join(missing)}. Seen: {', '.join(sorted(config))}."
        )
    for key, values in family.only.items():
        if config.get(key, values[0]) not in values:
            raise CheckpointError(
                f"config.json: {family.name} with {key} {config[key]!r} is not supported; it must be "
                f"{' or '.join(map(repr, values))}."
            )
    return family


def _rope(config: Facts, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": config["rope_theta"], **more}


def _llada_config(config: Facts) -> dict[str, Any]:
    heads = config["n_heads"]
    return {
        "vocab_size": config.get("embedding_size") or config["vocab_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": config["mlp_hidden_size"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("n_kv_heads")
        or (1 if config.get("multi_query_attention") else heads),
        "max_position_embeddings": config["max_sequence_length"],
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_parameters": _rope(config),
        "tie_word_embeddings": config["weight_tying"],
        "bos_token_id": None,
        "eos_token_id": config.get("eos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
    }


def _llada_weights(config: Facts) -> WeightMap:
    block, layer = "model.transformer.blocks.{n}.", "model.layers.{n}."
    inside = {
        "attn_norm": "input_layernorm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj",
        "ff_norm": "post_attention_layernorm",
        "ff_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj",
    }
    return WeightMap(
        (
            Rename("model.transformer.wte.weight", "model.embed_tokens.weight"),
            Rename("model.transformer.ln_f.weight", "model.norm.weight"),
            Rename("model.transformer.ff_out.weight", "lm_head.weight"),
            *(Rename(f"{block}{theirs}.weight", f"{layer}{ours}.weight") for theirs, ours in inside.items()),
        )
    )


def _llada_moe_config(config: Facts) -> dict[str, Any]:
    frequency = config.get("moe_layer_freq") or [1] * config["num_hidden_layers"]
    return {
        **_as_it_is(config),
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "intermediate_size": config["dense_intermediate_size"],
        "moe_intermediate_size": config["expert_intermediate_size"],
        "mlp_only_layers": [layer for layer, is_moe in enumerate(frequency) if not is_moe],
        "decoder_sparse_step": 1,
        # Fixed in the published model, whatever the key says.
        "norm_topk_prob": False,
        "rope_parameters": _rope(config),
        "use_sliding_window": False,
    }


def _llada2_config(config: Facts) -> dict[str, Any]:
    return {
        **_as_it_is(config),
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": config["num_shared_experts"],
        "attention_bias": config.get("use_qkv_bias", False),
        # The published model normalises queries and keys, and the weights of several experts, whatever the
        # keys say.
        "use_qk_norm": True,
        "norm_topk_prob": config["num_experts_per_tok"] > 1,
        "rope_parameters": _rope(config, partial_rotary_factor=config["partial_rotary_factor"]),
        "num_nextn_predict_layers": 0,
    }


def _llada2_weights(config: Facts) -> WeightMap:
    theirs, ours = "model.layers.{n}.attention.", "model.layers.{n}.self_attn."
    size = config["head_dim"]
    query, key = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return WeightMap(
        (
            Rename("model.word_embeddings.weight", "model.embed_tokens.weight"),
            *(
                Split(
                    f"{theirs}query_key_value.{part}",
                    (f"{ours}q_proj.{part}", f"{ours}k_proj.{part}", f"{ours}v_proj.{part}"),
                    (query, key, key),
                )
                for part in ("weight", "bias")
            ),
            Rename(f"{theirs}dense.weight", f"{ours}o_proj.weight"),
            Rename(f"{theirs}query_layernorm.weight", f"{ours}q_norm.weight"),
            Rename(f"{theirs}key_layernorm.weight", f"{ours}k_norm.weight"),
            Rename(
                "model.layers.{n}.mlp.gate.expert_bias", "model.layers.{n}.mlp.gate.e_score_correction_bias"
            ),
        )
    )


def _wedlm_backbone(config: Facts) -> str:
    """WeDLM-8B is a Qwen3 and WeDLM-7B a Qwen2; two keys, with these defaults, tell which."""
    has_bias, has_norm = config.get("attention_bias", True), config.get("qk_norm", False)
    if has_bias == has_norm:
        raise CheckpointError(
            f"config.json: wedlm needs either attention_bias or qk_norm; got {has_bias} and {has_norm}."
        )
    return "Qwen3" if has_norm else "Qwen2"


def _wedlm_config(config: Facts) -> dict[str, Any]:
    # Where it is left out, Qwen3 would have heads of 128.
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {**_as_it_is(config), "head_dim": size}


_QWEN = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)

FAMILIES = (
    Published(
        name="llada",
        architecture="LLaDAModelLM",
        model_type="llada",
        backbone=lambda config: "Llama",
        needs=(
            "d_model", "n_heads", "n_layers", "mlp_hidden_size", "max_sequence_length", "rms_norm_eps",
            "rope_theta", "weight_tying", "vocab_size", "block_type", "layer_norm_type", "activation_type",
            "rope",
        ),
        only={
            "block_type": ("llama",),
            "layer_norm_type": ("rms",),
            "activation_type": ("silu",),
            "rope": (True,),
            "alibi": (False,),
            "attention_layer_norm": (False,),
            "include_bias": (False,),
            "include_qkv_bias": (False, None),
            "input_emb_norm": (False,),
            "scale_logits": (False,),
            "block_group_size": (1,),
            "layer_norm_with_affine": (True,),
        },
        config=_llada_config,
        weights=_llada_weights,
        kind="masked",
        mask_token="<|mdm_mask|>",
        stop_tokens=("<|eot_id|>",),
    ),
    Published(
        name="illada",
        architecture="ILLaDAForCausalLM",
        model_type="illada",
        backbone=lambda config: "Llama",
        needs=(*_QWEN, "rms_norm_eps", "rope_theta", "tie_word_embeddings"),
        only={"layer_norm_eps": (None,)},
        kind="masked",
        mask_token="<[MASK]>",
    ),
    Published(
        name="llada_moe",
        architecture="LLaDAMoEModelLM",
        model_type=None,  # it says "llada" as the dense one does
        backbone=lambda config: "Qwen3Moe",
        needs=(
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts",
            "num_experts_per_tok", "expert_intermediate_size", "dense_intermediate_size", "rms_norm_eps",
            "rope_theta",
        ),
        only={
            "qk_layernorm": (True,),
            "partial_rotary_factor": (1,),
            "moe_router_enable_expert_bias": (None, False),
            "shared_expert_intermediate_size": (None, 0),
            "clip_qkv": (None,),
            "attention_bias": (False,),
        },
        config=_llada_moe_config,
        kind="masked",
        mask_token="<|mask|>",
        mask_id=156895,
        stop_tokens=("<|role_end|>",),
    ),
    Published(
        name="llada2",
        architecture="LLaDA2MoeModelLM",
        model_type="llada2_moe",
        backbone=lambda config: "Glm4Moe",
        needs=(
            *_QWEN, "num_experts", "num_experts_per_tok", "num_shared_experts", "moe_intermediate_size",
            "first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor",
            "partial_rotary_factor", "head_dim", "rms_norm_eps", "rope_theta",
        ),
        without={
            "expert_capacity": "LLaDA2.2 routes the tokens of a block together, to at most so many experts, "
            "and no backbone does"
        },
        only={
            "use_bias": (False,),
            "use_sliding_window": (False,),
            "use_rmsnorm": (True,),
            "using_split_qkv_in_self_attention": (False,),
        },
        config=_llada2_config,
        weights=_llada2_weights,
        kind="block",
        block_length=32,
        block_key="block_size",
        mask_token="<|mask|>",
        mask_id=156895,
        stop_tokens=("<|role_end|>",),
        settings={"threshold": 0.95},
    ),
    Published(
        name="dream",
        architecture="DreamModel",
        model_type="Dream",
        backbone=lambda config: "Qwen2",
        needs=_QWEN,
        only={"use_sliding_window": (False,), "use_mrope": (False,)},
        kind="masked",
        shift=1,
        mask_token="<|mask|>",
        mask_id=151666,
        stop_tokens=("<|im_end|>",),
        tokenizer="Qwen2Tokenizer",
        settings={"order": "entropy"},
    ),
    Published(
        name="sdar",
        architecture="SDARForCausalLM",
        model_type="sdar",
        backbone=lambda config: "Qwen3",
        needs=(*_QWEN, "head_dim"),
        only={"use_sliding_window": (False,), "attention_bias": (False,)},
        kind="block",
        block_length=4,
        block_key="block_size",
        mask_token="<|MASK|>",
        mask_id=151669,
        tokenizer="Qwen2Tokenizer",
    ),
    Published(
        name="sdar_moe",
        architecture="SDARMoeForCausalLM",
        model_type="sdar_moe",
        backbone=lambda config: "Qwen3Moe",
        needs=(*_QWEN, "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        only={"use_sliding_window": (False,), "attention_bias": (False,)},
        kind="block",
        block_length=4,
        block_key="block_size",
        mask_token="<|MASK|>",
        mask_id=151669,
        tokenizer="Qwen2Tokenizer",
    ),
    Published(
        name="fast_dllm_v2",
        architecture="Fast_dLLM_QwenForCausalLM",
        model_type="Fast_dLLM_Qwen",
        backbone=lambda config: "Qwen2",
        needs=_QWEN,
        only={"use_sliding_window": (False,)},
        kind="block",
        shift=1,
        block_length=32,
        block_key="bd_size",
        mask_token="|<MASK>|",
        mask_id=151665,
        tokenizer="Qwen2Tokenizer",
    ),
    Published(
        name="wedlm",
        architecture="WeDLMForCausalLM",
        model_type="wedlm",
        backbone=_wedlm_backbone,
        needs=_QWEN,
        only={"use_sliding_window": (False,)},
        config=_wedlm_config,
        kind="masked_causal",
        mask_id=151665,
        stop_tokens=("<|im_end|>", "<|endoftext|>"),
        tokenizer="Qwen2Tokenizer",
    ),
)  # fmt: skip
