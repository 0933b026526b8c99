"""The routers of a mixture of experts: what they chose in a forward pass, and what they may choose.

A hook on each router of transformers notes the experts of every token, and where a request has a
`Routing` puts others in their place. What a router computes is not taken from its name: it is a known
formula if that gives what the router gives, and requests with a `Routing` are refused if none does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from chordal.errors import InputError
from chordal.forward import Bools
from chordal.ops.experts import Gate, Routing, share

_NUM_PROBES = 16


@dataclass(frozen=True, slots=True)
class Fed:
    """Where the rows of a request lie among those that the routers see, and how they are routed."""

    rows: slice
    routing: Routing | None


class Routers:
    """All routers of a model, in the order of its layers.

    Args:
        backbone: The model's backbone.
        device: Where its inputs go.
    """

    def __init__(self, backbone: Any, device: torch.device) -> None:
        self.device = device
        self.gates: list[Gate | None] = []
        self._num_experts = 0
        self._pass: _Pass | None = None
        for module in backbone.modules():
            if (made := _probe(module, device)) is not None:
                self._num_experts = made[0].shape[1]
                module.register_forward_hook(partial(self._route, len(self.gates)))
                self.gates.append(_find_gate(module, *made))

    def __len__(self) -> int:
        return len(self.gates)

    @contextmanager
    def watch(self, fed: Sequence[Fed], num_rows: int) -> Iterator[list[Tensor]]:
        """Route the requests of the forward pass that runs inside, and list the experts of each layer.

        Raises:
            InputError: A request has a routing, and this model has no router whose formula is known.
        """
        routings = dict.fromkeys(one.routing for one in fed if one.routing is not None)
        if routings and (not self.gates or None in self.gates):
            raise InputError(
                "only a mixture of experts can share experts, and only if its routers take the largest of "
                "softmax or sigmoid scores; this model is none. Use a decoder that leaves the routing alone."
            )
        self._pass = _Pass(num_rows, [self._gather(routing, fed) for routing in routings], [])
        try:
            yield self._pass.chosen
        finally:
            self._pass = None

    def used(self, chosen: list[Tensor], fed: Sequence[Fed]) -> list[Bools]:
        """Give the experts that the tokens of each request used, bool `[L, M]` each."""
        chosen_LNK = torch.stack([one.to(self.device) for one in chosen])
        request_N = np.full(chosen_LNK.shape[1], len(fed))  # padding is nobody's
        for at, one in enumerate(fed):
            request_N[one.rows] = at
        num_layers = len(chosen)
        used_LRM = torch.zeros(
            num_layers, len(fed) + 1, self._num_experts, dtype=torch.bool, device=self.device
        )
        layer_L11 = torch.arange(num_layers, device=self.device)[:, None, None]
        used_LRM[layer_L11, torch.from_numpy(request_N).to(self.device)[:, None], chosen_LNK] = True
        return list(used_LRM[:, :-1].transpose(0, 1).cpu().numpy())

    def _gather(self, routing: Routing, fed: Sequence[Fed]) -> _Shared:
        """List the rows that are routed in a way, and count the requests they belong to from 0."""
        mine = [one.rows for one in fed if one.routing == routing]
        rows = np.concatenate([np.arange(one.start, one.stop) for one in mine])
        request = np.repeat(np.arange(len(mine)), [one.stop - one.start for one in mine])
        at = torch.from_numpy(np.stack([rows, request])).to(self.device)
        return _Shared(routing, at[0], at[1], len(mine))

    def _route(self, layer: int, router: Any, given: Any, made: tuple[Tensor, ...]) -> Any:
        """Note what a router chose, after putting other experts where they are shared."""
        logits_NM, weights_NK, chosen_NK = made
        if self._pass is None or len(chosen_NK) != self._pass.num_rows:
            return None
        for one in self._pass.shared:
            gate = self.gates[layer]
            assert gate is not None, "`watch` refuses routers whose formula is not known"
            row_R, request_R = one.row_R.to(logits_NM.device), one.request_R.to(logits_NM.device)
            own = weights_NK[row_R], chosen_NK[row_R]
            weights_RK, chosen_RK = share(
                one.routing, gate, logits_NM[row_R], own, request_R, one.num_requests
            )
            weights_NK = weights_NK.index_copy(0, row_R, weights_RK)
            chosen_NK = chosen_NK.index_copy(0, row_R, chosen_RK)
        self._pass.chosen.append(chosen_NK)
        return logits_NM, weights_NK, chosen_NK


@dataclass(frozen=True, slots=True)
class _Shared:
    """The rows of all requests that are routed in one way, and which of these requests each belongs to."""

    routing: Routing
    row_R: Tensor
    request_R: Tensor
    num_requests: int


@dataclass(frozen=True, slots=True)
class _Pass:
    """A forward pass: its rows, those that share experts, and the experts of each layer so far."""

    num_rows: int
    shared: list[_Shared]
    chosen: list[Tensor]


@torch.no_grad()
def _probe(module: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
    """Give what a router makes of a few random states: logits, weights and experts. None if it is none."""
    if not type(module).__name__.lower().endswith("topkrouter"):
        return None
    try:
        shape = _NUM_PROBES, module.weight.shape[-1]
        states = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        logits_NM, weights_NK, chosen_NK = module(states.to(device, module.weight.dtype))
        is_router = logits_NM.dim() == 2 and weights_NK.shape == chosen_NK.shape == (*shape[:1], module.top_k)
    except (AttributeError, TypeError, ValueError, RuntimeError):  # it takes or gives something else
        return None
    return (logits_NM, weights_NK, chosen_NK) if is_router else None


def _find_gate(router: Any, logits_NM: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Gate | None:
    """Find the formula that gives what a router gave; None if none does."""
    want_NM = _spread(weights_NK, chosen_NK, logits_NM)
    tolerance = 4 * torch.finfo(weights_NK.dtype).eps
    for gate in _candidates(router):
        got_NM = _spread(*gate.choose(gate.scores(logits_NM)), logits_NM)
        if torch.allclose(got_NM, want_NM, rtol=tolerance, atol=tolerance):
            return gate
    return None


def _candidates(router: Any) -> Iterable[Gate]:
    """List the formulas that are known, with the parameters under the names that transformers has."""
    activations: tuple[Literal["softmax", "sigmoid"], ...] = ("softmax", "sigmoid")
    for activation, normalizes in product(activations, (True, False)):
        yield Gate(
            num_active=router.top_k,
            activation=activation,
            normalizes=normalizes,
            scale=getattr(router, "routed_scaling_factor", 1.0),
            bias_M=getattr(router, "e_score_correction_bias", None),
            num_groups=getattr(router, "num_group", 1),
            num_kept_groups=getattr(router, "topk_group", 1),
        )


def _spread(weights_NK: Tensor, chosen_NK: Tensor, like_NM: Tensor) -> Tensor:
    """Give every expert its weight, 0 to those that were not chosen."""
    zeros_NM = torch.zeros_like(like_NM, dtype=torch.float32)
    return zeros_NM.scatter(1, chosen_NK, weights_NK.float())
