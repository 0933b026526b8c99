"""From logits to tokens: temperature, truncation, penalties, keyed draws, confidence scores.

Every function works on a flat batch of N rows, each with its own settings, and no row depends on
another. Probabilities are computed in float32 or wider whatever the model's type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chordal.errors import DecodingError, InputError

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

# Far from where float32 ends, and enough to decide any choice.
_MAX_BIAS = 1e6


@runtime_checkable
class Constraint(Protocol):
    """Says which tokens may come next; a function of the text alone, so texts may be asked in any order."""

    def allowed(self, generated: Ints) -> Bools:
        """Tell which tokens may follow the generated ones, bool `[V]`.

        All may follow a text that already breaks the constraint, or that is over: rows of a draft behind a
        wrong token are read, but nothing comes of them.

        Raises:
            DecodingError: It cannot be told.
        """


@dataclass(frozen=True, kw_only=True)
class Law:
    """How tokens are drawn from a model's logits.

    The logits are adjusted first: bias, penalties, constraint. Temperature, top-k, top-p and min-p follow in
    transformers' order.

    Attributes:
        temperature: Divides the logits, at least 0; 0 takes the most likely token.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the fewest most likely tokens whose probabilities reach it, in (0, 1].
        min_p: Keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        repetition_penalty: Divides positive and multiplies negative logits of tokens that occurred, in the
            prompt too, above 0; 1 changes nothing.
        presence_penalty: Taken off the logits of tokens that were generated, of any sign.
        frequency_penalty: Taken off them for each time they were, of any sign.
        logit_bias: Pairs of a token id and what is added to its logit, at most 1e6 either way.
        constraint: Says which tokens may follow a text; the others get no probability.

    Raises:
        InputError: A value is outside its range or not a number.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        # Written so that NaN fails each of them.
        for name, holds, must in (
            ("temperature", 0 <= self.temperature < float("inf"), "be a finite number of at least 0"),
            ("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "be a whole number of at least 0"),
            ("top_p", 0 < self.top_p <= 1, "be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "be between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "be a finite number above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "be a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "be a finite number"),
            ("logit_bias", all(abs(bias) <= _MAX_BIAS for _, bias in self.logit_bias), "be within +-1e6"),
        ):
            if not holds:
                raise InputError(f"{name} must {must}; got {getattr(self, name)}.")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def reads_context(self) -> bool:
        """Whether it depends on the tokens before."""
        has_penalty = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(has_penalty) or self.constraint is not None

    @property
    def adjusts(self) -> bool:
        """Whether it changes logits before temperature and truncation."""
        return self.reads_context or bool(self.logit_bias)

    @property
    def unadjusted(self) -> Law:
        """The same temperature and truncation, for logits that are adjusted already."""
        return Law(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)

    @property
    def truncates(self) -> bool:
        """Whether some tokens lose all probability."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def penalize_repetition(logits_V: Tensor, context: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred in the context less likely (CTRL, arXiv 1909.05858).

    Args:
        logits_V: Logits of one row.
        context: Token ids that precede it, int64 of any length.
        penalty: Divides positive logits and multiplies negative ones.
    """
    seen = logits_V[context]
    return logits_V.index_put((context,), torch.where(seen > 0, seen / penalty, seen * penalty))


def transform(logits_NV: Tensor, laws: Sequence[Law]) -> Tensor:
    """Apply temperature, top-k, top-p and min-p; tokens that are cut get -inf.

    Temperature 0 scales by 1, so that the scores of a greedy row are those of the model.

    Args:
        logits_NV: Float32 or wider.
        laws: One for each row.
    """
    if not any(law.truncates or law.temperature not in (0.0, 1.0) for law in laws):
        return logits_NV
    new = logits_NV.new_tensor
    # Divided by less, logits could overflow; the most likely token is certain long before.
    z_NV = logits_NV / new([max(law.temperature, 1e-30) if law.temperature else 1.0 for law in laws])[:, None]
    if not any(law.truncates for law in laws):
        return z_NV

    vocab = z_NV.shape[1]
    sorted_NV, order_NV = z_NV.sort(dim=1, descending=True, stable=True)
    rank_V = torch.arange(vocab, device=z_NV.device)
    top_k_N1 = torch.tensor([law.top_k or vocab for law in laws], device=z_NV.device)[:, None]
    sorted_NV = sorted_NV.masked_fill(rank_V >= top_k_N1, float("-inf"))
    probs_NV = sorted_NV.softmax(1)
    # A token stays while the probability before it has not reached top_p: the first always does.
    before_NV = probs_NV.cumsum(1) - probs_NV
    # The sum may round up to 1 early, which must not cut where nothing was asked for.
    top_p_N1 = new([law.top_p if law.top_p < 1 else float("inf") for law in laws])[:, None]
    sorted_NV = sorted_NV.masked_fill(before_NV >= top_p_N1, float("-inf"))
    # Relative to the most likely token, so renormalizing after top-p would change nothing.
    floor_N1 = probs_NV[:, :1] * new([law.min_p for law in laws])[:, None]
    sorted_NV = sorted_NV.masked_fill(probs_NV < floor_N1, float("-inf"))
    return torch.empty_like(z_NV).scatter_(1, order_NV, sorted_NV)


def adjust(logits_NV: Tensor, law: Law, contexts: Sequence[Ints], num_prompt: int) -> Tensor:
    """Apply bias, penalties and constraint of one law, each row by the tokens before it.

    Args:
        logits_NV: Float32 or wider.
        law: The law.
        contexts: Tokens that count for each row, those of the prompt first; not looked at if the law does
            not read them.
        num_prompt: How many of them are the prompt's.

    Returns:
        New logits, or the same if the law adjusts nothing.

    Raises:
        ValueError: The law needs contexts and there are not as many as rows.
        DecodingError: The constraint allows no token at all.
    """
    if not law.adjusts:
        return logits_NV
    z_NV = logits_NV.clone()
    device = z_NV.device
    if law.logit_bias:
        tokens, biases = zip(*law.logit_bias, strict=True)
        z_NV[:, torch.tensor(tokens, device=device)] += torch.tensor(biases, dtype=z_NV.dtype, device=device)
    if not law.reads_context:
        return z_NV
    if len(contexts) != len(z_NV):
        raise ValueError(f"a law that reads the context needs one a row; got {len(contexts)}")
    for row, context in enumerate(contexts):
        if law.repetition_penalty != 1:
            seen = torch.from_numpy(np.unique(context)).to(device)
            z_NV[row] = penalize_repetition(z_NV[row], seen, law.repetition_penalty)
        if law.presence_penalty or law.frequency_penalty:
            generated, counts = np.unique(context[num_prompt:], return_counts=True)
            penalties = torch.from_numpy(law.presence_penalty + law.frequency_penalty * counts)
            z_NV[row, torch.from_numpy(generated).to(device)] -= penalties.to(z_NV)
    if law.constraint is not None:
        allowed_NV = np.stack([law.constraint.allowed(context[num_prompt:]) for context in contexts])
        if not allowed_NV.any(1).all():
            raise DecodingError("the constraint allows no token of the model's here.")
        z_NV.masked_fill_(~torch.from_numpy(allowed_NV).to(device), float("-inf"))
    return z_NV


def under_law(logits_NV: Tensor, law: Law, contexts: Sequence[Ints], num_prompt: int) -> Tensor:
    """Apply one law to all rows; arguments as for `adjust`."""
    return transform(adjust(logits_NV, law, contexts, num_prompt), [law] * len(logits_NV))


def draw(logits_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution at a given uniform number.

    With tokens of probability .2, .5, .3 the uniforms 0, .2 and .69 give tokens 0, 1 and 1.

    Args:
        logits_NV: After `transform`; -inf is never drawn.
        uniforms_N: Float64 in [0, 1).
    """
    cumulative_NV = logits_NV.double().softmax(1).cumsum(1)
    # The sum may miss 1 by rounding: scale to it and stay below, or a token of probability 0 at the
    # end of the vocabulary could be drawn.
    total_N = cumulative_NV[:, -1]
    at_N = torch.minimum(uniforms_N * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
    drawn_N1: Tensor = torch.searchsorted(cumulative_NV, at_N[:, None], right=True)
    # A row that is not finite is beyond every token; it must not fail the rows beside it.
    return drawn_N1[:, 0].clamp(max=logits_NV.shape[1] - 1)


def probs_of(probs_NV: Tensor, tokens_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Give the probability of one token of each row, on the host."""
    at_N1 = torch.from_numpy(tokens_N).to(probs_NV.device)[:, None]
    probs_N: npt.NDArray[np.float64] = probs_NV.gather(1, at_N1)[:, 0].double().cpu().numpy()
    return probs_N


def entropy(probs_NV: Tensor) -> Tensor:
    """Entropy of each row in nats, with 0 log 0 = 0."""
    entropy_N: Tensor = torch.special.entr(probs_NV).sum(1)
    return entropy_N


def margin(probs_NV: Tensor) -> Tensor:
    """Difference of the two largest probabilities of each row."""
    top_N2 = probs_NV.topk(min(2, probs_NV.shape[1]), dim=1).values
    return top_N2[:, 0] - top_N2[:, 1] if top_N2.shape[1] == 2 else top_N2[:, 0]


def guide(conditional_NV: Tensor, unconditional_NV: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: push away from the logits given no prompt (LLaDA's form).

    Scale 0 gives the conditional logits. A token that is banned in both (-inf) stays banned.
    """
    guided_NV = unconditional_NV + (scale + 1) * (conditional_NV - unconditional_NV)
    return torch.where(conditional_NV == float("-inf"), conditional_NV, guided_NV)
