"""A transformers backbone that runs a batch of `Forward` requests in one pass.

This is the only place where a model is called, where requests become tensors, and where
readings are reduced on the device and brought to the host in one transfer. Layer kinds that see less
than the request asks for (sliding windows, chunks) are kept to what they see, by position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

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
from chordal.models.tiles import TILE_COST_TOKENS, Tile, attending, can_tile, join_masks, lay_tiles

Array = TypeVar("Array", Ints, Tensor)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where one request stands in a pass.

    Attributes:
        tile: Number of its tile.
        row: Its row of the tile.
        at: Its first query of that row.
        start: Its first token among those of the pass.
        forward: The request.
        slots: The slots it writes.
        visible: What it sees.
    """

    tile: int
    row: int
    at: int
    start: int
    forward: Forward
    slots: Ints
    visible: Visible

    @property
    def queries(self) -> slice:
        """Its part of the query axis of its row."""
        return slice(self.at, self.at + len(self.slots))

    @property
    def tokens(self) -> slice:
        """Its tokens among those of the pass."""
        return slice(self.start, self.start + len(self.slots))


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that run in one pass; those of one row stand side by side on its query axis.

    Attributes:
        tiles: The rows of the cache that take part.
        placed: Each request.
        used: One past the highest slot that each of their rows has written after this pass.
        packed_5N: Tokens, positions, slots (-1 for padding), and first and one past the last visible
            slot, tile after tile: one host array for one transfer.
    """

    tiles: list[Tile]
    placed: list[Placed]
    used: dict[int, int]
    packed_5N: Ints

    @property
    def shape(self) -> tuple[int, int]:
        """That the backbone is given tokens in: the rows of a tile, or all tiles as one long row."""
        if len(self.tiles) == 1:
            return self.tiles[0].num_rows, self.tiles[0].width
        return 1, self.packed_5N.shape[1]

    @property
    def fed(self) -> list[Fed]:
        """Where the tokens of each request are, and how they are routed."""
        return [Fed(p.tokens, p.forward.routing) for p in self.placed]

    def cut(self, packed: Array, tile: Tile) -> Array:
        """Cut a tile out of `packed_5N`, or of its copy on the device, as a view `[5, B, T]`."""
        return packed[:, tile.tokens].reshape(5, tile.num_rows, tile.width)

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
        self.packs = can_tile(model)
        self._max_padding = TILE_COST_TOKENS
        # Whether some kind of layer sees less than a request may ask for.
        self._goes_by_position = any(size is not None for size in self.architecture.reach.values())
        self._used = [0] * max_rows  # one past the highest slot each row has written

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> list[Reading]:
        """Run requests together in one forward pass and give each its reading.

        Several requests of one row stand side by side on its query axis. Rows between the lowest and
        the highest of a tile take part whether they ask for something or not, as padding, so that a tile
        is one view of the cache.

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
        packed_5N = batch.packed_5N
        # On a GPU an id outside the table would end the process.
        if packed_5N[0].min() < 0 or packed_5N[0].max() >= self._num_embeddings:
            low, high = packed_5N[0].min(), packed_5N[0].max()
            raise InputError(f"{self.name} has tokens 0 to {self._num_embeddings - 1}; got {low} to {high}.")
        if self.num_positions is not None and packed_5N[1].max() >= self.num_positions:
            raise InputError(f"{self.name} has {self.num_positions} positions; got {packed_5N[1].max()}.")
        span = max(tile.span for tile in batch.tiles)
        if span > self.cache.max_slots:
            raise InputError(f"a sequence needs {span} cache slots; {self.name} has {self.cache.max_slots}.")
        self.cache.reserve(batch.tiles[-1].rows.stop, span)
        for row, end in batch.used.items():
            self._used[row] = end
        packed_5N[2][packed_5N[2] < 0] = self.cache.trash
        device_5N = torch.from_numpy(packed_5N).to(self.device)

        moved = [(row, *forward.moves) for row, forward in requests if forward.moves is not None]
        self.move_slots(moved)
        self.cache.aim(batch.tiles, device_5N[2])
        tokens_BT, positions_BT = device_5N[:2].view(2, *batch.shape)
        fed = batch.fed
        with self.routers.watch(fed, tokens_BT.numel()) as chosen, self._attending(batch):
            output = self._call(
                batch,
                **self._input(batch, tokens_BT),
                position_ids=positions_BT,
                attention_mask=self._masks(batch, device_5N),
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
        given = self._place_backwards(tokens)
        for row in range(len(given)):
            self.free_row(row, clear=True)
        tokens_1T = torch.from_numpy(tokens)[None].to(self.device)
        own_TV = self.model(input_ids=tokens_1T, use_cache=False).logits[0].float()
        return torch.cat(given), own_TV.repeat(len(given), 1)

    def _place_backwards(self, tokens: Ints) -> list[Tensor]:
        """Feed tokens, in parts, into slots from the last to the first; give the logits of each row.

        No model does so by itself: what it is not told by positions and masks, but takes from where keys
        lie, comes out. Two rows get them in parts that are alike once, and unlike twice: a model that packs
        then does so.
        """
        num = len(tokens)
        cuts = [[1, 3], [1, num - 1]][: self.max_rows]
        given: list[list[Tensor]] = [[] for _ in cuts]
        before, self._max_padding = self._max_padding, 0
        try:
            for parts in zip(*(np.split(np.arange(num), cut) for cut in cuts), strict=True):
                requests = []
                for row, positions in enumerate(parts):
                    slots = num - 1 - positions
                    sees, read = Visible(slots, np.full(len(slots), num)), Logits(np.arange(len(slots)))
                    requests.append((row, Forward(tokens[positions], positions, sees, read, slots=slots)))
                for row, reading in enumerate(self.run(requests)):
                    assert reading.logits is not None
                    given[row].append(reading.logits)
        finally:
            self._max_padding = before
        return [torch.cat(logits) for logits in given]

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
            embeds_BTD.flatten(0, 1)[p.tokens] = sums_QD.to(embeds_BTD.dtype)
        return {"inputs_embeds": embeds_BTD}

    def _call(self, batch: Batch, **given: Any) -> Any:
        """Run the backbone on the tensors of a batch."""
        return self.architecture.backbone(**given, output_hidden_states=batch.reads_hidden)

    def _place(self, requests: Sequence[Request]) -> Batch:
        """Give each request its place; rows that ask for nothing are padding."""
        used = {row: self._used[row] for row, _ in requests}
        widths = dict.fromkeys(used, 0)
        for row, forward in requests:
            widths[row] += len(forward.tokens)
            if forward.slots is not None:
                used[row] = max(used[row], int(forward.slots.max()) + 1)
        tiles = lay_tiles(widths, self._max_padding if self.packs else None)
        tile_of = {row: number for number, tile in enumerate(tiles) for row in _range(tile.rows)}

        packed_5N = np.zeros((5, tiles[-1].tokens.stop), np.int64)
        packed_5N[2] = -1
        packed_5N[4] = 1  # padding looks at slot 0: attention over nothing would be NaN
        placed, seen, filled = [], [0] * len(tiles), dict.fromkeys(used, 0)
        for row, forward in requests:
            number, at = tile_of[row], filled[row]
            tile = tiles[number]
            filled[row] += len(forward.tokens)
            slots = forward.slots
            if slots is None:
                slots = np.arange(used[row] + at, used[row] + at + len(forward.tokens))
            start = tile.at + (row - tile.first_row) * tile.width + at
            visible = _visible(forward, slots)
            p = Placed(number, row - tile.first_row, at, start, forward, slots, visible)
            placed.append(p)
            mine_5Q = packed_5N[:, p.tokens]
            mine_5Q[0], mine_5Q[1], mine_5Q[2] = forward.tokens, forward.positions, slots
            mine_5Q[3], mine_5Q[4] = visible.start, visible.end
            if visible.seen is not None:
                seen[number] = max(seen[number], visible.seen.shape[1])
        if self.vocab_size > self.architecture.vocab_size:
            np.minimum(packed_5N[0], self.architecture.vocab_size - 1, out=packed_5N[0])
        for number, tile in enumerate(tiles):
            slots_N, end_N = packed_5N[2, tile.tokens], packed_5N[4, tile.tokens]
            span = max(int(slots_N.max()) + 1, int(end_N.max()), seen[number])
            tiles[number] = dataclasses.replace(tile, span=span)
        return Batch(tiles, placed, used, packed_5N)

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

    def _attending(self, batch: Batch) -> AbstractContextManager[None]:
        if len(batch.tiles) == 1:
            return nullcontext()
        return attending(self.architecture.backbone.config, batch.tiles)

    def _masks(self, batch: Batch, device_5N: Tensor) -> Any:
        """Give the masks of a pass in the form the backbone takes."""
        placed_BS: Sequence[Tensor | None] = [None] * len(batch.tiles)
        if self._goes_by_position:
            placed_BS = self.cache.place(device_5N[1])
        masks = []
        for number, (tile, key_BS) in enumerate(zip(batch.tiles, placed_BS, strict=True)):
            _, positions_BT, _, start_BT, end_BT = batch.cut(device_5N, tile)
            can_attend_B1TS: Tensor | None = None
            if not _sees_all(batch):
                mine = [p for p in batch.placed if p.tile == number]
                can_attend_B1TS = self._can_attend(mine, start_BT, end_BT, tile.span)
            masks.append(self._masks_by_kind(can_attend_B1TS, positions_BT, key_BS))
        return self._form({kind: join_masks(batch.tiles, [one[kind] for one in masks]) for kind in masks[0]})

    def _form(self, masks: dict[LayerKind, Tensor | None]) -> Any:
        """Give masks in the form the backbone takes, one for each kind of layer if there are several."""
        formed = {kind: self._mask(mask) for kind, mask in masks.items()}
        return formed if self.architecture.has_mask_per_kind else next(iter(formed.values()))

    def _masks_by_kind(
        self, can_attend_B1TS: Tensor | None, query_BT: Tensor, key_BS: Tensor | None
    ) -> dict[LayerKind, Tensor | None]:
        """Say what the queries of a tile see in each kind of layer, bool `[B, 1, T, S]`; None for all.

        Args:
            can_attend_B1TS: What the requests let each query see; None for all.
            query_BT: Positions of the queries.
            key_BS: Positions of the keys, where some kind of layer goes by them.
        """
        masks: dict[LayerKind, Tensor | None] = {}
        for kind, size in self.architecture.reach.items():
            seen_B1TS = can_attend_B1TS
            if size is not None:
                assert key_BS is not None
                near_B1TS = _is_near(kind, size, query_BT[:, None, :, None], key_BS[:, None, None])
                seen_B1TS = near_B1TS if seen_B1TS is None else seen_B1TS & near_B1TS
            masks[kind] = seen_B1TS
        return masks

    def _mask(self, can_attend_B1TS: Tensor | None) -> Tensor | None:
        if can_attend_B1TS is None or not self.architecture.adds_mask:
            return can_attend_B1TS
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(can_attend_B1TS, dtype=self.dtype).masked_fill(~can_attend_B1TS, lowest)

    def _read(self, batch: Batch, output: Any) -> list[Reading]:
        """Compute logits at the rows that are read, for the whole batch at once."""
        readings = [Reading() for _ in batch.placed]
        reads: list[tuple[int, LogitsRead]] = []
        at = []
        for index, p in enumerate(batch.placed):
            read = p.forward.read
            if isinstance(read, Hidden):
                states = [
                    output.hidden_states[layer].flatten(0, 1)[p.start + read.rows].to(self.device)
                    for layer in read.layers
                ]
                readings[index] = Reading(hidden=torch.stack(states, 1))
            elif read is not None:
                reads.append((index, read))
                at.append(p.start + read.rows)
        if reads:
            states_ND = output.last_hidden_state.flatten(0, 1)  # where the last layer is, perhaps elsewhere
            at_R = torch.from_numpy(np.concatenate(at)).to(states_ND.device)
            logits_NV = self.architecture.logits(states_ND[at_R])
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


def _range(rows: slice) -> range:
    return range(rows.start, rows.stop)


def _sees_all(batch: Batch) -> bool:
    """Whether no query needs a mask: each is alone in its row and sees the whole span."""
    tile, (start_N, end_N) = batch.tiles[0], batch.packed_5N[3:]
    return (
        len(batch.tiles) == tile.width == 1
        and (end_N == tile.span).all()
        and not start_N.any()
        and all(p.visible.hidden is None for p in batch.placed)
    )


def _is_near(kind: LayerKind, size: int, query: Tensor, key: Tensor) -> Tensor:
    """Say which keys are within the reach of a layer, by their positions in the text."""
    if kind == "chunked_attention":
        return query // size == key // size
    return (query - key).abs() < size
