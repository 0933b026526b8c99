"""Every registered decoder keeps to what `chordal.testing` asks, with every one of its options."""

from __future__ import annotations

import dataclasses

import pytest

from chordal.registry import decoder_class, decoder_names
from chordal.testing import CHECKS, subjects

CONFIGS = {
    "autoregressive": [{}],
    "prompt_lookup": [
        {},
        {"num_draft": 0},
        {"num_draft": 3, "max_ngram": 2, "match": "first"},
        {"max_ngram": 5, "min_ngram": 2},
    ],
    "copyspec": [
        {},
        {"ngram": 1, "num_copy": 4, "match": "last", "adaptive": True},
        {"num_copy": 0},
        {"ngram": 2, "draft_model": True, "num_draft": 3},
    ],
    "aggressive": [
        {},
        {"match": "unique", "start": 0, "end": -1, "max_ngram": 1},
        {"start": 1, "num_draft": 4},
        {"start": "a", "end": "b"},
    ],
    "jacobi": [
        {},
        {"window": 6, "ngram": 2, "num_branches": 0},
        {"window": 5, "ngram": 2, "num_branches": 0, "recycle": 4},
        {"window": 1, "ngram": 3, "num_branches": 2, "learn_text": False},
    ],
    "token_recycling": [
        {},
        {"tree": "3/2,1,0/1,0,1", "num_candidates": 3, "recycle_prompt": 0, "scope": "session"},
        {"tree": "1/1/1/1/1", "num_candidates": 50, "recycle_prompt": 2},
    ],
    "aded": [
        {},
        {"num_draft": 0},
        {"num_draft": 7, "num_iterations": 9, "num_paths": 40, "exploration": 1.0, "exploration_base": 1.0},
        {"num_paths": 3, "max_nodes": 4, "num_successors": 2, "max_pairs": 5, "learn_prompt": False},
        {"window": 5, "increment": 1.0, "max_score": 2.0, "scope": "session", "corpus": None},
    ],
    "diverse_beam": [
        {},
        {"num_beams": 1, "num_groups": 1},
        {"num_beams": 4, "num_groups": 1, "length_penalty": 1.0, "early_stopping": "never"},
        {"num_beams": 6, "num_groups": 3, "diversity": 2.0, "early_stopping": True, "penalize_eos": False},
    ],
    "superposed": [
        {},
        {"num_drafts": 1, "alpha": 0.0, "rerank": False},
        {"num_drafts": 5, "num_candidates": 8, "temperature": 0.5, "restart_every": 4},
        {"alpha": 0.9, "max_ngram": 3, "ngrams": None, "backoff": 0.0, "restart_every": 1},
    ],
    "draft_model": [
        {},
        {"num_draft": 0},
        {"num_draft": 5, "min_confidence": 0.0},
        {"schedule": "heuristic", "min_confidence": 0.1},
        {"acceptance": "follow", "min_confidence": 0.0},
        {"acceptance": "typical", "eps": 0.3, "delta": 0.2},
        {"lenience": 0.5},
    ],
    "entropy_adaptive": [
        {},
        {"threshold": 2.0, "threshold_down": 1.0, "window": 2, "min_run": 2, "clear_window": True},
        {"start": "target", "threshold": 3.0, "min_run": 1, "redo": True},
        {"threshold": 99, "min_run": 1},
    ],
    "first_finish": [
        {},
        {"num_samples": 3, "num_finishers": 2, "decoder": "prompt_lookup"},
        {"num_samples": 1, "answer": "[a-m]", "min_tokens": 2},
    ],
    "rsd": [
        {},
        {"beam_width": 3, "depth": 3},
        {"tree": "constant", "widths": "3,2"},
        {"tree": "constant", "widths": "2,2", "rule": "independent"},
        {"tree": "constant", "widths": "3,1,1", "rule": "k_seq"},
    ],
    "pearl": [
        {},
        {"num_draft": 1},
        {"num_draft": 7},
        {"num_draft": 3, "acceptance": "follow"},
    ],
    "specmquant": [
        {},
        {"min_draft": 1, "num_draft": 0},
        {"min_draft": 2, "num_draft": 3, "max_ngram": 1, "acceptance": "follow"},
        {"draft": "model", "min_draft": 4, "num_draft": 2},
        {"draft": "model", "num_draft": 3, "acceptance": "follow"},
        {"draft": "model", "min_draft": 3, "num_draft": 2, "width": 3},
    ],
    "low_confidence": [
        {},
        {"block_length": None, "num_steps": 5},
        {"block_length": 5, "num_steps": 20},
        {"block_length": 4, "num_steps": 6, "order": "random"},
        {"order": "origin", "num_steps": 7},
        {"order": "maskgit_plus", "num_steps": 7, "order_temperature": 0.5},
        {"order": "topk_margin", "num_steps": 7},
        {"order": "entropy", "num_steps": 7},
        {"cfg_scale": 1.5, "num_steps": 6},
        {"ban_eos": True},
        {"defer_eos": True},
    ],
    "threshold": [
        {},
        {"threshold": 0.1, "block_length": 5},
        {"threshold": 0.2, "block_length": None},
        {"factor": 1.0, "block_length": 4},
        {"threshold": 0.2, "feed": "prefix", "block_length": 5},
        {"threshold": 0.2, "feed": "dual", "block_length": 5},
    ],
    "localleap": [
        {},
        {"threshold": 0.3, "relaxed_threshold": 0.1, "radius": 2, "block_length": 5},
        {"threshold": 0.4, "relaxed_threshold": 0.2, "feed": "dual", "block_length": 5},
        {"threshold": 0.3, "relaxed_threshold": 0.1, "feed": "prefix", "block_length": None},
    ],
    "credit_decoding": [
        {},
        {"threshold": 0.3, "fusion": 2.0, "decay": 0.9, "concavity": 0.5, "block_length": 5},
        {"threshold": 0.3, "feed": "dual", "block_length": 5},
        {"threshold": 0.6, "feed": "prefix", "block_length": None},
    ],
    "prophet": [
        {},
        {"answer_start": 2, "early_threshold": 1.5, "middle_threshold": 1.0, "late_threshold": 0.5},
        {"answer_start": -3, "answer_length": 2, "late_threshold": 1.0, "num_steps": 4, "block_length": 5},
        {"answer_start": 0, "middle_threshold": 1.0, "feed": "prefix", "block_length": None},
    ],
    "denoise": [
        {},
        {"commit": "local_leap", "threshold": 0.3, "relaxed_threshold": 0.1, "radius": 2, "feed": "dual"},
        {"feed": "block", "commit": "entropy", "entropy_bound": 2.0, "scores_of": "model"},
        {
            "refine": "credit",
            "fusion": 1.0,
            "decay": 0.8,
            "concavity": 0.5,
            "block_length": 5,
            "stop": "prophet",
            "answer_start": 1,
            "answer_length": 3,
            "early_threshold": 2.0,
            "middle_threshold": 1.5,
            "late_threshold": 1.0,
        },
        {
            "feed": "sub_block",
            "sub_block_length": 3,
            "sub_block_cache": True,
            "factor": 2.0,
            "commit": "factor",
        },
        {"commit": "schedule", "order": "margin", "num_steps": 6, "cfg_scale": 1.0, "ban_eos": True},
        {"feed": "block", "commit": "coherent", "adaptive": False, "expand_ratio": 2.0},
        {"feed": "window", "active_length": 3, "window_length": 5, "refresh_period": 3, "defer_eos": True},
        {
            "commit": "averaged",
            "history_length": 1,
            "pool_size": 3,
            "max_entropy": 2.0,
            "block_length": "canvas",
        },
        {"commit": "near_independent", "entropy_bound": 3.0, "feed": "prefix"},
        {"experts": "vote", "expert_share": 0.4, "threshold": 0.2, "feed": "dual", "block_length": 4},
        {"experts": "seq", "expert_choices": 1, "expert_refresh": True},
    ],
    "des": [
        {},
        {"experts": "max", "expert_share": 0.3, "expert_refresh": True, "feed": "whole"},
        {"experts": "seq", "expert_choices": 1, "threshold": 0.2},
        {"expert_share": 0.3, "expert_refresh": True, "threshold": 0.2},
        {"expert_share": 0.2, "threshold": 0.2, "feed": "prefix", "block_length": 5},
    ],
    "ccd": [
        {},
        {"variant": "paper"},
        {"variant": "paper", "history_length": 1, "pool_size": 6, "max_entropy": 3.0, "order": "confidence"},
        {"adaptive": False, "block_length": 6, "num_steps": 8},
        {"expand_ratio": 9.0},
    ],
    "window_diffusion": [
        {},
        {"active_length": 3, "window_length": 5, "refresh_period": 4},
        {
            "active_length": 2,
            "window_length": 5,
            "refresh_period": 3,
            "prune_at_refresh": True,
            "leftmost_at_refresh": True,
            "contiguous": True,
            "order": "entropy",
            "slide": False,
        },
        {
            "active_length": 3,
            "window_length": 4,
            "threshold": 0.2,
            "prune_at_refresh": True,
            "cut_at_eos": True,
        },
        {"active_length": 1, "window_length": 1, "refresh_period": 9, "num_steps": 5},
    ],
    "ete": [
        {},
        {"threshold": 0.3, "block_length": 4},
        {"threshold": 0.3, "block_length": 4, "feed": "dual", "explore_below": 9},
        {"threshold": 0.3, "block_length": 5, "feed": "prefix", "num_branches": 3, "cascade_weight": 0.2},
        {"threshold": 0.2, "block_length": 4, "explore_below": 0, "window_blocks": 3, "eos_threshold": 0.5},
    ],
    "block_diffusion": [
        {},
        {"num_steps": 2},
        {"num_steps": 2, "order": "left_to_right", "merge": False},
        {"num_steps": 3, "order": "random"},
        {"threshold": 0.1},
        {"threshold": 0.2, "num_steps": 2, "merge": False},
        {"entropy_bound": 2.0},
    ],
    "freedave": [
        {},
        {"num_drafts": 3, "feed": "dual", "block_length": 5},
        {"num_drafts": 6, "num_ahead": 1},
        {"num_drafts": 8, "threshold": 0.2, "match": "subset"},
        {"threshold": 0.2, "feed": "prefix", "block_length": None},
        {"num_drafts": 5, "block_length": 3, "num_ahead": 2},
    ],
    "fast_dllm_v2": [
        {},
        {"threshold": 0.2, "sub_block_length": 3},
        {"threshold": 1.0, "sub_block_length": 2, "sub_block_cache": True},
        {"threshold": 0.3, "sub_block_length": 3, "sub_block_cache": True},
    ],
    "s2d2": [
        {},
        {"route": "always", "causal_cache": True, "causal_draft": True},
        {"route": "always", "sub_block_length": 3, "ratio_power": 0.5},
        {"route": "never", "threshold": 0.2, "causal_draft": True},
        {"route": "span", "min_span": 3, "threshold": 0.2, "sub_block_length": 3},
        {"estimate": "margin_limit", "estimate_at": 0.1, "verify_cost": 0.5, "min_score": 0.5},
        {"route": "hysteresis", "on_score": 0.6, "off_score": 0.2, "cost_per_confident": False},
        {"route": "bandit", "exploration": 0.5, "causal_cache": True},
    ],
    "wedlm": [
        {},
        {"entropy_threshold": None, "window_length": 4},
        {"entropy_threshold": 1.5, "distance_penalty": 0.1, "window_length": 5},
        {"entropy_threshold": 9.0, "distance_penalty": 0.0, "window_length": 3},
    ],
    # Not with the 48 steps that are its default, for canvases of four tokens.
    "renoise": [
        {"num_steps": 4, "t_max": 0.7, "t_min": 0.3},
        {"num_steps": 6, "entropy_bound": 4.0, "confidence_threshold": 9.0, "stability_threshold": 1},
    ],
    "recurrent_depth": [
        {},
        {"inner_recurrence": 2, "max_wavefront": 3, "headway": 2, "noise": 0.5},
        {"exit_threshold": 0.5, "freeze": "prefix", "momentum": 0.3, "num_loops": 5},
        {"freeze": "fixed"},
        {"freeze": "stability", "inner_recurrence": 1},
    ],
    "loop_speculative": [{}, {"num_draft": 3, "draft_loops": 4}],
}


def _cases():
    """The default settings run on every kind of model, the others on one kind in turn."""
    for name in decoder_names():
        for at, settings in enumerate(CONFIGS.get(name, [{}])):
            every = subjects(name, settings)
            for subject in every if not settings else [every[at % len(every)]]:
                given = [f"{key}={value}" for key, value in settings.items()]
                yield pytest.param(subject, id="-".join([name, *given, str(subject)]))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", [*_cases()])
def test_decoder(subject, check):
    check(subject)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_is_used_at_least_once(name):
    options = {field.name for field in dataclasses.fields(decoder_class(name).Config)}
    assert options == {key for settings in CONFIGS[name] for key in settings}
