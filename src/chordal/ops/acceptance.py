"""How much of a draft is kept: rules of draft and verify, each a pure function.

p is the target's law of a token given the text before it and q the law its draft was drawn with, both
behind temperature and truncation. A chain is judged from left to right and kept up to the first token
that is rejected; a tree is walked down from its root, and a rule says at each node which child is next.

Rules of a node are `Offers`. They say with what chance each child is accepted in the order in which the
children are offered, and what law the token has if none is, so that whoever walks compares numbers
and whoever tests adds the chances up. A token that was chosen rather than drawn needs no rule: draw
y ~ p and go to the child that equals it (`ops.tree.follow_drawn`).

| children of a node               | rule                  | law of the token  |
|----------------------------------|-----------------------|-------------------|
| one, drawn                       | `without_replacement` | p                 |
| drawn one by one, none twice     | `without_replacement` | p                 |
| drawn independently              | `with_replacement`    | p                 |
| drawn independently              | `k_seq`               | p                 |
| by several drafters              | `with_replacement`    | p                 |
| any of these, `lenient`          | `lenient(rule, l)`    | approximate       |
| any                              | `typical`             | approximate       |

On p = .1, .2, .3, .4 and q = .4, .3, .2, .1 one child is accepted with chance .6, two of them with .72
with replacement, .75 by `k_seq` and .764 without replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chordal.errors import InputError
from chordal.ops import sampling

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

Offers: TypeAlias = Callable[[Tensor, Tensor, Ints], Iterator[tuple[float, Tensor]]]
"""A rule at one node: its law p `[V]`, the law q `[V]` its children were drawn with, and their tokens in the
order they were drawn. For each child it gives the chance that it is accepted if those before it were
not, and the law that is owed if it is rejected too; behind the last, that is the law of the token."""

# Each step halves an interval that is narrower than the number of children.
_NUM_BISECTIONS = 40


def accept_greedy(draft: Ints, best: Ints) -> int:
    """Count the leading draft tokens that are also the target's most likely ones."""
    return _leading(draft == best)


def accept_by_ratio(ratio: Floats, uniforms: Floats) -> int:
    """Count the leading draft tokens whose number in [0, 1) is below their ratio."""
    return _leading(uniforms < ratio)


def acceptance_ratio(p: Tensor, q: Tensor, power: float = 1.0) -> Tensor:
    """Give the probability of keeping draft tokens x: min(1, (p(x) / q(x))^power), in float64.

    With power 1 and `residual` for the first rejected token, what is committed has the law p whatever q
    is (speculative sampling, arXiv 2211.17192, 2302.01318). A lower power keeps more and loses that.
    What q cannot draw is not kept.

    Args:
        p: The target's probability of each draft token, any shape.
        q: The probability it was drawn with, same shape; of a token that was not drawn but taken, 1.
        power: Above 0.
    """
    p, q = p.double(), q.double()
    return torch.where(q > 0, (p / q).pow(power).clamp(max=1), 0.0)


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """Give the law of the token in place of a rejected one: max(p - q, 0), normalized, in float64.

    p = .3, .5, .2 and q = .6, .3, .1 give 0, 2/3, 1/3. Where nothing is left, because p = q up to
    rounding, it is p.

    Args:
        p_V: Probabilities of the target, `[..., V]`.
        q_V: Probabilities of the draft, same shape.
    """
    p_V = p_V.double()
    left_V = (p_V - q_V.double()).clamp(min=0)
    mass_1 = left_V.sum(-1, keepdim=True)
    return torch.where(mass_1 > 0, left_V / mass_1, p_V)


def overlap(p_V: Tensor, q_V: Tensor) -> Tensor:
    """Give sum min(p, q), the chance that one token drawn from q is accepted (alpha), for each row."""
    return torch.minimum(p_V, q_V).sum(-1)


def without_replacement(p_V: Tensor, q_V: Tensor, children: Ints) -> Iterator[tuple[float, Tensor]]:
    """Offer children that were drawn one by one, none twice (recursive rejection sampling).

    What is owed becomes the residual of each child that is rejected, and that child leaves q. With a
    single child it is speculative sampling of a chain. If the children are all that q can draw, one
    of them is accepted unless p has tokens that q has not.

    Promise: exact, if they come in the order they were drawn: by falling perturbed score with
    Gumbel-top-k. In any other order the law is wrong. How many are drawn may depend on anything but
    tokens not yet offered.

    Source: arXiv 2402.14160.

    Args:
        p_V: Law of the target at the node, `[V]`.
        q_V: Law the first child was drawn with, `[V]`.
        children: Their tokens. One that q cannot draw, or that was offered before, is never accepted.
    """
    p_V, q_V = _normalize(p_V), _normalize(q_V)
    for token in children.tolist():
        chance, p_V = _offer(p_V, q_V, token)
        yield chance, p_V
        q_V = q_V.clone()
        q_V[token] = 0
        q_V = _normalize(q_V)


def with_replacement(p_V: Tensor, q_V: Tensor, children: Ints) -> Iterator[tuple[float, Tensor]]:
    """Offer children that were drawn independently, each of its own law or all of one.

    What is owed becomes the residual of each child that is rejected. A token drawn twice is two
    children.

    Promise: exact, in any order that does not depend on what was drawn. A token that was chosen has
    probability 1 under its law, so chosen and drawn children may stand side by side.

    Source: arXiv 2305.09781 (multi-step speculative sampling).

    Args:
        p_V: Law of the target at the node, `[V]`.
        q_V: Law all children were drawn with, `[V]`, or that of each of K children, `[K, V]`.
        children: Their tokens, int `[K]`. One that its law cannot draw is never accepted.
    """
    p_V, q_KV = _normalize(p_V), _normalize(q_V).expand(len(children), -1)
    for token, own_V in zip(children.tolist(), q_KV, strict=True):
        chance, p_V = _offer(p_V, own_V, token)
        yield chance, p_V


def k_seq(p_V: Tensor, q_V: Tensor, children: Ints) -> Iterator[tuple[float, Tensor]]:
    """Offer children that were drawn independently of one law, all with one ratio min(1, p / (rho q)).

    With beta = sum min(q, p / rho) the chance that one of k is accepted is 1 - (1 - beta)^k. It is
    spread over the tokens as min(q, p / rho) is, and what p has beyond that is owed if none is.

    Promise: exact, in any order that does not depend on what was drawn.

    Source: arXiv 2310.15141 (K-SEQ).

    Args:
        p_V: Law of the target at the node, `[V]`.
        q_V: Law of all children, `[V]`.
        children: Their tokens. One that q cannot draw is never accepted.
    """
    p_V, q_V = _normalize(p_V), _normalize(q_V)
    scaled_V = p_V / k_seq_rho(p_V, q_V, len(children))
    owed_V = residual(p_V, torch.minimum(q_V, scaled_V) * _num_tried(overlap(scaled_V, q_V), len(children)))
    tokens_K = torch.from_numpy(children).to(p_V.device)
    for chance in acceptance_ratio(scaled_V[tokens_K], q_V[tokens_K]).tolist():
        yield chance, owed_V


def k_seq_rho(p_V: Tensor, q_V: Tensor, num: int) -> Tensor:
    """Give the smallest rho in [1, num] with 1 - (1 - beta)^num <= rho beta, on the device of p.

    A smaller one would accept some token more often than p has it; num is always large enough. The left
    side falls with rho and the right side rises, so bisection finds it, from above up to num 2^-40.
    """
    low, high = torch.ones_like(p_V[0]), torch.full_like(p_V[0], max(num, 1))
    for _ in range(_NUM_BISECTIONS):
        rho = (low + high) / 2
        # Both sides divided by beta, which may be 0.
        is_enough = _num_tried(overlap(p_V / rho, q_V), num) <= rho
        low, high = torch.where(is_enough, low, rho), torch.where(is_enough, rho, high)
    return high


def lenient(offers: Offers, lenience: float) -> Offers:
    """Make a rule accept more: a child that has the chance c of being accepted gets min(1, c / lenience).

    Promise: approximate below 1, where a token may be up to 1 / lenience times as likely as under p.

    Source: arXiv 2211.17192, appendix A.5.

    Raises:
        InputError: lenience is not above 0 and at most 1.
    """
    if not 0 < lenience <= 1:
        raise InputError(f"lenience must be above 0 and at most 1; got {lenience}. Use 1 to stay exact.")

    def offer(p_V: Tensor, q_V: Tensor, children: Ints) -> Iterator[tuple[float, Tensor]]:
        for chance, rest_V in offers(p_V, q_V, children):
            yield min(1.0, chance / lenience), rest_V

    return offer


def typical(p_NV: Tensor, tokens: Ints, eps: float = 0.09, delta: float = 0.3) -> Bools:
    """Say which tokens are likely enough: p(x) > min(eps, delta exp(-H)), H being the entropy of p.

    Where p is flat less is asked for. No number is drawn, so a tree may have several paths of likely tokens;
    published code takes the longest.

    Promise: approximate; with p of temperature 0 it keeps the most likely token and no other.

    Source: arXiv 2401.10774 (typical acceptance).

    Args:
        p_NV: The target's law that each token is judged by, that behind its parent.
        tokens: Token ids, int `[N]`.
        eps: Probability that is always enough, above 0.
        delta: Share of exp(-H) that is enough, above 0; published code takes sqrt(eps).
    """
    p_NV = p_NV.double()
    p_N = p_NV.gather(1, torch.from_numpy(tokens).to(p_NV.device)[:, None])[:, 0]
    is_likely: Bools = (p_N > (delta * torch.exp(-sampling.entropy(p_NV))).clamp(max=eps)).cpu().numpy()
    return is_likely


def expected_accepted(chances: Floats) -> float:
    """Give the mean number of draft tokens that are kept if each is kept with a chance of its own.

    Chances .9, .8, .5 give .9 + .72 + .36 = 1.98.
    """
    return float(np.cumprod(chances).sum())


def _offer(p_V: Tensor, q_V: Tensor, token: int) -> tuple[float, Tensor]:
    """Give the chance of one child, and what is owed if it is rejected."""
    # A child that was not drawn from q tells nothing of what q has left.
    rest_V = torch.where(q_V[token] > 0, residual(p_V, q_V), p_V)
    return float(acceptance_ratio(p_V[token], q_V[token])), rest_V


def _num_tried(beta: Tensor, num: int) -> Tensor:
    """Give (1 - (1 - beta)^num) / beta, the mean number of children until one is accepted, as a sum."""
    return (
        torch.stack([(1 - beta) ** tried for tried in range(num)]).sum(0) if num else torch.zeros_like(beta)
    )


def _normalize(law_V: Tensor) -> Tensor:
    """Make probabilities add up to 1 in float64; nothing stays nothing."""
    law_V = law_V.double()
    return law_V / law_V.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def _leading(is_kept: Bools) -> int:
    return len(is_kept) if is_kept.all() else int(np.argmin(is_kept))
