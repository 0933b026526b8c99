from __future__ import annotations

import numpy as np
import pytest

from chordal.planning.acceptance import NOT_DRAFTED, RIGHT, WRONG, WRONG_AND_LAST
from chordal.planning.latency import Roofline
from chordal.planning.replay import replay

PER_PASS = Roofline(weight_bytes=1, cache_bytes=0, flops=0, bandwidth=1, peak=1)
PER_POSITION = Roofline(weight_bytes=0, cache_bytes=0, flops=1, bandwidth=1, peak=1)
TEXT = np.array([NOT_DRAFTED, RIGHT, RIGHT, RIGHT, WRONG, NOT_DRAFTED, RIGHT, WRONG])
"""Behind the first pass, which commits one token, 4 drafts commit 4, 1 and 2 tokens."""


def test_passes_go_on_behind_what_they_committed():
    played = replay([TEXT], 4, 1, PER_PASS)
    assert (played.tokens, played.passes, played.seconds) == (32 * 7, 32 * 3, 32 * 3)


def test_shorter_drafts_need_more_passes():
    # 1 at a time: right and one more, twice; the wrong one is the token drawn behind the second.
    played = replay([TEXT], 1, 1, PER_PASS)
    assert (played.tokens, played.passes) == (32 * 7, 32 * 4)


def test_without_drafts_every_token_is_a_pass():
    played = replay([TEXT], 0, 1, PER_POSITION)
    assert (played.tokens, played.passes, played.seconds) == (32 * 7, 32 * 7, 32 * 7)


def test_a_pass_is_as_wide_as_its_draft():
    # 4 and the root; none drafted, the root alone; a draft with a wrong token was drafted to its end.
    assert replay([TEXT], 4, 1, PER_POSITION).seconds == 32 * (5 + 1 + 5)


def test_a_draft_ends_where_the_drafter_had_no_more():
    text = np.array([NOT_DRAFTED, RIGHT, RIGHT, NOT_DRAFTED, RIGHT])
    # Root and two tokens; then a draft that would have gone on behind the end of the text.
    assert replay([text], 4, 1, PER_POSITION).seconds == 32 * (3 + 5)
    text = np.array([NOT_DRAFTED, RIGHT, WRONG_AND_LAST, RIGHT])
    assert replay([text], 4, 1, PER_POSITION).seconds == 32 * (3 + 5)
    assert replay([text], 1, 1, PER_POSITION).seconds == 32 * (2 + 2)


def test_a_batch_waits_for_its_widest_row():
    plain, drafted = np.array([NOT_DRAFTED] * 5), np.array([NOT_DRAFTED] + [WRONG] * 4)
    played = replay([plain, drafted], 3, 2, PER_POSITION)
    assert played.seconds == played.passes / 2 * (2 * 4)


def test_every_draft_token_of_a_second_model_costs_a_pass():
    played = replay(
        [TEXT], 4, 1, PER_PASS, draft=Roofline(weight_bytes=0.5, cache_bytes=0, flops=0, bandwidth=1, peak=1)
    )
    assert played.seconds == 32 * (3 + (4 + 0 + 4) * 0.5)


def test_time_outside_of_the_models_is_paid_at_every_tick():
    assert replay([TEXT], 4, 1, PER_PASS, host_s=0.5).seconds == 32 * 3 * 1.5
    assert replay([TEXT], 4, 1, PER_PASS, PER_PASS, host_s=0.5).seconds == 32 * (3 + 8) * 1.5


@pytest.mark.parametrize("length", [0, 1])
def test_texts_of_one_pass_have_nothing_to_play(length):
    assert replay([TEXT[:length]], 4, 2, PER_PASS).passes == 0
