"""Token Recycling: draft a tree from the candidates that earlier passes found likely and threw away.

A pass of the target tells the k most likely tokens behind every token it is fed, in rejected branches
too. They are kept in a table by that token, and the next tree is read out of it, level by level.

Promise: exact. Cost: no extra model; one forward pass of up to 1 + n positions, n the nodes of the tree, for
1 to 1 + depth tokens; 4 bytes * V * k for the table.
Source: Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
Recycling", 2024 (arXiv 2408.08696; Luowaterbi/TokenRecycling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chordal.cursor import Cursor
from chordal.decoders.decoder import Decoder, Decoding
from chordal.decoders.speculate import speculate
from chordal.drafters.token_table import TokenTable, TokenTableDrafter
from chordal.errors import InputError
from chordal.forward import Sample
from chordal.ops import tree
from chordal.sequence import Sequence

# The published template: 80 nodes, 8 21 25 15 8 3 a level.
PUBLISHED_TREE = (
    "8/8,4,3,2,1,1,1,1/8,3,2,1,1,1,1,1,2,1,0,0,1,0,0,1,0,1,1,0,0"
    "/5,2,1,1,1,0,0,0,1,0,0,1,0,0,0,0,0,0,1,0,0,1,1,0,0/3,1,1,0,0,1,0,0,0,0,1,0,1,0,0/2,0,0,1,0,0,0,0"
)


@dataclass(frozen=True, kw_only=True)
class TokenRecyclingConfig:
    """Settings of `token_recycling`."""

    tree: str = PUBLISHED_TREE
    """Shape of the draft: child counts level by level, levels apart by "/", counts by ","; see
    `chordal.ops.tree.parse`. At least one node."""
    num_candidates: int = 8
    """Tokens kept behind each token (k), at least the largest child count."""
    # Departs from the paper, which recycles none; without them the table of a request begins empty.
    recycle_prompt: int = 256
    """Last tokens of the prompt that are recycled, at least 0; above 0 the prompt has a pass of its own."""
    scope: Literal["request", "session"] = "request"
    """How long the table lives: one request, or as long as the decoder."""

    def __post_init__(self) -> None:
        num_children = 1 + tree.ranks(tree.parse(self.tree)).max(initial=-1)
        if not num_children:
            raise InputError(f"tree must have at least one node; got {self.tree!r}.")
        if self.num_candidates < num_children:
            raise InputError(
                f"num_candidates must be at least the largest child count of the tree, {num_children}; "
                f"got {self.num_candidates}."
            )
        if self.recycle_prompt < 0:
            raise InputError(f"recycle_prompt must be at least 0; got {self.recycle_prompt}.")


class TokenRecycling(Decoder):
    """Recycle the candidates of all passes as a draft tree."""

    name = "token_recycling"
    family = "autoregressive"
    promise = "exact"
    needs = ("causal",)
    constrains = True
    local_settings = ("tree",)
    paper = "arXiv 2408.08696"
    Config = TokenRecyclingConfig

    def __init__(self, config: TokenRecyclingConfig | None = None) -> None:
        super().__init__(config)
        self.remembers = self.config.scope == "session"
        self._parents = tree.parse(self.config.tree)
        self.reset()

    def reset(self) -> None:
        """Empty the table of the session."""
        self._table = TokenTable(self.config.num_candidates)

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: TokenRecyclingConfig = self.config
        table = self._table if self.remembers else TokenTable(config.num_candidates)
        drafter = TokenTableDrafter(table, self._parents, config.num_candidates)

        # The root's row is read with its draft, those of the prompt before it now.
        target, before = Cursor(), seq.prompt[:-1]
        if num_read := min(config.recycle_prompt, len(before)):
            feed = target.feed(before, num_read=num_read)
            reading = yield feed.read(Sample(feed.rows, candidates=config.num_candidates))
            table.write(before[-num_read:], reading.candidates)

        num_draft = int(tree.depths(self._parents).max())
        yield from speculate(seq, drafter, num_draft=num_draft, target=target)
