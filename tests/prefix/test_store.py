from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.prefix.store import Hold, PrefixStore

PAGE, WIDTH = 2, 3
PAGE_BYTES = PAGE * WIDTH * 8


def tokens(*ids):
    return np.array(ids)


def rows(prompt):
    """What a model caches of a prompt: numbers that depend on all tokens up to each."""
    held = np.cumsum(prompt * 7.0 + 1) % 1013
    return torch.from_numpy(np.stack([held, held + 1, np.arange(len(prompt))], 1))


def add(store, prompt, owner="a", hold=None):
    held = rows(prompt)
    store.add(owner, prompt, PAGE, lambda start, end: held[start:end], hold)


def found(store, prompt, owner="a"):
    """How many tokens are found; what is found is what was kept for these very tokens."""
    pages = store.find(owner, prompt, PAGE)
    held = [page.held for page in pages]
    assert all(part is not None for part in held)
    num = len(pages) * PAGE
    if held:
        assert torch.equal(torch.cat(held), rows(prompt)[:num])
    return num


def make(num_pages=1000):
    return PrefixStore(num_pages * PAGE_BYTES, PAGE)


def test_prompts_are_found_as_far_as_whole_pages_of_them_were_added():
    """Against all prefixes that were added, on random prompts that begin alike."""
    store, known = make(), set()
    rng = np.random.default_rng(0)
    for _ in range(300):
        prompt = rng.integers(0, 2, 2 * rng.integers(1, 6))
        add(store, prompt)
        known |= {tuple(prompt[:end].tolist()) for end in range(PAGE, len(prompt) + 1, PAGE)}
        asked = rng.integers(0, 2, rng.integers(0, 12))
        ends = [end for end in range(PAGE, len(asked) + 1, PAGE) if tuple(asked[:end].tolist()) in known]
        assert found(store, asked) == max(ends, default=0)
        assert store.num_bytes == len(known) * PAGE_BYTES


def test_tokens_whose_hashes_collide_are_told_apart():
    one, other = tokens(0, 0, 1, 1), tokens(2**61 - 1, 0, 1, 1)
    assert hash(tuple(one.tolist())) == hash(tuple(other.tolist()))
    store = make()
    add(store, one)
    assert found(store, other) == 0
    add(store, other)
    assert found(store, one) == found(store, other) == 4


def test_owners_share_nothing():
    store = make()
    add(store, tokens(1, 2, 3, 4), owner=("salt", "target"))
    assert found(store, tokens(1, 2, 3, 4), owner=("", "target")) == 0
    assert found(store, tokens(1, 2, 3, 4), owner=("salt", "draft")) == 0
    assert found(store, tokens(1, 2, 3, 4), owner=("salt", "target")) == 4


def test_the_bound_holds_and_what_is_kept_is_found_from_its_first_token_on():
    store, rng = make(5), np.random.default_rng(1)
    for number in range(500):
        add(store, rng.integers(0, 3, 2 * rng.integers(1, 8)), owner=number % 3)
        assert store.num_bytes <= store.max_bytes
        every = list(store._by_age)
        assert sum(page.num_bytes for page in every) == store.num_bytes
        # Every page can be reached, and is older than those above it.
        for age, page in enumerate(every):
            assert page.parent.children[page.key] is page
            assert page.parent.parent is None or every.index(page.parent) > age
        assert all(root.children for root in store._roots.values())


def test_the_least_recently_used_goes_first_and_its_end_before_its_beginning():
    store = make(4)
    add(store, tokens(1, 1, 2, 2))
    add(store, tokens(3, 3, 4, 4))
    assert found(store, tokens(1, 1, 2, 2)) == 4
    add(store, tokens(5, 5))
    assert found(store, tokens(3, 3, 4, 4)) == 2
    add(store, tokens(6, 6))
    assert found(store, tokens(1, 1, 2, 2)) == 2
    assert found(store, tokens(3, 3, 4, 4)) == 2
    assert found(store, tokens(5, 5)) == found(store, tokens(6, 6)) == 2


def test_of_a_prompt_that_is_too_long_the_beginning_is_kept():
    store = make(3)
    add(store, tokens(9, 9))
    prompt = np.arange(1000)
    add(store, prompt)
    assert found(store, prompt) == 6
    assert found(store, tokens(9, 9)) == 0
    tight = PrefixStore(PAGE_BYTES - 1, PAGE)
    add(tight, prompt)
    assert (found(tight, prompt), tight.num_bytes, tight._roots) == (0, 0, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_kept(value):
    store, prompt = make(), tokens(1, 2, 3, 4)
    held = rows(prompt)
    held[3, 1] = value
    store.add("a", prompt, PAGE, lambda start, end: held[start:end])
    assert (store.num_bytes, store._roots) == (0, {})


def test_only_what_is_missing_is_read_and_a_read_that_fails_leaves_the_rest():
    store, asked = make(), []
    add(store, tokens(1, 2, 3, 4))

    def fail(start, end):
        asked.append((start, end))
        raise MemoryError

    with pytest.raises(MemoryError):
        store.add("a", tokens(1, 2, 3, 4, 5, 6), PAGE, fail)
    store.add("a", tokens(1, 2, 3, 4), PAGE, fail)
    assert asked == [(4, 6)]
    assert found(store, tokens(1, 2, 3, 4, 5, 6)) == 4
    assert len(store._by_age) == 2


def test_pages_are_copies():
    store, prompt = make(), tokens(1, 2, 3, 4)
    held = rows(prompt)
    store.add("a", prompt, PAGE, lambda start, end: held[start:end])
    held.zero_()
    assert found(store, prompt) == 4


# Holds.


def test_what_is_held_stays_and_goes_with_the_hold():
    store, hold = make(4), Hold(4)
    add(store, tokens(1, 2, 3, 4, 5, 6), hold=hold)
    for other in range(10, 30):
        add(store, tokens(other, other, other, other))
    assert found(store, tokens(1, 2, 3, 4, 5, 6)) == 4  # the end is not part of what is held
    assert store.num_bytes == store.max_bytes
    store.release(hold)
    assert found(store, tokens(1, 2, 3, 4)) == 0
    assert store.num_bytes == 2 * PAGE_BYTES
    store.release(hold)
    assert store.num_bytes == 2 * PAGE_BYTES


def test_nothing_is_added_where_everything_is_held():
    store, hold = make(2), Hold(4)
    add(store, tokens(1, 2, 3, 4), hold=hold)
    add(store, tokens(7, 8))
    assert found(store, tokens(7, 8)) == 0
    store.clear()
    assert found(store, tokens(1, 2, 3, 4)) == 4
    store.release(hold)
    assert (store.num_bytes, store._roots) == (0, {})


def test_what_was_there_before_a_hold_is_there_after_it():
    store, hold = make(), Hold(4)
    add(store, tokens(1, 2))
    add(store, tokens(1, 2, 3, 4), hold=hold)
    store.release(hold)
    assert found(store, tokens(1, 2, 3, 4)) == 2


def test_two_holds_of_one_beginning_end_with_the_last():
    for first_to_go in (0, 1):
        store, holds = make(), [Hold(2), Hold(4)]
        add(store, tokens(1, 2, 3, 4), hold=holds[0])
        add(store, tokens(1, 2, 3, 4), hold=holds[1])
        store.release(holds[first_to_go])
        assert found(store, tokens(1, 2)) == 2
        store.release(holds[1 - first_to_go])
        store.clear()
        assert (store.num_bytes, store._roots) == (0, {})
