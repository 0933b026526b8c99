"""Faults of clients, of models and of decoders: each ends what it hits, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import random
import socket
import struct
import sys
import threading
import time
import tracemalloc
from collections import Counter

import httpx
import numpy as np
import pytest
import torch

import chordal
from chordal.generation import Job
from chordal.sequence import Sequence
from chordal.server.mailbox import Ticket

PROMPT = "reverse: Ana Ben Cleo Dan"
LONG = {"model": "tiny-ar", "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True}


def head(length, *lines):
    """Write the head of a POST whose body has a length."""
    given = "".join(f"{line}\r\n" for line in lines)
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n{given}\r\n"
    ).encode()


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def send(server, body):
    """Send a request over a socket of its own."""
    link = connect(server)
    raw = json.dumps(body).encode()
    link.sendall(head(len(raw)) + raw)
    return link


def reset(link):
    """End a connection without a word."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.close()


def read_all(link):
    """Read until the other side hangs up."""
    with link:
        return b"".join(iter(lambda: link.recv(1 << 16), b""))


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


def gather(server, bodies, *, limit=None):
    """Send all bodies at once, and give the responses in order."""

    async def main():
        limits = httpx.Limits(max_connections=limit)
        async with httpx.AsyncClient(base_url=server.base_url, timeout=60, limits=limits) as client:
            asked = [client.post("/v1/completions", json=body) for body in bodies]
            return await asyncio.gather(*asked)

    return asyncio.run(main())


def tokens_of(response):
    """Give the tokens of a whole answer, or join those of a stream; None if it is an error."""
    if response.status_code != 200:
        return None
    if not response.headers["content-type"].startswith("text/event-stream"):
        return response.json()["choices"][0]["token_ids"]
    *blocks, end, _ = response.text.split("\n\n")
    if end != "data: [DONE]":
        return None
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks if not block.startswith(":")]
    return [token for chunk in chunks for one in chunk["choices"] for token in one.get("token_ids", [])]


VICTIM = 666  # seed of the request that a fault is for


class Others:
    """Requests of several kinds beside a victim, and what they must be answered."""

    def __init__(self, name, count=6):
        decoders = {
            "tiny-ar": ["autoregressive", "prompt_lookup"],
            "tiny-mdm": ["low_confidence", "threshold"],
        }
        model = chordal.load(name)
        prompt = model.tokenizer(PROMPT)["input_ids"]
        self.bodies, self.tokens = [], []
        for number in range(count):
            law = {"temperature": 1.5, "seed": number} if number % 3 else {"temperature": 0.0}
            decoder = decoders[name][number % 2]
            length = 8 + 4 * number
            [result] = model.generate(
                [prompt], decoder=decoder, max_new_tokens=length, ignore_eos=True, **law
            )
            self.tokens.append(result.tokens)
            asked = {"model": name, "prompt": prompt, "max_tokens": length, "ignore_eos": True}
            told = {"return_token_ids": True, "stream": number % 2 == 1, "chordal": {"decoder": decoder}}
            self.bodies.append(asked | law | told)

    def check(self, responses):
        for response, tokens in zip(responses, self.tokens, strict=True):
            assert tokens_of(response) == tokens, response.text[:500]


@pytest.fixture(scope="module")
def others():
    return {name: Others(name) for name in ("tiny-ar", "tiny-mdm")}


@pytest.fixture(scope="module")
def faulty():
    """Models of our own, whose passes can be made to fail: `faulty[name].fault(forward, reading)`."""
    return {name: Faulty(chordal.load(name)) for name in ("tiny-ar", "tiny-mdm")}


class Faulty:
    """A model with a fault in what it reads for the victim, whose seed tells it from the others."""

    def __init__(self, model):
        self.model = model
        self.fail(None)
        runner, real = model.engine.target, model.engine.target.run

        def run(requests):
            live = model.engine._live
            hit = [live[row].seq.seed == VICTIM for row, _ in requests]
            if self.fault is not None and any(hit):
                self.left -= 1
                if self.left <= 0:
                    return self.fault(lambda: real(requests), runner, [row for row, _ in requests], hit)
            return real(requests)

        runner.run = run

    def fail(self, fault, at=1):
        """Fail from the victim's first pass on, which is its prefill, or a later one; None does not fail."""
        self.fault, self.left = fault, at


def no_memory(run, runner, rows, hit):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB")


def no_memory_of_the_host(run, runner, rows, hit):
    raise MemoryError


def any_error(run, runner, rows, hit):
    raise RuntimeError("an illegal memory access was encountered at /secret/path")


def not_a_number(run, runner, rows, hit):
    """Make the network itself give NaN for the victim's tokens, and keep that in its cache."""
    batches, place = [], runner._place

    def note(requests):
        batches.append(place(requests))
        return batches[-1]

    def poison(module, given, output):
        output = output.clone()
        for placed, is_hit in zip(batches[-1].placed, hit, strict=True):
            if is_hit:
                output.flatten(0, 1)[placed.tokens] = float("nan")
        return output

    runner._place = note
    handle = runner.model.get_input_embeddings().register_forward_hook(poison)
    try:
        return run()
    finally:
        handle.remove()
        del runner._place


@pytest.mark.parametrize("name", ["tiny-ar", "tiny-mdm"])
@pytest.mark.parametrize("fault", [no_memory, no_memory_of_the_host, any_error, not_a_number])
def test_a_pass_that_fails_for_one_request_ends_that_request_alone(
    make_server, check_healthy, faulty, others, name, fault
):
    victim = {"model": name, "prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, "seed": VICTIM}
    with make_server({name: faulty[name].model}) as running:
        for at, stream in ((1, False), (3, False), (3, True)):
            faulty[name].fail(fault, at)
            *rest, hit = gather(running, [*others[name].bodies, {**victim, "stream": stream}])
            faulty[name].fail(None)
            others[name].check(rest)
            assert tokens_of(hit) is None
            assert hit.status_code in (200, 500, 503)
            last = hit.text.strip().split("\n\n")[-1].removeprefix("data: ")
            error = json.loads(last)["error"]
            assert "secret" not in hit.text and "CUDA" not in hit.text
            if fault is not_a_number:
                assert "finite" in error["message"]
            # The row it had serves the next one.
            check_healthy(running)


def test_a_decoder_that_fails_ends_its_request_alone(make_server, check_healthy, others, monkeypatch):
    from chordal.decoders.autoregressive import Autoregressive

    plain = Autoregressive.decode

    def decode(self, seq):
        steps, reading = plain(self, seq), None
        while True:
            if seq.seed == VICTIM and seq.frontier - seq.num_prompt >= 3:
                raise ZeroDivisionError("secret")
            try:
                asked = steps.send(reading)
            except StopIteration:
                return
            reading = yield asked

    monkeypatch.setattr(Autoregressive, "decode", decode)
    mine = others["tiny-ar"]
    with make_server() as running:
        for stream in (False, True):
            victim = {**LONG, "seed": VICTIM, "temperature": 1, "stream": stream}
            *rest, hit = gather(running, [*mine.bodies, victim])
            mine.check(rest)
            assert tokens_of(hit) is None
            assert "secret" not in hit.text
            check_healthy(running)


def test_biases_that_exclude_every_token_change_nothing_but_the_one_request(healthy):
    size = healthy.worker.models["tiny-ar"].engine.target.vocab_size
    for value in (-100, 100):
        asked = {"logit_bias": {str(token): value for token in range(size)}, "max_tokens": 8}
        for model in ("tiny-ar", "tiny-mdm"):
            plain = healthy.complete(PROMPT, model=model)["choices"][0]["text"]
            assert healthy.complete(PROMPT, model=model, **asked)["choices"][0]["text"] == plain
    # Of what JSON allows, everything is made unlikely: it is JSON all the same.
    asked = {
        "logit_bias": {str(token): -100 for token in range(size)},
        "response_format": {"type": "json_object"},
    }
    text = healthy.complete(PROMPT, **asked, max_tokens=200)["choices"][0]["text"]
    assert text.startswith("{")


def test_a_constraint_that_allows_nothing_ends_its_request_alone(
    make_server, check_healthy, others, monkeypatch
):
    class Dead:
        """Allows anything twice, and then nothing."""

        def __init__(self, size):
            self.size = size

        def allowed(self, generated):
            return np.full(self.size, len(generated) < 2)

    mine = others["tiny-ar"]
    monkeypatch.setattr("chordal.constraint.json_object", lambda model: Dead(model.engine.target.vocab_size))
    with make_server() as running:
        for stream in (False, True):
            victim = {"prompt": PROMPT, "response_format": {"type": "json_object"}, "stream": stream}
            *rest, hit = gather(running, [*mine.bodies, victim])
            mine.check(rest)
            assert tokens_of(hit) is None
            assert "error" in hit.text
        check_healthy(running)


def leave(rng, server, models=("tiny-ar", "tiny-mdm")):
    """Begin a request and leave it at some moment, in one of the ways that clients do."""
    body = {
        **LONG,
        "model": rng.choice(models),
        "max_tokens": rng.choice([20, 120]),
        "stream": rng.random() < 0.6,
        "n": rng.choice([1, 1, 2]),
        "temperature": 1,
    }
    raw = json.dumps(body).encode()
    link = connect(server)
    how = rng.choice(["head", "body", "at once", "byte", "later", "later", "half", "reset", "reset", "deaf"])
    link.sendall((head(len(raw)) + raw)[: {"head": 40, "body": -5}.get(how)])
    if how == "byte":
        link.recv(1)
    elif how in ("later", "reset", "deaf"):
        time.sleep(rng.random() * 0.08)
    elif how == "half":
        link.shutdown(socket.SHUT_WR)
        time.sleep(rng.random() * 0.05)
    (reset if how == "reset" else socket.socket.close)(link)
    return how


def test_clients_that_leave_in_every_way_at_random_moments_disturb_nobody(healthy, others):
    rng = random.Random(5)
    hows = Counter()

    def storm(seed):
        mine = random.Random(seed)
        for _ in range(12):
            hows[leave(mine, healthy)] += 1

    leaving = [threading.Thread(target=storm, args=(rng.random(),)) for _ in range(4)]
    for thread in leaving:
        thread.start()
    while any(thread.is_alive() for thread in leaving):
        for name in others:
            others[name].check(gather(healthy, others[name].bodies))
    for thread in leaving:
        thread.join()
    assert len(hows) >= 7
    healthy.wait_idle()
    # Both models are idle, and right, before and after their rows were used again.
    for name in others:
        others[name].check(gather(healthy, others[name].bodies))


def test_a_flood_is_refused_at_once_and_what_was_taken_is_right(make_server, check_healthy, others):
    with make_server(max_num_seqs=2, max_queue=4) as small:
        mine = others["tiny-ar"]
        blocker = send(small, LONG | {"stream": True})
        assert blocker.recv(1)
        count = Counter()
        for _ in range(3):
            bodies = [mine.bodies[number % 6] for number in range(60)]
            responses = gather(small, bodies)
            for number, response in enumerate(responses):
                count[response.status_code] += 1
                if response.status_code == 200:
                    assert tokens_of(response) == mine.tokens[number % 6]
                    continue
                assert response.status_code == 429
                assert 1 <= int(response.headers["Retry-After"]) <= 60
                assert response.json()["error"]["code"] == "queue_full"
        blocker.close()
        assert count[200] >= 3 * 4
        assert count[429] >= 60
        check_healthy(small)
        told = small.client.get("/metrics").text
        assert f'chordal:admission_rejections_total{{reason="queue_full"}} {count[429]}.0' in told


def test_a_body_that_comes_too_slowly_or_not_at_all_is_given_up(make_server, check_healthy):
    with make_server(body_timeout_s=0.4, max_body_bytes=2000) as small:
        link = connect(small)
        link.sendall(head(100) + b'{"prompt": ')
        answer = read_all(link)
        assert status_of(answer) == 408
        assert b'"code": "body_timeout"' in answer
        link = connect(small)
        link.sendall(head(100).replace(b"Content-Length: 100", b"Transfer-Encoding: chunked"))
        for _ in range(12):  # a byte now and then is not enough
            time.sleep(0.02)
            link.sendall(b"1\r\n \r\n")
        assert status_of(read_all(link)) == 408
        check_healthy(small)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"800\r\n" + b" " * 0x800 + b"\r\n0\r\n\r\n", 413),
        (b"80\r\n" + b" " * 0x80 + b"\r\n" + 20 * (b"80\r\n" + b" " * 0x80 + b"\r\n"), 413),
        (b"xyz\r\n{}\r\n", 400),
        (b"-1\r\n{}\r\n", 400),
        (b"FFFFFFFFFFFFFFFFFFFFF\r\n{}\r\n", 400),
        (b'a\r\n{"prompt": ', None),
        (b"3\r\n{}\r", None),
    ],
)
def test_chunks_that_are_too_many_or_cut_end_their_connection(
    make_server, check_healthy, chunked, sent, status
):
    link = connect(chunked)
    link.sendall(head(9).replace(b"Content-Length: 9", b"Transfer-Encoding: chunked") + sent)
    if status is None:  # cut in the middle
        link.close()
    else:
        assert status_of(read_all(link)) == status
    check_healthy(chunked)


@pytest.fixture(scope="module")
def chunked(make_server):
    with make_server(max_body_bytes=2000) as small:
        yield small


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x"])
def test_a_body_that_is_packed_is_refused_and_never_unpacked(healthy, encoding):
    bomb = gzip.compress(b'{"prompt": "' + b"a" * 50_000_000 + b'"}')
    assert len(bomb) < 100_000
    tracemalloc.start()
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    response = healthy.client.post("/v1/completions", content=bomb, headers=headers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert response.status_code == 415
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert peak < 5_000_000


def test_idle_connections_keep_nobody_out(healthy, others):
    idle = [connect(healthy) for _ in range(300)]
    for number, link in enumerate(idle):
        if number % 3 == 0:
            link.sendall(b"POST /v1/completions HT")
    try:
        others["tiny-ar"].check(gather(healthy, others["tiny-ar"].bodies))
    finally:
        for link in idle:
            link.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/99\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"GET /\x80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
        b"\r\n" * 1000,
        b"GET",
    ],
    ids=range(12),
)
def test_what_is_no_http_is_refused_or_cut(healthy, sent):
    answer = b""
    with connect(healthy) as link, contextlib.suppress(OSError):  # it was hung up in the middle
        link.sendall(sent)
        link.shutdown(socket.SHUT_WR)
        answer = read_all(link)
    assert not answer or 400 <= status_of(answer) < 500


def test_requests_sent_one_behind_the_other_are_answered_in_order(healthy):
    link = connect(healthy)
    for length in (1, 3, 2):
        raw = json.dumps({"prompt": PROMPT, "max_tokens": length, "temperature": 0}).encode()
        close = ["Connection: close"] if length == 2 else []
        link.sendall(head(len(raw), *close) + raw)
    bodies = read_all(link).split(b"HTTP/1.1 200 OK")
    used = [json.loads(body.split(b"\r\n\r\n", 1)[1])["usage"] for body in bodies[1:]]
    assert [one["completion_tokens"] for one in used] == [1, 3, 2]


def test_deadlines_in_the_queue_and_beyond_end_their_requests_alone(make_server, check_healthy, others):
    mine = others["tiny-ar"]
    with make_server(max_num_seqs=3) as small:
        late = {**LONG, "chordal": {"timeout": 0.05}}
        responses = gather(small, [*mine.bodies, *[late] * 6, {**late, "stream": True}])
        mine.check(responses[:6])
        for response in responses[6:-1]:
            assert tokens_of(response) is None
            assert response.status_code == 504
            assert response.json()["error"]["code"] == "timeout"
        # A stream that has begun ends with the error as an event.
        streamed = responses[-1]
        assert streamed.status_code in (200, 504)
        assert '"code":"timeout"' in streamed.text.replace('": "', '":"')
        assert "[DONE]" not in streamed.text
        check_healthy(small)


def living():
    """Count what belongs to requests."""
    gc.collect()
    kinds = (Job, Sequence, Ticket)
    return Counter(type(one).__name__ for one in gc.get_objects() if type(one) in kinds)


def test_memory_is_back_after_a_storm_and_stays_there(make_server, check_healthy, others):
    model = chordal.load("tiny-ar", prefix_cache_mib=0)
    mine = others["tiny-ar"]
    rng = random.Random(3)
    before = living()

    def some(count):
        for _turn in range(count // 18):
            for _ in range(4):
                leave(rng, running, ["tiny-ar"])
            for wrong in ({"prompt": [10**9]}, {"nope": 1}):
                assert running.post("/v1/completions", wrong).status_code == 400
            responses = gather(running, 2 * mine.bodies)
            mine.check(responses[:6])
            mine.check(responses[6:])
            running.wait_idle()

    with make_server({"tiny-ar": model}) as running:
        some(36)
        check_healthy(running)
        some(36)
        gc.collect()
        blocks = sys.getallocatedblocks()
        some(200)
        gc.collect()
        grown = sys.getallocatedblocks() - blocks
        assert grown < 2000
        end = time.monotonic() + 10
        while (left := living() - before) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left
