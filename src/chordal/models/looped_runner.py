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
        for span, loops in _loops(batch):
            if loops.states is not None:
                old_BTD[span][: len(loops.states)] = loops.states
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
        if not _loops(batch):
            return readings
        states_BTD = output.states
        change_BT = (states_BTD - output.old_states).norm(dim=-1) / states_BTD.norm(dim=-1)
        change_BT = change_BT.double().cpu().numpy()
        for index, p in enumerate(batch.placed):
            if p.forward.loops is not None:
                readings[index] = dataclasses.replace(
                    readings[index],
                    states=states_BTD[p.row, p.queries],
                    embeds=output.embeds[p.row, p.queries],
                    change=change_BT[p.row, p.queries],
                )
        return readings


def _loops(batch: Batch) -> list[tuple[tuple[int, slice], Loops]]:
    """List where the requests that have `loops` stand in the batch."""
    return [((p.row, p.queries), p.forward.loops) for p in batch.placed if p.forward.loops is not None]


def _mix_noise(batch: Batch, states_BTD: Tensor) -> Tensor:
    """Replace the share of each state that its request asks for by a fresh state."""
    mixed_BTD = states_BTD.clone()
    for span, loops in _loops(batch):
        if loops.noise is not None and loops.noise_keys is not None:
            drawn = [
                fresh_states(states_BTD.shape[-1:], torch.Generator().manual_seed(key))
                for key in loops.noise_keys.tolist()
            ]
            share_N1 = torch.from_numpy(loops.noise)[:, None].to(mixed_BTD)
            mixed_BTD[span][: len(drawn)].lerp_(torch.stack(drawn).to(mixed_BTD), share_N1)
    return mixed_BTD


def _past_embeds(batch: Batch, states_BTD: Tensor) -> dict[str, Tensor]:
    """Give the earlier embeddings and their share, if some request has any."""
    given = [(span, loops) for span, loops in _loops(batch) if loops.embeds is not None and loops.momentum]
    if not given:
        return {}
    embeds_BTD, momentum_BT1 = torch.zeros_like(states_BTD), torch.zeros_like(states_BTD[..., :1])
    for span, loops in given:
        embeds_BTD[span][: len(loops.embeds)] = loops.embeds
        momentum_BT1[span][: len(loops.embeds)] = loops.momentum
    return {"past_embeds": embeds_BTD, "momentum": momentum_BT1}
