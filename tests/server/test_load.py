"""Many clients at once against the real command: nobody is lost, stuck or answered wrongly."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

import chordal

pytest.importorskip("uvicorn", reason="needs the extra serve")
aiohttp = pytest.importorskip("aiohttp", reason="plays the clients")

PROMPTS = [
    "reverse: Ana Ben Cleo Dan",
    "sort: dog cat ant bee",
    "copy: red green blue",
    "reverse: one two three four five six",
    "add: 12 7",
    "Once upon a time",
]
# Those that leave have decoders of their own, so that the counters of the others must agree to the token.
STAYING = {
    "tiny-ar": ["autoregressive", "prompt_lookup", "draft_model"],
    "tiny-mdm": ["low_confidence", "threshold"],
}
LEAVING = {"tiny-ar": ["copyspec", "token_recycling"], "tiny-mdm": ["localleap"]}


@dataclass
class Case:
    """A request, and what each of its answers must be."""

    path: str
    body: dict
    texts: list[str]
    tokens: list[list[int]]
    finish: list[str]


def make_cases(rng, decoders):
    """Make requests of several kinds, with their answers as the library gives them."""
    cases = []
    for name, choices in decoders.items():
        model = chordal.load(name, draft="tiny-draft" if name == "tiny-ar" else None)
        for number, decoder in enumerate(choices * 4):
            prompt = PROMPTS[(number * 5 + len(choices)) % len(PROMPTS)]
            is_chat, is_sampled, num = number % 2 == 0, number % 3 > 0, 1 + number % 2
            length = rng.choice([6, 16, 40]) if name == "tiny-ar" else rng.choice([8, 16])
            law = {"temperature": 1.2, "top_p": 0.95} if is_sampled else {"temperature": 0.0}
            seed = rng.randrange(1000)
            stop = [" Ben"] if number % 4 == 2 else []
            given = [{"role": "user", "content": prompt}] if is_chat else prompt
            tokens = model.encode(given, chat=is_chat).tolist()
            texts, answers, finish = [], [], []
            for at in range(num):
                [result] = model.generate(
                    [tokens],
                    decoder=decoder,
                    max_new_tokens=length,
                    ignore_eos=not is_chat,
                    seed=seed + at,
                    stop_strings=stop if is_chat else (),
                    **law,
                )
                assert result.error is None
                before = "" if is_chat else model.decode(tokens[-1:])
                text = result.text if is_chat else model.decode(tokens[-1:] + result.tokens)[len(before) :]
                texts.append(text)
                answers.append(result.tokens)
                finish.append(result.finish_reason)
            body = {
                "model": name,
                "max_tokens": length,
                "n": num,
                "seed": seed,
                "return_token_ids": True,
                **law,
            }
            body["chordal"] = {"decoder": decoder, "counts": True}
            if is_chat:
                body |= {"messages": given, "stop": stop}
            else:
                body |= {"prompt": prompt, "ignore_eos": True}
            path = "/v1/chat/completions" if is_chat else "/v1/completions"
            cases.append(Case(path, body, texts, answers, finish))
    return cases


class Serving:
    """The command in a process of its own, and how much memory it has."""

    def __init__(self, *args):
        command = [
            sys.executable,
            "-m",
            "chordal",
            "serve",
            *STAYING,
            "--draft",
            "tiny-draft",
            "--port",
            "0",
            *args,
        ]
        environment = {key: value for key, value in os.environ.items() if key != "CHORDAL_API_KEY"}
        # oneDNN keeps a kernel for each of the last 1024 shapes: hundreds of MiB that would hide a leak.
        environment |= {"OMP_NUM_THREADS": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.err = [self.process.stderr.readline()]
        self.url = re.search(r"http://localhost:\d+", self.err[0])[0].replace("localhost", "127.0.0.1")
        self._reader = threading.Thread(target=lambda: self.err.extend(self.process.stderr), daemon=True)
        self._reader.start()
        assert self.process.stdout.readline(), "".join(self.err)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def wait(self):
        code = self.process.wait(60)
        self._reader.join()
        return code

    def rss_mib(self):
        told = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", told)[1]) / 1024

    def metrics(self):
        """Read all counters: name and labels to value."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"}


@dataclass
class Seen:
    """What all clients saw together."""

    finished: Counter = field(default_factory=Counter)  # answers by model and decoder
    tokens: Counter = field(default_factory=Counter)
    drafted: Counter = field(default_factory=Counter)
    accepted: Counter = field(default_factory=Counter)
    requests: int = 0
    left: int = 0  # requests
    left_choices: int = 0
    full: int = 0
    wrong: list = field(default_factory=list)
    rss: list = field(default_factory=list)


def check(seen, case, choices, usage):
    """Compare an answer with what it must be, and count it."""
    name, decoder = case.body["model"], case.body["chordal"]["decoder"]
    for index, (text, tokens, finish) in enumerate(zip(case.texts, case.tokens, case.finish, strict=True)):
        got = choices[index]
        if (got["text"], got["tokens"], got["finish"]) != (text, tokens, finish):
            seen.wrong.append((case.body, got, text, tokens, finish))
        counts = got["counts"]
        seen.finished[name, decoder] += 1
        seen.tokens[name, decoder] += counts["committed_tokens"]
        seen.drafted[name, decoder] += counts["draft_tokens"]
        seen.accepted[name, decoder] += counts["accepted_tokens"]
    if usage["completion_tokens"] != sum(map(len, case.tokens)):
        seen.wrong.append((case.body, usage))
    seen.requests += 1


async def read_stream(response):
    """Put the chunks of a stream together by choice."""
    choices, usage, ended = {}, None, False
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        assert not ended
        if line.strip() == b"data: [DONE]":
            ended = True
            continue
        chunk = json.loads(line[6:])
        assert "error" not in chunk, chunk
        usage = chunk["usage"] or usage
        for one in chunk["choices"]:
            got = choices.setdefault(one["index"], {"text": "", "tokens": [], "finish": None, "counts": None})
            assert got["finish"] is None
            got["text"] += one.get("text") or one.get("delta", {}).get("content") or ""
            got["tokens"] += one.get("token_ids", [])
            got["finish"] = one["finish_reason"]
            got["counts"] = one.get("chordal", {}).get("counts")
    assert ended
    return choices, usage


def read_whole(document):
    choices = {}
    for one in document["choices"]:
        text = one["text"] if "text" in one else one["message"]["content"]
        choices[one["index"]] = {
            "text": text,
            "tokens": one["token_ids"],
            "finish": one["finish_reason"],
            "counts": one["chordal"]["counts"],
        }
    return choices, document["usage"]


async def ask(session, seen, rng, case):
    """Ask until there is room, and check the answer."""
    is_stream = rng.random() < 0.5
    body = case.body | ({"stream": True, "stream_options": {"include_usage": True}} if is_stream else {})
    while True:
        async with session.post(case.path, json=body) as response:
            if response.status == 429:
                assert int(response.headers["Retry-After"]) >= 1
                assert (await response.json())["error"]["code"] == "queue_full"
                seen.full += 1
            else:
                assert response.status == 200, await response.text()
                check(
                    seen,
                    case,
                    *(await read_stream(response) if is_stream else read_whole(await response.json())),
                )
                return
        await asyncio.sleep(rng.uniform(0.05, 0.5))


async def client(session, seen, rng, until, staying, leaving):
    """One user: asks again and again, and a third of the time goes away at some moment."""
    while time.monotonic() < until:
        leaves = rng.random() < 1 / 3
        asking = ask(session, seen, rng, rng.choice(leaving if leaves else staying))
        if not leaves:
            await asyncio.wait_for(asking, 240)
            continue
        task = asyncio.ensure_future(asking)
        done, _ = await asyncio.wait({task}, timeout=rng.expovariate(1 / rng.choice([0.02, 0.2, 1.0])))
        if done:
            task.result()
            continue
        task.cancel()
        await asyncio.wait({task})
        seen.left += 1


async def storm(server, seen, cases, num_clients, seconds):
    async def watch():
        while True:
            seen.rss.append(server.rss_mib())
            await asyncio.sleep(seconds / 60)

    timeout = aiohttp.ClientTimeout(total=200)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, timeout=timeout, connector=connector) as session:
        until = time.monotonic() + seconds
        clients = [
            client(session, seen, random.Random(number), until, *cases) for number in range(num_clients)
        ]
        watching = asyncio.ensure_future(watch())
        await asyncio.gather(*clients)
        watching.cancel()


async def end_busy(server, cases):
    """Send a few requests and a signal behind them: all are answered."""
    seen = Seen()
    async with aiohttp.ClientSession(server.url) as session:
        asking = [
            asyncio.ensure_future(ask(session, seen, random.Random(number), case))
            for number, case in enumerate(cases)
        ]
        end = time.monotonic() + 30
        while time.monotonic() < end:
            async with session.get("/metrics") as response:
                told = await response.text()
            if sum(map(float, re.findall(r"chordal:requests_admitted_total\S+ (\S+)", told))) > 0:
                break
        server.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*asking, return_exceptions=True)
    return seen


@pytest.mark.parametrize(
    ("num_clients", "seconds"),
    [(40, 10), pytest.param(200, 180, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_many_clients_a_third_of_which_leave_lose_nothing_and_the_counters_add_up(num_clients, seconds):
    rng = random.Random(1)
    cases = make_cases(rng, STAYING), make_cases(rng, LEAVING)
    seen = Seen()
    limits = ["--max-num-seqs", "16", "--max-queue", "16", "--prefix-cache-mib", "16"]
    with Serving(*limits) as server:
        asyncio.run(storm(server, seen, cases, num_clients, seconds))
        end = time.monotonic() + 20
        while True:
            told = server.metrics()
            busy = [
                value for name, value in told.items() if "num_requests_running{" in name or "waiting{" in name
            ]
            if not any(busy):
                break
            assert time.monotonic() < end, "something still runs"
            time.sleep(0.1)
        first, middle, last = seen.rss[0], seen.rss[len(seen.rss) // 2], seen.rss[-1]
        print(
            f"\n{seen.requests} answered, {seen.left} left, {seen.full} times full, {len(seen.wrong)} wrong, "
            f"{sum(seen.tokens.values())} tokens, RSS {first:.0f}, {middle:.0f}, {last:.0f} MiB"
        )
        assert seen.wrong == []
        assert len(busy) == 4
        assert seen.requests > num_clients
        assert seen.left > num_clients / 3
        assert seen.full > 0

        def total(name, **labels):
            return sum(
                value
                for key, value in told.items()
                if key.startswith(f"chordal:{name}_total{{")
                and all(f'{label}="{wanted}"' in key for label, wanted in labels.items())
            )

        for model, decoders in STAYING.items():
            for decoder in decoders:
                for name, counted in (
                    ("requests_finished", seen.finished),
                    ("committed_tokens", seen.tokens),
                    ("draft_tokens", seen.drafted),
                    ("accepted_tokens", seen.accepted),
                ):
                    assert total(name, model_name=model, decoder=decoder) == counted[model, decoder], (
                        name,
                        decoder,
                    )
        ends = {
            reason: total("request_success", finished_reason=reason)
            for reason in ("stop", "length", "cancelled", "timeout", "error")
        }
        assert ends["timeout"] == ends["error"] == 0
        answered = sum(seen.finished.values())
        # Who left may have left behind the answer, before the request was read, or two answers.
        assert answered <= ends["stop"] + ends["length"] <= answered + 2 * seen.left
        assert 0 < ends["cancelled"] <= 2 * seen.left
        assert total("requests_admitted") == total("requests_finished") == sum(ends.values())
        assert total("generation_tokens") == total("committed_tokens") >= sum(seen.tokens.values())
        assert seen.full <= total("admission_rejections", reason="queue_full") <= seen.full + seen.left
        assert total("admission_rejections", reason="unavailable") == 0
        second_half = seen.rss[len(seen.rss) // 2 :]
        assert (
            max(second_half[len(second_half) // 2 :]) < 1.03 * max(second_half[: len(second_half) // 2]) + 16
        )

        last = asyncio.run(end_busy(server, cases[0][:12]))
        assert last.wrong == []
        assert server.wait() == 0
        assert "Traceback" not in "".join(server.err)
