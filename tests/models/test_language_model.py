from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from chordal.decoders.autoregressive import Autoregressive
from chordal.engine import Engine
from chordal.errors import InputError
from chordal.forward import (
    Blocks,
    Causal,
    Forward,
    Full,
    Hidden,
    Logits,
    Sample,
    Together,
    TopK,
    Tree,
    Visible,
    Window,
)
from chordal.models.family import Family
from chordal.models.language_model import LanguageModel
from chordal.ops.sampling import Law
from chordal.sequence import Sequence, StopRules
from chordal.testing import tiny_model

ARCHITECTURES = ["llama", "qwen2", "qwen3", "olmo2", "gpt_neox", "gpt2"]
POISON = 63


def random_tokens(num, seed=0):
    return np.random.default_rng([seed, num]).integers(0, POISON, num)


def feed(tokens, start=0, sees=None, read=None):
    """Feed a span at its own slots and read the logits of every row, unless told otherwise."""
    at = np.arange(start, start + len(tokens))
    return Forward(tokens, at, sees or Causal(), read or Logits(np.arange(len(tokens))), slots=at)


def peek(tokens, positions, sees):
    """Feed rows that leave the cache as it is, and read the logits of each."""
    return Forward(tokens, np.asarray(positions), sees, Logits(np.arange(len(tokens))))


def run_one(model, forward, row=0):
    return model.run([(row, forward)])[0].logits


def by_transformers(backbone, tokens, can_attend=None):
    """Logits of one plain forward pass of transformers under an explicit mask, causal by default."""
    can_attend = np.tri(len(tokens), dtype=bool) if can_attend is None else can_attend
    with torch.inference_mode():
        return backbone(
            input_ids=torch.from_numpy(tokens)[None],
            attention_mask=torch.from_numpy(can_attend)[None, None],
            position_ids=torch.arange(len(tokens))[None],
        ).logits[0]


def held(model, row, num_slots):
    """Keys and values of the first slots of a row."""
    return torch.stack(
        [
            torch.stack([a.keys[row, :, :num_slots], a.values[row, :, :num_slots]])
            for a in model.cache.slot_layers
        ]
    )


def assert_same(got, want):
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=1e-6)


# The whole path.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_decoding_equals_transformers_generate(make_backbone, make_model, architecture):
    """200 prompts of 1 to 40 tokens in float32, batched as they come and go, 20 new tokens each."""
    num, length, stop_token = 200, 20, 7
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 64, size) for size in rng.integers(1, 41, num)]

    model = make_model(architecture, dtype=torch.float32, max_rows=32)
    engine, stop = Engine(model), StopRules(max_new_tokens=length, eos_ids=(stop_token,))
    seqs = [
        engine.submit(Autoregressive(), Sequence(prompt=prompt, family=model.family, stop=stop))
        for prompt in prompts
    ]
    engine.run()

    # Always with the mask: transformers takes a pad token inside a prompt for padding otherwise.
    padded, is_token = torch.zeros(2, num, 40, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, -len(prompt) :] = torch.from_numpy(prompt)
        is_token[row, -len(prompt) :] = 1
    outputs = make_backbone(architecture, dtype=torch.float32).generate(
        padded,
        attention_mask=is_token,
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=stop_token,
        pad_token_id=0,
    )
    for seq, output in zip(seqs, outputs[:, 40:].tolist(), strict=True):
        if stop_token in output:
            output = output[: output.index(stop_token) + 1]
        assert seq.output.tolist() == output
    # The model says something: texts differ, and some but not all end before the limit.
    assert len({tuple(seq.output) for seq in seqs}) > 150
    assert {seq.finish_reason for seq in seqs} == {"stop", "length"}


# What each spec lets a query see, against transformers with the same mask spelled out.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_fed_in_pieces_equals_one_forward_pass(make_backbone, make_model, architecture):
    model, tokens = make_model(architecture), random_tokens(60)
    want = by_transformers(make_backbone(architecture), tokens)
    rng = np.random.default_rng(1)
    for row in range(4):
        cuts = np.unique(np.r_[0, rng.integers(1, 60, 3 * row), 60])
        got = [run_one(model, feed(tokens[a:b], a), row) for a, b in itertools.pairwise(cuts)]
        assert_same(torch.cat(got), want)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_window_sees_its_last_slots_only(make_backbone, make_model, size):
    model, tokens = make_model(), random_tokens(30)
    at = np.arange(30)
    can_attend = (at <= at[:, None]) & (at > at[:, None] - size)
    want = by_transformers(make_backbone(), tokens, can_attend)
    for row, step in enumerate((30, 12, 1)):
        for start in range(0, 30, step):
            got = run_one(model, feed(tokens[start : start + step], start, Window(size)), row)
            assert_same(got, want[start : start + step])


@pytest.mark.parametrize("length", [1, 4, 7])
def test_blocks_see_themselves_and_all_before(make_backbone, make_model, length):
    num = 4 * length
    model, tokens = make_model(), random_tokens(num)
    block = np.arange(num) // length
    want = by_transformers(make_backbone(), tokens, block <= block[:, None])
    assert_same(run_one(model, feed(tokens, sees=Blocks(length))), want)
    for start in range(0, num, length):
        got = run_one(model, feed(tokens[start : start + length], start, Blocks(length)), 1)
        assert_same(got, want[start : start + length])


def test_full_attention_sees_the_whole_canvas(make_backbone, make_model):
    model, tokens = make_model(), random_tokens(20)
    want = by_transformers(make_backbone(), tokens, np.ones((20, 20), bool))
    assert_same(run_one(model, feed(tokens, sees=Full(20))), want)


def test_full_attention_ends_where_it_says(make_backbone, make_model):
    model, tokens = make_model(), random_tokens(20)
    can_attend = np.ones((20, 20), bool)
    can_attend[:, 15:] = False
    assert_same(
        run_one(model, feed(tokens, sees=Full(15))), by_transformers(make_backbone(), tokens, can_attend)
    )


@pytest.mark.parametrize("num_fed", [1, 3, 20])
def test_hidden_slots_are_seen_by_nobody(make_backbone, make_model, num_fed):
    """A single row used to see them: where it saw all else it went without a mask."""
    model, tokens = make_model(), random_tokens(20)
    hidden, fed = np.array([4, 11, 18]), np.arange(5, 20, 20 // num_fed)[:num_fed]
    run_one(model, feed(tokens, sees=Full(20, hidden)))
    fed = np.arange(20) if num_fed == 20 else fed
    can_attend = np.ones((20, 20), bool)
    can_attend[:, hidden] = False
    forward = Forward(tokens[fed], fed, Full(20, hidden), Logits(np.arange(num_fed)), slots=fed)
    want = by_transformers(make_backbone(), tokens, can_attend)
    assert_same(run_one(model, forward), want[fed])


def test_a_canvas_fed_again_replaces_what_was_cached(make_backbone, make_model):
    model, backbone = make_model(), make_backbone()
    for seed in range(3):
        tokens = random_tokens(20, seed)
        want = by_transformers(backbone, tokens, np.ones((20, 20), bool))
        assert_same(run_one(model, feed(tokens, sees=Full(20))), want)


def test_refreshing_a_block_leaves_the_rest_as_it_was(make_model):
    """One layer's keys depend on its own token alone, so a refresh in place equals feeding everything."""
    settings = {"num_hidden_layers": 1}
    model, tokens = make_model(**settings), random_tokens(20)
    run_one(model, feed(tokens, sees=Full(20)))
    tokens[8:12] = random_tokens(4, 1)
    got = run_one(model, feed(tokens[8:12], 8, Full(20)))
    assert_same(got, run_one(make_model(**settings), feed(tokens, sees=Full(20)))[8:12])


def test_an_explicit_mask_is_taken_as_it_is(make_backbone, make_model):
    """Slots out of order: only what a query sees and its position count, not where its keys lie."""
    model, tokens = make_model(), random_tokens(12)
    order = np.random.default_rng(0).permutation(12)
    none = np.zeros(12, np.int64)
    sees = Visible(none, none, order[None] <= order[:, None])
    forward = Forward(
        tokens[order], order, sees, Logits(np.arange(12)), slots=np.random.default_rng(1).permutation(12)
    )
    assert_same(run_one(model, forward)[np.argsort(order)], by_transformers(make_backbone(), tokens))


def test_positions_are_what_rotary_embeddings_see(make_model):
    """The same tokens further right in the text give the same relative positions, so the same logits."""
    model, tokens = make_model(), random_tokens(10)
    at = np.arange(10)
    near, far, spread = (
        run_one(model, Forward(tokens, positions, Causal(), Logits(at), slots=at))
        for positions in (at, at + 50, 3 * at)
    )
    # Rotary embeddings are computed in float32, whatever the weights.
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(near, spread, atol=1e-2)


# Rolling back.


def test_forgotten_slots_are_written_again_as_if_they_had_never_been(make_backbone, make_model):
    model, tokens = make_model(), random_tokens(40)
    run_one(model, feed(tokens[:10]))
    run_one(model, feed(random_tokens(15, 1), 10))  # a draft of which nothing is kept
    got = [run_one(model, feed(tokens[10:13], 10)), run_one(model, feed(tokens[13:], 13))]
    assert_same(torch.cat(got), by_transformers(make_backbone(), tokens)[10:])


def test_a_draft_is_kept_up_to_where_it_is_right(make_backbone, make_model):
    model, tokens = make_model(), random_tokens(30)
    draft = np.r_[tokens[10:14], random_tokens(6, 1)]
    run_one(model, feed(tokens[:10]))
    run_one(model, feed(draft, 10))
    assert_same(run_one(model, feed(tokens[14:], 14)), by_transformers(make_backbone(), tokens)[14:])


# Read-only requests.


def test_each_node_of_a_tree_reads_what_its_path_alone_would(make_backbone, make_model):
    parents = (-1, -1, 0, 0, 2, 1)
    paths = [[0], [1], [0, 2], [0, 3], [0, 2, 4], [1, 5]]
    model, prefix, nodes = make_model(), random_tokens(9), random_tokens(6, 1)
    run_one(model, feed(prefix))
    got = run_one(model, peek(nodes, [9 + len(path) - 1 for path in paths], Tree(9, parents)))
    for node, path in enumerate(paths):
        want = by_transformers(make_backbone(), np.r_[prefix, nodes[path]])[-1]
        assert_same(got[node], want)


def test_another_branch_of_a_tree_changes_nothing(make_model):
    model, nodes = make_model(), random_tokens(5, 1)
    run_one(model, feed(random_tokens(9)))
    sees, positions = Tree(9, (-1, 0, 0, 1, 2)), [9, 10, 10, 11, 11]
    before = run_one(model, peek(nodes, positions, sees))
    nodes = nodes.copy()
    nodes[[2, 4]] = random_tokens(2, 2)
    after = run_one(model, peek(nodes, positions, sees))
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert not torch.allclose(before[[2, 4]], after[[2, 4]], atol=1e-2)


def test_rows_fed_together_see_each_other_and_nothing_cached(make_backbone, make_model):
    model, tokens = make_model(), random_tokens(12)
    run_one(model, feed(random_tokens(30, 1)))
    want = by_transformers(make_backbone(), tokens, np.ones((12, 12), bool))
    assert_same(run_one(model, peek(tokens, np.arange(12), Together())), want)


def test_a_read_only_request_may_see_any_part_of_the_cache_and_of_itself(make_backbone, make_model):
    model, prefix, canvas = make_model(), random_tokens(10), random_tokens(4, 1)
    run_one(model, feed(prefix))
    own = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], bool)
    sees = Visible(np.array([0, 2, 3, 10]), np.array([10, 10, 7, 10]), own)
    can_attend = np.tri(14, dtype=bool)
    can_attend[10:, 10:] = own
    can_attend[11, :2] = can_attend[12, :3] = can_attend[12, 7:10] = can_attend[13, :10] = False
    want = by_transformers(make_backbone(), np.r_[prefix, canvas], can_attend)[10:]
    assert_same(run_one(model, peek(canvas, np.arange(10, 14), sees)), want)


@pytest.mark.parametrize(
    "sees",
    [
        Tree(20, (-1, 0, 0, 1)),
        Together(),
        Visible(np.zeros(4, np.int64), np.full(4, 20), np.ones((4, 4), bool)),
    ],
    ids=["tree", "together", "visible"],
)
def test_a_read_only_request_leaves_the_cache_bit_for_bit(make_model, sees):
    model, tokens = make_model(), random_tokens(26)
    run_one(model, feed(tokens[:20]))
    before = held(model, 0, 20).clone()
    peeked = [run_one(model, peek(random_tokens(4, 1), np.arange(20, 24), sees)) for _ in range(3)]
    assert torch.equal(held(model, 0, 20), before)
    assert torch.equal(peeked[0], peeked[2])

    other = make_model()
    run_one(other, feed(tokens[:20]))
    assert torch.equal(run_one(model, feed(tokens[20:], 20)), run_one(other, feed(tokens[20:], 20)))


# Batches.


def mixed_requests():
    """Rows of different lengths that ask for different things, each after a prompt of its own."""
    prompts = [random_tokens(size, 10 + size) for size in (5, 40, 1, 17)]
    reads = [Logits(np.array([0])), Logits(np.array([2, 0])), Logits(np.arange(6)), Logits(np.arange(3))]
    forwards = [
        feed(random_tokens(1, 1), 5, read=reads[0]),
        feed(random_tokens(3, 2), 38, Window(5), reads[1]),
        feed(random_tokens(6, 3), 0, Full(6), reads[2]),
        Forward(random_tokens(3, 4), np.array([17, 18, 18]), Tree(17, (-1, 0, 0)), reads[3]),
    ]
    return [feed(prompt) for prompt in prompts], forwards


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_requests_of_a_ragged_batch_read_what_they_would_alone(make_model, architecture):
    prompts, forwards = mixed_requests()
    model = make_model(architecture)
    first, second = model.run([*enumerate(prompts)]), model.run([*enumerate(forwards)])
    for row, (prompt, forward) in enumerate(zip(prompts, forwards, strict=True)):
        alone = make_model(architecture)
        assert_same(first[row].logits, run_one(alone, prompt))
        assert_same(second[row].logits, run_one(alone, forward))


def test_the_order_of_requests_and_their_rows_change_nothing(make_model):
    prompts, _ = mixed_requests()
    model, other = make_model(), make_model()
    want = model.run([*enumerate(prompts)])
    got = other.run([(7 - row, prompts[row]) for row in (2, 0, 3, 1)])
    for row, reading in zip((2, 0, 3, 1), got, strict=True):
        assert_same(reading.logits, want[row].logits)


def test_rows_that_ask_for_nothing_stay_as_they_are(make_backbone, make_model):
    model, tokens = make_model(), random_tokens(30)
    for row in range(3):
        run_one(model, feed(tokens[:20]), row)
    before = held(model, 1, 20).clone()
    model.run([(0, feed(random_tokens(9, 1), 20)), (2, feed(random_tokens(2, 2), 20))])
    assert torch.equal(held(model, 1, 20), before)
    assert_same(run_one(model, feed(tokens[20:], 20), 1), by_transformers(make_backbone(), tokens)[20:])


def test_canvases_of_one_row_in_one_pass_do_not_see_each_other(make_model):
    model = make_model()
    run_one(model, feed(random_tokens(10)))
    requests = [
        peek(random_tokens(4, 1), np.arange(4), Together()),
        peek(random_tokens(3, 2), [10, 11, 11], Tree(10, (-1, 0, 0))),
        peek(random_tokens(6, 3), np.arange(6), Together()),
    ]
    alone = [run_one(model, request) for request in requests]
    for reading, want in zip(model.run([(0, request) for request in requests]), alone, strict=True):
        assert_same(reading.logits, want)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_row_may_write_and_read_in_one_pass(make_model, order):
    """A read-only request before a writing one used to be given the slots that were written."""
    model, alone = make_model(), make_model()
    requests = [
        feed(random_tokens(5, 1), 10),
        peek(random_tokens(4, 2), [10, 11, 11, 12], Tree(10, (-1, 0, 0, 2))),
    ]
    for one in (model, alone):
        run_one(one, feed(random_tokens(10)))
    want = [run_one(alone, requests[1]), run_one(alone, requests[0])][::-1]
    got = model.run([(0, requests[at]) for at in order])
    for at, reading in zip(order, got, strict=True):
        assert_same(reading.logits, want[at])
    following = feed(random_tokens(3, 3), 15)
    assert_same(run_one(model, following), run_one(alone, following))


def test_a_text_may_grow_beyond_the_slots_held_at_first(make_backbone, make_model):
    model, tokens = make_model(), random_tokens(250)
    want = by_transformers(make_backbone(), tokens)
    run_one(model, feed(random_tokens(5, 1)), 1)
    before = held(model, 1, 5).clone()
    got = [run_one(model, feed(tokens[start : start + 50], start)) for start in range(0, 250, 50)]
    assert_same(torch.cat(got), want)
    assert torch.equal(held(model, 1, 5), before)


def test_a_moved_row_goes_on_where_it_was(make_backbone, make_model):
    model, tokens = make_model(), random_tokens(30)
    want = by_transformers(make_backbone(), tokens)
    for row, text in enumerate([random_tokens(12, 1), random_tokens(12, 2), tokens[:20]]):
        run_one(model, feed(text), row)
    model.move_row(2, 0)
    model.free_row(2)
    # What it reads without writing goes behind what it holds, not behind what the row held before.
    peeked = run_one(model, peek(tokens[20:], np.arange(20, 30), Tree(20, tuple(range(-1, 9)))))
    assert_same(peeked, want[20:])
    assert_same(run_one(model, feed(tokens[20:], 20)), want[20:])


def test_a_freed_row_starts_anew(make_backbone, make_model):
    model, tokens = make_model(), random_tokens(10)
    run_one(model, feed(random_tokens(250, 1)))
    model.free_row(0)
    # With all of its slots: these would not fit behind the 250.
    canvas = random_tokens(600, 2)
    run_one(model, peek(canvas, np.arange(600) % 256, Together()))
    assert_same(run_one(model, feed(tokens)), by_transformers(make_backbone(), tokens))


# Values that are not finite.


@pytest.fixture
def poisoned(make_model):
    """A model with a token whose embedding is not a number."""
    model = make_model()
    with torch.no_grad():
        model.architecture.backbone.get_input_embeddings().weight[POISON] = float("nan")
    return model


def test_a_row_that_is_not_finite_does_not_reach_the_others(poisoned, make_model):
    clean, tokens = make_model(), random_tokens(12)
    sick = np.r_[tokens[:5], POISON]
    got = poisoned.run([(0, feed(tokens)), (1, feed(sick)), (2, feed(tokens[:3]))])
    assert got[1].logits[-1].isnan().any()
    assert_same(got[0].logits, run_one(clean, feed(tokens)))
    assert_same(got[2].logits, run_one(clean, feed(tokens[:3])))
    # Nor as padding between them.
    following = feed(random_tokens(2, 1), 12)
    got = poisoned.run([(0, following), (2, feed(tokens[3:], 3))])
    assert_same(got[0].logits, run_one(clean, following))
    assert got[1].logits.isfinite().all()


def test_a_wiped_row_can_be_used_again(poisoned, make_model):
    """Beside a longer row, attention spans the slots that were wiped, and 0 times NaN is NaN."""
    tokens = random_tokens(12)
    run_one(poisoned, feed(np.r_[tokens, POISON, tokens]))
    poisoned.free_row(0, clear=True)
    got, _ = poisoned.run([(0, feed(tokens)), (1, feed(random_tokens(30)))])
    assert_same(got.logits, run_one(make_model(), feed(tokens)))


# What is read.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_are_numbered_as_in_transformers(make_backbone, make_model, architecture):
    model, tokens = make_model(architecture), random_tokens(15)
    with torch.inference_mode():
        states = make_backbone(architecture)(
            torch.from_numpy(tokens)[None], output_hidden_states=True
        ).hidden_states
    rows, layers = np.array([4, 0, 2]), (0, 2, 1)
    run_one(model, feed(tokens[:10]))
    [hidden, logits] = model.run([(0, feed(tokens[10:], 10, read=Hidden(rows, layers))), (1, feed(tokens))])
    assert hidden.hidden.shape == (3, 3, 32)
    want = torch.stack([states[layer][0, 10 + rows] for layer in layers], 1)
    assert_same(hidden.hidden, want)
    assert_same(logits.logits, by_transformers(make_backbone(architecture), tokens))


def test_hidden_states_are_of_the_request_that_asked(make_model):
    model, at = make_model(), np.arange(4)
    first = peek(random_tokens(4, 1), at, Together())
    second = Forward(random_tokens(4, 2), at, Together(), Hidden(np.array([3, 1]), (1, 2)))
    [want] = model.run([(0, second)])
    _, got = model.run([(0, first), (0, second)])
    assert_same(got.hidden, want.hidden)


def test_reads_are_of_the_rows_asked_for(make_backbone, make_model):
    model, tokens = make_model(), random_tokens(9)
    want = by_transformers(make_backbone(), tokens)
    rows = np.array([7, 2])
    logits, best, top, nothing = model.run(
        [
            (0, feed(tokens, read=Logits(rows))),
            (1, feed(tokens, read=Sample(rows, scores=("probs",)))),
            (2, feed(tokens, read=TopK(rows, 4))),
            (3, Forward(tokens, np.arange(9), Causal(), None, slots=np.arange(9))),
        ]
    )
    assert_same(logits.logits, want[rows])
    assert best.tokens.tolist() == want[rows].argmax(1).tolist()
    np.testing.assert_allclose(best.probs, want[rows].softmax(1).amax(1), rtol=1e-5)
    assert top.tokens.tolist() == want[rows].topk(4).indices.tolist()
    np.testing.assert_allclose(top.entropy, torch.special.entr(want[rows].softmax(1)).sum(1), rtol=1e-5)
    assert (nothing.tokens, nothing.logits, nothing.max_logit) == (None, None, None)


def test_logits_are_in_float32_or_wider(make_model):
    for dtype, wide in [
        (torch.float64, torch.float64),
        (torch.float32,) * 2,
        (torch.bfloat16, torch.float32),
    ]:
        assert run_one(make_model(dtype=dtype), feed(random_tokens(3))).dtype == wide


def test_the_mask_token_has_no_probability(make_model):
    mask_id = 17
    model = make_model(family=Family(kind="masked", mask_id=mask_id, shift=0))
    tokens = np.full(20, mask_id)
    logits, top = model.run([(0, feed(tokens)), (1, feed(tokens, read=TopK(np.arange(20), 64)))])
    assert logits.logits[:, mask_id].isneginf().all()
    assert logits.logits[:, :mask_id].isfinite().all()
    assert (top.probs[top.tokens == mask_id] == 0).all()


def test_a_run_makes_one_transfer_to_the_host(make_model, monkeypatch):
    transfers = []

    def count(tensor, *args, _cpu=torch.Tensor.cpu, **kwargs):
        transfers.append(tuple(tensor.shape))
        return _cpu(tensor, *args, **kwargs)

    model = make_model()
    model.run([(0, feed(random_tokens(5)))])
    monkeypatch.setattr(torch.Tensor, "cpu", count)
    reads = [
        Sample(np.array([1])),
        TopK(np.array([0, 2]), 5),
        Sample(np.array([2]), scores=("entropy",)),
        Logits(np.arange(3)),
    ]
    model.run([(row, feed(random_tokens(3, row), read=read)) for row, read in enumerate(reads)])
    assert len(transfers) == 1
    model.run([(0, feed(random_tokens(3), 3, read=Hidden(np.arange(3), (1,))))])
    assert len(transfers) == 1


def test_runs_do_not_move_the_cache_in_memory(make_model):
    model = make_model()
    model.run([(row, feed(random_tokens(5, row))) for row in range(4)])
    before = [layer.keys.data_ptr() for layer in model.cache.slot_layers]
    model.run([(row, feed(random_tokens(1, row), 5)) for row in range(1, 4)])
    assert [layer.keys.data_ptr() for layer in model.cache.slot_layers] == before


def test_a_request_beyond_the_cache_is_refused_and_changes_nothing(make_model):
    model, tokens = make_model(), random_tokens(10)
    run_one(model, feed(tokens))
    with pytest.raises(InputError, match="a sequence needs 5001 cache slots; tiny has 4352"):
        run_one(model, Forward(tokens[:1], np.array([10]), Causal(), slots=np.array([5000])))
    peeked = run_one(model, peek(tokens, np.arange(10), Together()))
    assert_same(peeked, run_one(make_model(), peek(tokens, np.arange(10), Together())))


def test_a_model_says_what_it_can_take(make_model):
    model = make_model(max_rows=3)
    assert (model.window, model.vocab_size, model.max_rows, model.name) == (256, 64, 3, "tiny")
    assert not model.model.training


def test_a_model_takes_and_gives_the_tokens_of_the_one_it_works_for(make_backbone):
    """Tokens that it lacks have no probability and are read as its last one; those too many are left out."""
    tokens = np.array([5, 63, 6])
    model = LanguageModel(make_backbone(), Family())
    own = run_one(model, feed(tokens))
    for size in (70, 60):
        model.share_vocabulary(size)
        shared = run_one(model, feed(np.minimum(tokens, size - 1)))
        assert (model.vocab_size, shared.shape) == (size, (3, size))
        if size > 64:
            assert torch.equal(shared[:, :64], own)
            assert (shared[:, 64:] == float("-inf")).all()
            assert torch.equal(run_one(model, feed(np.array([5, 69, 6]))), shared)
            drawn = Sample(np.arange(3), uniforms=np.array([0.1, 0.5, 1 - 2**-53]), law=Law(temperature=1.0))
            [reading] = model.run([(0, feed(tokens, read=drawn))])
            assert max(reading.tokens) < 64


# Several tokens fed as one.


def blended(tokens, weights, start=0):
    """Feed weighted sums of embeddings of `[q, k]` tokens; the plain tokens are others."""
    forward = feed(np.zeros(len(tokens), np.int64), start)
    return dataclasses.replace(forward, blend=(np.asarray(tokens), np.asarray(weights)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blended_rows_are_fed_the_sum_of_their_embeddings(make_backbone, make_model, architecture):
    """As transformers computes it from embeddings, in a batch with rows of plain tokens."""
    model, backbone = make_model(architecture), make_backbone(architecture)
    prefix, other = random_tokens(5), random_tokens(6, seed=1)
    ids, weights = random_tokens(9).reshape(3, 3), np.random.default_rng(0).random((3, 3))
    model.run([(0, feed(prefix))])
    mixed, plain = model.run([(0, blended(ids, weights, 5)), (1, feed(other))])

    embed = backbone.get_input_embeddings()
    with torch.inference_mode():
        sums = (embed(torch.from_numpy(ids)) * torch.from_numpy(weights)[..., None]).sum(1)
        embeds = torch.cat([embed(torch.from_numpy(prefix)), sums])[None]
        want = backbone(inputs_embeds=embeds, use_cache=False).logits[0, 5:]
    assert_same(mixed.logits, want)
    assert_same(plain.logits, by_transformers(backbone, other))


def test_one_token_of_weight_one_is_that_token_bit_for_bit(make_model):
    model, tokens = make_model(), random_tokens(7)
    plain = run_one(model, feed(tokens), row=1)
    ids = np.stack([tokens, random_tokens(7, seed=1)], 1)
    assert torch.equal(run_one(model, blended(ids, np.tile([1.0, 0.0], (7, 1)))), plain)
    halves = np.stack([tokens, tokens], 1), np.tile([0.25, 0.75], (7, 1))
    assert_same(run_one(model, blended(*halves)), plain)


def test_requests_may_blend_unlike_numbers_of_tokens(make_model):
    model = make_model()
    asks = [blended(random_tokens(2 * k).reshape(2, k), np.full((2, k), 1 / k)) for k in (1, 3, 2)]
    alone = [run_one(model, ask, row=5) for ask in asks]
    for reading, want in zip(model.run(list(enumerate(asks))), alone, strict=True):
        assert_same(reading.logits, want)


def test_a_backbone_that_looks_at_token_ids_refuses_to_blend(make_backbone):
    """As those with an embedding for each layer do."""
    backbone = make_backbone("llama")
    own = backbone.model.forward

    def forward(input_ids=None, inputs_embeds=None, **given):
        embeds = backbone.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return own(inputs_embeds=embeds if input_ids is None else embeds + input_ids[..., None], **given)

    backbone.model.forward = forward
    model = LanguageModel(backbone, Family(), name="layered")
    with pytest.raises(InputError, match="layered reads token ids beside their embeddings"):
        model.run([(0, blended([[1, 2]], [[0.5, 0.5]]))])
    model.run([(0, feed(random_tokens(3)))])


def test_a_looped_model_blends_too():
    model, tokens = tiny_model(arch="looped"), np.arange(1, 6)
    plain = run_one(model, feed(tokens), row=1)
    assert torch.equal(run_one(model, blended(tokens[:, None], np.ones((5, 1)))), plain)
    halves = np.stack([tokens, tokens[::-1]], 1), np.full((5, 2), 0.5)
    assert not torch.allclose(run_one(model, blended(*halves)), plain)


@pytest.mark.parametrize("token", [-1, 64])
def test_what_is_no_token_is_refused_before_it_is_fed(make_model, token):
    at = np.arange(1)
    with pytest.raises(InputError, match=f"tiny has tokens 0 to 63; got .*{token}"):
        make_model().run([(0, Forward(np.array([token]), at, Causal(), slots=at))])
