"""A key-value cache addressed by slot: append, roll back, overwrite and refresh are all "which slots".

Row i belongs to the engine's i-th live sequence. A tile of a pass is a view of neighbouring rows, so
nothing is copied to attend. What a slot holds is only ever reached through a mask, so forgetting is free:
a rolled-back slot is simply not visible until it is written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from chordal.models.tiles import Tile

_GROW_SLOTS = 128


class SlotCache(Cache):
    """Cache of all layers of one model for a number of rows.

    `aim` says where the next forward pass writes and how far it looks; the layers then serve
    transformers' attention modules unchanged.

    Args:
        num_layers: Layers of the model.
        max_rows: Sequences at most.
        max_slots: Slots a row can grow to.
    """

    def __init__(self, num_layers: int, max_rows: int, max_slots: int) -> None:
        self.slot_layers = [_SlotLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))
        self.max_rows, self.max_slots = max_rows, max_slots
        self.rows_held, self.num_slots = 1, min(_GROW_SLOTS, max_slots)
        self.span = 0
        self.tiles: list[tuple[Tile, Tensor]] = []  # with the slots their tokens are written to, [B, 1, T, 1]
        self._positions_RS: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever written, so that not even the shape of keys is known."""
        return not self.slot_layers[-1].is_initialized

    @property
    def trash(self) -> int:
        """The slot behind all others, where rows that only fill up a batch write."""
        return self.num_slots

    def reserve(self, num_rows: int, num_slots: int) -> None:
        """Make room for rows and slots below these numbers; what is held stays."""
        if num_rows <= self.rows_held and num_slots <= self.num_slots:
            return
        # At least doubled, so that growing costs little over a sequence's life.
        rows, slots = self.rows_held, self.num_slots
        if num_rows > rows:
            rows = min(self.max_rows, max(num_rows, 2 * rows))
        if num_slots > slots:
            slots = min(self.max_slots, max(num_slots, 2 * slots, _GROW_SLOTS))
        for layer in self.slot_layers:
            layer.resize(rows, slots)
        if self._positions_RS is not None:
            self._positions_RS = _padded(self._positions_RS, rows, slots, slot_axis=1)
        # Should memory run out above, layers that have grown are only larger than they need be.
        self.rows_held, self.num_slots = rows, slots

    def aim(self, tiles: Sequence[Tile], slots_N: Tensor) -> None:
        """Direct the next forward pass.

        Args:
            tiles: Of the pass.
            slots_N: Where each fed token is written, tile after tile.
        """
        self.span = max(tile.span for tile in tiles)
        self.tiles = [(tile, slots_N[tile.tokens].view(tile.num_rows, 1, tile.width, 1)) for tile in tiles]

    def place(self, positions_N: Tensor) -> list[Tensor]:
        """Note at which positions the tokens of this pass stand, and give those of all visible slots.

        Only models with layers of limited reach need to know; they must place every pass.

        Returns:
            For each tile, int `[B, span]`; of slots that were never written, anything.
        """
        if self._positions_RS is None:
            self._positions_RS = positions_N.new_zeros(self.rows_held, self.num_slots + 1)
        assert self.tiles, "the cache was not aimed before the forward pass"
        placed = []
        for tile, slots_B1T1 in self.tiles:
            positions_BS = self._positions_RS[tile.rows]
            positions_BT = positions_N[tile.tokens].view(tile.num_rows, tile.width)
            positions_BS.scatter_(1, slots_B1T1[:, 0, :, 0], positions_BT)
            placed.append(positions_BS[:, : tile.span])
        return placed

    def positions(self, rows: slice, span: int) -> Tensor:
        """Give what `place` noted of the first slots of some rows."""
        assert self._positions_RS is not None, "nothing was ever placed"
        return self._positions_RS[rows, :span]

    def held(self, rows: slice, span: int) -> list[tuple[Tensor, Tensor]]:
        """Give the keys and values of each layer in the first slots of some rows, as views."""
        return [(layer.keys[rows, :, :span], layer.values[rows, :, :span]) for layer in self.slot_layers]

    @torch.inference_mode()
    def move_slots(self, rows_M: Tensor, source_M: Tensor, target_M: Tensor) -> None:
        """Copy what some slots hold to other slots of the same rows; all are read before any is written."""
        layers = [layer for layer in self.slot_layers if layer.is_initialized]
        held = [(layer.keys[rows_M, :, source_M], layer.values[rows_M, :, source_M]) for layer in layers]
        for layer, (keys, values) in zip(layers, held, strict=True):
            layer.keys[rows_M, :, target_M] = keys
            layer.values[rows_M, :, target_M] = values
        if self._positions_RS is not None:
            self._positions_RS[rows_M, target_M] = self._positions_RS[rows_M, source_M]

    @torch.inference_mode()
    def move_row(self, source: int, target: int) -> None:
        """Copy one row over another, when the last live sequence takes a freed place."""
        if source >= self.rows_held:  # nothing was ever written to it
            return self.clear_row(target)
        for layer in self.slot_layers:
            if layer.is_initialized:
                layer.keys[target] = layer.keys[source]
                layer.values[target] = layer.values[source]
        if self._positions_RS is not None:
            self._positions_RS[target] = self._positions_RS[source]

    @torch.inference_mode()
    def read(self, row: int, start: int, end: int) -> Tensor:
        """Copy what some slots of a row hold in all layers, `[end - start, W]` on the device of the first."""
        parts = [
            held[row, :, start:end].transpose(0, 1).flatten(1)
            for layer in self.slot_layers
            for held in (layer.keys, layer.values)
        ]
        return torch.cat([part.to(parts[0].device) for part in parts], 1)

    @torch.inference_mode()
    def write(self, row: int, held_TW: Tensor, *, notes_positions: bool) -> None:
        """Fill the first slots of a row with what `read` gave.

        Args:
            row: The row.
            held_TW: What they hold.
            notes_positions: Note that each stands at the position of its slot, for `place`.
        """
        num = len(held_TW)
        self.reserve(row + 1, num)
        slots = [slot for layer in self.slot_layers for slot in (layer.keys, layer.values)]
        parts = held_TW.split([held.shape[1] * held.shape[3] for held in slots], 1)
        for held, part in zip(slots, parts, strict=True):
            held[row, :, :num] = part.unflatten(1, (held.shape[1], -1)).transpose(0, 1)
        if notes_positions:
            positions_T = torch.arange(num, device=held_TW.device)
            if self._positions_RS is None:
                self._positions_RS = positions_T.new_zeros(self.rows_held, self.num_slots + 1)
            self._positions_RS[row, :num] = positions_T

    @torch.inference_mode()
    def release(self) -> bool:
        """Give back all memory, with what every row holds; whether there was any."""
        held = [layer for layer in self.slot_layers if layer.is_initialized and layer.keys.numel()]
        for layer in held:
            # The shape of keys stays known.
            layer.keys, layer.values = layer.keys[:0, :, :0].clone(), layer.values[:0, :, :0].clone()
        if held:
            self.rows_held = self.num_slots = 0
            self.tiles, self._positions_RS = [], None
        return bool(held)

    @torch.inference_mode()
    def clear_row(self, row: int) -> None:
        """Forget what a row holds for good, so that not even a non-finite value outlives its sequence."""
        for layer in self.slot_layers:
            if layer.is_initialized and row < self.rows_held:
                layer.keys[row] = 0
                layer.values[row] = 0


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, `[rows, heads, slots + 1, head size]`."""

    is_sliding = False
    keys: Tensor  # set before use, as `is_initialized` tells
    values: Tensor

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, slots = self.cache.rows_held, self.cache.num_slots + 1
        # Zeros, not empty: a masked slot still enters the sum, with weight 0 times what it holds.
        self.keys = key_states.new_zeros(rows, key_states.shape[1], slots, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], slots, value_states.shape[3])
        self.is_initialized = True

    def resize(self, num_rows: int, num_slots: int) -> None:
        if self.is_initialized:
            self.keys = _padded(self.keys, num_rows, num_slots, slot_axis=2)
            self.values = _padded(self.values, num_rows, num_slots, slot_axis=2)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the fed tokens at their slots and return what attention takes, as views.

        Returns:
            Keys and values: of a pass of one tile its rows up to the span, else all there are.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tiles = self.cache.tiles
        assert tiles, "the cache was not aimed before the forward pass"
        is_whole = len(tiles) == 1
        for tile, slots_B1T1 in tiles:
            slots_B1T1 = slots_B1T1.to(self.keys.device)  # the layers of a model may be on several
            for held, fed in ((self.keys, key_states), (self.values, value_states)):
                fed_BHTD = fed if is_whole else tile.cut(fed)
                held[tile.rows].scatter_(2, slots_B1T1.expand_as(fed_BHTD), fed_BHTD)
        if not is_whole:
            return self.keys, self.values
        tile = tiles[0][0]
        return self.keys[tile.rows, :, : tile.span], self.values[tile.rows, :, : tile.span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.span, 0

    def get_seq_length(self) -> int:
        return self.cache.span

    def get_max_length(self) -> int:
        return self.cache.max_slots


def _padded(held: Tensor, num_rows: int, num_slots: int, *, slot_axis: int) -> Tensor:
    """Copy into a tensor with room for more rows and slots; one slot behind the last is the trash."""
    shape = list(held.shape)
    shape[0], shape[slot_axis] = max(num_rows, shape[0]), max(num_slots + 1, shape[slot_axis])
    if shape == list(held.shape):
        return held
    grown = held.new_zeros(shape)
    grown.narrow(0, 0, held.shape[0]).narrow(slot_axis, 0, held.shape[slot_axis]).copy_(held)
    return grown
