"""DiffusionGemma: an encoder that writes the cache, and a decoder that reads it and refines a canvas.

Both are transformers' own and share their weights. The encoder is causal. Rows of the decoder see the
cached prefix and each other, in both directions, and take in what the last pass said of them
(self-conditioning). Sliding layers of the decoder keep the prefix that the canvas's first token is near
to, and all of the canvas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chordal.errors import CheckpointError, InputError
from chordal.forward import Forward, Logits, Reading, Visible
from chordal.models.family import Family
from chordal.models.language_model import Batch, LanguageModel
from chordal.models.runner import Request
from chordal.models.tiles import Tile

# Settings of `renoise` by the names of the generation config.
_SETTINGS = {
    "max_denoising_steps": "num_steps",
    "t_max": "t_max",
    "t_min": "t_min",
    "stability_threshold": "stability_threshold",
    "confidence_threshold": "confidence_threshold",
}


def read_facts(config: Any, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Read the facts of a checkpoint, in the form that `make_family` takes.

    Args:
        config: Its config, of transformers.
        generation: Its generation_config.json.

    Raises:
        CheckpointError: It asks for another computation or another sampler.
    """
    text = config.get_text_config()
    if text.use_bidirectional_attention == "all":
        raise CheckpointError(
            "config.json: use_bidirectional_attention 'all' is not supported; a prefix must be causal to be "
            "cached once."
        )
    settings = {ours: generation[key] for key, ours in _SETTINGS.items() if generation.get(key) is not None}
    sampler = generation.get("sampler_config")
    if sampler is not None:
        name = sampler.get("_cls_name") if isinstance(sampler, dict) else sampler
        if name != "EntropyBoundSamplerConfig" or "entropy_bound" not in sampler:
            raise CheckpointError(
                f"generation_config.json: sampler_config must be an EntropyBoundSamplerConfig with its "
                f"entropy_bound; got {name!r}."
            )
        settings["entropy_bound"] = sampler["entropy_bound"]
    return {"family": "uniform", "block_length": config.canvas_length, "settings": settings}


class DiffusionGemma(LanguageModel):
    """A `DiffusionGemmaForBlockDiffusion`: requests that write are its encoder's, others its decoder's.

    A tick that asks for both takes a pass of each. Images are not read.

    Args:
        model: The model.
        family: What decoders need to know of it.
        tokenizer: transformers tokenizer, or None for models of tests.
        name: For messages and results.
        max_rows: Sequences at once, at most.
    """

    def __init__(
        self, model: Any, family: Family, tokenizer: Any = None, *, name: str = "model", max_rows: int = 64
    ):
        super().__init__(model, family, tokenizer, name=name, max_rows=max_rows)
        self.packs = False  # its decoder attends to the canvas beside the cache
        self.decoder = model.model.decoder
        self.architecture = dataclasses.replace(
            self.architecture, backbone=model.model.encoder.language_model, has_mask_per_kind=True
        )

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> list[Reading]:
        """Encode, then refine: a canvas sees what is written in the same tick."""
        readings = [Reading()] * len(requests)
        for is_written, run in ((True, super().run), (False, self._refine)):
            mine = [
                at for at, (_, forward) in enumerate(requests) if (forward.slots is not None) is is_written
            ]
            if mine:
                for at, reading in zip(mine, run([requests[at] for at in mine]), strict=True):
                    readings[at] = reading
        return readings

    @torch.inference_mode()
    def compare(self) -> tuple[Tensor, Tensor]:
        """Encode a few tokens and refine a few more; see `LanguageModel.compare`."""
        prompt, canvas = np.split(np.arange(1, 11) % self.vocab_size, [6])
        num = len(canvas)
        sees = Visible(np.zeros(num, np.int64), np.full(num, len(prompt)), np.ones((num, num), bool))
        written = self._place_backwards(prompt)
        positions = np.arange(len(prompt), len(prompt) + num)
        [reading] = self.run([(0, Forward(canvas, positions, sees, Logits(np.arange(num))))])
        for row in range(len(written)):
            self.free_row(row, clear=True)
        prompt_1T, canvas_1T = (torch.from_numpy(part)[None].to(self.device) for part in (prompt, canvas))
        return reading.logits, self.model(input_ids=prompt_1T, decoder_input_ids=canvas_1T).logits[0]

    def _refine(self, requests: Sequence[Request]) -> list[Reading]:
        """Run read-only requests through the decoder, which leaves the cache as it is.

        The rows fed stand behind the cached slots without being written there.
        """
        if self.cache.is_empty:
            raise InputError(
                f"{self.name} refines a canvas behind a prefix; encode at least one token first."
            )
        if any(forward.routing is not None for _, forward in requests):
            raise InputError(
                f"{self.name} cannot share experts while it refines a canvas; leave out the routing."
            )
        batch = self._place(requests)
        if batch.blends:
            raise InputError(f"{self.name} refines a canvas of tokens; it cannot be fed several as one.")
        [tile] = batch.tiles
        rows, width = tile.rows, tile.width
        packed_5BT = batch.cut(batch.packed_5N, tile)
        span = int(packed_5BT[4].max())
        self.cache.reserve(rows.stop, span)
        placed = [
            dataclasses.replace(p, slots=np.arange(span + p.queries.start, span + p.queries.stop))
            for p in batch.placed
        ]
        # As far as sliding layers go, all of a request stands where its first row does.
        packed_5BT[2] = 0
        for p in placed:
            packed_5BT[2, p.row, p.queries] = p.forward.positions.min()
        tokens_BT, positions_BT, anchor_BT, start_BT, end_BT = torch.from_numpy(packed_5BT).to(self.device)
        can_attend_B1TS = self._can_attend(placed, start_BT, end_BT, span + width)

        key_BS = None
        if self._goes_by_position:
            key_BS = torch.cat([self.cache.positions(rows, span), anchor_BT], 1)
        logits_BTV, is_given_B = self._injected(batch, tile)
        output = self.decoder(
            decoder_input_ids=tokens_BT,
            decoder_position_ids=positions_BT,
            decoder_attention_mask=self._form(self._masks_by_kind(can_attend_B1TS, anchor_BT, key_BS)),
            past_key_values=_Prefix([_Held(*layer) for layer in self.cache.held(rows, span)]),
            self_conditioning_logits=logits_BTV,
            self_conditioning_mask=is_given_B,
            output_hidden_states=batch.reads_hidden,
        )
        return self._read(batch, output)

    def _injected(self, batch: Batch, tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        """Give the logits that rows are conditioned on, and which rows are; None where no row is."""
        given = [p for p in batch.placed if p.forward.inject is not None]
        if not given:
            return None, None
        dtype = self.decoder.embed_tokens.weight.dtype  # as published: rounded before the softmax
        if len(batch.placed) == 1:
            return given[0].forward.inject[None].to(self.device, dtype), None
        rows = {p.row for p in given}
        if any(p.row in rows and p.forward.inject is None for p in batch.placed):
            raise InputError("requests of one row must all be conditioned on logits, or none; got both.")
        size = tile.num_rows, tile.width, self.vocab_size
        logits_BTV = torch.zeros(size, dtype=dtype, device=self.device)
        for p in given:
            logits_BTV[p.row, p.queries] = p.forward.inject
        is_given_B = torch.tensor([row in rows for row in range(tile.num_rows)], device=self.device)
        return logits_BTV, is_given_B


@dataclass(frozen=True, slots=True)
class _Held:
    """Keys and values of one layer."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class _Prefix:
    """What the decoder's attention asks of a cache: each layer's keys and values, to append its own to."""

    layers: list[_Held]
    is_compileable: bool = False
