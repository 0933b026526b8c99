"""What models cached of the beginnings of prompts, kept within a bound and found by tokens.

Prompts are cut into pages of so many tokens. A page hangs below the page before it, so it is found only
by all tokens from the first on, compared one by one: no two prompts are ever taken for each other. What a
page holds is opaque here: one row of numbers for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from chordal.forward import Ints

# Whose prompts they are; those of different owners share nothing.
Owner: TypeAlias = Hashable

# Pages that are copied out of a cache at once: few operations, and little memory beside the pages.
_PAGES_AT_ONCE = 64


@dataclass(eq=False)
class Page:
    """What a model cached of some tokens that follow those of the pages above.

    Attributes:
        key: The tokens; of a root its owner.
        parent: The page before; None of a root, which holds nothing.
        held: One row for each token, `[tokens, W]`.
        children: The pages behind, by their tokens.
        num_pins: Holds that it is part of; it stays while there are any.
        is_kept_for_holds: Whether it goes with the last of them.
    """

    key: Hashable
    parent: Page | None = None
    held: Tensor | None = None
    children: dict[Hashable, Page] = field(default_factory=dict)
    num_pins: int = 0
    is_kept_for_holds: bool = False

    @property
    def num_bytes(self) -> int:
        """Memory of what it holds."""
        return 0 if self.held is None else self.held.nbytes


@dataclass(eq=False)
class Hold:
    """Keeps the pages of a prefix in the store until all who want them had them.

    Attributes:
        num_tokens: Length of the prefix. Those who have the hold add nothing behind it.
        pages: Its pages as far as they are there, from the first on.
    """

    num_tokens: int
    pages: dict[Page, None] = field(default_factory=dict)


class PrefixStore:
    """Pages of prompts, the least recently used ones dropped first.

    Args:
        max_bytes: Memory of all pages at most.
        page_tokens: Tokens of a page, at least 1.

    Attributes:
        num_bytes: Memory of all pages.
    """

    def __init__(self, max_bytes: int, page_tokens: int = 16) -> None:
        self.max_bytes, self.page_tokens = max_bytes, page_tokens
        self.num_bytes = 0
        self._roots: dict[Owner, Page] = {}
        # Oldest first, without pinned ones. A page is older than those above it, so the first is a leaf.
        self._by_age: dict[Page, None] = {}

    def find(self, owner: Owner, tokens: Ints, page_tokens: int, hold: Hold | None = None) -> list[Page]:
        """Find the pages that a prompt begins with, from the first on, and note that they are used.

        Args:
            owner: Whose they are.
            tokens: The prompt.
            page_tokens: Tokens of a page of this owner.
            hold: Keeps those within its prefix.
        """
        page = self._roots.get(owner)
        chain: list[Page] = []
        for start in range(0, len(tokens) - page_tokens + 1, page_tokens):
            page = page and page.children.get(tuple(tokens[start : start + page_tokens].tolist()))
            if page is None:
                break
            chain.append(page)
        self._use(chain)
        if hold is not None:
            for page in chain[: hold.num_tokens // page_tokens]:
                self._pin(page, hold)
        return chain

    def add(
        self,
        owner: Owner,
        tokens: Ints,
        page_tokens: int,
        read: Callable[[int, int], Tensor],
        hold: Hold | None = None,
    ) -> None:
        """Keep what a model cached of the beginning of a prompt, as far as there is room.

        What is not finite is not kept, nor what is behind it.

        Args:
            owner: Whose it is.
            tokens: The tokens, a multiple of the page.
            page_tokens: Tokens of a page of this owner.
            read: Gives what is cached of the tokens from a start to an end, `[tokens, W]`.
            hold: Keeps those within its prefix.
        """
        path = self.find(owner, tokens, page_tokens, hold)
        first, last = len(path), len(tokens) // page_tokens
        for page in path:  # they must not be dropped for those that come behind them
            self._by_age.pop(page, None)
        try:
            for at in range(first, last, _PAGES_AT_ONCE):
                end = min(at + _PAGES_AT_ONCE, last)
                held_TW = read(at * page_tokens, end * page_tokens)
                if not torch.isfinite(held_TW).all():
                    return
                for number, part_PW in enumerate(held_TW.split(page_tokens), at):
                    if not self._make_room(part_PW.nbytes):
                        return
                    parent = path[-1] if path else self._roots.setdefault(owner, Page(owner))
                    key = tuple(tokens[number * page_tokens : (number + 1) * page_tokens].tolist())
                    page = parent.children[key] = Page(key, parent, part_PW.clone())
                    self.num_bytes += page.num_bytes
                    path.append(page)
                    if hold is not None and len(path) * page_tokens <= hold.num_tokens:
                        page.is_kept_for_holds = True
                        self._pin(page, hold)
        finally:
            self._use(path)

    def release(self, hold: Hold) -> None:
        """Let go of a prefix: what was kept for it alone is dropped at once."""
        for page in reversed(hold.pages):  # the last one first
            page.num_pins -= 1
            if page.num_pins:
                continue
            self._by_age[page] = None
            if page.is_kept_for_holds and not page.children:
                self._remove(page)
        hold.pages.clear()

    def clear(self) -> None:
        """Drop everything that nobody holds."""
        while self._by_age:
            self._remove(next(iter(self._by_age)))

    def _use(self, path: Seq[Page]) -> None:
        """Make the pages of a path the newest."""
        for page in reversed(path):
            if not page.num_pins:
                self._by_age.pop(page, None)
                self._by_age[page] = None

    def _pin(self, page: Page, hold: Hold) -> None:
        if page not in hold.pages:
            hold.pages[page] = None
            page.num_pins += 1
            self._by_age.pop(page, None)

    def _make_room(self, num_bytes: int) -> bool:
        """Drop the oldest pages until there is room for another one."""
        while self.num_bytes + num_bytes > self.max_bytes:
            if not self._by_age:
                return False
            self._remove(next(iter(self._by_age)))
        return True

    def _remove(self, page: Page) -> None:
        assert page.parent is not None, "roots are not pages"
        del self._by_age[page]
        del page.parent.children[page.key]
        self.num_bytes -= page.num_bytes
        page.held = None
        root = page.parent
        if root.parent is None and not root.children:
            del self._roots[root.key]
