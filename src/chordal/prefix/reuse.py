"""Requests whose prompts begin alike share the keys and values of the beginning, whatever decodes them.

What a causal model caches of a token depends on the tokens up to it and on nothing else, as long as each
stands in the slot of its position and sees every slot up to its own; of a block model, on the blocks up to
its own. Rows of a request that are fed in this plain way and belong to the prompt can be left out where
the row of the cache already holds them, and what they leave there can be handed to others. No decoder
knows; see docs/prefix.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch

from chordal.forward import Blocks, Bools, Causal, Forward, Ints, Visible
from chordal.models.runner import Runner
from chordal.prefix.store import Hold, Page, PrefixStore
from chordal.sequence import Sequence
from chordal.stats import TARGET

# Sequences wait a tick for one that computes what they share if that spares them so many tokens together:
# a forward pass costs about as much.
_WAIT_TOKENS = 64

# Ticks that one sequence waits at most for one model; prompts may branch several times.
_MAX_WAITS = 4


@dataclass(eq=False)
class Share:
    """What one sequence has of the store.

    Attributes:
        seq: The sequence.
        hold: Keeps the prefix of its group, if it is part of one.
        held: What its row of each model holds of its prompt; of models that have been asked to write.
        waits: Ticks that it waited, by model.
        settled: Models of which it wants nothing more: they write behind its prompt, or cannot share.
    """

    seq: Sequence
    hold: Hold | None = None
    held: dict[str, Held] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)

    @property
    def num_kept(self) -> int:
        """Tokens of its prompt that may be handed to others."""
        return self.seq.num_prompt if self.hold is None else self.hold.num_tokens


@dataclass
class Held:
    """What a row of a model holds of a prompt, as plain feeding leaves it.

    Attributes:
        num_plain: The first slots, so many, hold the prompt's first tokens.
        num_copied: Those of them that came from the store.
        num_spared: Tokens that were left out of requests so far.
        num_stored: Tokens that the store was given.
    """

    num_plain: int = 0
    num_copied: int = 0
    num_spared: int = 0
    num_stored: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """What a sequence asks of a model in a tick, and the row it has."""

    share: Share
    row: int
    forwards: Seq[Forward]


# A sequence that asks a model for the first time: its prompt up to where the store is read, the pages
# found there, how many of its tokens the request could do without, and how many it will leave to others.
@dataclass(frozen=True, slots=True)
class _First:
    asked: Asked
    prompt: Ints
    pages: list[Page]
    num_found: int
    num_needless: int
    num_left: int


class PrefixReuse:
    """Shares prompts between the sequences of an engine.

    Args:
        models: The engine's.
        max_bytes: Memory of what is kept at most.
        page_tokens: Tokens of a page, at least 1; of block models the next multiple of the block.

    Attributes:
        store: What is kept.
        num_queried: Prompt tokens of the target that were looked up so far.
        num_hit: Those of them that were found.
    """

    def __init__(self, models: Mapping[str, Runner], max_bytes: int, page_tokens: int) -> None:
        self.store = PrefixStore(max_bytes)
        self.num_queried = self.num_hit = 0
        self._models = models
        self._blocks = {
            name: (model.family.block_length or 1) if model.family.kind == "block" else 1
            for name, model in models.items()
            if can_share(model)
        }
        self._pages = {name: -(-page_tokens // block) * block for name, block in self._blocks.items()}

    def page_tokens(self, name: str) -> int | None:
        """Give the tokens of a page of a model, None if it shares nothing."""
        return self._pages.get(name)

    def plan(self, name: str, asked: Seq[Asked]) -> list[list[Forward | None] | None]:
        """Say what of the requests for a model is run, with the cache filled for that.

        Returns:
            For each sequence its requests without what the cache holds, None for those with nothing left;
            or None if the sequence waits a tick, for another one is about to compute what it needs.
        """
        if name not in self._blocks:
            for one in asked:
                one.share.settled.add(name)
            return [list(one.forwards) for one in asked]
        firsts = {at: first for at, one in enumerate(asked) if (first := self._look_up(name, one))}
        waiting = self._wait(name, firsts)
        planned: list[list[Forward | None] | None] = []
        for at, one in enumerate(asked):
            if at in waiting:
                one.share.waits[name] = one.share.waits.get(name, 0) + 1
                planned.append(None)
                continue
            if at in firsts:
                self._fetch(name, firsts[at])
            planned.append(self._without_held(name, one))
        return planned

    def note(self, name: str, done: Asked) -> None:
        """Take note of requests that were run, and keep what they computed of the prompt."""
        share = done.share
        if (held := share.held.get(name)) is None:
            return
        block, page_tokens = self._blocks[name], self._pages[name]
        is_behind = [_write(held, forward, share.seq.prompt, block) for forward in done.forwards]
        if all(is_behind):
            share.settled.add(name)
        num = min(held.num_plain, share.num_kept) // page_tokens * page_tokens
        if num > held.num_stored:
            held.num_stored = num
            model, owner = self._models[name], (share.seq.cache_salt, name)
            try:
                self.store.add(
                    owner,
                    share.seq.prompt[:num],
                    page_tokens,
                    lambda start, end: model.read_slots(done.row, start, end),
                    share.hold,
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise

    def _look_up(self, name: str, asked: Asked) -> _First | None:
        """Look up the prompt of a sequence that writes to a model for the first time."""
        share, prompt, block = asked.share, asked.share.seq.prompt, self._blocks[name]
        writing = [forward for forward in asked.forwards if forward.slots is not None]
        if name in share.held or not writing:
            return None
        spans = [(plain_span(forward, prompt, block), forward) for forward in writing]
        begins = [(end, forward) for (start, end), forward in spans if start == 0 and end > 0]
        if len(begins) != 1:
            share.held[name] = Held()
            return None
        [(end, forward)] = begins
        page_tokens = self._pages[name]
        pages = self.store.find((share.seq.cache_salt, name), prompt, page_tokens, share.hold)
        return _First(
            asked,
            prompt,
            pages,
            len(pages) * page_tokens,
            min(end, _first_read(forward)),
            min(end, share.num_kept) // page_tokens * page_tokens,
        )

    def _wait(self, name: str, firsts: Mapping[int, _First]) -> set[int]:
        """Choose who waits: all that would compute the same beginning but the first of them.

        Those of one group always do, others if that pays.

        Each tick somebody goes, and who waits is asked anew in the next, so nobody waits for a sequence
        that was cancelled or has failed.
        """
        page_tokens = self._pages[name]
        going: dict[tuple[str, bytes], list[int]] = {}
        followers: dict[int, list[tuple[int, int]]] = {}
        planned: set[int] = set()
        for at, first in firsts.items():
            share = first.asked.share
            if len(first.prompt) < page_tokens:
                continue
            alike = going.setdefault((share.seq.cache_salt, first.prompt[:page_tokens].tobytes()), [])
            best = (0, -1)
            if share.waits.get(name, 0) < _MAX_WAITS:
                for other in alike:
                    shared = common_prefix(first.prompt, firsts[other].prompt) // page_tokens * page_tokens
                    num = min(shared, firsts[other].num_left, first.num_needless)
                    best = max(best, (num - first.num_found, other))
            num, other = best
            if num <= 0:
                alike.append(at)
            elif share.hold is not None and share.hold is firsts[other].asked.share.hold:
                planned.add(at)
            else:
                followers.setdefault(other, []).append((num, at))
        groups = [group for group in followers.values() if sum(num for num, _ in group) >= _WAIT_TOKENS]
        return planned | {at for group in groups for _, at in group}

    def _fetch(self, name: str, first: _First) -> None:
        """Copy what was found into the row."""
        share = first.asked.share
        held = share.held[name] = Held()
        if name == TARGET:
            self.num_queried += len(first.prompt)
            self.num_hit += first.num_found
        if not first.pages:
            return
        pages = [page.held for page in first.pages if page.held is not None]
        try:
            self._models[name].write_slots(first.asked.row, torch.cat(pages))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return
        held.num_plain = held.num_copied = held.num_stored = first.num_found

    def _without_held(self, name: str, asked: Asked) -> list[Forward | None]:
        """Leave rows out that the cache holds."""
        share, forwards = asked.share, list(asked.forwards)
        if (held := share.held.get(name)) is None:
            return list(forwards)
        block = self._blocks[name]
        for forward in forwards:
            if forward.moves is not None:
                held.num_plain = min(held.num_plain, int(forward.moves[1].min()) // block * block)
        if not held.num_copied:
            return list(forwards)
        prompt = share.seq.prompt
        lowest = [None if one.slots is None else int(one.slots.min()) for one in forwards]
        left: list[Forward | None] = []
        for at, forward in enumerate(forwards):
            start, end = plain_span(forward, prompt, block)
            # Who else writes in the same pass must not write there.
            others = [low for other, low in enumerate(lowest) if other != at and low is not None]
            end = min(end, held.num_plain, held.num_copied, *others)
            num = min(end - start, _first_read(forward))
            if num == len(forward.tokens) and forward.moves is not None:
                num -= 1
            if num <= 0:
                left.append(forward)
                continue
            spared = max(held.num_spared, start + num)
            if name == TARGET:
                share.seq.stats.cached_tokens += spared - held.num_spared
            held.num_spared = spared
            left.append(without_rows(forward, num))
        return left


def can_share(model: Runner) -> bool:
    """Whether what a model caches of a token depends on the tokens up to it alone, or up to its block's end.

    Of models with full attention it depends on the whole canvas, and of looped ones on how many loops
    each request runs.
    """
    family = model.family
    return family.kind != "masked" and family.num_loops is None


def plain_span(forward: Forward, prompt: Ints, block: int) -> tuple[int, int]:
    """Say which slots the first rows of a request fill with the tokens of a prompt, as any request would.

    Each row stands at its own position and sees exactly the slots up to its own, or, in blocks of more than
    one token, to the end of its block. Rows behind these write to none of the slots before.

    Args:
        forward: The request.
        prompt: The prompt.
        block: Length of a block of the model; 1 of causal models.

    Returns:
        Start and end of the slots; in blocks a multiple of their length. Equal if there are none.
    """
    slots = forward.slots
    if slots is None:
        return 0, 0
    start = int(slots[0])
    special = (forward.inject, forward.loops, forward.routing, forward.blend)
    sees = forward.sees
    is_causal = block == 1 and isinstance(sees, (Causal, Visible))
    if start >= len(prompt) or any(one is not None for one in special):
        return start, start
    if not is_causal and sees != Blocks(block):
        return start, start
    num = min(len(slots), len(prompt) - start)
    expected = np.arange(start, start + num)
    is_plain = (slots[:num] == expected) & (forward.positions[:num] == expected)
    is_plain &= forward.tokens[:num] == prompt[start : start + num]
    num = _num_leading(is_plain)
    if isinstance(sees, Visible):
        num = _num_leading(_sees_all_before(sees, slots, num))
    if len(slots) > num and int(slots[num:].min()) < start + num:
        return start, start
    return start, max(start, (start + num) // block * block)


def without_rows(forward: Forward, num: int) -> Forward | None:
    """Leave the first rows out of a request that writes; None if that leaves nothing to be done.

    Args:
        forward: The request.
        num: How many rows; the cache holds them, none of them is read, and the others see their slots.
    """
    if num == len(forward.tokens):
        return None
    assert forward.slots is not None, "a request that only reads writes nothing that could be left out"
    sees, read = forward.sees, forward.read
    if isinstance(sees, Visible):
        sees = dataclasses.replace(
            sees,
            start=sees.start[num:],
            end=sees.end[num:],
            own=None if sees.own is None else sees.own[num:, num:],
            seen=None if sees.seen is None else sees.seen[num:],
        )
    return dataclasses.replace(
        forward,
        tokens=forward.tokens[num:],
        positions=forward.positions[num:],
        slots=forward.slots[num:],
        sees=sees,
        read=None if read is None else dataclasses.replace(read, rows=read.rows - num),
    )


def common_prefix(one: Ints, other: Ints) -> int:
    """Count the tokens that both begin with."""
    num = min(len(one), len(other))
    return _num_leading(one[:num] == other[:num])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on the host or on a device."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def _write(held: Held, forward: Forward, prompt: Ints, block: int) -> bool:
    """Note what a request that was run left in the row; whether that is all behind the prompt."""
    slots = forward.slots
    if slots is None or int(slots.min()) >= len(prompt):
        return True
    start, end = plain_span(forward, prompt, block)
    if start < end and start <= held.num_plain:
        held.num_plain = max(held.num_plain, end)
    rest = slots[end - start :]
    if len(rest):
        held.num_plain = min(held.num_plain, int(rest.min()) // block * block)
    return False


def _first_read(forward: Forward) -> int:
    """Give the first row that is read; at least one is left of a request that reads."""
    if forward.read is None:
        return len(forward.tokens)
    return int(np.min(forward.read.rows, initial=len(forward.tokens) - 1))


def _sees_all_before(sees: Visible, slots: Ints, num: int) -> Bools:
    """Say which of the first rows see exactly the slots up to their own, and are seen as slots alone."""
    first = slots[:num]
    if sees.hidden is not None or (sees.own is not None and sees.own[:, :num].any()):
        return np.zeros(num, bool)
    if sees.seen is None:
        differs = (sees.start[:num] != 0) | (sees.end[:num] != first + 1)
    else:
        ends = int(sees.end.max(initial=0)), int(first.max(initial=-1)) + 1
        at = np.arange(max(sees.seen.shape[1], *ends))
        seen = (at >= sees.start[:num, None]) & (at < sees.end[:num, None])
        seen[:, : sees.seen.shape[1]] |= sees.seen[:num]
        differs = (seen != (at <= first[:, None])).any(1)
    if sees.own is not None:
        differs |= sees.own[:num].any(1)
    is_plain: Bools = ~differs
    return is_plain


def _num_leading(is_so: Bools) -> int:
    """Count the true values before the first that is false."""
    return len(is_so) if is_so.all() else int(np.argmin(is_so))
