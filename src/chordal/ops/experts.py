"""Which experts the tokens of a request share, and which of them each token takes.

The router of a mixture of experts scores M experts for each of N tokens; a token takes the K it wants most.
Many tokens together then take nearly all. Dynamic Expert Sharing (DES, arXiv 2602.00879) first agrees on a
few and lets every token choose among those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from chordal.errors import InputError

RoutingRule: TypeAlias = Literal["vote", "max", "seq"]


@dataclass(frozen=True, slots=True)
class Routing:
    """How the tokens of a request agree on experts, in each layer anew.

    Attributes:
        rule: "vote" takes the experts with the largest sums of scores, where a token has a vote for its
            own choice only; "max" those with the largest scores of any token; "seq" the first choices of
            every token.
        share: Of "vote" and "max": share of a layer's experts, rounded down, at least one (beta).
        num_choices: Of "seq": first choices of a token (k).

    Raises:
        InputError: A value is outside its range.
    """

    rule: RoutingRule = "vote"
    share: float = 1.0
    num_choices: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share must be above 0 and at most 1; got {self.share}.")
        if self.num_choices < 1:
            raise InputError(f"num_choices must be at least 1; got {self.num_choices}.")

    def size(self, num_experts: int) -> int:
        """Give how many experts a share is: .15 of 256 is 38, .29 of 100 is 29 in spite of rounding."""
        return max(1, int(self.share * num_experts + 1e-9))


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """How a router turns logits into the choice of a token and the weights of what it chose.

    Attributes:
        num_active: Experts of a token (K).
        activation: Turns logits into scores, in float32: a softmax over all experts, or a sigmoid of each.
        normalizes: Whether the scores of the chosen are divided by their sum.
        scale: Multiplies the weights.
        bias_M: Added to the scores where they are compared, and nowhere else.
        num_groups: Groups of experts side by side.
        num_kept_groups: Groups that a token chooses from: those whose two best scores add up to most.
    """

    num_active: int
    activation: Literal["softmax", "sigmoid"] = "softmax"
    normalizes: bool = True
    scale: float = 1.0
    bias_M: Tensor | None = None
    num_groups: int = 1
    num_kept_groups: int = 1

    def scores(self, logits_NM: Tensor) -> Tensor:
        """Turn logits into scores, from 0 to 1."""
        logits_NM = logits_NM.float()
        return logits_NM.softmax(-1) if self.activation == "softmax" else logits_NM.sigmoid()

    def preferences(self, scores_NM: Tensor) -> Tensor:
        """Give what a token goes by when it chooses."""
        return scores_NM if self.bias_M is None else scores_NM + self.bias_M.to(scores_NM)

    def choose(self, scores_NM: Tensor, is_allowed_NM: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Let every token choose among the experts it is allowed, None for all, and weigh them.

        Where the groups a token keeps hold too few of these, it chooses from all groups. A token that is
        allowed fewer than K has its first choice again in the places left, with weight 0.

        Returns:
            Weights and experts, both `[N, K]`.
        """
        wanted_NM = self.preferences(scores_NM)
        is_open_NM = is_allowed_NM
        if self.num_kept_groups < self.num_groups:
            is_open_NM = self._in_groups(wanted_NM, is_allowed_NM)
        if is_open_NM is None:
            chosen_NK = wanted_NM.topk(self.num_active, -1).indices
            weights_NK = scores_NM.gather(-1, chosen_NK)
        else:
            chosen_NK = wanted_NM.masked_fill(~is_open_NM, float("-inf")).topk(self.num_active, -1).indices
            is_real_NK = is_open_NM.gather(-1, chosen_NK)
            chosen_NK = torch.where(is_real_NK, chosen_NK, chosen_NK[:, :1])
            weights_NK = scores_NM.gather(-1, chosen_NK) * is_real_NK
        if self.normalizes:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return weights_NK * self.scale, chosen_NK

    def _in_groups(self, wanted_NM: Tensor, is_allowed_NM: Tensor | None) -> Tensor:
        """Mark the allowed experts of the groups that each token keeps."""
        by_group_NGS = wanted_NM.unflatten(-1, (self.num_groups, -1))
        best_NG = by_group_NGS.topk(2, -1).values.sum(-1).topk(self.num_kept_groups, -1).indices
        is_kept_NG = torch.zeros_like(by_group_NGS[..., 0], dtype=torch.bool).scatter(-1, best_NG, True)
        is_kept_NM = is_kept_NG[..., None].expand_as(by_group_NGS).flatten(-2)
        if is_allowed_NM is None:
            return is_kept_NM
        is_both_NM = is_kept_NM & is_allowed_NM
        num_needed_N1 = is_allowed_NM.sum(-1, keepdim=True).clamp(max=self.num_active)
        return torch.where(is_both_NM.sum(-1, keepdim=True) < num_needed_N1, is_allowed_NM, is_both_NM)


def share(
    routing: Routing,
    gate: Gate,
    logits_NM: Tensor,
    own: tuple[Tensor, Tensor],
    group_N: Tensor,
    num_groups: int,
) -> tuple[Tensor, Tensor]:
    """Let the tokens of each group agree on experts and choose again among those.

    A token that loses none of its own keeps them and their weights to the last bit.

    Args:
        routing: How they agree.
        gate: Of the router.
        logits_NM: Of the router.
        own: Weights and experts that the router gave, both `[N, K]`.
        group_N: Group of each token, from 0.
        num_groups: Groups.
    """
    weights_NK, own_NK = own
    scores_NM = gate.scores(logits_NM)
    is_shared_GM = coreset(routing, scores_NM, gate.preferences(scores_NM), own_NK, group_N, num_groups)
    is_allowed_NM = is_shared_GM[group_N]
    new_weights_NK, chosen_NK = gate.choose(scores_NM, is_allowed_NM)
    keeps_N1 = is_allowed_NM.gather(1, own_NK).all(1, keepdim=True)
    return (
        torch.where(keeps_N1, weights_NK, new_weights_NK.to(weights_NK)),
        torch.where(keeps_N1, own_NK, chosen_NK.to(own_NK)),
    )


def coreset(
    routing: Routing,
    scores_NM: Tensor,
    preferences_NM: Tensor,
    own_NK: Tensor,
    group_N: Tensor,
    num_groups: int,
) -> Tensor:
    """Agree on the experts of each group of tokens: bool `[num_groups, M]`. Ties go to the lower expert.

    With K = 2, a share of .5 and tokens of one group with scores (.5, .3, .15, .05) and (.1, .45, .05, .4),
    the votes are (.5, .75, 0, .4), and experts 0 and 1 are taken. The second token has 1 and 0 then
    instead of 1 and 3.

    Args:
        routing: How.
        scores_NM: Of the router, at least 0; what votes weigh.
        preferences_NM: What a token goes by, for its first choices.
        own_NK: What each token chose by itself.
        group_N: Group of each token, from 0.
        num_groups: Groups.
    """
    num_experts = scores_NM.shape[1]
    votes_GM = scores_NM.new_zeros(num_groups, num_experts)
    if routing.rule == "max":
        votes_GM.scatter_reduce_(0, group_N[:, None].expand_as(scores_NM), scores_NM, "amax")
        return _largest(votes_GM, routing.size(num_experts))
    is_voted_NM = torch.zeros_like(scores_NM, dtype=torch.bool)
    if routing.rule == "vote":
        is_voted_NM.scatter_(1, own_NK, True)
        votes_GM.index_add_(0, group_N, scores_NM * is_voted_NM)
        return _largest(votes_GM, routing.size(num_experts))
    num = min(routing.num_choices, own_NK.shape[1])
    first_NK = preferences_NM.gather(1, own_NK).topk(num, -1).indices
    is_voted_NM.scatter_(1, own_NK.gather(1, first_NK), True)
    return votes_GM.index_add_(0, group_N, is_voted_NM.to(votes_GM)) > 0


def _largest(votes_GM: Tensor, num: int) -> Tensor:
    """Mark the largest values of each row."""
    order_GM = votes_GM.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(votes_GM, dtype=torch.bool).scatter_(1, order_GM[:, :num], True)
