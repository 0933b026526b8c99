"""Rows that are fed unlike numbers of tokens, in one forward pass and with next to no padding.

The tokens of a pass stand in tiles: neighbouring rows of the cache that are fed about equally many. All of a
model but its attention takes the tokens of all tiles as one long row; attention goes tile by tile, each with
its own rows of the cache. A pass reads the weights once, whoever joins with a long prompt while others decode
a token each, and however unlike their drafts are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

# Attention by tile, in the registry of transformers.
_NAME = "chordal"

# Attending once more, in every layer, costs about as much as so many tokens of padding.
TILE_COST_TOKENS = 4

_TILES: ContextVar[Sequence[Tile]] = ContextVar("tiles of the forward pass that runs", default=())


@dataclass(frozen=True, slots=True)
class Tile:
    """Neighbouring rows of the cache, and the tokens they are fed in a pass, padding included.

    Attributes:
        first_row: The first of the rows.
        num_rows: How many there are.
        width: Tokens of a row.
        at: Where its tokens begin among those of the pass; they stand row after row.
        span: Slots that attention looks at, from 0.
    """

    first_row: int
    num_rows: int
    width: int
    at: int = 0
    span: int = 0

    @property
    def rows(self) -> slice:
        """Its rows of the cache."""
        return slice(self.first_row, self.first_row + self.num_rows)

    @property
    def tokens(self) -> slice:
        """Its tokens among those of the pass."""
        return slice(self.at, self.at + self.num_rows * self.width)

    def cut(self, heads_1HND: Tensor) -> Tensor:
        """Cut its tokens out of queries, keys or values of a pass, as a view `[B, H, T, D]`."""
        heads_HBTD: Tensor = heads_1HND[0, :, self.tokens].unflatten(1, (self.num_rows, self.width))
        return heads_HBTD.transpose(0, 1)


def can_tile(model: Any) -> bool:
    """Whether the attention of a transformers model can be exchanged for one that goes tile by tile."""
    return bool(model.config._attn_implementation == "sdpa" and model._supports_attention_backend)


def lay_tiles(widths: Mapping[int, int], max_padding: int | None) -> list[Tile]:
    """Lay rows into tiles, in their order.

    Args:
        widths: Tokens by row.
        max_padding: Tokens of padding that a row may bring into a tile, else it begins the next; None: any
            number, so that there is one tile.
    """
    rows = sorted(widths)
    tiles: list[Tile] = []
    first, width, fed = rows[0], 0, 0
    for before, row in zip([rows[0], *rows], rows, strict=False):
        # Rows in between that are fed nothing are padding, too.
        wider, num_rows = max(width, widths[row]), row - first + 1
        padding = num_rows * wider - (before - first + 1) * width - widths[row]
        if max_padding is not None and padding > max_padding:
            tiles.append(Tile(first, before - first + 1, width, fed))
            fed += tiles[-1].num_rows * width
            first, wider = row, widths[row]
        width = wider
    return [*tiles, Tile(first, rows[-1] - first + 1, width, fed)]


@contextmanager
def attending(config: Any, tiles: Sequence[Tile]) -> Iterator[None]:
    """Let a model whose config this is attend tile by tile in the forward pass inside."""
    before, token = config._attn_implementation, _TILES.set(tiles)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _TILES.reset(token)


def join_masks(tiles: Sequence[Tile], masks: Sequence[Tensor | None]) -> Tensor | None:
    """Put the masks of several tiles, `[B, 1, T, S]` each, into one for the pass, `[1, 1, N, S]`."""
    if len(tiles) == 1:
        return masks[0]
    span, device = max(tile.span for tile in tiles), next(mask.device for mask in masks if mask is not None)
    joined_11NS = torch.zeros(1, 1, tiles[-1].tokens.stop, span, dtype=torch.bool, device=device)
    for tile, mask_B1TS in zip(tiles, masks, strict=True):
        assert mask_B1TS is not None
        joined_11NS[0, 0, tile.tokens, : tile.span] = mask_B1TS.flatten(0, 2)
    return joined_11NS


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from each tile to its rows of the cache.

    Args:
        module: The attention layer.
        query: `[1, H, N, D]`, those of all tiles.
        key: `[R, H, S, D]`, all rows of the cache.
        value: As `key`.
        attention_mask: As `join_masks` gives it.
        **kwargs: As transformers gives them to every attention.
    """
    attend, tiles, parts = ALL_ATTENTION_FUNCTIONS["sdpa"], _TILES.get(), []
    if not tiles:  # another thread runs the same model in its own way
        whole: tuple[Tensor, None] = attend(module, query, key, value, attention_mask, **kwargs)
        return whole
    assert attention_mask is not None
    for tile in tiles:
        mask_TS = attention_mask[0, 0, tile.tokens, : tile.span]
        part_BTHD, _ = attend(
            module,
            tile.cut(query),
            key[tile.rows, :, : tile.span],
            value[tile.rows, :, : tile.span],
            mask_TS.unflatten(0, (tile.num_rows, 1, tile.width)),
            **kwargs,
        )
        parts.append(part_BTHD.flatten(0, 1))
    return torch.cat(parts)[None], None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
