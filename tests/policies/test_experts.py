from __future__ import annotations

import pytest

from chordal.ops.experts import Routing
from chordal.policies.experts import SharedExperts
from chordal.policies.feed import Block, BlockFeed, CanvasFeed

ROUTING = Routing(share=0.5)


@pytest.mark.parametrize(
    ("feed", "step", "is_shared"),
    [
        (CanvasFeed("whole"), 0, False),
        (CanvasFeed("whole"), 1, False),
        (CanvasFeed("prefix"), 0, False),
        (CanvasFeed("prefix"), 1, True),
        (CanvasFeed("dual"), 0, False),
        (CanvasFeed("dual"), 1, True),
        (BlockFeed(4), 0, False),
        (BlockFeed(4), 1, True),
        (BlockFeed(4, carry=False), 0, True),
    ],
)
def test_experts_are_shared_where_only_a_block_and_what_follows_is_fed(make_sequence, feed, step, is_shared):
    seq, block = make_sequence("abcdefgh", 12), Block(8, 12, 20)
    seq.open_canvas(20)
    plan = feed.plan(seq, block, step)
    assert SharedExperts(ROUTING)(plan, block) == (ROUTING if is_shared else None)
    assert SharedExperts(ROUTING, refresh=True)(plan, block) == ROUTING
