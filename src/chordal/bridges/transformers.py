"""Chordal's drafters inside transformers' own assisted generation.

transformers asks a `CandidateGenerator` for a chain of tokens, verifies it and tells what became of it;
`DrafterCandidates` is one that asks a drafter. `generate` has no argument for it: it makes its generator
in a method, so `with_drafter` gives a view of the model whose class answers that method. Everything else
(logits processors, stopping criteria, streamers, caches) stays as transformers has it, and so does its
limit of one prompt at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from chordal.drafters.draft import NO_DRAFT, Drafter, Outcome
from chordal.errors import InputError
from chordal.forward import Reading


class DrafterCandidates(CandidateGenerator):
    """Let a drafter propose the candidates of one text.

    Args:
        drafter: It must propose chains of chosen tokens and ask no model.
        num_draft: Most tokens of a draft, at least 1.
        max_length: Most tokens of the text, prompt included.
    """

    def __init__(self, drafter: Drafter, *, num_draft: int, max_length: int) -> None:
        self.drafter, self.num_draft, self.max_length = drafter, num_draft, max_length
        self._draft = NO_DRAFT

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Give the text `[1, T]` with a draft behind it, `[1, T + draft]`, and no scores."""
        text = input_ids[0].cpu().numpy()
        # The last token never needs a draft behind it.
        budget = min(self.num_draft, self.max_length - len(text) - 1)
        draft = self.drafter.propose(text, budget) if budget > 0 else NO_DRAFT
        if isinstance(draft, Generator) or draft.laws is not None or not draft.is_chain:
            raise InputError(
                f"transformers takes chains of chosen tokens; {type(self.drafter).__name__} drafts trees, "
                f"draws its tokens or asks a model. Use it with a decoder of Chordal."
            )
        self._draft = draft.cut(max(budget, 0))
        drafted = torch.from_numpy(self._draft.tokens).to(input_ids)
        return torch.cat([input_ids, drafted[None]], 1), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Tell the drafter what became of its draft.

        Args:
            input_ids: The text with what was accepted and the token behind it, `[1, T]`.
            scores: Of the root and of each drafted token, processed, `[1, draft + 1, V]`.
            num_matches: How many drafted tokens were accepted.
        """
        text, num_new = input_ids[0].cpu().numpy(), int(num_matches) + 1
        tokens = scores[0].argmax(-1).cpu().numpy()
        tokens[:num_new] = text[-num_new:]
        most_likely = scores[0].topk(self.drafter.candidates).indices.cpu().numpy()
        outcome = Outcome(
            root=int(text[-num_new - 1]),
            draft=self._draft,
            kept=np.arange(num_new - 1),
            reading=Reading(tokens=tokens, candidates=most_likely),
        )
        self.drafter.observe(outcome)


def with_drafter(model: Any, make_drafter: Callable[[], Drafter], *, num_draft: int = 10) -> Any:
    """Give a view of a transformers model whose `generate` verifies what a drafter proposes.

    Greedy text is the model's own, sampled text has its law. The view shares weights and hooks with the
    model, which stays as it was.

    Args:
        model: A causal model of transformers.
        make_drafter: Makes the drafter of each call of `generate`.
        num_draft: Most tokens of a draft, at least 1.

    Raises:
        InputError: `num_draft` is too small.
    """
    if num_draft < 1:
        raise InputError(f"num_draft must be at least 1; got {num_draft}. The model itself drafts nothing.")

    def candidates(self: Any, generation_config: Any, **kwargs: Any) -> DrafterCandidates:
        return DrafterCandidates(make_drafter(), num_draft=num_draft, max_length=generation_config.max_length)

    kind = type(model)
    view = copy.copy(model)
    # Under the name of its class, which transformers looks at.
    members = {"_get_candidate_generator": candidates, "__module__": kind.__module__}
    view.__class__ = type(kind.__name__, (kind,), members)
    view.generation_config = copy.deepcopy(model.generation_config)
    # With this transformers takes the way that asks for candidates.
    view.generation_config.prompt_lookup_num_tokens = num_draft
    return view
