from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.models.family import Family
from chordal.models.language_model import LanguageModel
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.testing import TINY_VOCAB, TableModel, chi_square, random_prompt, sample_joint, tiny_backbone

NEW_TOKENS = 12


def generate(backbone, prompts, **settings):
    """Decode prompts of one length with transformers, greedily."""
    ids = torch.from_numpy(np.stack(prompts))
    output = backbone.generate(
        ids,
        attention_mask=torch.ones_like(ids),  # or it takes every pad token of the prompt for padding
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )
    return output[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("arch", ["llama", "qwen3", "qwen2", "olmo2"])
def test_greedy_output_equals_transformers_generate(decode, arch):
    """220 prompts of an architecture, in float32; some texts end with a stop token, most do not."""
    backbone = tiny_backbone(arch, dtype=torch.float32)
    model = LanguageModel(tiny_backbone(arch, dtype=torch.float32), Family(), max_rows=55)
    num_stopped = 0
    for length in (1, 4, 7, 13):
        prompts = [random_prompt(length, seed) for seed in range(55)]
        wanted = generate(backbone, prompts, eos_token_id=5)
        seqs = decode(model, "autoregressive", prompts=prompts, max_new_tokens=NEW_TOKENS, eos_ids=(5,))
        for seq, tokens in zip(seqs, wanted, strict=True):
            if 5 in tokens:
                tokens = tokens[: tokens.index(5) + 1]
                num_stopped += 1
            assert seq.output.tolist() == tokens
    assert 0 < num_stopped < 110


def test_a_repetition_penalty_equals_that_of_transformers(decode):
    backbone = tiny_backbone(dtype=torch.float32)
    prompts = [random_prompt(6, seed) for seed in range(30)]
    model = LanguageModel(tiny_backbone(dtype=torch.float32), Family(), max_rows=30)
    law = Law(repetition_penalty=1.8)
    seqs = decode(model, "autoregressive", prompts=prompts, max_new_tokens=NEW_TOKENS, law=law)
    penalized = generate(backbone, prompts, repetition_penalty=1.8)
    assert [seq.output.tolist() for seq in seqs] == penalized
    assert penalized != generate(backbone, prompts)


def test_sampled_output_has_the_law_of_the_model():
    """All 64 continuations of 3 tokens, 1,500 runs; chi-square, false alarm once in a million."""
    model, prompt = TableModel(seed=3), np.array([2, 0, 1])
    counts = sample_joint(make_decoder("autoregressive"), model, prompt, 3, 1500, Law(temperature=0.6))
    assert chi_square(counts, model.joint(prompt, 3, 0.6)) > 1e-6


def test_a_truncated_law_gives_the_rest_in_proportion_and_never_what_it_cuts():
    """Two of four tokens at every position, 1,000 runs; chi-square, false alarm once in a million."""
    model, prompt = TableModel(seed=3), np.array([2, 0, 1])
    law = Law(temperature=1.0, top_k=2)
    counts = sample_joint(make_decoder("autoregressive"), model, prompt, 3, 1000, law)
    cut = TableModel(seed=3)
    cut.table_VVV[cut.table_VVV < np.sort(cut.table_VVV)[..., -2:-1]] = -np.inf
    assert chi_square(counts, cut.joint(prompt, 3)) > 1e-6


def test_each_token_is_fed_once_and_costs_one_forward(tiny, decode):
    [seq] = decode(tiny("causal"), "autoregressive", prompts=[random_prompt(9)], max_new_tokens=20)
    assert (seq.stats.forwards, seq.stats.positions_fed) == ({"target": 20}, {"target": 9 + 19})
    assert seq.committed_at[9:].tolist() == list(range(1, 21))


def test_the_whole_window_can_be_used(tiny, decode):
    model = tiny("causal")
    [seq] = decode(model, "autoregressive", prompts=[random_prompt(4)], max_new_tokens=model.window - 4)
    assert len(seq.output) == model.window - 4
    assert seq.output.max() < TINY_VOCAB
