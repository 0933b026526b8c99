from __future__ import annotations

import json
import socket
import struct
import time

import httpx
import pytest

from chordal.decoders.autoregressive import Autoregressive
from chordal.errors import DecodingError, InputError
from chordal.server import connection

ASK = "reverse: Ana Ben Cleo Dan"
DONE = "[DONE]"


def events(server, path, **fields):
    """Stream, and give the data of all events, the end marker included."""
    body = {"model": "tiny-ar", "max_tokens": 8, "temperature": 0, "stream": True} | fields
    with server.client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    blocks = text.split("\n\n")
    assert blocks.pop() == ""  # each event ends with a blank line
    data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    assert all("\n" not in one for one in data)
    return [one if one == DONE else json.loads(one) for one in data]


def chat(server, text=ASK, **fields):
    return events(
        server, "/v1/chat/completions", **({"messages": [{"role": "user", "content": text}]} | fields)
    )


def complete(server, prompt=ASK, **fields):
    return events(server, "/v1/completions", prompt=prompt, **fields)


def choices(chunks):
    return [choice for chunk in chunks if chunk != DONE for choice in chunk["choices"]]


def joined(chunks, index=0):
    """Join the text of one answer."""
    mine = [choice for choice in choices(chunks) if choice["index"] == index]
    return "".join(one["text"] if "text" in one else one["delta"].get("content", "") for one in mine)


def open_stream(server, **fields):
    """Send a request that streams for long, and give the socket once the first byte is there."""
    body = {"model": "tiny-ar", "prompt": ASK, "max_tokens": 900, "ignore_eos": True, "stream": True} | fields
    link = send(server, body)
    assert link.recv(1)
    return link


def send(server, body):
    """Send a request over a socket of our own."""
    link = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    raw = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    link.sendall(head.encode() + raw)
    return link


def wait_running(server):
    until(lambda: server.worker.num_running, "nothing began")


def until(condition, otherwise):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.005)


def test_chat_begins_with_the_role_and_ends_with_the_reason(server):
    *chunks, end = chat(server)
    assert end == DONE
    first, *middle, last = choices(chunks)
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert all(set(choice["delta"]) == {"content"} for choice in middle)
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    assert joined(chunks) == "Dan Cleo Ben Ana"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("model", ["tiny-ar", "tiny-mdm", "tiny-block"])
@pytest.mark.parametrize("fields", [{}, {"stop": "Ben"}, {"temperature": 1, "seed": 4, "ignore_eos": True}])
def test_stream_joins_to_the_whole_answer(server, model, fields):
    whole = server.chat(ASK, model=model, **fields)
    chunks = chat(server, model=model, stream_options={"include_usage": True}, **fields)
    assert joined(chunks) == whole["choices"][0]["message"]["content"]
    last = choices(chunks)[-1]
    assert last["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert last["stop_reason"] == whole["choices"][0]["stop_reason"]
    counted = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [chunks[-2]["usage"][name] for name in counted] == [whole["usage"][name] for name in counted]


def test_completion_ends_with_the_reason(server):
    *chunks, end = complete(server)
    assert end == DONE
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert choices(chunks)[-1]["finish_reason"] == "length"
    assert joined(chunks) == server.complete(ASK)["choices"][0]["text"]


def test_usage_is_null_until_the_last_chunk_which_has_no_choice(server):
    *chunks, last, _ = chat(server, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert all("usage" not in chunk for chunk in chat(server)[:-1])


def test_continuous_usage_counts_what_was_sent(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = complete(server, stream_options=options, return_token_ids=True)
    total = 0
    for chunk in chunks:
        total += len(chunk["choices"][0].get("token_ids", []))
        assert chunk["usage"]["completion_tokens"] == total
    assert last["usage"]["completion_tokens"] == total == 8


def test_usage_without_a_token_is_told(server):
    *_, last, end = complete(server, echo=True, max_tokens=0, stream_options={"include_usage": True})
    assert end == DONE
    assert last["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("n", [1, 3])
def test_several_prompts_and_answers_stream_side_by_side(server, n):
    prompts, fields = [ASK, "sort: c b a"], {"temperature": 1, "seed": 3, "n": n}
    chunks = complete(server, prompts, stream_options={"include_usage": True}, **fields)
    whole = server.complete(prompts, **fields)
    for index, choice in enumerate(whole["choices"]):
        assert joined(chunks, index) == choice["text"]
    reasons = [choice["index"] for choice in choices(chunks) if choice["finish_reason"]]
    assert sorted(reasons) == list(range(2 * n))
    assert chunks[-2]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_logprobs_of_a_stream_are_those_of_the_whole_answer(server):
    def merged(chunks):
        got = [choice["logprobs"] for choice in choices(chunks) if choice["logprobs"]]
        return {name: [entry for one in got for entry in one[name]] for name in got[0]}

    for fields in ({}, {"echo": True}):
        whole = server.complete(ASK, logprobs=2, **fields)["choices"][0]
        chunks = complete(server, logprobs=2, **fields)
        streamed = merged(chunks)
        for name in ("tokens", "text_offset"):
            assert streamed[name] == whole["logprobs"][name]
        assert joined(chunks) == whole["text"]
    whole = server.chat(ASK, logprobs=True)["choices"][0]["logprobs"]["content"]
    told = [one["logprobs"] for one in choices(chat(server, logprobs=True)) if one["logprobs"]]
    content = [entry for one in told for entry in one["content"]]
    assert [one["token"] for one in content] == [one["token"] for one in whole]


def test_characters_that_are_spread_over_tokens_are_never_split(server, models):
    """Forced to write emoji and accents, the model streams whole characters only."""
    tokenizer = models["tiny-ar"].tokenizer
    text = "\U0001f600\u00e9\u4e2d"
    bias = {str(token): 60.0 for token in set(tokenizer(text)["input_ids"])}
    fields = {"logit_bias": bias, "temperature": 1, "seed": 5, "max_tokens": 40, "ignore_eos": True}
    whole = server.complete(ASK, **fields)["choices"][0]["text"]
    chunks = complete(server, **fields)
    assert joined(chunks) == whole
    pieces = [choice["text"] for choice in choices(chunks)]
    *before, _ = [piece for piece in pieces if piece]
    assert len(before) > 3
    joined_before, rest = "".join(before), whole
    assert rest.startswith(joined_before)


def test_stop_string_is_never_sent_not_even_in_part(server):
    text = server.complete(ASK, max_tokens=16)["choices"][0]["text"]
    for stop in (text[3:9], text[4:6], " Ben Ben"):
        at = text.index(stop)
        for decoder in ("autoregressive", "prompt_lookup"):
            chunks = complete(server, max_tokens=16, stop=stop, chordal={"decoder": decoder})
            assert joined(chunks) == text[:at]


def test_text_that_only_begins_like_a_stop_string_is_sent_at_last(server):
    text = server.complete(ASK, max_tokens=16)["choices"][0]["text"]
    assert joined(complete(server, max_tokens=16, stop=text[-6:] + "@")) == text


@pytest.mark.parametrize("model", ["tiny-ar", "tiny-mdm", "tiny-block"])
def test_events_add_up_to_the_answer(server, model):
    chunks = chat(server, model=model, chordal={"events": True, "counts": True})
    seen = {}
    for choice in choices(chunks):
        for event in choice.get("chordal", {}).get("events", []):
            assert len(event["positions"]) == len(event["tokens"]) == len(event["texts"])
            if event["kind"] == "commit":
                seen |= zip(event["positions"], event["texts"], strict=True)
    counts = choices(chunks)[-1]["chordal"]["counts"]
    text = "".join(seen[at] for at in range(counts["committed_tokens"]))
    assert text == " Dan Cleo Ben Ana<|end|>"


def test_drafts_are_told_with_what_was_kept_of_them(server):
    options = {"events": True, "counts": True, "decoder": "draft_model"}
    chunks = chat(server, max_tokens=16, chordal=options)
    told = [event for choice in choices(chunks) for event in choice.get("chordal", {}).get("events", [])]
    drafts = [event for event in told if event["kind"] == "draft"]
    counts = choices(chunks)[-1]["chordal"]["counts"]
    assert sum(len(event["tokens"]) for event in drafts) == counts["draft_tokens"] > 0
    assert sum(len(event["kept"]) for event in drafts) == counts["accepted_tokens"]


def test_silence_is_filled_with_comments(server, monkeypatch):
    monkeypatch.setattr(connection, "PING_S", 0.001)
    body = {"model": "tiny-ar", "prompt": ASK, "max_tokens": 40, "ignore_eos": True, "stream": True}
    text = server.post("/v1/completions", body).text
    assert ": ping\n\n" in text
    assert text.endswith("data: [DONE]\n\n")


def failing(error, after):
    """Make a decoder's coroutine that fails after some tokens."""
    plain = Autoregressive.decode

    def decode(self, seq):
        steps = plain(self, seq)
        reading = None
        while True:
            if seq.frontier - seq.num_prompt >= after:
                raise error
            reading = yield steps.send(reading)

    return decode


def test_error_after_the_first_chunk_is_an_event_and_no_end_follows(server, monkeypatch):
    monkeypatch.setattr(Autoregressive, "decode", failing(DecodingError("logits that are not finite"), 3))
    *chunks, last = complete(server)
    assert last["error"]["type"] == "internal_server_error"
    assert "not finite" in last["error"]["message"]
    assert DONE not in chunks
    server.wait_idle()


def test_unforeseen_error_is_not_shown(server, monkeypatch):
    monkeypatch.setattr(Autoregressive, "decode", failing(RuntimeError("secret path /x/y"), 3))
    *_, last = complete(server)
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(last)
    response = server.post("/v1/completions", {"model": "tiny-ar", "prompt": ASK})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in response.text


def test_error_before_the_first_chunk_has_its_own_status(server, monkeypatch):
    monkeypatch.setattr(Autoregressive, "decode", failing(InputError("num_draft must be small."), 0))
    body = {"model": "tiny-ar", "prompt": ASK, "stream": True}
    response = server.post("/v1/completions", body)
    assert (response.status_code, response.json()["error"]["message"]) == (400, "num_draft must be small.")


def test_timeout_of_a_stream_is_an_error_event(server, slow):
    *chunks, last = complete(server, max_tokens=900, ignore_eos=True, chordal={"timeout": 1.5})
    assert last["error"]["code"] == "timeout"
    assert DONE not in chunks
    server.wait_idle()


def test_client_that_closes_a_stream_ends_its_work(server, slow):
    with open_stream(server):
        assert server.worker.num_running == 1
    server.wait_idle()


def test_client_that_resets_the_connection_ends_its_work(server, slow):
    with open_stream(server, n=4, temperature=1) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.wait_idle()


def test_client_that_closes_its_half_ends_its_work(server, slow):
    with open_stream(server) as link:
        link.shutdown(socket.SHUT_WR)
        server.wait_idle()


def test_client_that_leaves_before_a_whole_answer_ends_its_work(server, slow):
    with send(server, {"model": "tiny-ar", "prompt": ASK, "max_tokens": 900, "ignore_eos": True}):
        wait_running(server)
    server.wait_idle()


def test_client_that_leaves_while_it_waits_in_the_queue_is_forgotten(make_server, slow):
    with make_server(max_num_seqs=1) as small:
        with open_stream(small):
            with send(small, {"prompt": ASK, "max_tokens": 900, "ignore_eos": True}):
                until(lambda: small.worker.num_waiting, "nothing waits")
            until(lambda: not small.worker.num_waiting, "it still waits")
            assert small.worker.num_running == 1
        small.wait_idle()


def test_client_that_never_reads_is_given_up(server, monkeypatch):
    monkeypatch.setattr(connection, "STALL_S", 0.3)
    body = {
        "model": "tiny-ar",
        "prompt": [ASK] * 16,
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 20,
        "chordal": {"events": True},
    }
    raw = json.dumps(body).encode()
    before = num_cancelled(server)
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        link.settimeout(20)
        link.connect(("127.0.0.1", server.port))
        link.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(raw)}\r\n\r\n".encode()
            + raw
        )
        until(lambda: num_cancelled(server) == before + 16, "it is not given up")
    assert server.chat(ASK)["choices"][0]["message"]["content"] == "Dan Cleo Ben Ana"


def num_cancelled(server):
    """Count the requests of tiny-ar that ended because nobody waits for them."""
    name = 'chordal:request_success_total{finished_reason="cancelled",model_name="tiny-ar"} '
    [line] = [line for line in server.client.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(line.removeprefix(name))


def test_clients_that_leave_at_any_moment_disturb_nobody(server):
    """Connections that are cut at many different moments, beside answers that must be right."""
    for cut in range(12):
        with send(server, {"model": "tiny-ar", "prompt": ASK, "max_tokens": 200, "stream": bool(cut % 2)}):
            time.sleep(cut * 0.01)
        if cut % 4 == 0:
            assert server.chat(ASK)["choices"][0]["message"]["content"] == "Dan Cleo Ben Ana"
    server.wait_idle()


def test_queue_that_is_full_says_so_at_once(make_server, slow):
    with make_server(max_num_seqs=1, max_queue=0) as small:
        with open_stream(small):
            response = small.post("/v1/completions", {"prompt": ASK})
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "queue_full"
            too_many = small.post("/v1/completions", {"prompt": ASK, "n": 2})
            assert too_many.status_code == 400
        small.wait_idle()
        assert small.post("/v1/completions", {"prompt": ASK}).status_code == 200


def test_connection_serves_one_stream_after_the_other(server):
    with httpx.Client(base_url=server.base_url) as client:
        for _ in range(3):
            body = {"prompt": ASK, "max_tokens": 2, "stream": True}
            assert client.post("/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
