from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chordal.decoders.autoregressive import Autoregressive
from chordal.engine import Engine
from chordal.forward import Causal, Forward, Full, Hidden, Logits, Loops, Tree, Visible, Window
from chordal.models import tiles
from chordal.models.load import load_model
from chordal.models.tiles import Tile, attending, can_tile, join_masks, lay_tiles
from chordal.ops.experts import Routing
from chordal.sequence import Sequence, StopRules
from chordal.testing import tiny_model

SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CAUSAL = [("llama", {}), ("qwen2", SLIDING), ("gpt_neox", {}), ("gpt2", {})]


def tokens_of(num, seed=0):
    return np.random.default_rng([seed, num]).integers(1, 20, num)


def feed(tokens, start=0, sees=None, **more):
    at = np.arange(start, start + len(tokens))
    return Forward(tokens, at, sees or Causal(), Logits(np.arange(len(tokens))), slots=at, **more)


def passes(model):
    """Count the passes of the backbone from now on."""
    counted = []
    model.architecture.backbone.register_forward_pre_hook(lambda *_: counted.append(1))
    return counted


def both_ways(make, rounds):
    """Run rounds of requests packed and padded, and give the readings of each."""
    found = []
    for packs in (True, False):
        model = make()
        assert model.packs
        model.packs = packs
        found.append([model.run(requests) for requests in rounds])
    return found


def assert_same(got, want):
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=1e-6)


# Where the rows are laid.


@pytest.mark.parametrize(
    ("widths", "max_padding", "want"),
    [
        ({3: 7}, 16, [(3, 1, 7, 0)]),
        ({0: 1, 1: 1, 2: 1}, 0, [(0, 3, 1, 0)]),
        ({0: 1, 1: 1, 2: 40}, 16, [(0, 2, 1, 0), (2, 1, 40, 2)]),
        ({0: 1, 1: 1, 2: 40}, None, [(0, 3, 40, 0)]),
        ({0: 40, 1: 1, 2: 1}, 16, [(0, 1, 40, 0), (1, 2, 1, 40)]),
        ({0: 5, 1: 7, 2: 3}, 4, [(0, 3, 7, 0)]),  # 2 and then 4 tokens of padding
        ({0: 5, 1: 7, 2: 3}, 3, [(0, 2, 7, 0), (2, 1, 3, 14)]),
        ({1: 2, 4: 2}, 4, [(1, 4, 2, 0)]),  # two rows in between are padding
        ({1: 2, 4: 2}, 3, [(1, 1, 2, 0), (4, 1, 2, 2)]),
    ],
)
def test_rows_share_a_tile_where_the_padding_is_little(widths, max_padding, want):
    assert lay_tiles(widths, max_padding) == [Tile(*one) for one in want]


def test_every_row_is_in_one_tile_and_tiles_lie_side_by_side():
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows = rng.choice(40, rng.integers(1, 20), replace=False).tolist()
        widths = {row: int(rng.geometric(0.1) * rng.choice([1, 20])) for row in rows}
        max_padding = int(rng.integers(0, 60))
        laid = lay_tiles(widths, max_padding)
        covered = [row for tile in laid for row in range(tile.first_row, tile.rows.stop)]
        assert sorted(set(covered)) == covered
        assert set(widths) <= set(covered)
        assert [tile.at for tile in laid[1:]] == [tile.tokens.stop for tile in laid[:-1]]
        assert laid[0].at == 0
        for tile in laid:
            mine = [width for row, width in widths.items() if row in range(40)[tile.rows]]
            assert tile.width == max(mine)
            assert tile.num_rows * tile.width - sum(mine) <= max_padding * (len(mine) - 1)


def test_masks_of_unlike_tiles_stand_one_after_the_other():
    laid = [Tile(0, 2, 1, 0, 3), Tile(4, 1, 2, 2, 5)]
    masks = [torch.ones(2, 1, 1, 3, dtype=torch.bool), torch.ones(1, 1, 2, 5, dtype=torch.bool)]
    joined = join_masks(laid, masks)
    assert joined.shape == (1, 1, 4, 5)
    assert joined[0, 0].tolist() == [[True] * 3 + [False] * 2] * 2 + [[True] * 5] * 2
    assert join_masks(laid[:1], masks[:1]) is masks[0]
    assert join_masks(laid[:1], [None]) is None


# What is computed.


@pytest.mark.parametrize(("architecture", "settings"), CAUSAL)
def test_rows_of_unlike_widths_run_in_one_pass_and_read_what_they_do_padded(
    make_model, architecture, settings
):
    """Prompts that join in the middle and behind, trees, windows, and several requests of a row."""
    tree = Tree(40, (-1, 0, 0))
    hiding = Full(42, hidden=np.array([3, 4]))
    seen = np.zeros((2, 12), bool)
    seen[:, [1, 7, 11]] = True
    rounds = [
        [(0, feed(tokens_of(40))), (1, feed(tokens_of(2))), (4, feed(tokens_of(33)))],
        [
            (0, feed(tokens_of(1), 40)),
            (1, feed(tokens_of(1), 2)),
            (3, feed(tokens_of(50))),
            (4, feed(tokens_of(30, 1), 33, Window(9))),
        ],
        [
            (0, Forward(tokens_of(3), np.array([41, 42, 42]), tree, Logits(np.arange(3)))),
            (0, feed(tokens_of(1), 41, hiding)),
            (1, feed(tokens_of(25, 2), 3)),
            (3, Forward(tokens_of(2), np.array([50, 51]), _seeing(seen), Logits(np.arange(2)))),
        ],
    ]
    packed, padded = both_ways(lambda: make_model(architecture, **settings), rounds)
    for got, want in zip(packed, padded, strict=True):
        for one, other in zip(got, want, strict=True):
            assert_same(one.logits, other.logits)
    model = make_model(architecture, **settings)
    counted = passes(model)
    for requests in rounds:
        model.run(requests)
    assert len(counted) == len(rounds)


def _seeing(seen):
    num = len(seen)
    return Visible(np.full(num, 20), np.full(num, 50), np.eye(num, dtype=bool), seen=seen)


def test_only_what_is_fed_goes_through_the_layers(make_model):
    """A token each in seven rows beside a prompt: 47 tokens, where padding made 320 of them."""
    model, fed = make_model(), []
    model.architecture.backbone.layers[0].mlp.register_forward_pre_hook(
        lambda _, given: fed.append(given[0].shape[:2].numel())
    )
    model.run([(row, feed(tokens_of(5, row))) for row in range(7)])
    model.run([(row, feed(tokens_of(1, row), 5)) for row in range(7)] + [(7, feed(tokens_of(40)))])
    assert fed == [35, 47]


@pytest.mark.parametrize("sick", [0, 1, 2])
def test_what_is_not_finite_stays_in_its_row(make_model, sick):
    """In whichever tile the row stands, in the pass that made it so and in those after it."""
    clean, model = make_model(), make_model()
    with torch.no_grad():
        model.architecture.backbone.get_input_embeddings().weight[63] = float("nan")
    starts = [0, 0, 0]
    for widths in ([2, 2, 40], [1, 30, 1], [1, 1, 1]):
        asked = [feed(tokens_of(width, row), starts[row]) for row, width in enumerate(widths)]
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
        want = clean.run(list(enumerate(asked)))
        asked[sick].tokens[0] = 63
        got = model.run(list(enumerate(asked)))
        for row in range(3):
            if row == sick:
                assert got[row].logits.isnan().any()
            else:
                assert_same(got[row].logits, want[row].logits)


def test_experts_and_hidden_states_are_of_the_request_that_asked():
    routing = Routing(share=0.5)
    rounds = [
        [(0, feed(tokens_of(2), sees=Full(2), routing=routing)), (1, feed(tokens_of(30), sees=Full(30)))],
        [
            (0, dataclasses.replace(feed(tokens_of(1), 2), read=Hidden(np.arange(1), (0, 2)))),
            (1, feed(tokens_of(28, 1), 30, Full(58), routing=routing)),
        ],
    ]
    packed, padded = both_ways(lambda: tiny_model("masked", arch="qwen3_moe"), rounds)
    for got, want in zip(packed, padded, strict=True):
        for one, other in zip(got, want, strict=True):
            assert np.array_equal(one.experts, other.experts)
            if one.logits is None:
                assert_same(one.hidden, other.hidden)
            else:
                assert_same(one.logits, other.logits)


def test_a_looped_model_packs_its_states_too():
    noise = {"noise": np.array([0.5, 0.0]), "noise_keys": np.array([3, 4])}
    first = [
        (0, feed(tokens_of(30), loops=Loops(3))),
        (1, feed(tokens_of(2), loops=Loops(3, **noise))),
        (2, feed(tokens_of(2, 1), loops=Loops(3))),
    ]
    packed, padded = both_ways(lambda: tiny_model(arch="looped"), [first])
    for one, other in zip(packed[0], padded[0], strict=True):
        assert_same(one.logits, other.logits)
        assert_same(one.states, other.states)
        assert_same(one.embeds, other.embeds)
        np.testing.assert_allclose(one.change, other.change, atol=1e-9)


def test_several_tokens_are_fed_as_one_beside_a_long_prompt(make_model):
    blend = np.array([[1, 2], [3, 4]]), np.array([[0.5, 0.5], [0.25, 0.75]])
    asked = dataclasses.replace(feed(np.zeros(2, np.int64)), blend=blend)
    packed, padded = both_ways(make_model, [[(0, asked), (1, feed(tokens_of(40)))]])
    for one, other in zip(packed[0], padded[0], strict=True):
        assert_same(one.logits, other.logits)


def test_the_engine_runs_what_joins_in_the_pass_of_those_that_decode(make_model):
    model = make_model()
    engine = Engine(model)
    stop = StopRules(max_new_tokens=6)
    seqs = [Sequence(prompt=tokens_of(3, row), family=model.family, stop=stop) for row in range(3)]
    seqs.append(Sequence(prompt=tokens_of(90), family=model.family, stop=stop))
    for seq in seqs[:3]:
        engine.submit(Autoregressive(), seq)
    engine.step()
    engine.submit(Autoregressive(), seqs[3])
    counted = passes(model)
    engine.step()
    assert len(counted) == 1
    engine.run()
    alone = Engine(make_model())
    for seq in seqs:
        again = alone.submit(Autoregressive(), Sequence(prompt=seq.prompt, family=model.family, stop=stop))
        alone.run()
        assert seq.output.tolist() == again.output.tolist()


# Where it is not done.


def test_what_does_not_attend_through_the_registry_is_padded(make_backbone, make_model):
    assert can_tile(make_backbone())
    eager = make_backbone()
    eager.set_attn_implementation("eager")
    assert not can_tile(eager)
    assert not tiny_model("uniform").packs


def test_a_model_that_gives_other_logits_by_tile_is_loaded_and_padded(checkpoint_dir, monkeypatch):
    assert load_model(checkpoint_dir).packs
    attend = ALL_ATTENTION_FUNCTIONS[tiles._NAME]

    def damaged(*args, **more):
        output, weights = attend(*args, **more)
        return 2 * output, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, tiles._NAME, damaged)
    assert not load_model(checkpoint_dir).packs


def test_a_pass_that_fails_leaves_the_model_as_it_was(make_backbone):
    config = make_backbone().config
    with pytest.raises(RuntimeError), attending(config, [Tile(0, 1, 1)]):
        raise RuntimeError
    assert config._attn_implementation == "sdpa"
    assert not tiles._TILES.get()


def test_who_runs_the_model_by_itself_meanwhile_is_not_disturbed(make_backbone):
    model, given = make_backbone(), {"input_ids": torch.arange(1, 17).view(2, 8)}
    given["attention_mask"] = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    want = model(**given).logits
    with attending(model.config, [Tile(0, 1, 1), Tile(1, 1, 4, 1)]), ThreadPoolExecutor(1) as other:
        got = other.submit(lambda: model(**given).logits).result()
    assert torch.equal(got[given["attention_mask"] == 1], want[given["attention_mask"] == 1])
