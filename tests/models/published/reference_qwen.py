"""The architecture of Dream, SDAR, SDAR-MoE, Fast-dLLM v2 and WeDLM, written down once more.

They are one: Qwen's layers, with biases or with norms of the heads, and with experts or without. What sets
them apart is who sees whom. No logits are shifted: those at a position are for the token at it.
"""

from __future__ import annotations

import torch

from .layers import attend, rms_norm, rotate, swiglu

# What no key of theirs says: have queries, keys and values biases, and are queries and keys normalised?
FIXED = {
    "Dream": (True, False),
    "Fast_dLLM_Qwen": (True, False),
    "sdar": (False, True),
    "sdar_moe": (False, True),
}


def qwen(c, w, tokens, can_attend_TT, positions=None):
    """Give logits `[T, V]` from config.json, the weights as published, tokens, and who sees whom."""
    has_bias, has_norm = FIXED.get(c["model_type"]) or (c["attention_bias"], c["qk_norm"])
    eps, theta = c["rms_norm_eps"], c["rope_theta"]
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        n = rms_norm(x, w[f"{at}.input_layernorm.weight"], eps)
        q, k, v = (n @ w[f"{at}.self_attn.{part}_proj.weight"].T for part in "qkv")
        if has_bias:
            q, k, v = (
                y + w[f"{at}.self_attn.{part}_proj.bias"] for y, part in zip((q, k, v), "qkv", strict=True)
            )
        q = q.unflatten(1, (c["num_attention_heads"], -1))
        k, v = (y.unflatten(1, (c["num_key_value_heads"], -1)) for y in (k, v))
        if has_norm:
            q, k = (
                rms_norm(y, w[f"{at}.self_attn.{part}_norm.weight"], eps)
                for y, part in zip((q, k), "qk", strict=True)
            )
        q, k = (rotate(y, theta, positions=positions) for y in (q, k))
        x = x + attend(q, k, v, can_attend_TT) @ w[f"{at}.self_attn.o_proj.weight"].T
        mix = experts if "num_experts" in c else mlp
        x = x + mix(c, w, f"{at}.mlp", rms_norm(x, w[f"{at}.post_attention_layernorm.weight"], eps))
    head = "model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"
    return rms_norm(x, w["model.norm.weight"], eps) @ w[head].T


def mlp(c, w, at, x):
    return swiglu(x, *(w[f"{at}.{part}_proj.weight"] for part in ("gate", "up", "down")))


def experts(c, w, at, x_TD):
    """For each token the experts its router likes best, in shares that add up to 1 if the config says so."""
    mixed = []
    for x_D in x_TD:
        best = (w[f"{at}.gate.weight"] @ x_D).softmax(0).topk(c["num_experts_per_tok"])
        shares = best.values / best.values.sum() if c["norm_topk_prob"] else best.values
        parts = [mlp(c, w, f"{at}.experts.{expert}", x_D) for expert in best.indices]
        mixed.append(sum(share * part for share, part in zip(shares, parts, strict=True)))
    return torch.stack(mixed)
