"""The sampler against plain decoding, and its rules on a model that is a script."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chordal.engine import Engine
from chordal.errors import InputError
from chordal.forward import Reading
from chordal.models.family import Family
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import TINY_LOOPS, CountingModel, random_prompt, tiny_model

PLAIN = {"max_wavefront": 1, "inner_recurrence": TINY_LOOPS}
LAWS = [Law(), Law(temperature=0.9), Law(temperature=1.2, top_p=0.9, repetition_penalty=1.5)]


@pytest.fixture(scope="module")
def contraction():
    """Make a looped model whose states settle: each loop changes them by a fraction of the one before."""

    def make(num_loops):
        model = tiny_model(arch="looped")
        with torch.no_grad():
            model.model.model.adapter.weight[:, :32] *= 0.1
        model.model.config.num_loops = num_loops
        return model

    return make


class Script:
    """A model that gives what it is told: for each pass, the tokens drawn and how much states changed.

    The states it gives count what was fed, so that what is fed back can be recognised.
    """

    name, window, vocab_size, max_rows, tokenizer = "script", 64, 32, 4, None
    device, dtype = torch.device("cpu"), torch.float32
    packs = False

    def __init__(self, passes, num_loops=8):
        self.family = Family(num_loops=num_loops, vocab_size=32)
        self.passes, self.asked = iter(passes), []

    def run(self, requests):
        [(_, forward)] = requests
        self.asked.append(forward)
        tokens, change = next(self.passes)
        numbers = torch.arange(len(forward.tokens))[:, None] + 100.0 * len(self.asked)
        return [
            Reading(
                tokens=np.array(tokens),
                change=np.array(change, float),
                states=numbers,
                embeds=numbers + 0.5,
                max_logit=np.zeros(1),
            )
        ]

    def move_row(self, source, target):
        pass

    def free_row(self, row, *, clear=False):
        pass


def run_script(passes, *, max_new_tokens=20, prompt=(1, 2), eos_ids=(), num_loops=8, **settings):
    """Decode until the script or the text ends."""
    script = Script([([7], [1]), *passes], num_loops)
    stop = StopRules(max_new_tokens=max_new_tokens, eos_ids=eos_ids)
    seq = Sequence(prompt=np.array(prompt), family=script.family, stop=stop)
    engine = Engine(script)
    engine.submit(make_decoder("recurrent_depth", settings), seq)
    engine.run()
    assert seq.error is None or isinstance(seq.error, StopIteration)
    return seq, script.asked


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("settings", [{}, {"exit_threshold": 0.0}, {"freeze": "prefix"}, {"freeze": "fixed"}])
def test_a_wave_of_one_with_all_loops_is_plain_decoding(decode, prompts, law, settings):
    model = tiny_model(arch="looped")
    seeds = list(range(4))
    given = {"prompts": prompts(4), "law": law, "seeds": seeds, "max_new_tokens": 10}
    got = decode(model, "recurrent_depth", PLAIN | settings, **given)
    want = decode(model, "autoregressive", **given)
    for one, other in zip(got, want, strict=True):
        assert one.output.tolist() == other.output.tolist()
        assert one.stats.loops == other.stats.loops == 10 * TINY_LOOPS
        assert one.stats.positions_fed == other.stats.positions_fed


@pytest.mark.parametrize("settings", [{"inner_recurrence": 1}, {"inner_recurrence": 3, "momentum": 0.0}])
@pytest.mark.parametrize("law", LAWS)
def test_a_contraction_converges_to_plain_decoding_at_many_loops(decode, prompts, contraction, settings, law):
    given = {"prompts": prompts(4, seed=1), "law": law, "max_new_tokens": 10, "seeds": [3, 4, 5, 6]}
    exact = {"freeze": "prefix", "exit_threshold": 1e-9, "num_loops": 40, **settings}
    got = decode(contraction(TINY_LOOPS), "recurrent_depth", exact, **given)
    want = decode(contraction(40), "autoregressive", **given)
    for one, other in zip(got, want, strict=True):
        assert one.output.tolist() == other.output.tolist()


def test_a_wave_needs_fewer_loops_than_plain_decoding(decode, prompts, contraction):
    given = {"prompts": prompts(4, seed=1), "max_new_tokens": 16}
    got = decode(contraction(8), "recurrent_depth", {"inner_recurrence": 1}, **given)
    want = decode(contraction(8), "autoregressive", **given)
    assert sum(seq.stats.loops for seq in got) < 0.5 * sum(seq.stats.loops for seq in want)


@pytest.mark.parametrize("freeze", ["last", "prefix"])
def test_a_threshold_of_0_freezes_only_where_the_wave_is_full(decode, freeze):
    """Two loops a pass, four in all: the first position of a full wave of three is given up each pass."""
    settings = {"exit_threshold": 0.0, "max_wavefront": 3, "inner_recurrence": 2, "freeze": freeze}
    [seq] = decode(tiny_model(arch="looped"), "recurrent_depth", settings, prompts=[random_prompt(5)])
    assert seq.committed_at[seq.num_prompt :].tolist() == [1, 4, 5, 6, 7, 8, 9, 10]
    assert seq.stats.loops == TINY_LOOPS + 9 * 2


def test_a_wave_that_reaches_the_limit_is_full(decode):
    [seq] = decode(
        tiny_model(arch="looped"),
        "recurrent_depth",
        {"exit_threshold": 0.0, "inner_recurrence": 1},
        prompts=[random_prompt(5)],
        max_new_tokens=5,
    )
    # It holds 5 positions in pass 6, the first of which had 5 loops.
    assert seq.committed_at[seq.num_prompt :].tolist() == [1, 6, 7, 8, 9]


def test_a_wave_begins_with_the_last_committed_token_and_writes_behind_the_cache(decode, contraction):
    """What each pass feeds, and the states it goes on from, whatever was frozen before."""
    counting = CountingModel(contraction(8))
    seen = []
    [seq] = decode(
        counting,
        "recurrent_depth",
        {"inner_recurrence": 2, "exit_threshold": 0.05, "headway": 2},
        prompts=[random_prompt(6)],
        max_new_tokens=14,
        listeners=[lambda seq, event: seen.append(seq.frontier)],
    )
    calls = [call[0][1] for call in counting.calls]
    assert calls[0].positions.tolist() == list(range(6))
    last_of_pass = dict(zip(seq.committed_at[6:].tolist(), range(6, 20), strict=True))
    frontier, width = 7, 0
    for number, call in enumerate(calls[1:], 2):
        assert call.positions[0] == call.slots[0] == frontier - 1
        assert call.tokens[0] == seq.tokens[frontier - 1]
        assert (np.diff(call.positions) == 1).all()
        assert (call.positions == call.slots).all()
        num_kept = 0 if call.loops.states is None else len(call.loops.states)
        assert num_kept == width
        moved = last_of_pass.get(number, frontier - 1) + 1 - frontier
        frontier, width = frontier + moved, len(call.tokens) - moved
    assert frontier == 20
    assert max(np.diff(seen)) > 1, "nothing was frozen together"


def test_the_last_settled_position_freezes_those_before_it():
    seq, asked = run_script(
        [
            ([10], [1]),
            ([11, 12], [1, 1]),
            ([13, 14, 15], [0.01, 1, 0.01]),
            ([16, 17], [1, 1]),
        ],
        exit_threshold=0.03,
    )
    # Position 4 is the last that settled; the token drawn for it in the same pass is kept.
    assert seq.output[:3].tolist() == [7, 13, 14]
    assert seq.committed_at[2:6].tolist() == [1, 4, 4, -1]
    assert asked[4].tokens.tolist() == [14, 15]
    assert asked[4].positions.tolist() == [4, 5]
    # Of the three states of pass 4 the one that settled goes on.
    assert asked[4].loops.states.flatten().tolist() == [402.0]
    assert asked[4].loops.embeds.flatten().tolist() == [402.5]


def test_the_settled_prefix_leaves_what_is_behind_a_gap():
    passes = [
        ([10], [1]),
        ([10, 12], [1, 1]),
        ([10, 12, 15], [0.01, 0.01, 1]),
        ([12, 15, 16], [0.01, 1, 0.01]),
        ([12, 20, 21, 22], [1, 1, 1, 1]),
    ]
    seq, _ = run_script(passes, exit_threshold=0.03, freeze="prefix")
    assert seq.output.tolist() == [7, 10]


def test_the_settled_prefix_ends_at_a_token_that_changed():
    passes = [([10], [1]), ([10, 12], [1, 1]), ([10, 13, 15], [0.01, 0.01, 0.01]), ([13, 15, 16], [1, 1, 1])]
    seq, _ = run_script(passes, exit_threshold=0.03, freeze="prefix")
    assert seq.output.tolist() == [7, 10]


def test_stable_tokens_are_frozen_whatever_the_states_do():
    """After more than 8 / 4 passes in a row, and with them what is before them."""
    passes = [
        ([10], [1]),
        ([10, 20], [1, 1]),
        ([10, 21, 30], [1, 1, 1]),
        ([10, 20, 30, 40], [1] * 4),
        ([20, 30, 40, 50], [1] * 4),
        ([20, 30, 40, 50, 60], [1] * 5),
    ]
    seq, _ = run_script(passes, freeze="stability")
    # Position 3 was redrawn alike in passes 3 to 5, position 5 in 5 to 7, position 4 in 6 and 7 only.
    assert seq.output.tolist() == [7, 10, 20, 30]
    assert seq.committed_at[2:6].tolist() == [1, 5, 7, 7]


def test_a_token_that_changed_has_to_prove_stable_anew():
    passes = [
        ([10], [1]),
        ([10, 20], [1, 1]),
        ([11, 21, 30], [1] * 3),
        ([11, 22, 31, 40], [1] * 4),
        ([11, 23, 32, 41, 50], [1] * 5),
        ([11, 24, 33, 42, 51, 60], [1] * 6),
    ]
    seq, _ = run_script(passes, freeze="stability")
    # Position 3 was redrawn alike in passes 3, 5, 6 and 7.
    assert seq.committed_at[3] == 7


def test_a_fixed_schedule_freezes_one_position_when_it_had_its_loops():
    passes = [([10], [0]), ([10, 11], [0, 0]), ([11, 12], [0, 0]), ([12, 13], [0, 0])]
    seq, asked = run_script(passes, freeze="fixed", max_new_tokens=4)
    assert seq.committed_at[2:].tolist() == [1, 3, 4, 5]
    assert [len(forward.tokens) for forward in asked[1:]] == [1, 2, 2, 2]


def test_headway_adds_positions_that_begin_with_any_token():
    _, asked = run_script([([10], [1]), ([10, 11, 12, 13], [1] * 4)], headway=3)
    assert asked[2].tokens[:2].tolist() == [7, 10]
    assert asked[2].positions.tolist() == [2, 3, 4, 5]
    assert len(asked[2].loops.states) == 1
    assert set(asked[2].tokens[2:]) <= set(range(32))
    again = run_script([([10], [1]), ([10, 11, 12, 13], [1] * 4)], headway=3)[1]
    assert asked[2].tokens.tolist() == again[2].tokens.tolist()


def test_noise_fades_with_the_loops_of_a_position():
    _, asked = run_script([([10], [1]), ([10, 11], [1, 1]), ([10, 11, 12], [1] * 3)], noise=0.5)
    assert asked[1].loops.noise is None
    assert asked[2].loops.noise.tolist() == [0.5 / 5]
    assert asked[3].loops.noise.tolist() == [0.5 / 9, 0.5 / 5]
    assert len(set(asked[3].loops.noise_keys.tolist()) | set(asked[2].loops.noise_keys.tolist())) == 3


def test_a_stop_token_ends_the_text_in_the_first_pass_that_freezes_it():
    seq, asked = run_script(
        [([10], [1]), ([10, 30], [1, 1]), ([10, 30, 12], [1, 1, 0])], eos_ids=(30,), exit_threshold=0.03
    )
    assert (seq.output.tolist(), seq.stop_reason, len(asked)) == ([7, 10, 30], 30, 4)


def test_other_models_are_refused():
    with pytest.raises(InputError, match="recurrent_depth needs a looped model; this one is causal"):
        make_decoder("recurrent_depth").check(tiny_model().family)


def test_a_pass_cannot_have_more_loops_than_the_prompt():
    for settings in ({"inner_recurrence": 9}, {"inner_recurrence": 3, "num_loops": 2}):
        with pytest.raises(InputError, match="inner_recurrence must be at most num_loops; got"):
            run_script([], **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"inner_recurrence": 0},
        {"max_wavefront": 0},
        {"headway": 0},
        {"num_loops": 0},
        {"exit_threshold": -0.1},
        {"exit_threshold": float("nan")},
        {"momentum": 1.0},
        {"noise": 1.5},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match=f"{next(iter(settings))} must be"):
        make_decoder("recurrent_depth", settings)
