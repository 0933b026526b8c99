"""Runs requests on a looped model: how many loops, from which states, and what comes out of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chordal.errors import InputError
from chordal.forward import Loops, Reading
from chordal.models.language_model import Batch, LanguageModel
from chordal.models.looped import fresh_states
from chordal.models.runner import Request


class LoopedLanguageModel(LanguageModel):
    """A `LoopedForCausalLM`; requests of one number of loops run in one pass, each number in its own."""

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> list[Reading]:
        """Run requests and give each its reading; see `LanguageModel.run`."""
        by_count: dict[int, list[int]] = {}
        for index, (_, forward) in enumerate(requests):
            by_count.setdefault(self._count(forward.loops), []).append(index)
        readings = [Reading()] * len(requests)
        for mine in by_count.values():
            for index, reading in zip(mine, super().run([requests[at] for at in mine]), strict=True):
                readings[index] = reading
        return readings

    def _count(self, loops: Loops | None) -> int:
        return int(self.model.config.num_loops) if loops is None else loops.count

    def _call(self, batch: Batch, **given: Any) -> Any:
        if batch.reads_hidden:
            raise InputError(f"{self.name} repeats its layers; hidden states by layer cannot be read.")
        backbone = self.architecture.backbone
        old_BTD = backbone.fresh(given["position_ids"]).to(self.dtype)
        for old_QD, loops in _loops(batch, old_BTD):
            if loops.states is not None:
                old_QD[: len(loops.states)] = loops.states
        output = backbone(
            **given,
            num_loops=self._count(batch.placed[0].forward.loops),
            states=_mix_noise(batch, old_BTD),
            **_past_embeds(batch, old_BTD),
        )
        output.old_states = old_BTD
        return output

    def _read(self, batch: Batch, output: Any) -> list[Reading]:
        readings = super()._read(batch, output)
        if all(p.forward.loops is None for p in batch.placed):
            return readings
        states_ND, embeds_ND, old_ND = (
            one.flatten(0, 1) for one in (output.states, output.embeds, output.old_states)
        )
        change_N = (states_ND - old_ND).norm(dim=-1) / states_ND.norm(dim=-1)
        change_N = change_N.double().cpu().numpy()
        for index, p in enumerate(batch.placed):
            if p.forward.loops is not None:
                readings[index] = dataclasses.replace(
                    readings[index],
                    states=states_ND[p.tokens],
                    embeds=embeds_ND[p.tokens],
                    change=change_N[p.tokens],
                )
        return readings


def _loops(batch: Batch, states_BTD: Tensor) -> list[tuple[Tensor, Loops]]:
    """List the requests that have `loops`, with their part of some states as a view."""
    states_ND = states_BTD.flatten(0, 1)
    return [(states_ND[p.tokens], p.forward.loops) for p in batch.placed if p.forward.loops is not None]


def _mix_noise(batch: Batch, states_BTD: Tensor) -> Tensor:
    """Replace the share of each state that its request asks for by a fresh state."""
    mixed_BTD = states_BTD.clone()
    for mixed_QD, loops in _loops(batch, mixed_BTD):
        if loops.noise is not None and loops.noise_keys is not None:
            drawn = [
                fresh_states(states_BTD.shape[-1:], torch.Generator().manual_seed(key))
                for key in loops.noise_keys.tolist()
            ]
            share_N1 = torch.from_numpy(loops.noise)[:, None].to(mixed_BTD)
            mixed_QD[: len(drawn)].lerp_(torch.stack(drawn).to(mixed_BTD), share_N1)
    return mixed_BTD


def _past_embeds(batch: Batch, states_BTD: Tensor) -> dict[str, Tensor]:
    """Give the earlier embeddings and their share, if some request has any."""
    if not any(loops.embeds is not None and loops.momentum for _, loops in _loops(batch, states_BTD)):
        return {}
    embeds_BTD, momentum_BT1 = torch.zeros_like(states_BTD), torch.zeros_like(states_BTD[..., :1])
    mine = _loops(batch, embeds_BTD), _loops(batch, momentum_BT1)
    for (embeds_QD, loops), (momentum_Q1, _) in zip(*mine, strict=True):
        if loops.embeds is not None and loops.momentum:
            embeds_QD[: len(loops.embeds)] = loops.embeds
            momentum_Q1[: len(loops.embeds)] = loops.momentum
    return {"past_embeds": embeds_BTD, "momentum": momentum_BT1}
