"""The window of Window-Diffusion; the other feeds are tested with the loop they feed."""

from __future__ import annotations

import numpy as np
import pytest

from chordal.forward import Full
from chordal.models.family import Family
from chordal.policies.feed import Block, WindowFeed
from chordal.sequence import Sequence, StopRules

EOS, MASK = 7, 9


@pytest.fixture
def canvas():
    """D D M D M M M M: a prompt of two, six positions, the second of which is committed."""
    family = Family(kind="masked", mask_id=MASK, shift=0, eos_ids=(EOS,))
    seq = Sequence(prompt=np.array([1, 2]), family=family, stop=StopRules(max_new_tokens=6))
    seq.open_canvas(8)
    commit(seq, 3)
    return seq


def commit(seq, *positions, token=0):
    seq.commit(np.array(positions), np.full(len(positions), token))


def plan(feed, seq, step=1):
    """Give what a pass feeds, what it hides, and what may be committed."""
    made = feed.plan(seq, Block(2, 8, 8), step)
    assert isinstance(made.sees, Full)
    return made.positions.tolist(), made.sees.hidden.tolist(), made.candidates.tolist()


def test_two_active_of_three_in_the_window(canvas):
    feed = WindowFeed(2, 3, 9)
    assert plan(feed, canvas, 0) == ([*range(8)], [], [2, 4, 5, 6, 7])
    assert plan(feed, canvas) == ([2, 4], [6, 7], [2, 4])
    # What is committed is computed on, and the next mask becomes active; the window stays.
    commit(canvas, 4)
    assert plan(feed, canvas) == ([2, 4, 5], [6, 7], [2, 5])
    commit(canvas, 2)
    assert plan(feed, canvas) == ([2, 4, 5], [6, 7], [5])
    # Nothing is left in the window: refreshed before its time.
    commit(canvas, 5)
    assert plan(feed, canvas) == ([*range(8)], [], [6, 7])
    assert plan(feed, canvas) == ([6, 7], [], [6, 7])


def test_what_a_refresh_commits_is_computed_once_more_and_counts_for_the_window(canvas):
    feed = WindowFeed(2, 3, 9)
    plan(feed, canvas, 0)
    commit(canvas, 2, 7)
    assert plan(feed, canvas) == ([2, 4, 5, 7], [], [4, 5])
    commit(canvas, 4)
    assert plan(feed, canvas) == ([4, 5, 6], [], [5, 6])


def test_a_refresh_comes_every_so_many_passes(canvas):
    feed = WindowFeed(1, 3, 3)
    assert [len(plan(feed, canvas)[0]) for _ in range(7)] == [8, 1, 1, 8, 1, 1, 8]
    always = WindowFeed(1, 3, 1)
    assert [len(plan(always, canvas)[0]) for _ in range(3)] == [8, 8, 8]


def test_a_pruned_refresh_does_not_see_what_is_far(canvas):
    feed = WindowFeed(2, 3, 9, prune=True)
    assert plan(feed, canvas, 0) == ([0, 1, 2, 3, 4, 5], [6, 7], [2, 4, 5])
    # Nothing else is cached, so the window is not refilled after the commits of the refresh.
    commit(canvas, 2)
    assert plan(feed, canvas) == ([2, 4, 5], [6, 7], [4, 5])


def test_a_window_that_does_not_slide_waits_for_the_refresh(canvas):
    feed = WindowFeed(2, 3, 9, slide=False)
    plan(feed, canvas, 0)
    assert plan(feed, canvas)[2] == [2, 4]
    commit(canvas, 2)
    assert plan(feed, canvas) == ([2, 4], [6, 7], [4])
    commit(canvas, 4)
    assert len(plan(feed, canvas)[0]) == 8


def test_a_contiguous_pass_feeds_all_up_to_the_first_mask_that_is_not_active(canvas):
    feed = WindowFeed(2, 4, 9, contiguous=True, leftmost=True)
    assert plan(feed, canvas, 0) == ([*range(8)], [], [2])
    commit(canvas, 2)
    # From where the leftmost mask of the refresh was.
    assert plan(feed, canvas) == ([2, 3, 4, 5], [], [4, 5])
    commit(canvas, 6)
    assert plan(feed, canvas) == ([2, 3, 4, 5, 6], [], [4, 5])
    commit(canvas, 5)
    assert plan(feed, canvas) == ([*range(2, 8)], [], [4, 7])
    held = WindowFeed(2, 4, 9, contiguous=True, slide=False)
    plan(held, canvas, 0)
    commit(canvas, 4)
    assert plan(held, canvas) == ([*range(4, 8)], [], [7])


def test_a_canvas_that_is_cut_ends_at_its_first_stop_token_and_is_refreshed_always(canvas):
    feed = WindowFeed(1, 3, 9, cut_at_eos=True)
    plan(feed, canvas, 0)
    assert plan(feed, canvas)[0] == [2]
    commit(canvas, 5, 7, token=EOS)
    for _ in range(3):
        assert plan(feed, canvas) == ([*range(6)], [], [2, 4])
    # If that does not end the text, what was behind the cut is computed before it is seen.
    commit(canvas, 2, 4)
    assert plan(feed, canvas) == ([*range(8)], [], [6])


def test_a_canvas_does_not_end_at_a_stop_token_of_the_prompt(canvas):
    canvas.tokens[1] = EOS
    feed = WindowFeed(1, 3, 9, cut_at_eos=True)
    assert plan(feed, canvas, 0)[0] == [*range(8)]
    assert plan(feed, canvas)[0] == [2]
