from __future__ import annotations

import numpy as np
import pytest

from chordal.errors import InputError
from chordal.planning.measure import decode_prompts

PROMPTS = [[1, 2, 3], [4, 0], [2, 5, 1, 3], [3, 3]]


@pytest.mark.parametrize("batch", [1, 3])
def test_only_ticks_of_a_full_batch_behind_prefill_count(make_timed, clock, batch):
    model = make_timed(slope=0.5)
    run = decode_prompts(model, PROMPTS, "autoregressive", {}, batch=batch, clock=clock, max_new_tokens=9)
    # Plain passes have a known price and give a token a row.
    assert run.tokens_per_s == pytest.approx(batch / (1 + 0.5 * batch))
    assert run.tokens % (batch * 8) == 0
    assert run.host_s == 0


def test_time_outside_of_the_model_is_told_apart(make_timed, clock, monkeypatch):
    model = make_timed()
    step = model.engine.step

    def slow():
        clock.now += 0.25
        step()

    monkeypatch.setattr(model.engine, "step", slow)
    run = decode_prompts(model, PROMPTS, "autoregressive", {}, batch=1, clock=clock, max_new_tokens=9)
    assert run.host_s == pytest.approx(0.25)
    assert run.tokens_per_s == pytest.approx(1 / 1.25)


def test_every_prompt_is_given_back_once_with_its_trace(make_timed, clock):
    model = make_timed()
    run = decode_prompts(
        model, PROMPTS, "prompt_lookup", {"num_draft": 4}, batch=2, clock=clock, max_new_tokens=20
    )
    assert [seq.prompt.tolist() for seq in run.seqs] == PROMPTS
    expected = [result.tokens for result in model.generate(PROMPTS, max_new_tokens=20)]
    for seq, trace, tokens in zip(run.seqs, run.traces, expected, strict=True):
        committed = np.concatenate([event.tokens for event in trace if event.kind == "commit"])
        assert seq.output.tolist() == tokens == committed[: len(tokens)].tolist()


def test_texts_of_one_pass_have_no_speed(make_timed, clock):
    run = decode_prompts(make_timed(), PROMPTS, "autoregressive", {}, batch=2, clock=clock, max_new_tokens=1)
    with pytest.raises(InputError, match="texts are too short to be timed"):
        _ = run.tokens_per_s


def test_a_sequence_that_fails_ends_the_run_and_frees_the_rest(make_timed, clock, monkeypatch):
    model = make_timed()
    target = model.engine.target
    monkeypatch.setattr(target, "logits", lambda position, view: np.full(6, np.nan))
    with pytest.raises(Exception, match="not finite"):
        decode_prompts(model, PROMPTS, "autoregressive", {}, batch=2, clock=clock)
    assert model.engine.num_live == 0
    assert not model.engine.has_work
