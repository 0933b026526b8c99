"""Tiny seeded models, a small tokenizer, sequences of bytes, a browser and a server, shared by all tests."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
import transformers

from chordal.models.family import Family
from chordal.models.language_model import LanguageModel
from chordal.sequence import Sequence, StopRules
from chordal.training.tokenizer import train_tokenizer

# Weights this large make a random model choose different tokens for different texts, and by a margin.
_SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "olmo2": (transformers.Olmo2Config, {"num_key_value_heads": 2}),
    "gpt_neox": (transformers.GPTNeoXConfig, {}),
    "gpt2": (transformers.GPT2Config, {}),
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """At these sizes several threads only wait for each other, on a busy machine for very long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def interrupts():
    """Tests send SIGINT, which a shell has its background jobs ignore, and their children with them."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory):
    """What a benchmark remembers goes to a folder of the tests, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHORDAL_STATE", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def make_backbone():
    """Give a new transformers model; the same arguments give the same weights.

    In float64, where no sum is so close that the shape of a batch decides it.
    """

    def make(architecture="llama", dtype=torch.float64, **settings):
        config_class, shape = _ARCHITECTURES[architecture]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                config_class(**(_SHAPE | shape | settings)), attn_implementation="sdpa"
            )
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def make_model(make_backbone):
    """Give a new `LanguageModel` with a cache of its own; the same arguments give the same weights."""

    def make(architecture="llama", family=None, *, tokenizer=None, max_rows=8, **settings):
        backbone = make_backbone(architecture, **settings)
        return LanguageModel(backbone, family or Family(), tokenizer, name="tiny", max_rows=max_rows)

    return make


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(directory, num_examples=150)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    return transformers.AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="session")
def checkpoint_dir(make_backbone, tokenizer, tmp_path_factory):
    """A folder in transformers' layout: a tiny causal model and its tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    eos = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    make_backbone("llama", torch.float32, **eos).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def make_sequence():
    """Give a sequence whose tokens are bytes of UTF-8; 0 has no text and 255 is the mask token."""

    def detokenize(tokens):
        return bytes(token for token in tokens.tolist() if token).decode(errors="replace")

    def make(prompt="ab", max_new_tokens=8, *, eos_ids=(0,), stop_strings=(), mask_id=255, **more):
        return Sequence(
            prompt=np.frombuffer(prompt.encode(), np.uint8).astype(np.int64),
            family=Family(kind="causal" if mask_id is None else "masked", mask_id=mask_id, eos_ids=eos_ids),
            stop=StopRules(max_new_tokens=max_new_tokens, eos_ids=eos_ids, stop_strings=stop_strings),
            detokenize=detokenize,
            **more,
        )

    return make


# Nothing but the page under test: no sandbox to set up as root, no calls home.
_BROWSER_FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync
""".split()


# Not for the whole session: while it is open, no other test could run an event loop of its own.
@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("needs Chromium, e.g. apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=_BROWSER_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page of 1280 x 800 to open `path.as_uri()` in; the test is marked `browser`.

    What the page logs as a warning or an error, throws, or asks the network for fails the test.
    """
    faults = []
    context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: faults.append(f"threw {error}"))
    page.on("console", lambda line: faults.append(line.text) if line.type in ("warning", "error") else None)
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(("file:", "data:", "blob:")) else faults.append(request.url)
        ),
    )
    yield page
    context.close()
    assert not faults


class FakeServer:
    """Speaks OpenAI's streaming API; what it does with a prompt is known beforehand.

    A prompt that is a JSON object says what to do: "chunks" of text, "usage" (prompt and output tokens,
    null for none), Chordal's "counts", and a "fault". Other prompts are lists to be copied or reversed, a
    word a chunk; their usage is their words, and one token more for the end of the answer.

    Attributes:
        requests: The bodies of the requests so far; `headers` are theirs.
        peak: Most requests at once.
        meet: So many requests must be there at once before the first is answered.
        api_key: What to ask for.
        on_request: Called with each body, on the server's thread.
    """

    def __init__(self):
        self.requests, self.headers = [], []
        self.running = self.peak = 0
        self.meet = 1
        self.api_key = None
        self.models = ["fake"]
        self.on_request = lambda body: None
        self._loop = asyncio.new_event_loop()
        self._tasks = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self):
        self._met = asyncio.Event()
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _stop(self):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            method, path, _ = head[0].split()
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            await self._answer(writer, path, headers, json.loads(body) if method == "POST" else None)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, writer, path, headers, body):
        if self.api_key and headers.get("authorization") != f"Bearer {self.api_key}":
            message = f"Incorrect API key provided: {headers.get('authorization')}"
            return self._json(writer, 401, {"error": {"message": message, "type": "authentication_error"}})
        if path not in ("/v1/models", "/v1/completions", "/v1/chat/completions"):
            return self._json(writer, 404, {"error": "no such path"})
        if body is None:
            return self._json(writer, 200, {"data": [{"id": name} for name in self.models]})
        if body["model"] not in self.models:
            return self._json(writer, 404, {"error": {"message": f"no model {body['model']}", "code": 404}})
        self.requests.append(body)
        self.headers.append(headers)
        self.on_request(body)
        self.running += 1
        self.peak = max(self.peak, self.running)
        if self.running >= self.meet:
            self._met.set()
        try:
            await self._met.wait()
            await self._stream(writer, path, body)
        finally:
            self.running -= 1

    async def _stream(self, writer, path, body):
        is_chat = path == "/v1/chat/completions"
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        script = json.loads(prompt) if prompt.startswith("{") else _copied(prompt)
        fault = script.get("fault")
        if fault == "hang":
            await asyncio.Event().wait()
        if isinstance(fault, int):
            return self._json(writer, fault, {"detail": "planted\x1b[2J\nfault"})
        if fault == "reset":
            return None
        if fault == "whole":
            return self._json(writer, 200, {"choices": [{"text": "all at once", "finish_reason": "stop"}]})
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
            b"Connection: close\r\n\r\n"
        )

        def send(data):
            encoded = data.encode() if isinstance(data, str) else data
            writer.write(b"%x\r\n%s\r\n" % (len(encoded), encoded))

        def event(value):
            # Not ASCII alone: some servers send U+2028 and its like as they are.
            send(f"data: {json.dumps(value, ensure_ascii=False)}\n\n")

        def choice(text, **more):
            said = {"delta": {"content": text}} if is_chat else {"text": text}
            return {"choices": [{"index": 0, "finish_reason": None, **said, **more}]}

        send(": ping\n\n")
        if is_chat:
            event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
        for chunk in script["chunks"]:
            event(choice(chunk))
            # Each is read alone.
            await writer.drain()
            await asyncio.sleep(0.001)
        if fault == "error":
            event({"error": {"message": "planted error", "type": "internal_server_error"}})
        elif fault == "junk":
            send("data: {not json}\n\n")
        if fault in ("cut", "error", "junk"):
            return None
        if fault != "unfinished":
            counts = {"chordal": {"counts": script["counts"]}} if script.get("counts") else {}
            event(choice("", finish_reason="stop", **counts))
            if script["usage"]:
                prompt_tokens, output_tokens = script["usage"]
                usage = {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens}
                event({"choices": [], "usage": usage})
            send("data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return None

    def _json(self, writer, status, value):
        body = json.dumps(value).encode()
        writer.write(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
            b"Connection: close\r\n\r\n%s" % (status, len(body), body)
        )


def _copied(prompt):
    request, _, line = prompt.partition(": ")
    words = line.split()
    if request == "reverse":
        words.reverse()
    return {"chunks": [f"{word} " for word in words], "usage": [len(prompt.split()), len(words) + 1]}


@pytest.fixture
def openai_server(monkeypatch):
    """A fake server of OpenAI's API on a port of its own."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("CHORDAL_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with FakeServer() as server:
        yield server


@pytest.fixture
def harness_tasks(tmp_path, monkeypatch):
    """Give lm-evaluation-harness two tasks over one local file: generate an answer, choose one of three."""

    def write_tasks(prompts):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        rows = [
            {"prompt": prompt, "answer": answer, "choices": [answer, "Zoe", "7"]}
            for prompt, answer in prompts.items()
        ]
        (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        both = {
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "lists.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
        }
        write = {
            "task": "lists_write",
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
        choose = {
            "task": "lists_choose",
            "output_type": "multiple_choice",
            "doc_to_target": 0,
            "doc_to_choice": "{{choices}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (tmp_path / "tasks").mkdir()
        for task in (write, choose):
            (tmp_path / "tasks" / f"{task['task']}.yaml").write_text(json.dumps({**both, **task}))
        return tmp_path / "tasks"

    return write_tasks
