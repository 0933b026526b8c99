"""Decoding equals the published sampling rules, token for token, on checkpoints in the published layouts.

Each rule is written out for one sequence, its steps in the order the published samplers take them, over
a plain torch model that shares nothing with ours but the weights; caches are lists of keys and values.
Two things are taken over from ours because every decoder documents them: the mask token is never
predicted (its logit is -inf before the rule begins), and of equal scores the lower position goes first.

Temperature is 0: above it ours draws from the same law with other random numbers, which the decoders'
own tests check. Where a published order is random at any temperature, both sides get the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import chordal
from chordal.ops.randomness import uniforms
from chordal.testing import published_llada, published_qwen

NUM_PROMPTS = 50
CANVAS = 16

# --- The model -----------------------------------------------------------------------------------------


class Plain:
    """The decoder layers of Llama, Qwen2 and Qwen3 in plain torch, for one sequence of up to 64 tokens.

    Args:
        model: A transformers model of one of these architectures; only its numbers are used.
        mask: Token that is never predicted.
    """

    def __init__(self, model, mask):
        config, self.mask = model.config, mask
        self.weights = {name: value.detach() for name, value in model.state_dict().items()}
        self.num_layers, self.eps = config.num_hidden_layers, config.rms_norm_eps
        self.size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rates = config.rope_parameters["rope_theta"] ** (-torch.arange(0, self.size, 2) / self.size)
        angles = (torch.arange(64)[:, None] * rates).double()
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, tokens, at=0, kept=None, can_attend=None):
        """Feed tokens at positions `at`, `at + 1` and so on.

        Args:
            tokens: `[q]`.
            at: Position of the first.
            kept: Keys before rotation and values of each layer; those of the fed positions are replaced,
                or appended if they are next.
            can_attend: Bool `[q, n]` over all n keys; None is full attention.

        Returns:
            Logits `[q, V]`, and the keys and values of each layer, `[heads, n, size]`.
        """
        num = len(tokens)
        states = self.weights["model.embed_tokens.weight"][tokens]
        now = []
        for n in range(self.num_layers):
            layer = f"model.layers.{n}."
            x = self._norm(states, f"{layer}input_layernorm")
            q, k, v = (
                self._linear(x, f"{layer}self_attn.{name}_proj").view(num, -1, self.size).transpose(0, 1)
                for name in "qkv"
            )
            if f"{layer}self_attn.q_norm.weight" in self.weights:
                q, k = self._norm(q, f"{layer}self_attn.q_norm"), self._norm(k, f"{layer}self_attn.k_norm")
            if kept is not None:
                k, v = (
                    torch.cat([old[:, :at], new, old[:, at + num :]], 1)
                    for old, new in zip(kept[n], (k, v), strict=True)
                )
            now.append((k, v))
            q, k = self._rotate(q, at), self._rotate(k, 0)
            # Each head of keys serves several heads of queries that stand side by side.
            q = q.view(len(k), -1, num, self.size)
            scores = q @ k[:, None].mT / self.size**0.5
            if can_attend is not None:
                scores = scores.masked_fill(~can_attend, -math.inf)
            mixed = (scores.softmax(-1) @ v[:, None]).flatten(0, 1)
            states = states + self._linear(mixed.transpose(0, 1).flatten(1), f"{layer}self_attn.o_proj")
            x = self._norm(states, f"{layer}post_attention_layernorm")
            gate, up = self._linear(x, f"{layer}mlp.gate_proj"), self._linear(x, f"{layer}mlp.up_proj")
            states = states + self._linear(F.silu(gate) * up, f"{layer}mlp.down_proj")
        return self._linear(self._norm(states, "model.norm"), "lm_head"), now

    def _linear(self, x, name):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x, name):
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.eps)

    def _rotate(self, x, at):
        cos, sin = self.cos[at : at + x.shape[1]], self.sin[at : at + x.shape[1]]
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


# --- LLaDA ---------------------------------------------------------------------------------------------


def front_loaded(num_masked, num_steps):
    """Tokens of each step of a block, the larger shares first."""
    return [num_masked // num_steps + (i < num_masked % num_steps) for i in range(num_steps)]


def guided(given, without, scale):
    return without + (scale + 1) * (given - without)


def llada(
    model, prompt, length, *, num_steps, block_length, remasking="low_confidence", cfg_scale=0.0,
    eos_inf=(), eos_eot_inf=(), noise=None,
):  # fmt: skip
    """LLaDA's sampler (arXiv 2502.09992).

    `eos_inf` and `eos_eot_inf` are the tokens of the two options of that name. `noise(i)` gives the numbers
    by which random remasking orders the positions in the i-th forward pass.
    """
    assert length % block_length == 0 and num_steps % (length // block_length) == 0
    x = torch.tensor([*prompt, *[model.mask] * length])
    is_prompt = x != model.mask
    steps_of_block = num_steps // (length // block_length)
    now = 0
    for start in range(len(prompt), len(x), block_length):
        end = start + block_length
        quotas = front_loaded(int((x[start:end] == model.mask).sum()), steps_of_block)
        for quota in quotas:
            is_masked = x == model.mask
            z, _ = model(x)
            if cfg_scale > 0:
                without, _ = model(torch.where(is_prompt, model.mask, x))
                z = guided(z, without, cfg_scale)
            z[:, [model.mask, *eos_inf]] = -math.inf
            x0 = z.argmax(1)
            # The option cuts the noisy logits. At temperature 0 these are the very logits confidence is of,
            # so the other tokens' probabilities grow.
            z[:, list(eos_eot_inf)] = -math.inf
            if remasking == "low_confidence":
                confidence = z.softmax(1).gather(1, x0[:, None])[:, 0]
            else:
                confidence = noise(now)[: len(x)].clone()
            confidence[end:] = -math.inf
            x0 = torch.where(is_masked, x0, x)
            confidence = torch.where(is_masked, confidence, -math.inf)
            chosen = best(confidence, quota)
            x[chosen] = x0[chosen]
            now += 1
    return x[len(prompt) :].tolist()


def best(scores, num):
    return scores.sort(descending=True, stable=True).indices[:num]


# --- Dream ---------------------------------------------------------------------------------------------


def dream_times(num_steps):
    return torch.linspace(1, 1e-3, num_steps + 1)


def shifted(z):
    """Row p - 1 predicts position p; the first position keeps its own row."""
    return torch.cat([z[:1], z[:-1]])


def dream_scores(q, alg):
    """Say how sure a row is, by the algorithm: q `[n, V]` are the probabilities after truncation."""
    if alg == "maskgit_plus":
        return q.max(1).values
    if alg == "topk_margin":
        ranked = q.sort(1, descending=True).values
        return ranked[:, 0] - ranked[:, 1]
    return (q * (q + 1e-10).log()).sum(1)


def dream(model, prompt, length, *, num_steps, alg, top_p=None, top_k=None, noise=None):
    """Dream's sampler (arXiv 2508.15487) with alg_temp None.

    `noise(i)` gives the numbers by which "origin" picks positions in step i.
    """
    x = torch.tensor([*prompt, *[model.mask] * length])
    times = dream_times(num_steps)
    for i in range(num_steps):
        is_masked = x == model.mask
        z, _ = model(x)
        z = shifted(z)[is_masked]
        z[:, model.mask] = -math.inf
        t, s = times[i], times[i + 1]
        is_last = i == num_steps - 1
        if alg == "origin":
            x0 = torch.full((len(z),), model.mask)
            is_chosen = noise(i)[: len(x)][is_masked] < (1 if is_last else 1 - s / t)
            x0[is_chosen] = z[is_chosen].argmax(1)
            x[is_masked] = x0
            continue
        if top_p is not None and top_p < 1:
            ranked, order = z.sort(1, descending=True)
            is_cut = ranked.softmax(1).cumsum(1) > top_p
            is_cut = torch.cat([torch.zeros_like(is_cut[:, :1]), is_cut[:, :-1]], 1)
            z = z.masked_fill(is_cut.gather(1, order.argsort(1)), torch.finfo(z.dtype).min)
        if top_k is not None:
            z = z.masked_fill(z < z.topk(top_k).values[:, -1:], torch.finfo(z.dtype).min)
        q = z.softmax(1)
        num = int(is_masked.sum()) if is_last else int(is_masked.sum().float() * (1 - s / t))
        if num > 0:
            confidence = torch.full((len(x),), -math.inf, dtype=q.dtype)
            confidence[is_masked] = dream_scores(q, alg)
            proposed = torch.full_like(x, model.mask)
            proposed[is_masked] = q.argmax(1)
            chosen = best(confidence, num)
            x[chosen] = proposed[chosen]
    return x[len(prompt) :].tolist()


# --- Fast-dLLM -----------------------------------------------------------------------------------------


def above_threshold(ranked, threshold):
    """How many to commit, given the candidates' confidences from the highest: never none."""
    num = len(ranked)
    for confidence in ranked[1:]:
        if confidence < threshold:
            num -= 1
    return num


def by_factor(ranked, factor):
    """The same by the other rule: (n + 1) (1 - n-th confidence) < factor, up to the first that fails."""
    num = 0
    for n, confidence in enumerate(ranked, 1):
        if n > 1 and not (n + 1) * (1 - confidence) < factor:
            break
        num = n
    return num


def refreshed(kept, start, cache):
    """What a block's first pass over the whole canvas leaves for its later ones."""
    return [(keys[:, :start], values[:, :start]) for keys, values in kept] if cache == "prefix" else kept


def fast_dllm(model, prompt, length, *, block_length, cache, threshold=None, factor=None):
    """Fast-dLLM on a model of LLaDA's kind (arXiv 2505.22618); `cache` is "none", "prefix" or "dual".

    The published code runs one more pass on a block that is already full, which commits nothing.
    """
    x = torch.tensor([*prompt, *[model.mask] * length])

    def transfer(z, at, end):
        """Commit among the masked positions before `end`; the rows of z start at position `at`."""
        z[:, model.mask] = -math.inf
        now = x[at : at + len(z)]  # a view
        is_masked = now == model.mask
        is_masked[end - at :] = False
        confidence, x0 = z.softmax(1).max(1)
        confidence = torch.where(is_masked, confidence, -math.inf)
        order = best(confidence, int(is_masked.sum()))
        ranked = confidence[order].tolist()
        num = above_threshold(ranked, threshold) if factor is None else by_factor(ranked, factor)
        now[order[:num]] = x0[order[:num]]

    for start in range(len(prompt), len(x), block_length):
        end = start + block_length
        z, kept = model(x)
        transfer(z, 0, end)
        kept = refreshed(kept, start, cache)
        while (x[start:end] == model.mask).any():
            if cache == "none":
                z, _ = model(x)
                transfer(z, 0, end)
            elif cache == "prefix":
                # The suffix is fed too, and what it gives is dropped: the prefix stays as it was.
                z, _ = model(x[start:], start, kept)
                transfer(z, start, end)
            else:
                z, kept = model(x[start:end], start, kept)
                transfer(z, start, end)
    return x[len(prompt) :].tolist()


# --- SDAR ----------------------------------------------------------------------------------------------


def row_entropies(q):
    return torch.special.entr(q).sum(1)


def stored(model, tokens, start, kept, can_attend):
    """Feed a block without masks for its keys and values; those of its passes with masks are dropped."""
    _, kept = model(tokens, start, kept, can_attend)
    return kept


def sdar(
    model, prompt, length, *, block_length, num_steps, remasking, threshold=None, bound=None, top_k=None
):  # fmt: skip
    """SDAR's block decoding (arXiv 2510.06303).

    Two repairs of the published script: a step's share is capped by the masks left, where it would overwrite
    tokens, and the entropy rule takes each row's entropy, where it cannot run.
    """
    end_of_all = math.ceil((len(prompt) + length) / block_length) * block_length
    x = torch.tensor([*prompt, *[model.mask] * (end_of_all - len(prompt))])
    block_of = torch.arange(end_of_all) // block_length
    can_attend = block_of[None, :] <= block_of[:, None]

    first = len(prompt) // block_length * block_length
    kept = None
    if first:
        _, kept = model(x[:first], 0, None, can_attend[:first, :first])
    quotas = front_loaded(block_length, num_steps)
    for start in range(first, end_of_all, block_length):
        end = start + block_length
        now = x[start:end]  # a view
        for step in range(num_steps + 1):
            is_masked = now == model.mask
            if not is_masked.any():
                kept = stored(model, now, start, kept, can_attend[start:end, :end])
                break
            z, _ = model(now, start, kept, can_attend[start:end, :end])
            z[:, model.mask] = -math.inf
            if top_k is not None:
                z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -math.inf)
            q = z.softmax(1)
            x0_p, x0 = q.max(1)
            confidence = torch.where(is_masked, x0_p, -math.inf)
            quota = min(quotas[step], int(is_masked.sum()))
            if remasking == "sequential":
                at = int(is_masked.nonzero()[0])
                chosen = torch.arange(at, at + quota)
            elif remasking == "low_confidence_static":
                chosen = best(confidence, quota)
            elif remasking == "low_confidence_dynamic":
                chosen = (confidence > threshold).nonzero()[:, 0]
                if len(chosen) < quota:
                    chosen = best(confidence, quota)
            else:
                entropy = torch.where(is_masked, row_entropies(q), math.inf)
                ranked, order = entropy.sort(stable=True)
                chosen = order[: max(1, int((ranked.cumsum(0) < bound).sum()))]
            now[chosen] = x0[chosen]
    return x[len(prompt) : len(prompt) + length].tolist()


# --- The tests -----------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A tiny model loaded by us, the same weights in plain torch, and prompts for both."""

    ours: chordal.Model
    plain: Plain
    prompts: list[list[int]]

    def generate(self, decoder, config, *, length=CANVAS, **settings: Any):
        results = self.ours.generate(
            self.prompts,
            decoder=decoder,
            config=config,
            max_new_tokens=length,
            **{"ignore_eos": True} | settings,
        )
        assert [result.error for result in results] == [None] * len(self.prompts)
        return results

    def tokens(self, *args, **settings):
        return [result.tokens for result in self.generate(*args, **settings)]

    @torch.inference_mode()
    def transcribed(self, sampler, length=CANVAS, **settings):
        return [sampler(self.plain, prompt, length, **settings) for prompt in self.prompts]


def order_noise(seed):
    """Our numbers for random orders, those of the i-th forward pass for every position."""
    return lambda i: torch.from_numpy(uniforms(seed, "order", np.arange(64), i))


def sharpened(backbone, mask, stops):
    """Make a model surer, stop tokens frequent and the mask token the likeliest of all.

    So thresholds, and what bans, defers or forbids a token, have something to do. Not so sure, though,
    that confidences are 1 in float32, in which ours are compared.
    """
    head = backbone.get_output_embeddings().weight
    with torch.no_grad():
        tokens = torch.arange(160).view(20, 8)
        tokens[:, 4:] = mask
        is_seen = torch.ones(20, 1, 8, 8, dtype=torch.bool)
        common = backbone.base_model(tokens, attention_mask=is_seen).last_hidden_state[:, 4:].mean((0, 1))
        common /= common.square().sum()
        head *= 2.5
        head[stops] += 5 * common
        head[mask] = 40 * common


@pytest.fixture(scope="module")
def make_subject(tmp_path_factory):
    """Write a checkpoint in a published layout, load it, and draw prompts of 1 to 10 tokens."""

    def make_subject(write, **changes):
        folder = write(tmp_path_factory.mktemp("published") / write.__name__, **changes)
        # In float64 no sum is so close that the shape of a batch decides it.
        ours = chordal.load(folder, dtype="float64", device="cpu", max_rows=NUM_PROMPTS)
        backbone, family = ours.engine.target.model, ours.family
        sharpened(backbone, family.mask_id, list(family.eos_ids))
        random = np.random.default_rng(0)
        prompts = [random.integers(0, 250, random.integers(1, 11)).tolist() for _ in range(NUM_PROMPTS)]
        return Subject(ours, Plain(backbone, family.mask_id), prompts)

    return make_subject


@pytest.fixture(scope="module")
def llada_like(make_subject):
    return make_subject(published_llada.write_llada)


@pytest.fixture(scope="module")
def dream_like(make_subject):
    return make_subject(published_qwen.write_dream, num_hidden_layers=2)


@pytest.fixture(scope="module")
def sdar_like(make_subject):
    return make_subject(published_qwen.write_sdar, num_hidden_layers=2)


# Length, block length and steps: fewer steps than tokens, as many, more; shares that differ.
LLADA_SCHEDULES = [(16, 16, 16), (16, 16, 5), (16, 8, 6), (16, 4, 24), (16, 1, 16), (32, 16, 10)]


@pytest.mark.parametrize(("length", "block_length", "num_steps"), LLADA_SCHEDULES)
def test_low_confidence_remasking_equals_lladas(llada_like, length, block_length, num_steps):
    settings = {"block_length": block_length, "num_steps": num_steps}
    ours = llada_like.tokens("low_confidence", settings, length=length)
    assert ours == llada_like.transcribed(llada, length, **settings)


@pytest.mark.parametrize(("length", "block_length", "num_steps"), [(16, 8, 6), (24, 8, 15)])
def test_random_remasking_by_the_same_numbers_equals_lladas(llada_like, length, block_length, num_steps):
    settings = {"block_length": block_length, "num_steps": num_steps}
    ours = llada_like.tokens("low_confidence", {**settings, "order": "random"}, length=length, seed=7)
    theirs = {**settings, "remasking": "random", "noise": order_noise(7)}
    assert ours == llada_like.transcribed(llada, length, **theirs)


@pytest.mark.parametrize(("ours", "theirs"), [("ban_eos", "eos_inf"), ("defer_eos", "eos_eot_inf")])
def test_the_end_of_text_options_equal_lladas(llada_like, ours, theirs):
    settings = {"block_length": 8, "num_steps": 8}
    stops = llada_like.ours.family.eos_ids
    found = llada_like.tokens("low_confidence", {**settings, ours: True})
    assert found == llada_like.transcribed(llada, **settings, **{theirs: stops})
    assert found != llada_like.tokens("low_confidence", settings)
    assert any(set(stops) & set(tokens) for tokens in found) == (ours == "defer_eos")


@pytest.mark.parametrize(("cfg_scale", "remasking"), [(0.5, "low_confidence"), (2.0, "random")])
def test_guidance_equals_lladas(llada_like, cfg_scale, remasking):
    settings = {"block_length": 8, "num_steps": 8, "cfg_scale": cfg_scale}
    ours = llada_like.tokens("low_confidence", {**settings, "order": remasking}, seed=3)
    assert ours == llada_like.transcribed(llada, **settings, remasking=remasking, noise=order_noise(3))


@pytest.mark.parametrize("order", ["maskgit_plus", "topk_margin", "entropy", "origin"])
@pytest.mark.parametrize(("length", "num_steps"), [(20, 7), (8, 8), (8, 12)])
def test_every_order_equals_dreams(dream_like, order, length, num_steps):
    config = {"order": order, "num_steps": num_steps}
    ours = dream_like.tokens("low_confidence", config, length=length, seed=5)
    theirs = {"alg": order, "num_steps": num_steps, "noise": order_noise(5)}
    assert ours == dream_like.transcribed(dream, length, **theirs)


@pytest.mark.parametrize("order", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("truncation", [{"top_p": 0.7}, {"top_k": 3}], ids=str)
def test_truncation_changes_greedy_orders_as_dreams(dream_like, order, truncation):
    config = {"order": order, "num_steps": 6}
    ours = dream_like.tokens("low_confidence", config, **truncation)
    assert ours == dream_like.transcribed(dream, alg=order, num_steps=6, **truncation)
    assert ours != dream_like.tokens("low_confidence", config)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize(
    ("name", "value", "block_length"),
    [("threshold", 0.7, 8), ("threshold", 0.5, 12), ("factor", 1.0, 12), ("factor", 2.0, 8)],
)
def test_parallel_decoding_and_its_caches_equal_fast_dllms(llada_like, cache, name, value, block_length):
    config = {name: value, "block_length": block_length, "feed": "whole" if cache == "none" else cache}
    found = llada_like.generate("threshold", config, length=24)
    theirs = {name: value, "block_length": block_length, "cache": cache}
    assert [result.tokens for result in found] == llada_like.transcribed(fast_dllm, 24, **theirs)
    # The rule decides: hardly a prompt takes one pass a block or one a token.
    passes = [result.stats["forwards"] for result in found]
    assert sum(24 // block_length < num < 24 for num in passes) > 0.8 * NUM_PROMPTS


SDAR_RULES = [
    ({"remasking": "sequential"}, 4),
    ({"remasking": "sequential"}, 2),
    ({"remasking": "low_confidence_static"}, 4),
    ({"remasking": "low_confidence_static"}, 2),
    ({"remasking": "low_confidence_dynamic", "threshold": 0.85}, 4),
    ({"remasking": "low_confidence_dynamic", "threshold": 0.5}, 2),
    ({"remasking": "entropy_bounded", "bound": 0.35}, 4),
    ({"remasking": "entropy_bounded", "bound": 2.0}, 4),
]


def our_rule(remasking, threshold=None, bound=None):
    order = "left_to_right" if remasking == "sequential" else "confidence"
    return {"order": order, "threshold": threshold, "entropy_bound": bound}


@pytest.mark.parametrize(("rule", "num_steps"), SDAR_RULES, ids=str)
def test_block_decoding_equals_sdars(sdar_like, rule, num_steps):
    ours = sdar_like.tokens("block_diffusion", {**our_rule(**rule), "num_steps": num_steps}, length=14)
    assert ours == sdar_like.transcribed(sdar, 14, **rule, num_steps=num_steps, block_length=4)


@pytest.mark.parametrize("merge", [True, False])
def test_uneven_shares_over_any_cache_equal_sdars(sdar_like, merge):
    config = {"num_steps": 3, "merge": merge}
    theirs = {"remasking": "low_confidence_static", "num_steps": 3, "block_length": 4}
    assert sdar_like.tokens("block_diffusion", config) == sdar_like.transcribed(sdar, **theirs)


def test_confidence_is_of_what_top_k_leaves_as_in_sdars_script(sdar_like):
    rule = {"remasking": "low_confidence_dynamic", "threshold": 0.85}
    ours = sdar_like.tokens("block_diffusion", our_rule(**rule), top_k=3)
    theirs = {**rule, "num_steps": 4, "block_length": 4}
    assert ours == sdar_like.transcribed(sdar, **theirs, top_k=3)
    assert ours != sdar_like.tokens("block_diffusion", our_rule(**rule))


# Fixture, decoder, its settings, transcription, its settings.
FAMILIES = {
    "llada": (
        "llada_like", "low_confidence", {"num_steps": 6, "block_length": 8},
        llada, {"num_steps": 6, "block_length": 8},
    ),
    "dream": (
        "dream_like", "low_confidence", {"num_steps": 7, "order": "entropy"},
        dream, {"num_steps": 7, "alg": "entropy"},
    ),
    "fast_dllm": (
        "llada_like", "threshold", {"threshold": 0.7, "block_length": 8, "feed": "dual"},
        fast_dllm, {"threshold": 0.7, "block_length": 8, "cache": "dual"},
    ),
    "sdar": (
        "sdar_like", "block_diffusion", {"threshold": 0.85},
        sdar, {"remasking": "low_confidence_dynamic", "threshold": 0.85, "num_steps": 4, "block_length": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_ends_at_the_first_stop_token_of_the_published_one(request, family):
    fixture, decoder, config, sampler, settings = FAMILIES[family]
    subject = request.getfixturevalue(fixture)
    stops, tokenizer = subject.ours.family.eos_ids, subject.ours.tokenizer
    found = subject.generate(decoder, config, ignore_eos=False)
    for result, tokens in zip(found, subject.transcribed(sampler, **settings), strict=True):
        end = next((at for at, token in enumerate(tokens) if token in stops), None)
        assert result.tokens == tokens[: None if end is None else end + 1]
        assert result.text == tokenizer.decode(tokens[:end], skip_special_tokens=True)
        assert result.finish_reason == ("length" if end is None else "stop")
    assert len({result.finish_reason for result in found}) == 2


# --- Each transcription can fail -----------------------------------------------------------------------


def with_the_last_that_fails(ranked, factor, rule=by_factor):
    """The slip of the published code: a run that fails at its very last member is taken whole."""
    num = rule(ranked, factor)
    return num + (num == len(ranked) - 1)


# Family, what is changed in its transcription, to what, and the settings, ours and its, that show it.
CHANGES = {
    "llada, larger shares last": (
        "llada", "front_loaded", lambda num, steps: [(num + i) // steps for i in range(steps)], {}, {},
    ),
    "llada, w for w + 1": (
        "llada", "guided", lambda given, without, scale: without + scale * (given - without),
        {"cfg_scale": 1.5}, {"cfg_scale": 1.5},
    ),
    "dream, no shift": ("dream", "shifted", lambda z: z, {}, {}),
    "dream, times down to .2": ("dream", "dream_times", lambda num: torch.linspace(1, 0.2, num + 1), {}, {}),
    "dream, confidence for margin": (
        "dream", "dream_scores", lambda q, alg: q.max(1).values,
        {"order": "topk_margin"}, {"alg": "topk_margin"},
    ),
    "fast_dllm, off by one": (
        "fast_dllm", "by_factor", with_the_last_that_fails, {"factor": 1.0}, {"factor": 1.0},
    ),
    "fast_dllm, no suffix in the dual cache": (
        "fast_dllm", "refreshed", lambda kept, start, cache: [(k[:, :start], v[:, :start]) for k, v in kept],
        {}, {},
    ),
    "sdar, one entropy for all": (
        "sdar", "row_entropies", lambda q: q.max(1).values.sum().expand(len(q)),
        {"threshold": None, "entropy_bound": 2.0}, {"remasking": "entropy_bounded", "bound": 2.0},
    ),
    "sdar, masks stored": (
        "sdar", "stored",
        lambda model, tokens, *more: model(torch.full_like(tokens, model.mask), *more)[1], {}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_transcription_that_is_changed_gives_other_tokens(request, monkeypatch, change):
    family, name, changed, ours, theirs = CHANGES[change]
    fixture, decoder, config, sampler, settings = FAMILIES[family]
    subject = request.getfixturevalue(fixture)
    subject = replace(subject, prompts=subject.prompts[:15])
    found = subject.tokens(decoder, config | ours)
    assert found == subject.transcribed(sampler, **settings | theirs)
    monkeypatch.setitem(globals(), name, changed)
    assert found != subject.transcribed(sampler, **settings | theirs)
