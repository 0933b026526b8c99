from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from chordal.training import objectives
from chordal.training.data import Batch
from chordal.training.objectives import (
    _mask_uniform_count,
    balanced_loss,
    block_loss,
    causal_loss,
    masked_loss,
)

VOCAB, MASK, END = 24, 1, 2
BLOCK = 4

OBJECTIVES = {
    "causal": causal_loss,
    "masked": partial(masked_loss, mask_id=MASK, slacks=(BLOCK,)),
    "block": partial(block_loss, mask_id=MASK, block_length=BLOCK),
}
DIFFUSION = {name: OBJECTIVES[name] for name in ("masked", "block")}

every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
every_diffusion = pytest.mark.parametrize("objective", DIFFUSION.values(), ids=DIFFUSION)


class Stub:
    """Stands for a transformers model; its final state is already the logits, `logits(ids, positions)`."""

    def __init__(self, logits):
        self.logits = logits
        self.lm_head = lambda hidden: hidden

    def model(self, input_ids, position_ids, attention_mask, use_cache):
        self.ids = input_ids
        self.positions = position_ids.expand_as(input_ids)
        self.can_attend = (attention_mask == 0)[:, 0]
        return SimpleNamespace(last_hidden_state=self.logits(self.ids, self.positions))


class Recorder:
    """A real model that keeps what it was fed."""

    def __init__(self, inner):
        self.inner = inner
        self.lm_head = inner.lm_head

    def model(self, **fed):
        self.fed = fed
        return self.inner.model(**fed)


def uniform(ids, positions):
    return torch.zeros(*ids.shape, VOCAB)


def position_table(seed=0):
    """Logits that depend on the position alone, whatever is fed."""
    table = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(seed))
    return lambda ids, positions: table[positions]


def make_batch(prompts=(5, 3, 6, 1), answers=(4, 9, 1, 6), slack=BLOCK, seed=0):
    """Rows of random tokens; an answer's length counts its end token."""
    generator = torch.Generator().manual_seed(seed)
    prompt_length_B, answer_length_B = torch.tensor(prompts), torch.tensor(answers)
    length_B = prompt_length_B + answer_length_B
    at_T = torch.arange(int(length_B.max()) + slack)
    tokens_BT = torch.randint(END + 1, VOCAB, (len(prompts), len(at_T)), generator=generator)
    tokens_BT = torch.where(at_T < length_B[:, None] - 1, tokens_BT, END)
    return Batch(tokens_BT, prompt_length_B, length_B, 1.0)


def with_tokens(batch, tokens_BT):
    return Batch(tokens_BT, batch.prompt_length_B, batch.length_B, batch.weight)


def other_tokens(tokens):
    """Replace every token by another one that is neither special nor itself."""
    return (tokens - END - 1 + 1) % (VOCAB - END - 1) + END + 1


def run(objective, model, batch, seed=0):
    return objective(model, batch, torch.Generator().manual_seed(seed))


def masked_positions(stub):
    """Return (row, position) of every masked token that was fed."""
    return {(row, int(stub.positions[row, at])) for row, at in (stub.ids == MASK).nonzero().tolist()}


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        # Large weights: every token that can be seen makes a visible difference.
        initializer_range=0.5,
        attn_implementation="eager",
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=END,
    )
    return Qwen3ForCausalLM(config).double().eval().requires_grad_(False)


def log_probs(qwen, tokens, can_attend_TT, banned=None):
    """Run one sequence plainly; True in the mask means "can attend"."""
    bias = torch.zeros(can_attend_TT.shape, dtype=torch.float64).masked_fill(~can_attend_TT, -1e30)
    logits = qwen(input_ids=tokens[None], attention_mask=bias[None, None]).logits[0]
    if banned is not None:
        logits[:, banned] = float("-inf")
    return logits.log_softmax(-1)


# --- all objectives -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "choices"), [("causal", VOCAB), ("masked", VOCAB - 1), ("block", VOCAB - 1)]
)
def test_uniform_model_loses_log_of_the_tokens_it_may_choose_from(name, choices, seed):
    loss = run(OBJECTIVES[name], Stub(uniform), make_batch(seed=seed), seed)
    assert loss.item() == pytest.approx(math.log(choices), abs=1e-5)


@every_objective
def test_model_that_knows_the_text_loses_nothing(objective):
    batch = make_batch()
    shift = int(objective is causal_loss)

    def knowing(ids, positions):
        at = (positions + shift).clamp(max=batch.tokens_BT.shape[1] - 1)
        return 1000.0 * F.one_hot(batch.tokens_BT.gather(1, at), VOCAB)

    assert run(objective, Stub(knowing), batch).item() == pytest.approx(0, abs=1e-6)


@every_objective
def test_prompts_and_what_lies_behind_the_end_are_never_scored(objective):
    batch, table = make_batch(), position_table()
    at_T = torch.arange(batch.tokens_BT.shape[1])
    behind = batch.length_B + (0 if objective is causal_loss else 2 * BLOCK)
    is_scored = (at_T >= batch.prompt_length_B[:, None]) & (at_T < behind[:, None])
    changed = with_tokens(batch, torch.where(is_scored, batch.tokens_BT, other_tokens(batch.tokens_BT)))
    assert not torch.equal(changed.tokens_BT, batch.tokens_BT)
    assert run(objective, Stub(table), changed) == run(objective, Stub(table), batch)


@every_objective
def test_prompts_are_never_masked(objective):
    batch = make_batch()
    for seed in range(20):
        stub = Stub(uniform)
        run(objective, stub, batch, seed)
        masked = masked_positions(stub)
        assert all(at >= batch.prompt_length_B[row] for row, at in masked)
        assert bool(masked) == (objective is not causal_loss)


@every_objective
def test_what_lies_behind_a_row_does_not_reach_it(objective, qwen):
    batch = make_batch(slack=3 * BLOCK)
    at_T = torch.arange(batch.tokens_BT.shape[1])
    is_behind = at_T >= batch.length_B[:, None] + BLOCK
    changed = with_tokens(batch, torch.where(is_behind, other_tokens(batch.tokens_BT), batch.tokens_BT))
    assert run(objective, qwen, changed).item() == pytest.approx(run(objective, qwen, batch).item(), abs=1e-6)


@every_objective
def test_prompts_are_read(objective, qwen):
    batch = make_batch()
    is_prompt = torch.arange(batch.tokens_BT.shape[1]) < batch.prompt_length_B[:, None]
    changed = with_tokens(batch, torch.where(is_prompt, other_tokens(batch.tokens_BT), batch.tokens_BT))
    assert abs(run(objective, qwen, changed) - run(objective, qwen, batch)) > 1e-3


@every_objective
def test_same_generator_seed_gives_the_same_loss(objective):
    batch, table = make_batch(), position_table()
    losses = [run(objective, Stub(table), batch, seed).item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert (losses[1] == losses[2]) == (objective is causal_loss)


# --- causal ---------------------------------------------------------------------------------------


def test_causal_loss_equals_the_plain_model_on_each_row_alone(qwen):
    batch = make_batch()
    losses = []
    for tokens, start, end in zip(batch.tokens_BT, batch.prompt_length_B, batch.length_B, strict=True):
        causal = torch.ones(end, end, dtype=torch.bool).tril()
        log_p = log_probs(qwen, tokens[:end], causal)
        losses += [-log_p[at - 1, tokens[at]] for at in range(start, end)]
    assert run(causal_loss, qwen, batch).item() == pytest.approx(sum(losses).item() / len(losses), abs=1e-5)


def test_causal_loss_scores_every_answer_token_and_the_end_once():
    batch, table = make_batch(prompts=(3,), answers=(5,)), position_table()
    before = run(causal_loss, Stub(table), batch)
    for at in range(batch.tokens_BT.shape[1]):
        changed = batch.tokens_BT.clone()
        changed[0, at] = other_tokens(changed[0, at])
        after = run(causal_loss, Stub(table), with_tokens(batch, changed))
        assert (after != before) == (3 <= at < 8)


# --- both diffusion objectives --------------------------------------------------------------------


@every_diffusion
def test_masked_tokens_alone_are_scored(objective):
    batch, table = make_batch(), position_table()
    stub = Stub(table)
    before = run(objective, stub, batch)
    masked = masked_positions(stub)
    scored = set()
    for row, at in torch.cartesian_prod(*map(torch.arange, batch.tokens_BT.shape)).tolist():
        changed = batch.tokens_BT.clone()
        changed[row, at] = other_tokens(changed[row, at])
        if run(objective, Stub(table), with_tokens(batch, changed)) != before:
            scored.add((row, at))
    assert scored == masked


@every_diffusion
def test_mask_token_gets_no_gradient(objective):
    weight = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0)).requires_grad_()
    run(objective, Stub(lambda ids, positions: weight[positions]), make_batch()).backward()
    assert torch.all(weight.grad[:, MASK] == 0)
    assert weight.grad.abs().sum() > 0.1


@every_diffusion
def test_mask_token_is_excluded_however_likely_the_model_finds_it(objective):
    def sure_of_mask(ids, positions):
        return torch.zeros(*ids.shape, VOCAB).index_fill(-1, torch.tensor(MASK), 1e4)

    loss = run(objective, Stub(sure_of_mask), make_batch())
    assert loss.item() == pytest.approx(math.log(VOCAB - 1), abs=1e-5)


def test_mask_counts_are_uniform_and_spread_evenly_over_the_rows():
    is_canvas = torch.zeros(24, 9, dtype=torch.bool)
    is_canvas[:, 2:8] = True
    for seed in range(20):
        is_masked = _mask_uniform_count(is_canvas, torch.Generator().manual_seed(seed))
        assert not (is_masked & ~is_canvas).any()
        # 24 rows of 6 positions: each count exactly four times, not just on average.
        assert is_masked.sum(1).bincount(minlength=7).tolist() == [0, 4, 4, 4, 4, 4, 4]


def test_mask_counts_follow_the_length_of_each_row():
    lengths = torch.tensor([0, 1, 2, 5, 3, 0, 4, 1])
    is_canvas = torch.arange(6) < lengths[:, None]
    seen = {row: set() for row in range(len(lengths))}
    for seed in range(200):
        counts = _mask_uniform_count(is_canvas, torch.Generator().manual_seed(seed)).sum(1)
        for row, count in enumerate(counts.tolist()):
            seen[row].add(count)
    for row, length in enumerate(lengths.tolist()):
        assert seen[row] == (set(range(1, length + 1)) or {0})


def test_masks_are_equally_likely_at_every_position_and_in_every_pair():
    is_canvas = torch.ones(5000, 4, dtype=torch.bool)
    is_masked = _mask_uniform_count(is_canvas, torch.Generator().manual_seed(0)).double()
    # k uniform on 1..4: a position is masked with 5/8, a given pair with (0 + 1/6 + 1/2 + 1) / 4.
    together = is_masked.T @ is_masked / len(is_masked)
    expected = torch.full((4, 4), 5 / 12, dtype=torch.float64).fill_diagonal_(5 / 8)
    # Five standard deviations of a mean of 5000 draws.
    assert (together - expected).abs().max() < 5 * 0.5 / 5000**0.5


@every_diffusion
def test_loss_is_an_unbiased_mean_over_the_answer_tokens(objective):
    """Averaged over many masks, every canvas token counts the same, however many were masked with it."""
    batch, table = make_batch(prompts=(4, 4), answers=(8, 8), slack=0), position_table(3)
    log_p = table(None, torch.arange(12)).index_fill(-1, torch.tensor(MASK), float("-inf")).log_softmax(-1)
    tokens = batch.tokens_BT[:, 4:]
    exact = -log_p[4:].expand(2, -1, -1).gather(2, tokens[..., None]).mean()
    losses = torch.tensor([run(objective, Stub(table), batch, seed) for seed in range(1500)])
    assert losses.std() > 0.05
    # Five standard errors.
    assert abs(losses.mean() - exact) < 5 * losses.std() / len(losses) ** 0.5


# --- masked ---------------------------------------------------------------------------------------


def test_masked_loss_equals_full_attention_on_each_canvas_alone(qwen):
    batch = make_batch()
    for seed in range(5):
        recorder = Recorder(qwen)
        loss = run(OBJECTIVES["masked"], recorder, batch, seed)
        fed, rows = recorder.fed["input_ids"], []
        ends = (recorder.fed["attention_mask"][:, 0, 0] == 0).sum(1)
        for row, end in enumerate(ends.tolist()):
            log_p = log_probs(qwen, fed[row, :end], torch.ones(end, end, dtype=torch.bool), banned=MASK)
            masked = (fed[row] == MASK).nonzero()[:, 0].tolist()
            rows.append(sum(-log_p[at, batch.tokens_BT[row, at]].item() for at in masked) / len(masked))
        assert loss.item() == pytest.approx(sum(rows) / len(rows), abs=1e-5)


def test_canvas_ends_between_the_end_token_and_the_slack_behind_it():
    batch, max_slack = make_batch(slack=12), 10
    objective = partial(masked_loss, mask_id=MASK, slacks=(max_slack,))
    slacks = set()
    for seed in range(150):
        stub = Stub(uniform)
        run(objective, stub, batch, seed)
        ends = stub.can_attend[:, 0].sum(1)
        slacks |= set((ends - batch.length_B).tolist())
        # Every row of one canvas sees the same keys: those before its end.
        at_T = torch.arange(stub.ids.shape[1])
        assert torch.equal(stub.can_attend, (at_T < ends[:, None])[:, None].expand_as(stub.can_attend))
        assert all(at < ends[row] for row, at in masked_positions(stub))
    assert slacks == set(range(max_slack + 1))


def test_suffix_rows_mask_the_last_tokens_of_the_canvas_or_of_the_answer():
    batch = make_batch(slack=12)
    objective = partial(masked_loss, mask_id=MASK, slacks=(6,), suffix_share=1.0)
    reached_end, stopped_early = 0, 0
    for seed in range(40):
        stub = Stub(uniform)
        run(objective, stub, batch, seed)
        ends = stub.can_attend[:, 0].sum(1)
        rows = {}
        for row, at in sorted(masked_positions(stub)):
            rows.setdefault(row, []).append(at)
        for row, masked in rows.items():
            assert masked == list(range(masked[0], masked[-1] + 1))
            assert masked[-1] + 1 in (int(ends[row]), int(batch.length_B[row]))
            reached_end += masked[-1] + 1 == ends[row]
            stopped_early += masked[-1] + 1 < ends[row]
    assert reached_end > 30
    assert stopped_early > 30


def test_canvas_never_leaves_the_batch():
    objective = partial(masked_loss, mask_id=MASK, slacks=(10,))
    for seed in range(50):
        loss = run(objective, Stub(uniform), make_batch(slack=1), seed)
        assert loss.item() == pytest.approx(math.log(VOCAB - 1), abs=1e-5)


# --- block ----------------------------------------------------------------------------------------


def visible_to(stub, row=0):
    """Return for each query (half, position) the keys (half, position) it sees."""
    positions = stub.positions[row]
    num_clean = int((positions.diff() < 0).nonzero()) + 1  # where the noisy half starts over
    names = [
        ("clean" if at < num_clean else "noisy", position) for at, position in enumerate(positions.tolist())
    ]
    return {
        name: {other for other, sees in zip(names, seen, strict=True) if sees}
        for name, seen in zip(names, stub.can_attend[row].tolist(), strict=True)
    }


def test_block_mask_of_four_tokens_in_blocks_of_two():
    """The worked example of the BD3-LM mask: L = 4, block 2."""
    stub = Stub(uniform)
    batch = Batch(torch.tensor([[3, 4, 5, END]]), torch.tensor([0]), torch.tensor([4]), 1.0)
    run(partial(block_loss, mask_id=MASK, block_length=2), stub, batch)
    seen = visible_to(stub)
    (clean_0, clean_1), (noisy_0, noisy_1) = (
        ({(half, 0), (half, 1)}, {(half, 2), (half, 3)}) for half in ("clean", "noisy")
    )
    for queries, keys in (
        (clean_0, clean_0),
        (clean_1, clean_0 | clean_1),
        (noisy_0, noisy_0),
        (noisy_1, clean_0 | noisy_1),
    ):
        assert all(seen[query] == keys for query in queries)


def test_only_answer_blocks_have_a_noisy_copy_and_prompt_tokens_in_it_stay():
    stub = Stub(uniform)
    batch = Batch(torch.tensor([[3, 4, 5, 6, END, END]]), torch.tensor([3]), torch.tensor([5]), 1.0)
    objective = partial(block_loss, mask_id=MASK, block_length=2)
    for seed in range(20):
        run(objective, stub, batch, seed)
        assert stub.positions.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 5]]
        assert stub.ids[0, :6].tolist() == batch.tokens_BT[0].tolist()
        # Position 2 is the prompt's, position 3 the only one of its block to mask.
        assert stub.ids[0, 6:8].tolist() == [5, MASK]
        assert set(stub.ids[0, 8:].tolist()) <= {MASK, END}
        assert MASK in stub.ids[0, 8:]
    seen = visible_to(stub)
    assert seen["noisy", 3] == {("clean", 0), ("clean", 1), ("noisy", 2), ("noisy", 3)}
    assert seen["noisy", 4] == {("clean", at) for at in range(4)} | {("noisy", 4), ("noisy", 5)}


def test_queries_beyond_the_end_of_a_row_are_seen_by_no_other():
    stub = Stub(uniform)
    batch = make_batch()
    run(OBJECTIVES["block"], stub, batch)
    for row, end in enumerate((batch.length_B + BLOCK - 1) // BLOCK * BLOCK):
        is_beyond = stub.positions[row] >= end
        assert not stub.can_attend[row][~is_beyond][:, is_beyond].any()
        # A query that sees nothing at all would give NaN.
        assert stub.can_attend[row].any(1).all()


@pytest.fixture
def block_run(qwen):
    """One block loss on the real model: what was fed, and the final states as a function of the ids."""
    batch, recorder = make_batch(), Recorder(qwen)
    loss = run(OBJECTIVES["block"], recorder, batch)
    fed = recorder.fed
    width = int(((batch.length_B + BLOCK - 1) // BLOCK * BLOCK).max())

    def states(ids):
        return qwen.model(**{**fed, "input_ids": ids}).last_hidden_state

    return SimpleNamespace(
        batch=batch,
        loss=loss,
        ids=fed["input_ids"],
        block=fed["position_ids"] // BLOCK,
        positions=fed["position_ids"],
        is_noisy=torch.arange(fed["input_ids"].shape[1]) >= width,
        states=states,
    )


def test_clean_tokens_of_a_block_or_later_do_not_leak_into_its_noisy_copy(block_run):
    plain = block_run.states(block_run.ids)
    for block in block_run.block[:, block_run.is_noisy].unique().tolist():
        is_later = (block_run.block >= block) & ~block_run.is_noisy
        changed = block_run.states(torch.where(is_later, other_tokens(block_run.ids), block_run.ids))
        is_own = (block_run.block == block) & block_run.is_noisy
        assert is_own.any()
        torch.testing.assert_close(changed[is_own], plain[is_own], rtol=0, atol=1e-12)


def test_noisy_tokens_of_other_blocks_do_not_leak_into_a_block(block_run):
    plain = block_run.states(block_run.ids)
    for block in block_run.block[:, block_run.is_noisy].unique().tolist():
        is_other = (block_run.block != block) & block_run.is_noisy
        changed = block_run.states(torch.where(is_other, other_tokens(block_run.ids), block_run.ids))
        torch.testing.assert_close(
            changed[block_run.block == block], plain[block_run.block == block], rtol=0, atol=1e-12
        )


def test_clean_tokens_of_earlier_blocks_reach_the_noisy_copy(block_run):
    plain = block_run.states(block_run.ids)
    reached = 0
    for block in block_run.block[:, block_run.is_noisy].unique().tolist():
        for row in range(len(block_run.ids)):
            is_own = (block_run.block[row] == block) & block_run.is_noisy
            is_earlier = (block_run.block[row] < block) & ~block_run.is_noisy
            is_inside = (block_run.positions[row] < block_run.batch.length_B[row]) & is_own
            if is_inside.any() and is_earlier.any():
                ids = block_run.ids.clone()
                ids[row] = torch.where(is_earlier, other_tokens(ids[row]), ids[row])
                change = (block_run.states(ids)[row] - plain[row]).abs().amax(-1)
                assert (change[is_inside] > 1e-3).all()
                reached += 1
    assert reached >= 4


def test_block_loss_equals_decoding_each_block_after_its_clean_prefix(block_run, qwen):
    """Feed what inference feeds: the clean blocks before, then the noisy block, nothing else."""
    loss, tokens_scored = 0.0, 0
    batch = block_run.batch
    for row in range(len(batch.tokens_BT)):
        end = -(-int(batch.length_B[row]) // BLOCK)
        start = int(batch.prompt_length_B[row]) // BLOCK
        for block in range(start, end):
            is_own = (block_run.block[row] == block) & block_run.is_noisy
            noisy = block_run.ids[row][is_own]
            ids = torch.cat([batch.tokens_BT[row, : block * BLOCK], noisy])
            block_of = torch.arange(len(ids)) // BLOCK
            log_p = log_probs(qwen, ids, block_of[:, None] >= block_of, banned=MASK)[-BLOCK:]
            target = batch.tokens_BT[row, block * BLOCK : (block + 1) * BLOCK]
            is_masked = noisy == MASK
            at = torch.arange(block * BLOCK, (block + 1) * BLOCK)
            num_answer = int((at >= batch.prompt_length_B[row]).sum())
            picked = log_p.gather(1, target[:, None])[is_masked]
            loss += num_answer * -picked.mean().item()
            tokens_scored += num_answer
    assert block_run.loss.item() == pytest.approx(loss / tokens_scored, abs=1e-5)


def test_one_block_over_the_whole_text_equals_masked_diffusion(monkeypatch, qwen):
    # Equal answer lengths: a block counts by its length, a canvas does not.
    batch = make_batch(prompts=(6, 6, 6), answers=(8, 8, 8), slack=0)
    width = batch.tokens_BT.shape[1]
    chosen = torch.rand(3, width, generator=torch.Generator().manual_seed(1)) < 0.5
    monkeypatch.setattr(objectives, "_mask_uniform_count", lambda is_canvas, *_: chosen & is_canvas)
    masked = run(partial(masked_loss, mask_id=MASK, slacks=(0,)), qwen, batch)
    block = run(partial(block_loss, mask_id=MASK, block_length=width), qwen, batch)
    assert block.item() == pytest.approx(masked.item(), abs=1e-5)


def test_blocks_of_one_token_equal_the_causal_factorisation(qwen):
    """Each token is predicted by a mask in its place, from the clean tokens before it."""
    batch = make_batch(slack=0)
    losses = []
    for tokens, start, end in zip(batch.tokens_BT, batch.prompt_length_B, batch.length_B, strict=True):
        for at in range(start, end):
            ids = torch.cat([tokens[:at], torch.tensor([MASK])])
            causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            losses.append(-log_probs(qwen, ids, causal, banned=MASK)[-1, tokens[at]].item())
    loss = run(partial(block_loss, mask_id=MASK, block_length=1), qwen, batch)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)


# --- balanced experts -----------------------------------------------------------------------------


class ScriptedTopKRouter(torch.nn.Module):
    """Gives the same logits and choices to everybody."""

    def __init__(self, logits, chosen):
        super().__init__()
        self.logits, self.chosen = torch.tensor(logits, requires_grad=True), torch.tensor(chosen)

    def forward(self):
        return self.logits, None, self.chosen


def balance(*routers, weight=1.0):
    """Give what balancing adds to a loss of 1.5."""
    model = torch.nn.ModuleList(routers)

    def objective(model, batch, generator):
        for router in model:
            router()
        return torch.tensor(1.5)

    loss = balanced_loss(model, None, torch.Generator(), objective=objective, weight=weight)
    assert not any(router._forward_hooks for router in routers)
    return loss - 1.5


def test_even_experts_add_the_weight_and_no_less():
    even = ScriptedTopKRouter([[0.0] * 4] * 2, [[0, 1], [2, 3]])
    assert balance(even, weight=0.25).item() == pytest.approx(0.25)


def test_busy_experts_cost_by_how_likely_they_are():
    """Worked by hand: probabilities .7, .1, .1, .1, and expert 0 gets half of all: 4 (.35 + .05)."""
    skewed = [math.log(7), 0.0, 0.0, 0.0]
    busy = ScriptedTopKRouter([skewed] * 2, [[0, 1], [0, 2]])
    assert balance(busy).item() == pytest.approx(4 * (0.5 * 0.7 + 0.25 * 0.1 + 0.25 * 0.1))
    even = ScriptedTopKRouter([[0.0] * 4], [[0, 1, 2, 3]])
    assert balance(busy, even).item() == pytest.approx((1.6 + 1) / 2)


def test_balancing_makes_busy_experts_less_likely():
    busy = ScriptedTopKRouter([[1.0, 0.0, 0.0]], [[0]])
    balance(busy).backward()
    assert busy.logits.grad[0, 0] > 0
    assert (busy.logits.grad[0, 1:] < 0).all()


def test_a_failed_objective_leaves_no_hook_behind():
    router = ScriptedTopKRouter([[0.0, 0.0]], [[0]])

    def objective(model, batch, generator):
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        balanced_loss(router, None, torch.Generator(), objective=objective, weight=1.0)
    assert not router._forward_hooks
