from __future__ import annotations

import numpy as np
import pytest

from chordal.errors import InputError
from chordal.models.load import load_model
from chordal.ops.experts import Routing
from chordal.ops.sampling import Law
from chordal.registry import list_decoders, make_decoder
from chordal.testing import TINY_EXPERTS, CountingModel, random_prompt
from chordal.testing.published_llada import write_llada2, write_llada_moe
from chordal.testing.published_qwen import write_sdar_moe

LAWS = [Law(), Law(temperature=0.8)]
EVERYTHING = [
    {"expert_share": 1},
    {"experts": "max", "expert_share": 1},
    {"experts": "seq", "expert_choices": 2},
]
MIXTURES = [("masked", "qwen3_moe"), ("masked", "olmoe"), ("block", "qwen3_moe"), ("block", "glm4_moe")]


class Watched(CountingModel):
    """Remembers each request with the experts its rows used."""

    def __init__(self, model):
        super().__init__(model)
        self.seen = []

    def run(self, requests):
        readings = super().run(requests)
        self.seen += [(row, ask, one.experts) for (row, ask), one in zip(requests, readings, strict=True)]
        return readings


def same(seqs, others):
    for seq, other in zip(seqs, others, strict=True):
        assert seq.output.tolist() == other.output.tolist()
        assert seq.committed_at.tolist() == other.committed_at.tolist()
        assert seq.stats.experts == other.stats.experts > 0


# What it equals.


@pytest.mark.parametrize("law", LAWS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("everything", EVERYTHING, ids=str)
@pytest.mark.parametrize("feed", ["prefix", "dual", "whole"])
def test_with_all_experts_it_is_threshold_on_a_canvas(tiny, decode, prompts, feed, everything, law):
    model, given = tiny("masked", arch="qwen3_moe"), prompts(4)
    settings = {"threshold": 0.3, "block_length": 3, "feed": feed}
    more = {"prompts": given, "max_new_tokens": 8, "law": law, "seeds": range(4)}
    same(
        decode(model, "des", settings | everything | {"expert_refresh": True}, **more),
        decode(model, "threshold", settings, **more),
    )


@pytest.mark.parametrize("everything", EVERYTHING, ids=str)
@pytest.mark.parametrize("arch", ["qwen3_moe", "glm4_moe"])
def test_with_all_experts_it_is_block_diffusion_on_blocks(tiny, decode, prompts, arch, everything):
    model, more = tiny("block", arch=arch), {"prompts": prompts(4), "max_new_tokens": 10}
    settings = everything | {"threshold": 0.3, "expert_refresh": True}
    same(
        decode(model, "des", settings, **more),
        decode(model, "denoise", {"commit": "threshold", "threshold": 0.3}, **more),
    )


def test_it_is_a_choice_of_parts(tiny, decode, prompts):
    model, more = tiny("masked", arch="qwen3_moe"), {"prompts": prompts(4), "max_new_tokens": 8}
    shared = {"experts": "vote", "expert_share": 0.3, "block_length": 3, "feed": "dual"}
    seqs = decode(model, "des", {**shared, "threshold": 0.2}, **more)
    same(seqs, decode(model, "denoise", {**shared, "commit": "threshold", "threshold": 0.2}, **more))
    plain = decode(model, "threshold", {"threshold": 0.2, "block_length": 3, "feed": "dual"}, **more)
    assert sum(seq.stats.experts for seq in seqs) < sum(seq.stats.experts for seq in plain)


# What a pass does.


@pytest.mark.parametrize(("kind", "arch"), MIXTURES)
@pytest.mark.parametrize(
    ("settings", "routing", "most"),
    [
        ({"expert_share": 0.5}, Routing(share=0.5), 4),
        ({"expert_share": 0.3}, Routing(share=0.3), 2),
        ({"expert_share": 0.1}, Routing(share=0.1), 1),
        ({"experts": "max", "expert_share": 0.5}, Routing("max", 0.5), 4),
        ({"experts": "seq", "expert_choices": 1}, Routing("seq", num_choices=1), None),
    ],
    ids=str,
)
def test_passes_inside_a_block_use_the_coreset_and_the_others_do_not(
    tiny, decode, prompts, kind, arch, settings, routing, most
):
    model = Watched(tiny(kind, arch=arch))
    settings = settings | {"threshold": 2.0} | ({"block_length": 4} if kind == "masked" else {})
    seqs = decode(model, "des", settings, prompts=prompts(5), max_new_tokens=9)
    shared = [(ask, used) for _, ask, used in model.seen if ask.routing is not None]
    assert len(shared) > len(model.seen) / 4
    for ask, used in shared:
        assert ask.routing == routing
        assert len(ask.tokens) <= 4
        assert used.sum(1).max() <= (most or min(len(ask.tokens), TINY_EXPERTS))
    for _, ask, _ in model.seen:
        if ask.routing is None:  # it feeds what lies before its block, or nothing else
            assert len(ask.tokens) > 4 or ask.read is None
    assert sum(seq.stats.forwards["target"] for seq in seqs) == len(
        [ask for _, ask, _ in model.seen if ask.read is not None]
    )


@pytest.mark.parametrize(("kind", "arch"), MIXTURES)
def test_all_that_read_share_experts_if_refreshes_do(tiny, decode, prompts, kind, arch):
    model = Watched(tiny(kind, arch=arch))
    decode(model, "des", {"expert_share": 0.5, "expert_refresh": True}, prompts=prompts(5), max_new_tokens=9)
    reading = [(ask, used) for _, ask, used in model.seen if ask.read is not None]
    assert all(ask.routing == Routing(share=0.5) for ask, _ in reading)
    assert max(used.sum(1).max() for _, used in reading) == 4


@pytest.mark.parametrize("more", [{"cfg_scale": 1.5}, {"refine": "credit"}], ids=str)
def test_guided_and_refined_passes_share_experts_too(tiny, decode, prompts, more):
    model = Watched(tiny("masked", arch="qwen3_moe"))
    settings = {"experts": "vote", "expert_share": 0.5, "expert_refresh": True, **more}
    decode(model, "denoise", settings, prompts=prompts(3))
    assert {ask.routing for _, ask, _ in model.seen} == {Routing(share=0.5)}


# What is counted.


@pytest.mark.parametrize(
    ("decoder", "settings"),
    [
        ("des", {"expert_share": 0.3, "threshold": 2.0, "block_length": 4}),
        ("low_confidence", {}),
        ("low_confidence", {"cfg_scale": 1.5}),  # two requests a pass, which count together
    ],
    ids=str,
)
def test_distinct_experts_are_counted_over_the_forward_passes(tiny, decode, decoder, settings):
    model = Watched(tiny("masked", arch="qwen3_moe"))
    [seq] = decode(model, decoder, settings, prompts=[random_prompt(5)])
    by_pass = np.split(np.array([used for _, _, used in model.seen]), len(model.calls))
    assert seq.stats.experts == pytest.approx(sum(used.any(0).sum(1).mean() for used in by_pass))
    assert seq.stats.experts_per_forward == seq.stats.experts / len(model.calls)


def test_experts_of_a_prefill_are_not_counted(tiny, decode):
    model = Watched(tiny("block", arch="qwen3_moe"))
    [seq] = decode(model, "des", {"threshold": 0.0}, prompts=[random_prompt(9)], max_new_tokens=3)
    (_, prefill, _), (_, _, used) = model.seen
    assert prefill.read is None
    assert (seq.stats.prefills, seq.stats.experts) == (1, used.sum(1).mean())


def test_requests_of_a_batch_are_counted_apart(tiny, decode, prompts):
    model, given = tiny("masked", arch="qwen3_moe"), prompts(5)
    settings = {"expert_share": 0.3, "expert_refresh": True}
    for prompt, seq in zip(given, decode(model, "des", settings, prompts=given), strict=True):
        same([seq], decode(model, "des", settings, prompts=[prompt]))


# Where it runs.


@pytest.mark.parametrize(
    "write", [write_llada2, write_llada_moe, write_sdar_moe], ids=lambda one: one.__name__
)
def test_published_layouts_share_their_experts(decode, tmp_path, write):
    model = Watched(load_model(write(tmp_path / "model"), dtype="float32", max_rows=2))
    prompts = [np.arange(40, 47), np.arange(50, 53)]
    seqs = decode(model, "des", {"expert_share": 0.25, "threshold": 2.0}, prompts=prompts, max_new_tokens=40)
    num_experts = model.family.num_experts
    shared = [used for _, ask, used in model.seen if ask.routing is not None]
    assert len(shared) > 20
    assert all((used.sum(1) <= num_experts // 4).all() for used in shared)
    for seq in seqs:
        assert model.family.mask_id not in seq.output


def test_models_without_experts_are_refused(tiny, decode):
    for decoder in ("des", "denoise"):
        settings = {"experts": "vote", "feed": "dual"}
        with pytest.raises(InputError, match="this model has none"):
            decode(tiny("masked"), decoder, settings, prompts=[random_prompt(3)])


def test_a_feed_that_never_stays_inside_a_block_is_refused(tiny, decode):
    model = tiny("masked", arch="qwen3_moe")
    for settings in ({"feed": "whole"}, {"feed": "whole", "experts": "seq"}):
        for decoder in ("des", "denoise"):
            with pytest.raises(InputError, match="expert_refresh"):
                decode(model, decoder, {"experts": "vote"} | settings, prompts=[random_prompt(3)])
    with pytest.raises(InputError, match="expert_refresh"):
        decode(model, "denoise", {"experts": "vote"}, prompts=[random_prompt(3)])


@pytest.mark.parametrize(
    "settings",
    [
        {"expert_share": 0.0},
        {"expert_share": 1.5},
        {"expert_choices": 0},
        {"threshold": -1},
        {"block_length": 0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        make_decoder("des", settings)


def test_the_list_says_that_experts_are_needed():
    [row] = [row for row in list_decoders() if row["name"] == "des"]
    assert row["needs"] == ["masked MoE", "block MoE"]
