"""The architectures of LLaDA, iLLaDA, LLaDA-MoE and LLaDA2, written down once more from their papers.

Each takes config.json and the weights as published, tokens, and who sees whom, and gives logits [T, V].
No logits are shifted: those at a position are for the token at it.
"""

from __future__ import annotations

import torch

from .layers import attend, rms_norm, rotate, swiglu


def llada(c, w, tokens, can_attend_TT):
    """Pre-norm layers of attention and SwiGLU, in the spelling of OLMo."""
    eps = c["rms_norm_eps"]
    embedding = w["model.transformer.wte.weight"]
    x = embedding[tokens]
    for i in range(c["n_layers"]):
        at = f"model.transformer.blocks.{i}"
        n = rms_norm(x, w[f"{at}.attn_norm.weight"], eps)
        q = heads(n, w[f"{at}.q_proj.weight"], c["n_heads"])
        k, v = (heads(n, w[f"{at}.{p}_proj.weight"], c["n_kv_heads"]) for p in "kv")
        q, k = rotate(q, c["rope_theta"]), rotate(k, c["rope_theta"])
        x = x + attend(q, k, v, can_attend_TT) @ w[f"{at}.attn_out.weight"].T
        n = rms_norm(x, w[f"{at}.ff_norm.weight"], eps)
        x = x + swiglu(n, *(w[f"{at}.{part}.weight"] for part in ("ff_proj", "up_proj", "ff_out")))
    head = embedding if c["weight_tying"] else w["model.transformer.ff_out.weight"]
    return rms_norm(x, w["model.transformer.ln_f.weight"], eps) @ head.T


def illada(c, w, tokens, can_attend_TT):
    """The same in the spelling of Llama, with shared key heads and a tied output embedding."""
    eps = c["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        n = rms_norm(x, w[f"{at}.input_layernorm.weight"], eps)
        q = heads(n, w[f"{at}.self_attn.q_proj.weight"], c["num_attention_heads"])
        k, v = (heads(n, w[f"{at}.self_attn.{p}_proj.weight"], c["num_key_value_heads"]) for p in "kv")
        q, k = rotate(q, c["rope_theta"]), rotate(k, c["rope_theta"])
        x = x + attend(q, k, v, can_attend_TT) @ w[f"{at}.self_attn.o_proj.weight"].T
        x = x + mlp(w, f"{at}.mlp", rms_norm(x, w[f"{at}.post_attention_layernorm.weight"], eps))
    return rms_norm(x, w["model.norm.weight"], eps) @ w["model.embed_tokens.weight"].T


def softmax_router(c, w, at, x):
    """The most likely experts, weighted with their probabilities among all, which add up to less than 1."""
    probs_TX = (x @ w[f"{at}.gate.weight"].T).softmax(-1)
    best = probs_TX.topk(c["num_experts_per_tok"])
    return torch.zeros_like(probs_TX).scatter(1, best.indices, best.values)


def llada_moe(c, w, tokens, can_attend_TT, router=softmax_router):
    """Queries and keys normalised head by head before they are turned, and experts in every layer."""
    eps = c["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        n = rms_norm(x, w[f"{at}.input_layernorm.weight"], eps)
        q, k, v = (heads(n, w[f"{at}.self_attn.{p}_proj.weight"], c["num_attention_heads"]) for p in "qkv")
        q = rotate(rms_norm(q, w[f"{at}.self_attn.q_norm.weight"], eps), c["rope_theta"])
        k = rotate(rms_norm(k, w[f"{at}.self_attn.k_norm.weight"], eps), c["rope_theta"])
        x = x + attend(q, k, v, can_attend_TT) @ w[f"{at}.self_attn.o_proj.weight"].T
        n = rms_norm(x, w[f"{at}.post_attention_layernorm.weight"], eps)
        if c["moe_layer_freq"][i]:
            x = x + mixture(w, f"{at}.mlp", n, router(c, w, f"{at}.mlp", n))
        else:
            x = x + mlp(w, f"{at}.mlp", n)
    return rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def group_router(c, w, at, x):
    """The best experts of the best groups.

    Choosing goes by sigmoid plus bias, and a group is as good as its two best experts; weights are the
    sigmoids alone, made to add up to 1 and then scaled.
    """
    probs_TX = (x @ w[f"{at}.gate.weight"].T).sigmoid()
    liked_TX = probs_TX + w[f"{at}.gate.expert_bias"]
    liked_TGX = liked_TX.unflatten(1, (c["n_group"], -1))
    groups_TG = liked_TGX.topk(2).values.sum(-1).topk(c["topk_group"]).indices
    is_out_TG = torch.ones(liked_TGX.shape[:2], dtype=torch.bool).scatter(1, groups_TG, False)
    liked_TX = liked_TGX.masked_fill(is_out_TG[..., None], -torch.inf).flatten(1)
    best = liked_TX.topk(c["num_experts_per_tok"]).indices
    weights = probs_TX.gather(1, best)
    if c["num_experts_per_tok"] > 1:
        weights = weights / weights.sum(1, keepdim=True)
    return torch.zeros_like(probs_TX).scatter(1, best, weights * c["routed_scaling_factor"])


def llada2(c, w, tokens, can_attend_TT, router=group_router):
    """One matrix for queries, keys and values, heads turned in part, a shared expert beside the others."""
    eps, size = c["rms_norm_eps"], int(c["head_dim"] * c["partial_rotary_factor"])
    num_q, num_k = c["num_attention_heads"], c["num_key_value_heads"]
    x = w["model.word_embeddings.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        n = rms_norm(x, w[f"{at}.input_layernorm.weight"], eps)
        name = f"{at}.attention.query_key_value"
        qkv = heads(n, w[f"{name}.weight"], num_q + 2 * num_k, w.get(f"{name}.bias", 0.0))
        q, k, v = qkv.split([num_q, num_k, num_k], 1)
        q = rotate(rms_norm(q, w[f"{at}.attention.query_layernorm.weight"], eps), c["rope_theta"], size)
        k = rotate(rms_norm(k, w[f"{at}.attention.key_layernorm.weight"], eps), c["rope_theta"], size)
        x = x + attend(q, k, v, can_attend_TT) @ w[f"{at}.attention.dense.weight"].T
        n = rms_norm(x, w[f"{at}.post_attention_layernorm.weight"], eps)
        if i < c["first_k_dense_replace"]:
            x = x + mlp(w, f"{at}.mlp", n)
        else:
            routed = mixture(w, f"{at}.mlp", n, router(c, w, f"{at}.mlp", n))
            x = x + routed + mlp(w, f"{at}.mlp.shared_experts", n)
    return rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def heads(x, weight, num, bias=0.0):
    return (x @ weight.T + bias).unflatten(1, (num, -1))


def mlp(w, at, x):
    return swiglu(x, *(w[f"{at}.{part}_proj.weight"] for part in ("gate", "up", "down")))


def mixture(w, at, x, weights_TX):
    """Run every expert on everything, and add up what they give by weight."""
    return sum(
        weights_TX[:, [expert]] * mlp(w, f"{at}.experts.{expert}", x) for expert in range(weights_TX.shape[1])
    )
