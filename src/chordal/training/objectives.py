"""The training losses: causal, masked diffusion, block diffusion, and what balances experts.

Each takes a transformers causal model, a batch of examples and a random number generator, and
returns the mean loss per answer token in nats. Prompts are never masked and never scored.

The masked losses draw the NUMBER of masked tokens k uniformly from 1..L and average over the masked
ones. In expectation that is the usual bound, masking each token with probability t ~ U(0, 1) and
weighting by 1/t (LLaDA, arXiv 2502.09992, eq. 14 for the exact-count form), with less variance: no
draw is empty and none has a huge weight. Draws are stratified over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from chordal.training.data import Batch

Objective = Callable[[Any, Batch, torch.Generator], Tensor]


def causal_loss(model: Any, batch: Batch, generator: torch.Generator, **more: Any) -> Tensor:
    """Average cross-entropy of the answer, end token included, each from the tokens before it.

    What is given as `more` goes to the backbone.
    """
    width = batch.tokens_BT.shape[1]
    at_T = torch.arange(width)
    is_scored_BT = (at_T >= batch.prompt_length_B[:, None]) & (at_T < batch.length_B[:, None])
    can_attend_TT = at_T[:, None] >= at_T
    hidden_BTD = _hidden(model, batch.tokens_BT, at_T[None], can_attend_TT[None, None], **more)
    # The state before a scored position predicts it.
    logits_NV = model.lm_head(hidden_BTD[:, :-1][is_scored_BT[:, 1:]])
    return F.cross_entropy(logits_NV.float(), batch.tokens_BT[:, 1:][is_scored_BT[:, 1:]])


def masked_loss(
    model: Any,
    batch: Batch,
    generator: torch.Generator,
    *,
    mask_id: int,
    slacks: Sequence[int],
    suffix_share: float = 0.0,
) -> Tensor:
    """Score the masked tokens of each canvas under full attention (LLaDA's objective).

    A canvas is the answer, its end token and some more end tokens ("slack"). Tight canvases teach
    fastest; but a model that saw few others takes the length of its canvas for that of the answer.

    Args:
        model: The transformers model.
        batch: The examples.
        generator: For masks and slack.
        mask_id: The mask token.
        slacks: One of these is drawn for the batch, and each row's slack from 0 to it; the same for
            all rows keeps the columns of tight batches few.
        suffix_share: Share of rows whose masked tokens are the last ones rather than any; half of
            these leave what is behind the end token visible. Decoding mostly goes through such
            canvases, and where a result is repeated later, only they make the model work it out.
    """
    count, width = batch.tokens_BT.shape
    most = slacks[int(torch.randint(len(slacks), (), generator=generator))]
    slack_B = torch.randint(0, most + 1, (count,), generator=generator)
    end_B = torch.clamp(batch.length_B + slack_B, max=width)
    width = int(end_B.max())
    tokens_BT, at_T = batch.tokens_BT[:, :width], torch.arange(width)
    is_canvas_BT = (at_T >= batch.prompt_length_B[:, None]) & (at_T < end_B[:, None])

    kind_B = torch.rand(count, generator=generator) / max(suffix_share, 1e-9)
    is_suffix_B, ends_early_B = kind_B < 1, kind_B < 0.5
    is_open_BT = is_canvas_BT & ~(ends_early_B[:, None] & (at_T >= batch.length_B[:, None]))
    is_masked_BT = _mask_uniform_count(is_open_BT, generator, is_suffix_B)
    noisy_BT = torch.where(is_masked_BT, mask_id, tokens_BT)
    can_attend_BT = at_T < end_B[:, None]
    hidden_BTD = _hidden(model, noisy_BT, at_T[None], can_attend_BT[:, None, None].expand(-1, -1, width, -1))
    loss_N = _cross_entropy(model, hidden_BTD[is_masked_BT], tokens_BT[is_masked_BT], mask_id)
    weight_BT = 1.0 / is_masked_BT.sum(1, keepdim=True).expand_as(is_masked_BT)
    return (loss_N * weight_BT[is_masked_BT]).sum() / count


def block_loss(
    model: Any, batch: Batch, generator: torch.Generator, *, mask_id: int, block_length: int
) -> Tensor:
    """Score the masked tokens of every block given the clean blocks before it (BD3-LM, 2503.09573).

    The rows hold the clean text followed by a noisy copy of its answer blocks, at the same
    positions. A query of position p sees:

        clean query -> clean keys of the blocks up to its own
        noisy query -> clean keys of the blocks before its own, noisy keys of its own

    Blocks are aligned to position 0, so the first answer block may begin with prompt tokens, which
    stay clean; the block with the end token is filled up with end tokens. The number of masked
    tokens is drawn for each block. Departs from the paper: only answer blocks have a noisy copy,
    which is exact (the prompt is never scored) and cheaper.
    """
    count = batch.tokens_BT.shape[0]
    end_B = (batch.length_B + block_length - 1) // block_length * block_length
    start_B = batch.prompt_length_B // block_length * block_length
    width, span = int(end_B.max()), int((end_B - start_B).max())
    tokens_BT, at_T = batch.tokens_BT[:, :width], torch.arange(width)
    at_BW = start_B[:, None] + torch.arange(span)
    is_inside_BW = at_BW < end_B[:, None]
    clean_BW = tokens_BT.gather(1, at_BW.clamp(max=width - 1))
    is_canvas_BW = is_inside_BW & (at_BW >= batch.prompt_length_B[:, None])

    # One row of the reshaped mask is one block.
    is_canvas_NL = is_canvas_BW.reshape(-1, block_length)
    is_masked_NL = _mask_uniform_count(is_canvas_NL, generator)
    is_masked_BW = is_masked_NL.reshape(count, span)
    noisy_BW = torch.where(is_masked_BW, mask_id, clean_BW)

    block_BQ = torch.cat([at_T.expand(count, -1), at_BW], 1) // block_length
    is_noisy_Q = torch.arange(width + span) >= width
    is_real_BK = torch.cat([at_T < end_B[:, None], is_inside_BW], 1)
    earlier_BQK = block_BQ[:, None, :] < block_BQ[:, :, None]
    same_BQK = block_BQ[:, None, :] == block_BQ[:, :, None]
    same_half_QK = is_noisy_Q[:, None] == is_noisy_Q
    can_attend_BQK = (earlier_BQK & ~is_noisy_Q) | (same_BQK & same_half_QK)
    can_attend_BQK = (can_attend_BQK & is_real_BK[:, None]) | torch.eye(width + span, dtype=torch.bool)
    hidden_BQD = _hidden(
        model,
        torch.cat([tokens_BT, noisy_BW], 1),
        torch.cat([at_T.expand(count, -1), at_BW], 1),
        can_attend_BQK[:, None],
    )
    loss_N = _cross_entropy(model, hidden_BQD[:, width:][is_masked_BW], clean_BW[is_masked_BW], mask_id)
    # A block counts by its length: mean over its masked tokens times its answer tokens.
    weight_NL = (is_canvas_NL.sum(1) / is_masked_NL.sum(1).clamp(min=1))[:, None].expand_as(is_masked_NL)
    return (loss_N * weight_NL[is_masked_NL]).sum() / is_canvas_NL.sum()


def balanced_loss(
    model: Any, batch: Batch, generator: torch.Generator, *, objective: Objective, weight: float
) -> Tensor:
    """Add to a loss what keeps the experts of every layer equally busy (arXiv 2101.03961, eq. 4).

    With f_e the share of routed tokens that expert e gets and P_e its mean probability, a layer with E
    experts adds weight * E * sum_e f_e P_e, which is `weight` when both are even.
    """
    loads: list[Tensor] = []

    def note(router: Any, given: Any, made: tuple[Tensor, ...]) -> None:
        logits_NE, _, chosen_NK = made
        num_experts = logits_NE.shape[1]
        share_E = torch.bincount(chosen_NK.flatten(), minlength=num_experts) / chosen_NK.numel()
        loads.append(num_experts * (share_E * logits_NE.float().softmax(1).mean(0)).sum())

    hooks = [
        module.register_forward_hook(note)
        for module in model.modules()
        if type(module).__name__.endswith("TopKRouter")
    ]
    try:
        loss = objective(model, batch, generator)
    finally:
        for hook in hooks:
            hook.remove()
    return loss + weight * torch.stack(loads).mean()


def _mask_uniform_count(
    is_canvas_NL: Tensor, generator: torch.Generator, is_suffix_N: Tensor | None = None
) -> Tensor:
    """Mask k of each row's L canvas positions, k uniform on 1..L and stratified over the rows.

    Rows marked in `is_suffix_N` mask their last k, the others any k.
    """
    num_rows, width = is_canvas_NL.shape
    u_N = (torch.rand((), generator=generator) + torch.randperm(num_rows, generator=generator) / num_rows) % 1
    length_N = is_canvas_NL.sum(1)
    k_N = torch.minimum((u_N * length_N).long() + 1, length_N)
    noise_NL = torch.rand(num_rows, width, generator=generator)
    if is_suffix_N is not None:
        noise_NL = torch.where(is_suffix_N[:, None], -torch.arange(width) / width, noise_NL)
    noise_NL = noise_NL.masked_fill(~is_canvas_NL, 2.0)
    rank_NL = noise_NL.argsort(1).argsort(1)
    return is_canvas_NL & (rank_NL < k_N[:, None])


def _cross_entropy(model: Any, hidden_ND: Tensor, target_N: Tensor, mask_id: int) -> Tensor:
    """Cross-entropy with the mask token excluded from the prediction (SUBS, arXiv 2406.07524)."""
    logits_NV = model.lm_head(hidden_ND).float()
    is_mask_V = torch.arange(logits_NV.shape[1]) == mask_id
    return F.cross_entropy(logits_NV.masked_fill(is_mask_V, float("-inf")), target_N, reduction="none")


def _hidden(
    model: Any, tokens_BT: Tensor, position_BT: Tensor, can_attend_BHTT: Tensor, **more: Any
) -> Tensor:
    # An additive mask, because training runs transformers' plain attention: at these widths it is
    # several times faster backward than the fused kernel on a CPU.
    bias_BHTT = torch.zeros(can_attend_BHTT.shape).masked_fill(
        ~can_attend_BHTT, torch.finfo(torch.float32).min
    )
    hidden: Tensor = model.model(
        input_ids=tokens_BT,
        position_ids=position_BT,
        attention_mask=bias_BHTT,
        use_cache=False,
        **more,
    ).last_hidden_state
    return hidden
