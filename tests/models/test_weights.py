from __future__ import annotations

import itertools

import pytest
import torch

from chordal.errors import CheckpointError
from chordal.models.checkpoint import Checkpoint
from chordal.models.published import FAMILIES, identify
from chordal.models.weights import Rename, Split, WeightMap
from chordal.testing import published_llada, published_qwen

WRITERS = {
    "llada": published_llada.write_llada,
    "illada": published_llada.write_illada,
    "llada_moe": published_llada.write_llada_moe,
    "llada2": published_llada.write_llada2,
    "dream": published_qwen.write_dream,
    "sdar": published_qwen.write_sdar,
    "sdar_moe": published_qwen.write_sdar_moe,
    "fast_dllm_v2": published_qwen.write_fast_dllm_v2,
    "wedlm": published_qwen.write_wedlm,
}

LLADA = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
    "model.transformer.blocks.0.ff_out.weight": "model.layers.0.mlp.down_proj.weight",
    "model.transformer.blocks.31.ff_out.weight": "model.layers.31.mlp.down_proj.weight",
    "model.transformer.blocks.31.ff_proj.weight": "model.layers.31.mlp.gate_proj.weight",
    "model.transformer.blocks.7.attn_out.weight": "model.layers.7.self_attn.o_proj.weight",
}


def map_of(family, **config):
    [entry] = [entry for entry in FAMILIES if entry.name == family]
    return entry.weights(config)


def test_the_cases_cover_every_family_of_the_table():
    assert set(WRITERS) == {family.name for family in FAMILIES}


@pytest.mark.parametrize("name", WRITERS)
def test_the_map_of_every_family_has_an_inverse(name, tmp_path):
    checkpoint = Checkpoint.open(WRITERS[name](tmp_path / name))
    family = identify(checkpoint.config)
    assert family.name == name
    weight_map, published = family.weights(checkpoint.config), checkpoint.slices()
    ours = weight_map.to_ours(published)
    back = weight_map.to_published(ours)
    assert back.keys() == published.keys()
    # None of ours is lost or used twice.
    assert sorted(itertools.chain(*back.values())) == sorted(ours)
    for stored, parts in back.items():
        tensor = torch.cat([ours[part][...] for part in parts]) if len(parts) > 1 else ours[parts[0]][...]
        want = published[stored][...]
        assert (tensor.dtype, tensor.shape) == (want.dtype, want.shape), stored
        assert torch.equal(tensor.view(torch.uint8), want.view(torch.uint8)), stored


def test_the_two_output_matrices_of_llada_are_told_apart_in_any_order_of_rules():
    weight_map = map_of("llada")
    for rules in (weight_map.rules, weight_map.rules[::-1]):
        reordered = WeightMap(rules)
        assert reordered.to_ours({name: name for name in LLADA}) == {
            ours: name for name, ours in LLADA.items()
        }
        assert reordered.to_published(LLADA.values()) == {name: (ours,) for name, ours in LLADA.items()}


def test_one_weight_of_llada2_is_three_of_ours():
    weight_map = map_of("llada2", head_dim=2, num_attention_heads=3, num_key_value_heads=1)
    rows = torch.arange(20).reshape(10, 2)
    ours = weight_map.to_ours({"model.layers.11.attention.query_key_value.weight": rows})
    assert list(ours) == [f"model.layers.11.self_attn.{part}_proj.weight" for part in "qkv"]
    assert [part[...].tolist() for part in ours.values()] == [
        rows[:6].tolist(),
        rows[6:8].tolist(),
        rows[8:].tolist(),
    ]
    # From any of the parts, the whole is found.
    for part in ours:
        assert weight_map.to_published([part]) == {
            "model.layers.11.attention.query_key_value.weight": tuple(ours)
        }


def test_parts_are_read_when_they_are_sliced_and_not_before():
    class Slice:
        def __init__(self):
            self.read = []

        def __getitem__(self, index):
            self.read.append(index)
            return torch.arange(6)[index]

    whole = Slice()
    ours = WeightMap((Split("whole", ("a", "b", "c"), (1, 2, 3)),)).to_ours({"whole": whole})
    assert whole.read == []
    assert ours["b"][...].tolist() == [1, 2]
    assert whole.read == [slice(1, 3)]
    assert ours["c"][1:].tolist() == [4, 5]


def test_rows_too_many_are_in_the_last_part_where_its_shape_gives_them_away():
    ours = WeightMap((Split("whole", ("a", "b"), (2, 2)),)).to_ours({"whole": torch.arange(7)})
    assert [part[...].tolist() for part in ours.values()] == [[0, 1], [2, 3, 4, 5, 6]]


def test_names_without_a_rule_stay():
    weight_map = map_of("llada")
    for name in [
        "model.transformer.blocks.x.ff_out.weight",
        "model.transformer.blocks.1.ff_out.weight.more",
        "a.model.transformer.wte.weight",
        "model.transformer.blocks.\u0663.ff_out.weight",  # a digit, but not of ours
        "model_transformer_wte_weight",
    ]:
        assert weight_map.to_ours({name: 1}) == {name: 1}
        assert weight_map.to_published([name]) == {name: (name,)}


def test_every_number_of_a_name_is_kept():
    weight_map = WeightMap((Rename("h.{layer}.e.{expert}.w", "layers.{layer}.experts.{expert}.weight"),))
    assert weight_map.to_ours({"h.12.e.3.w": 1}) == {"layers.12.experts.3.weight": 1}
    assert weight_map.to_published(["layers.12.experts.3.weight"]) == {
        "h.12.e.3.w": ("layers.12.experts.3.weight",)
    }


def test_one_weight_under_two_names_is_refused():
    with pytest.raises(CheckpointError) as error:
        map_of("llada").to_ours({"lm_head.weight": 1, "model.transformer.ff_out.weight": 2})
    assert str(error.value) == (
        "the weights hold model.transformer.ff_out.weight and lm_head.weight, which are the same one under "
        "two names."
    )
