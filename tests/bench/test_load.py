from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal

import numpy as np
import pytest

from chordal.bench.load import (
    Answer,
    EventReader,
    Level,
    Server,
    ServerError,
    arrivals,
    find_model,
    grade,
    percentile,
    run_load,
    summarize,
    summarize_times,
)
from chordal.bench.tasks.workload import Workload, load_tasks
from chordal.errors import InputError


def script(*chunks, usage=(5, 7), **more):
    """A prompt that says what the server is to do with it."""
    return json.dumps({"chunks": chunks, "usage": usage, **more})


@pytest.fixture
def load(openai_server):
    """Run one level, or several, and give their rows; `load.requests` are those of all levels."""

    def load(prompts, *levels, timeout_s=30.0, workloads=None, warmup=0, **settings):
        rows, load.requests = [], []

        def on_level(row, requests):
            rows.append(row)
            load.requests += requests

        workloads = workloads or [Workload("scripts", prompts)]
        levels = levels or (Level(concurrency=1, num_requests=len(prompts)),)
        server = Server(base_url=openai_server.url, timeout_s=timeout_s)
        run_load(server, "fake", workloads, levels, warmup=warmup, on_level=on_level, **settings)
        return rows if len(levels) > 1 else rows[0]

    return load


@pytest.mark.parametrize("num", [1, 2, 3, 10, 101])
def test_percentiles_are_those_of_numpy(num):
    values = sorted(random.Random(num).expovariate(1.0) for _ in range(num))
    for rank in (0, 25, 50, 95, 99, 100):
        assert percentile(values, rank) == pytest.approx(np.percentile(values, rank))


def test_times_are_summed_up_whatever_their_order():
    times = summarize_times([4.0, None, 1.0, 3.0, 2.0])
    assert times == pytest.approx({"mean": 2.5, "p50": 2.5, "p95": 3.85, "p99": 3.97})
    assert summarize_times([None]) is None


def test_times_of_an_answer_follow_from_its_chunks():
    answer = Answer(task="t", index=0, e2el_s=3.0, chunk_s=[0.5, 0.5, 2.0], output_tokens=6)
    assert answer.ttft_s == 0.5
    assert answer.itl_s == [0.0, 1.5]
    assert answer.tpot_s == pytest.approx(0.5)  # (3.0 - 0.5) / (6 - 1)
    assert Answer(task="t", index=0, chunk_s=[0.5], output_tokens=1).tpot_s is None
    assert Answer(task="t", index=0, chunk_s=[0.5]).tpot_s is None
    assert Answer(task="t", index=0, output_tokens=3).ttft_s is None


def test_sums_are_of_whole_answers_and_total_by_total():
    counts = [{"forwards": 2, "committed_tokens": 4}, {"forwards": 6, "committed_tokens": 6}]
    answers = [
        Answer(task="t", index=0, chunk_s=[1.0, 2.0], prompt_tokens=3, output_tokens=4, counts=counts[0]),
        Answer(task="t", index=1, chunk_s=[1.0], prompt_tokens=5, output_tokens=6, counts=counts[1]),
        Answer(task="t", index=2, chunk_s=[9.0], output_tokens=99, failure="timeout", message="late"),
    ]
    row = summarize(answers, [True, False, False], 4.0)
    assert (row["num_requests"], row["num_ok"], row["requests_per_s"]) == (3, 2, 0.5)
    assert (row["prompt_tokens"], row["prompt_tokens_per_s"]) == (8, 2.0)
    assert (row["output_tokens"], row["output_tokens_per_s"]) == (10, 2.5)
    assert (row["chunks"], row["tokens_per_chunk"]) == (3, pytest.approx(10 / 3))
    assert (row["forwards"], row["tokens_per_forward"]) == (8, 10 / 8)
    assert row["failures"] == [{"kind": "timeout", "num": 1, "message": "late"}]
    assert (row["quality"]["value"], row["quality"]["num_graded"]) == (pytest.approx(1 / 3), 3)
    assert row["ttft_s"]["p99"] == 1.0


def test_one_answer_without_usage_leaves_no_sum_of_tokens():
    answers = [
        Answer(task="t", index=0, chunk_s=[1.0], prompt_tokens=3, output_tokens=4),
        Answer(task="t", index=1, chunk_s=[1.0]),
    ]
    row = summarize(answers, [None, None], 4.0)
    assert row["num_without_usage"] == 1
    told = ("output_tokens", "output_tokens_per_s", "prompt_tokens", "tokens_per_chunk", "tokens_per_forward")
    assert [row[name] for name in told] == [None] * len(told)
    assert row["num_ok"] == 2
    assert row["quality"] is None


def test_arrivals_are_a_poisson_process_of_the_rate():
    """20,000 gaps of mean 0.25 s: mean and standard deviation are within 5 standard errors."""
    times = [0.0, *itertools.islice(arrivals(4.0, random.Random(0)), 20_000)]
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.25, abs=5 * 0.25 / math.sqrt(20_000))
    assert gaps.std() == pytest.approx(0.25, abs=5 * 0.25 * math.sqrt(2 / 20_000))
    assert times[1:4] == [*itertools.islice(arrivals(4.0, random.Random(0)), 3)]
    assert [*itertools.islice(arrivals(math.inf, random.Random(0)), 3)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_are_the_same_however_the_bytes_are_cut(size):
    said = "caf\u00e9 \u2028\x85 \N{GRINNING FACE}"
    events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"index": 0, "delta": {"content": said}}], "usage": None},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}},
    ]
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\n" for event in events]
    data = "".join(
        [": ping\n\nevent: x\n", *lines, "data:[DONE]\n\n", 'data: {"error": "late"}\n\n']
    ).encode()
    answer = Answer(task="t", index=0)
    reader = EventReader(answer)
    for start in range(0, len(data), size):
        reader.feed(data[start : start + size], 1.0)
    reader.end(2.0)
    assert answer.text == said
    assert (answer.finish_reason, answer.prompt_tokens, answer.output_tokens) == ("length", 3, 9)
    assert len(answer.chunk_s) == 2  # the thought and the text; a role is no text
    assert (answer.failure, answer.e2el_s) == (None, 1.0)


@pytest.mark.parametrize(
    "event", ["[]", "3", "{", '{"choices": 3}', '{"choices": [1]}', '{"usage": {"a": 1}}']
)
def test_an_event_of_another_format_is_a_failure_and_no_crash(event):
    answer = Answer(task="t", index=0)
    EventReader(answer).feed(f"data: {event}\n\n".encode(), 1.0)
    assert answer.failure == "bad stream"


def test_counts_are_those_the_server_gave(load, openai_server):
    counts = {"forwards": 2, "committed_tokens": 7}
    row = load([script("a", "bc", "d", counts=counts), script("e", usage=(1, 2), counts=counts)])
    assert (row["num_requests"], row["num_ok"], row["failures"]) == (2, 2, [])
    assert (row["prompt_tokens"], row["output_tokens"], row["chunks"]) == (6, 9, 4)
    assert row["tokens_per_forward"] == 14 / 4
    assert row["itl_s"] is not None
    assert row["is_complete"]
    [body, _] = openai_server.requests
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    assert sorted(len(request["chunk_s"]) for request in load.requests) == [1, 3]


def test_failures_are_told_apart_and_leave_no_tokens(load):
    faults = {
        503: "status 503",
        "cut": "broken stream",
        "unfinished": "broken stream",
        "reset": "connection",
        "error": "error event",
        "junk": "bad stream",
        "whole": "bad stream",
        "hang": "timeout",
    }
    row = load([script("a", fault=fault) for fault in faults] + [script("fine")], timeout_s=1.0)
    failures = {failure["kind"]: failure for failure in row["failures"]}
    assert {kind: failure["num"] for kind, failure in failures.items()} == {
        "status 503": 1, "broken stream": 2, "connection": 1, "error event": 1, "bad stream": 2, "timeout": 1,
    }  # fmt: skip
    assert failures["status 503"]["message"] == "planted [2J fault"
    assert failures["error event"]["message"] == "planted error"
    assert failures["timeout"]["message"] == "no whole answer within 1 s."
    assert (row["num_requests"], row["num_ok"], row["output_tokens"], row["chunks"]) == (9, 1, 7, 1)


def test_a_server_without_usage_is_not_guessed_for(load):
    row = load([script("a", "b", usage=None)])
    assert (row["num_ok"], row["num_without_usage"], row["output_tokens"]) == (1, 1, None)
    assert row["ttft_s"] is not None
    assert row["tpot_s"] is None


@pytest.mark.parametrize("concurrency", [1, 4])
def test_concurrency_is_reached_and_never_passed(load, openai_server, concurrency):
    openai_server.meet = concurrency
    row = load([script("a", "b")] * 12, Level(concurrency=concurrency, num_requests=12))
    assert openai_server.peak == row["peak_concurrency"] == concurrency
    assert row["num_ok"] == len(openai_server.requests) == 12


def test_no_limit_sends_everything_at_once(load, openai_server):
    openai_server.meet = 30
    assert load([script("a")], Level(num_requests=30))["peak_concurrency"] == 30


def test_requests_that_a_full_level_holds_back_are_told(load, openai_server):
    level = Level(concurrency=1, num_requests=5, request_rate=1e6)
    row = load([script("a")], level)
    assert row["peak_concurrency"] == openai_server.peak == 1
    # The last is due at once and waits for four answers, at the least.
    delays = [request["delay_s"] for request in load.requests]
    assert delays == sorted(delays)
    assert delays[-1] > delays[0]
    assert row["delay_s"]["mean"] > 0
    assert load([script("a")])["request_rate"] is None


def test_a_duration_ends_the_sending_and_what_is_sent_is_finished(load, openai_server):
    row = load([script("a")], Level(concurrency=2, duration_s=0.2))
    assert row["num_ok"] == row["num_requests"] == len(openai_server.requests) >= 2
    assert row["is_complete"]
    few = load([script("a")], Level(concurrency=2, duration_s=30.0, num_requests=3))
    assert few["num_requests"] == 3


def test_levels_go_on_where_the_prompts_of_the_last_one_ended(load, openai_server):
    prompts = [script(str(number)) for number in range(7)]
    load(prompts, *[Level(concurrency=1, num_requests=3)] * 2, warmup=1)
    sent = [body["messages"][0]["content"] for body in openai_server.requests]
    assert sorted(sent) == prompts
    openai_server.requests.clear()
    load(prompts, *[Level(concurrency=1, num_requests=3)] * 2, warmup=1)
    assert [body["messages"][0]["content"] for body in openai_server.requests] == sent
    openai_server.requests.clear()
    load(prompts, Level(concurrency=1, num_requests=7), seed=1)
    assert [body["messages"][0]["content"] for body in openai_server.requests] != sent


def test_workloads_take_turns_and_each_has_its_length(load, openai_server):
    workloads = [Workload("one", [script("a")], 3), Workload("two", [script("b")] * 5)]
    load(None, Level(concurrency=1, num_requests=4), workloads=workloads, default_max_tokens=9)
    assert [body["max_tokens"] for body in openai_server.requests] == [3, 9, 3, 9]


def test_right_answers_are_graded_and_failed_ones_are_wrong(load):
    workloads = load_tasks(["copy", "reverse", "sort"], 4)
    row = load(None, Level(concurrency=3, num_requests=12), workloads=workloads)
    right = {task: [] for task in ("copy", "reverse", "sort")}
    for request in load.requests:
        right[request["task"]].append(request["right"])
    assert (right["copy"], right["reverse"], right["sort"]) == ([True] * 4, [True] * 4, [False] * 4)
    assert (row["quality"]["num_right"], row["quality"]["num_graded"]) == (8, 12)
    workload = Workload("t", ["p"], grade=lambda index, text: True)
    failed = Answer(task="t", index=0, failure="timeout")
    assert grade([failed, Answer(task="t", index=0)], [workload]) == [False, True]


@pytest.mark.parametrize(
    ("endpoint", "prompt", "sent"),
    [
        ("chat", script("a"), {"messages": [{"role": "user", "content": script("a")}]}),
        (
            "chat",
            [{"role": "user", "content": script("a")}],
            {"messages": [{"role": "user", "content": script("a")}]},
        ),
        ("completions", script("a"), {"prompt": script("a")}),
    ],
)
def test_prompts_go_in_the_form_of_the_endpoint(load, openai_server, endpoint, prompt, sent):
    row = load([prompt], endpoint=endpoint, fields={"temperature": 0.5, "chordal": {"counts": True}})
    assert row["num_ok"] == 1
    [body] = openai_server.requests
    assert body == {
        "model": "fake", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 128,
        "temperature": 0.5, "chordal": {"counts": True}, **sent,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("endpoint", "prompt", "error"),
    [
        ("completions", [{"role": "user", "content": "a"}], "need --endpoint chat"),
        ("chat", [1, 2, 3], "need --endpoint completions"),
    ],
)
def test_prompts_that_an_endpoint_cannot_take_are_refused_before_any_is_sent(
    load, openai_server, endpoint, prompt, error
):
    with pytest.raises(InputError, match=error):
        load([script("a"), prompt], endpoint=endpoint)
    assert openai_server.requests == []


@pytest.mark.parametrize("name", ["stream", "n", "messages", "model"])
def test_fields_of_the_load_itself_are_refused(load, name):
    with pytest.raises(InputError, match=f"^{name} cannot be"):
        load([script("a")], fields={name: 1})


def test_workloads_of_one_name_are_refused(load):
    with pytest.raises(InputError, match="different names"):
        load(None, Level(num_requests=1), workloads=[Workload("a", ["p"]), Workload("a", ["q"])])


def test_a_warmup_that_fails_ends_the_run(load, openai_server):
    with pytest.raises(ServerError, match="status 400: planted"):
        load([script("a", fault=400)], warmup=1)
    assert len(openai_server.requests) == 1


def test_an_interrupted_level_gives_what_there_is(load, openai_server):
    rows = []

    def interrupt(done, level):
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    prompts = [script("a") for _ in range(3)] + [script("a", fault="hang") for _ in range(50)]
    with pytest.raises(KeyboardInterrupt):
        run_load(
            Server(base_url=openai_server.url),
            "fake",
            [Workload(str(at), [prompt]) for at, prompt in enumerate(prompts)],
            [Level(concurrency=20, num_requests=1000), Level(concurrency=1, num_requests=1)],
            warmup=0,
            on_level=lambda row, requests: rows.append(row),
            on_answer=interrupt,
        )
    [row] = rows
    assert (row["num_requests"], row["num_ok"], row["is_complete"]) == (3, 3, False)


def test_the_model_is_the_first_one_that_is_served(openai_server):
    openai_server.models = ["one", "two"]
    server = Server(base_url=f"{openai_server.url}/v1/")
    assert server.base_url == openai_server.url
    assert find_model(server) == "one"
    assert find_model(server, "other") == "other"
    openai_server.models = []
    with pytest.raises(ServerError, match=r"/v1/models names no model; give --model\.$"):
        find_model(server)
    with pytest.raises(ServerError, match=r"names no model \(404: no such path\); give --model\.$"):
        find_model(Server(base_url=f"{openai_server.url}/other"))


def test_a_key_is_sent_and_never_shown(openai_server, load):
    openai_server.api_key = "sekret-1"
    right = Server(base_url=openai_server.url, api_key="sekret-1")
    wrong = Server(base_url=openai_server.url, api_key="sekret-2")
    assert find_model(right) == "fake"
    assert "sekret" not in repr(right)
    with pytest.raises(ServerError, match="refuses the key") as refused:
        find_model(wrong)
    assert "sekret" not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "ftp://localhost"},
        {"base_url": "http://"},
        {"base_url": "http://a\nb"},
        {"base_url": "http://user:sekret@localhost"},
        {"api_key": "sekret\nX-Other: 1"},
        {"api_key": "sekret\N{SNOWMAN}"},
    ],
)
def test_what_cannot_be_a_server_is_refused_without_a_secret(settings):
    with pytest.raises(InputError) as refused:
        Server(**settings)
    assert "sekret" not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"concurrency": 3},
        {"duration_s": 3.0},
        {"num_requests": 3, "request_rate": 0.0},
        {"num_requests": 3, "request_rate": math.nan},
        {"concurrency": 3, "duration_s": 0.0},
        {"concurrency": 0, "num_requests": 3},
        {"num_requests": 0},
    ],
)
def test_a_load_without_an_end_or_a_beginning_is_refused(settings):
    with pytest.raises(InputError):
        Level(**settings)


def test_nobody_there_is_one_sentence(openai_server):
    with pytest.raises(ServerError, match=r"^no server answers at http://127\.0\.0\.1:1: "):
        find_model(Server(base_url="http://127.0.0.1:1"))
