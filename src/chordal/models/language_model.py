"""A transformers backbone that runs a batch of `Forward` requests in one pass.

This is the only place where a model is called, where requests become padded tensors, and where
readings are reduced on the device and brought to the host in one transfer. Layer kinds that see less
than the request asks for (sliding windows, chunks) are kept to what they see, by position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chordal.errors import InputError
from chordal.forward import Forward, Hidden, Ints, Logits, Reading, Visible
from chordal.models.architecture import Architecture, LayerKind, reads_only_embeddings
from chordal.models.cache import SlotCache
from chordal.models.family import Family
from chordal.models.fingerprint import fingerprint
from chordal.models.kernels import speed_up
from chordal.models.reading import LogitsRead, read_logits
from chordal.models.routers import Fed, Routers
from chordal.models.runner import Move, Request


@dataclass(frozen=True, slots=True)
class Placed:
    """Where one request stands in the batch: row, first query, the slots it writes, what it sees."""

    row: int
    at: int
    forward: Forward
    slots: Ints
    visible: Visible

    @property
    def queries(self) -> slice:
        """Its part of the query axis."""
        return slice(self.at, self.at + len(self.slots))


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that run in one pass; those of one row stand side by side on its query axis.

    Attributes:
        first_row: Row of the cache that the batch begins with.
        placed: Each request.
        used: One past the highest slot that each of their rows has written after this pass.
        packed_5BT: Tokens, positions, slots (-1 for padding), and first and one past the last visible
            slot: one host array for one transfer.
    """

    first_row: int
    placed: list[Placed]
    used: dict[int, int]
    packed_5BT: Ints

    @property
    def num_rows(self) -> int:
        """Rows of the cache that take part."""
        return int(self.packed_5BT.shape[1])

    @property
    def fed(self) -> list[Fed]:
        """Where the rows of each request are, rows of the cache one after the other."""
        width = self.packed_5BT.shape[2]
        spans = [slice(p.row * width + p.at, p.row * width + p.at + len(p.slots)) for p in self.placed]
        return [Fed(rows, p.forward.routing) for rows, p in zip(spans, self.placed, strict=True)]

    @property
    def blends(self) -> list[Placed]:
        """The requests that feed several tokens as one."""
        return [p for p in self.placed if p.forward.blend is not None]

    @property
    def reads_hidden(self) -> bool:
        """Whether hidden states of layers are asked for."""
        return any(isinstance(p.forward.read, Hidden) for p in self.placed)


class LanguageModel:
    """A causal-LM checkpoint of transformers and the cache of the sequences that run on it.

    Args:
        model: A transformers `...ForCausalLM` with a backbone at its `base_model_prefix` and an output
            embedding.
        family: What decoders need to know of it.
        tokenizer: transformers tokenizer, or None for models of tests.
        name: For messages and results.
        max_rows: Sequences at once, at most.
    """

    def __init__(
        self, model: Any, family: Family, tokenizer: Any = None, *, name: str = "model", max_rows: int = 64
    ):
        self.model = model.eval()
        self.fingerprint = fingerprint(model)  # before weights are packed
        speed_up(model)
        self.architecture = Architecture.of(model)
        self.routers = Routers(self.architecture.backbone, self.architecture.device)
        self.family = family
        self.tokenizer = tokenizer
        self.name = name
        self.window = self.architecture.window
        self.num_positions = self.architecture.num_positions
        self.vocab_size = self.architecture.vocab_size
        self.device = self.architecture.device
        self.dtype: torch.dtype = model.dtype
        self._num_embeddings = int(model.get_input_embeddings().weight.shape[0])
        self.max_rows = max_rows
        # Read-only requests need slots behind a full window; a tuple of them may be 16 times as wide.
        self.cache = SlotCache(self.architecture.num_layers, max_rows, 17 * self.window)
        # Whether some kind of layer sees less than a request may ask for.
        self._goes_by_position = any(size is not None for size in self.architecture.reach.values())
        self._used = [0] * max_rows  # one past the highest slot each row has written

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> list[Reading]:
        """Run requests together in one forward pass and give each its reading.

        Several requests of one row stand side by side on its query axis. Rows between the lowest and
        the highest take part whether they ask for something or not, as padding, so that the batch is
        one view of the cache.

        Raises:
            InputError: A request needs more slots than the cache can have, or feeds what is no token or
                stands where the model has no position.
        """
        batch = self._place(requests)
        if batch.blends and not self._takes_embeds:
            raise InputError(
                f"{self.name} reads token ids beside their embeddings, so it cannot be fed several tokens as "
                f"one. Use a decoder that feeds plain tokens."
            )
        packed_5BT = batch.packed_5BT
        # On a GPU an id outside the table would end the process.
        if packed_5BT[0].min() < 0 or packed_5BT[0].max() >= self._num_embeddings:
            low, high = packed_5BT[0].min(), packed_5BT[0].max()
            raise InputError(f"{self.name} has tokens 0 to {self._num_embeddings - 1}; got {low} to {high}.")
        if self.num_positions is not None and packed_5BT[1].max() >= self.num_positions:
            raise InputError(f"{self.name} has {self.num_positions} positions; got {packed_5BT[1].max()}.")
        seen = [p.visible.seen.shape[1] for p in batch.placed if p.visible.seen is not None]
        span = max(int(packed_5BT[2].max()) + 1, int(packed_5BT[4].max()), *seen)
        if span > self.cache.max_slots:
            raise InputError(f"a sequence needs {span} cache slots; {self.name} has {self.cache.max_slots}.")
        self.cache.reserve(batch.first_row + batch.num_rows, span)
        for row, end in batch.used.items():
            self._used[row] = end
        packed_5BT[2][packed_5BT[2] < 0] = self.cache.trash
        tokens_BT, positions_BT, slots_BT, start_BT, end_BT = torch.from_numpy(packed_5BT).to(self.device)

        moved = [(row, *forward.moves) for row, forward in requests if forward.moves is not None]
        self.move_slots(moved)
        self.cache.aim(batch.first_row, slots_BT, span)
        # One query a row that sees the whole span needs no mask. (Several would be taken for causal.)
        is_all_seen = packed_5BT.shape[2] == 1 and (packed_5BT[4] == span).all() and not packed_5BT[3].any()
        is_all_seen = is_all_seen and all(p.visible.hidden is None for p in batch.placed)
        can_attend_B1TS: Tensor | None = None
        if not is_all_seen:
            can_attend_B1TS = self._can_attend(batch.placed, start_BT, end_BT, span)
        positions_BS = self.cache.place(positions_BT) if self._goes_by_position else None
        fed = batch.fed
        with self.routers.watch(fed, tokens_BT.numel()) as chosen:
            output = self._call(
                batch,
                **self._input(batch, tokens_BT),
                position_ids=positions_BT,
                attention_mask=self._masks(can_attend_B1TS, positions_BT, positions_BS),
                past_key_values=self.cache,
                use_cache=True,
            )
        readings = self._read(batch, output)
        if chosen:
            used = self.routers.used(chosen, fed)
            readings = [
                dataclasses.replace(one, experts=mine) for one, mine in zip(readings, used, strict=True)
            ]
        return readings

    @torch.inference_mode()
    def compare(self) -> tuple[Tensor, Tensor]:
        """Give the logits of a few tokens twice: as run here, and as the model itself computes them."""
        tokens = np.arange(1, 7) % self.vocab_size
        given_TV = self._place_backwards(tokens)
        self.free_row(0, clear=True)
        tokens_1T = torch.from_numpy(tokens)[None].to(self.device)
        return given_TV, self.model(input_ids=tokens_1T, use_cache=False).logits[0].float()

    def _place_backwards(self, tokens: Ints) -> Tensor:
        """Feed tokens in three parts into slots from the last to the first, and give their logits.

        No model does so by itself: what it is not told by positions and masks, but takes from where keys
        lie, comes out.
        """
        num = len(tokens)
        given = []
        for positions in np.array_split(np.arange(num), 3):
            slots = num - 1 - positions
            sees = Visible(slots, np.full(len(slots), num))
            read = Logits(np.arange(len(slots)))
            given += self.run([(0, Forward(tokens[positions], positions, sees, read, slots=slots))])
        return torch.cat([reading.logits for reading in given])

    def share_vocabulary(self, size: int) -> None:
        """Have logits for so many tokens, as the model that this one works for.

        Models of one tokenizer may differ in how far their tables are filled up behind its last token:
        what is missing gets no probability and is read as the last token there is, what is too much is left
        out.
        """
        self.vocab_size = size

    def move_row(self, source: int, target: int) -> None:
        """Give the cache rows of one sequence another place."""
        self.cache.move_row(source, target)
        self._used[target] = self._used[source]

    def free_row(self, row: int, *, clear: bool = False) -> None:
        """Forget the sequence of a row; `clear` wipes values that may not be finite."""
        self._used[row] = 0
        if clear:
            self.cache.clear_row(row)

    @torch.inference_mode()
    def move_slots(self, moves: Sequence[Move]) -> None:
        """Copy what some slots hold to others, for all rows in one go; if it fails nothing has been copied.

        Raises:
            InputError: A slot is outside of the cache.
        """
        if not moves:
            return
        moves_3M = np.concatenate(
            [np.stack([np.full(len(source), row), source, target]) for row, source, target in moves], 1
        )
        if moves_3M.min(initial=0) < 0 or moves_3M[1:].max(initial=0) >= self.cache.max_slots:
            raise InputError(
                f"slots that are moved must be from 0 to {self.cache.max_slots - 1}; got "
                f"{moves_3M[1:].min()} to {moves_3M[1:].max()}."
            )
        self.cache.reserve(int(moves_3M[0].max(initial=-1)) + 1, int(moves_3M[1:].max(initial=-1)) + 1)
        self.cache.move_slots(*torch.from_numpy(moves_3M).to(self.device))

    def read_slots(self, row: int, start: int, end: int) -> Tensor:
        """Copy what some slots of a row hold, one row of numbers each, `[end - start, W]`."""
        return self.cache.read(row, start, end)

    def write_slots(self, row: int, held: Tensor) -> None:
        """Fill the first slots of a row with what `read_slots` gave for the same slots of any row."""
        self.cache.write(row, held, notes_positions=self._goes_by_position)
        self._used[row] = max(self._used[row], len(held))

    def release(self) -> None:
        """Give back the memory of the cache; only while no row has a sequence."""
        if self.cache.release() and self.device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def _takes_embeds(self) -> bool:
        return reads_only_embeddings(self.architecture.backbone, self.device)

    def _input(self, batch: Batch, tokens_BT: Tensor) -> dict[str, Tensor]:
        """Give the backbone token ids, or embeddings where some request blends tokens."""
        if not batch.blends:
            return {"input_ids": tokens_BT}
        embed = self.architecture.backbone.get_input_embeddings()
        embeds_BTD = embed(tokens_BT)
        for p in batch.blends:
            assert p.forward.blend is not None
            tokens_QK, weights_QK = (torch.from_numpy(part).to(self.device) for part in p.forward.blend)
            parts_QKD = embed(tokens_QK)
            wide = torch.promote_types(parts_QKD.dtype, torch.float32)
            sums_QD = (parts_QKD.to(wide) * weights_QK[..., None].to(wide)).sum(1)
            embeds_BTD[p.row, p.queries] = sums_QD.to(embeds_BTD.dtype)
        return {"inputs_embeds": embeds_BTD}

    def _call(self, batch: Batch, **given: Any) -> Any:
        """Run the backbone on the tensors of a batch."""
        return self.architecture.backbone(**given, output_hidden_states=batch.reads_hidden)

    def _place(self, requests: Sequence[Request]) -> Batch:
        """Give each request its place; rows that ask for nothing are padding."""
        first_row = min(row for row, _ in requests)
        width_B = [0] * (max(row for row, _ in requests) - first_row + 1)
        used = {row: self._used[row] for row, _ in requests}
        for row, forward in requests:
            if forward.slots is not None:
                used[row] = max(used[row], int(forward.slots.max()) + 1)
        placed = []
        for row, forward in requests:
            at = width_B[row - first_row]
            slots = forward.slots
            if slots is None:
                slots = np.arange(used[row] + at, used[row] + at + len(forward.tokens))
            placed.append(Placed(row - first_row, at, forward, slots, _visible(forward, slots)))
            width_B[row - first_row] += len(forward.tokens)

        packed_5BT = np.zeros((5, len(width_B), max(width_B)), np.int64)
        packed_5BT[2] = -1
        packed_5BT[4] = 1  # padding looks at slot 0: attention over nothing would be NaN
        for p in placed:
            row_5T = packed_5BT[:, p.row, p.queries]
            row_5T[0], row_5T[1], row_5T[2] = p.forward.tokens, p.forward.positions, p.slots
            row_5T[3], row_5T[4] = p.visible.start, p.visible.end
        if self.vocab_size > self.architecture.vocab_size:
            np.minimum(packed_5BT[0], self.architecture.vocab_size - 1, out=packed_5BT[0])
        return Batch(first_row, placed, used, packed_5BT)

    def _can_attend(
        self, placed: Sequence[Placed], start_BT: Tensor, end_BT: Tensor, num_slots: int
    ) -> Tensor:
        """Say what the requests let each query see of the first slots, bool `[B, 1, T, S]`."""
        at_S = torch.arange(num_slots, device=self.device)
        can_attend_B1TS = ((at_S >= start_BT[..., None]) & (at_S < end_BT[..., None]))[:, None]
        for p in placed:
            seen_QS = can_attend_B1TS[p.row, 0, p.queries]
            if p.visible.hidden is not None:
                seen_QS[:, torch.from_numpy(p.visible.hidden)] = False
            if p.visible.seen is not None:
                seen_QS[:, : p.visible.seen.shape[1]] |= torch.from_numpy(p.visible.seen).to(self.device)
            if p.visible.own is not None:
                own_QQ = torch.from_numpy(p.visible.own).to(self.device)
                seen_QS[:, torch.from_numpy(p.slots).to(self.device)] |= own_QQ
        return can_attend_B1TS

    def _masks(self, can_attend_B1TS: Tensor | None, query_BT: Tensor, key_BS: Tensor | None) -> Any:
        """Give the mask in the form the backbone takes, one for each kind of layer if there are several.

        Args:
            can_attend_B1TS: What the requests let each query see; None for all.
            query_BT: Positions of the queries.
            key_BS: Positions of the keys, where some kind of layer goes by them.
        """
        masks = {}
        for kind, size in self.architecture.reach.items():
            seen_B1TS = can_attend_B1TS
            if size is not None:
                assert key_BS is not None
                near_B1TS = _is_near(kind, size, query_BT[:, None, :, None], key_BS[:, None, None])
                seen_B1TS = near_B1TS if seen_B1TS is None else seen_B1TS & near_B1TS
            masks[kind] = self._mask(seen_B1TS)
        return masks if self.architecture.has_mask_per_kind else next(iter(masks.values()))

    def _mask(self, can_attend_B1TS: Tensor | None) -> Tensor | None:
        if can_attend_B1TS is None or not self.architecture.adds_mask:
            return can_attend_B1TS
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(can_attend_B1TS, dtype=self.dtype).masked_fill(~can_attend_B1TS, lowest)

    def _read(self, batch: Batch, output: Any) -> list[Reading]:
        """Compute logits at the rows that are read, for the whole batch at once."""
        readings = [Reading() for _ in batch.placed]
        reads: list[tuple[int, LogitsRead]] = []
        at_2N = []
        for index, p in enumerate(batch.placed):
            read = p.forward.read
            if isinstance(read, Hidden):
                states = [
                    output.hidden_states[layer][p.row, p.at + read.rows].to(self.device)
                    for layer in read.layers
                ]
                readings[index] = Reading(hidden=torch.stack(states, 1))
            elif read is not None:
                reads.append((index, read))
                at_2N.append(np.stack([np.full(len(read.rows), p.row), p.at + read.rows]))
        if reads:
            states_BTD = output.last_hidden_state  # where the last layer is, which may be another device
            row_N, query_N = torch.from_numpy(np.concatenate(at_2N, 1)).to(states_BTD.device)
            logits_NV = self.architecture.logits(states_BTD[row_N, query_N])
            logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
            if (extra := self.vocab_size - logits_NV.shape[1]) != 0:
                logits_NV = torch.nn.functional.pad(logits_NV, (0, extra), value=float("-inf"))
            if self.family.mask_id is not None:
                logits_NV[:, self.family.mask_id] = float("-inf")
            for (index, _), reading in zip(reads, read_logits(logits_NV, [r for _, r in reads]), strict=True):
                readings[index] = reading
        return readings


def _visible(forward: Forward, slots: Ints) -> Visible:
    return forward.sees if isinstance(forward.sees, Visible) else forward.sees.visible(slots)


def _is_near(kind: LayerKind, size: int, query: Tensor, key: Tensor) -> Tensor:
    """Say which keys are within the reach of a layer, by their positions in the text."""
    if kind == "chunked_attention":
        return query // size == key // size
    return (query - key).abs() < size
