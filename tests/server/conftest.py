"""A server on a free port, as users run it, shared by the tests of a module."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest
import uvicorn

import chordal
from chordal.decoders.autoregressive import Autoregressive
from chordal.server.app import create_app
from chordal.server.metrics import Metrics
from chordal.server.security import secure
from chordal.server.settings import ServerSettings
from chordal.server.worker import Worker


@dataclass
class Server:
    """A running server: where it is, what it runs, and a client of it."""

    base_url: str
    port: int
    worker: Worker
    settings: ServerSettings
    client: httpx.Client

    def post(self, path, body, **more):
        """Send a JSON body, and give the response."""
        return self.client.post(path, json=body, **more)

    def chat(self, text="reverse: Ana Ben Cleo Dan", **fields):
        """Ask greedily for a short answer, and give the document."""
        body = {"model": "tiny-ar", "max_tokens": 8, "temperature": 0} | fields
        body.setdefault("messages", [{"role": "user", "content": text}])
        response = self.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return response.json()

    def complete(self, prompt="reverse: Ana Ben Cleo Dan", **fields):
        """Ask greedily for a short continuation, and give the document."""
        body = {"model": "tiny-ar", "prompt": prompt, "max_tokens": 8, "temperature": 0} | fields
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        return response.json()

    def wait_idle(self):
        """Wait until nothing runs; fail if something still does."""
        end = time.monotonic() + 20
        while self.worker.num_unfinished:
            assert time.monotonic() < end, "something still runs"
            time.sleep(0.01)


@contextmanager
def serve(load, settings=None):
    """Run a server until the block is left.

    Args:
        load: Gives the models by name.
        settings: Of the server.
    """
    settings = settings or ServerSettings()
    metrics = Metrics(settings.served_names or ("tiny-ar",))

    def load_all():
        loaded = load()
        metrics.attach(loaded)
        return loaded

    worker = Worker(
        load_all,
        max_queue=settings.max_queue,
        max_running=settings.max_num_seqs,
        watchdog_s=settings.watchdog_s,
        observer=metrics,
    )
    app = secure(
        create_app(worker, settings, metrics),
        keys=settings.api_keys,
        host=settings.host,
        max_body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
        cors=settings.cors_origins,
        log_prompts=settings.log_prompts,
    )
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    worker.start()
    thread.start()
    base_url = f"http://127.0.0.1:{port}"
    headers = {"Authorization": f"Bearer {settings.api_keys[0]}"} if settings.api_keys else {}
    with httpx.Client(base_url=base_url, headers=headers, timeout=60) as client:
        yield Server(base_url, port, worker, settings, client)
    server.should_exit = True
    thread.join(20)
    worker.stop(5)
    listener.close()
    assert not thread.is_alive()


def wait_ready(server, seconds=60):
    """Wait until the models are loaded."""
    end = time.monotonic() + seconds
    while server.worker.state == "loading" and time.monotonic() < end:
        time.sleep(0.02)
    assert server.worker.state == "ready", server.worker.error


@pytest.fixture(scope="session")
def models():
    """The bundled models by name; tiny-ar has its draft beside it."""
    return {
        "tiny-ar": chordal.load("tiny-ar", draft="tiny-draft"),
        "tiny-mdm": chordal.load("tiny-mdm"),
        "tiny-block": chordal.load("tiny-block"),
    }


# Asked of a server after a test, and of models of our own for what they must give.
_PROBES = (
    ("tiny-ar", "prompt_lookup", {"temperature": 1.5, "seed": 11}),
    ("tiny-mdm", "threshold", {"temperature": 0.0}),
)


@pytest.fixture(scope="session")
def check_healthy():
    """Check that a server answers as ever, runs nothing and holds no cache row."""
    expected = []
    for name, decoder, law in _PROBES:
        model = chordal.load(name)
        prompt = model.tokenizer("reverse: Ana Ben Cleo Dan")["input_ids"]
        [result] = model.generate([prompt], decoder=decoder, max_new_tokens=4, **law)
        assert result.error is None
        body = {"model": name, "prompt": prompt, "max_tokens": 4, "return_token_ids": True}
        expected.append((body | law | {"chordal": {"decoder": decoder}}, result.tokens))

    def check(server):
        server.wait_idle()
        for body, tokens in expected:
            if body["model"] in server.worker.models:
                response = server.post("/v1/completions", body)
                assert response.status_code == 200, response.text
                assert response.json()["choices"][0]["token_ids"] == tokens
        server.wait_idle()
        assert not any(
            model.engine.has_work or model.engine.num_live for model in server.worker.models.values()
        )
        assert server.client.get("/health").json() == {"status": "ok"}

    return check


@pytest.fixture
def healthy(server, check_healthy):
    """The shared server, which must be well after the test."""
    yield server
    check_healthy(server)


@pytest.fixture(scope="module")
def server(models):
    """A server of the bundled models, without a key."""
    with serve(lambda: models, ServerSettings(served_names=tuple(models))) as running:
        wait_ready(running)
        yield running


@pytest.fixture(scope="session")
def make_server():
    """Run a server of other bundled models, or loaded ones by name, until the block is left.

    Not of those of `models`, which the threads of two servers would then run at once.
    """

    @contextmanager
    def make(given=("tiny-ar",), **settings):
        loaded = given if isinstance(given, dict) else {name: chordal.load(name) for name in given}
        with serve(lambda: loaded, ServerSettings(served_names=tuple(loaded), **settings)) as running:
            wait_ready(running)
            yield running

    return make


@pytest.fixture
def slow(monkeypatch):
    """Make plain decoding so slow that what is not ended runs for minutes."""
    plain = Autoregressive.decode

    def decode(self, seq):
        steps, reading = plain(self, seq), None
        while True:
            time.sleep(0.05)
            try:
                reading = yield steps.send(reading)
            except StopIteration:
                return

    monkeypatch.setattr(Autoregressive, "decode", decode)
