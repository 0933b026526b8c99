from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from chordal.cli import main
from chordal.errors import ChordalError, InputError
from chordal.server import run
from chordal.server.settings import ServerSettings
from chordal.server.worker import EXIT_HUNG

# The command with passes of 20 ms, and a fault from when a file is there.
_COMMAND = """
import sys, time
from pathlib import Path
from chordal.cli import main
from chordal.models.language_model import LanguageModel

fault, trigger = sys.argv[1], Path(sys.argv[2])
real_run, real_free = LanguageModel.run, LanguageModel.free_row

def run(self, requests):
    time.sleep(0.02)
    while fault == "hang" and trigger.exists():
        time.sleep(0.1)
    return real_run(self, requests)

def free_row(self, row, *, clear=False):
    if fault == "die" and trigger.exists():
        raise MemoryError("no room")
    real_free(self, row, clear=clear)

LanguageModel.run, LanguageModel.free_row = run, free_row
if fault == "load":
    import chordal.generation
    chordal.generation.load = lambda *_, **__: time.sleep(600)
sys.exit(main(sys.argv[3:]))
"""


class Serving:
    """The command in a process of its own."""

    def __init__(self, tmp_path, *args, fault=""):
        self.trigger = tmp_path / "fault"
        command = [sys.executable, "-c", _COMMAND, fault, str(self.trigger), "serve", "--port", "0", *args]
        environment = {key: value for key, value in os.environ.items() if key != "CHORDAL_API_KEY"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.err = []
        self._reader = threading.Thread(target=lambda: self.err.extend(self._lines()))
        first = self.process.stderr.readline()
        self.err.append(first)
        self.port = int(re.search(r"http://localhost:(\d+)", first)[1])
        self._reader.start()

    def _lines(self):
        yield from self.process.stderr

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def wait_ready(self):
        line = self.process.stdout.readline()
        assert line == f"chordal: tiny-ar on http://localhost:{self.port} (playground at /)\n", self.err

    def connect(self):
        return contextlib.closing(http.client.HTTPConnection("localhost", self.port, timeout=60))

    def health(self):
        with self.connect() as connection:
            connection.request("GET", "/health")
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())["status"]

    def wait_health(self, status):
        for _ in range(600):
            with contextlib.suppress(ConnectionError):
                if self.health() == status:
                    return
            time.sleep(0.05)
        raise AssertionError(f"health never was {status}")

    def ask(self, connection, **fields):
        body = {"prompt": "reverse: Ana Ben", "ignore_eos": True, "temperature": 0, **fields}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self):
        code = self.process.wait(60)
        self._reader.join()
        return code

    @property
    def log(self):
        return "".join(self.err)


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Run the command line inside the test."""
    monkeypatch.delenv("CHORDAL_API_KEY", raising=False)

    def run_main(*args):
        capsys.readouterr()
        return Result(main([str(arg) for arg in args]), *capsys.readouterr())

    return run_main


def test_a_signal_ends_the_server_when_running_requests_are_done(tmp_path):
    with Serving(tmp_path) as server, server.connect() as idle, server.connect() as busy:
        server.wait_ready()
        idle.request("GET", "/health")
        assert idle.getresponse().read()
        reply = server.ask(busy, max_tokens=100, stream=True)
        assert reply.readline().startswith(b"data: ")
        server.signal(signal.SIGTERM)
        server.wait_health((503, "draining"))
        with server.connect() as late:
            refused = server.ask(late, max_tokens=1)
            assert refused.status == 503
            assert refused.getheader("Retry-After")
            refused.read()
        assert reply.read().rstrip().endswith(b"data: [DONE]")
        assert server.wait() == 0
        assert "Traceback" not in server.log


def test_what_is_not_done_in_time_is_cut_off_and_nobody_holds_up_the_end(tmp_path):
    with Serving(tmp_path, "--shutdown-timeout", "0.2") as server, server.connect() as busy:
        server.wait_ready()
        address = ("localhost", server.port)
        with socket.create_connection(address) as half, socket.create_connection(address) as deaf:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            body = b'{"prompt": "a", "stream": true, "max_tokens": 200, "ignore_eos": true}'
            deaf.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            reply = server.ask(busy, max_tokens=200, stream=True)
            assert reply.readline().startswith(b"data: ")
            server.signal(signal.SIGTERM)
            text = reply.read()
            assert b'"error"' in text
            assert b"[DONE]" not in text
            assert server.wait() == 0
        assert "Traceback" not in server.log


@pytest.mark.slow
def test_a_second_signal_ends_the_server_at_once(tmp_path):
    with Serving(tmp_path) as server, server.connect() as busy:
        server.wait_ready()
        assert server.ask(busy, max_tokens=200, stream=True).readline()
        server.signal(signal.SIGINT)
        server.wait_health((503, "draining"))
        server.signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert "Traceback" not in server.log


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_while_models_load_ends_the_server_at_once(tmp_path, number, code):
    with Serving(tmp_path, fault="load") as server:
        server.wait_health((503, "loading"))
        server.signal(number)
        assert server.wait() == code
        assert "Traceback" not in server.log


def test_a_dead_engine_answers_whoever_waits_and_ends_the_server_with_1(tmp_path):
    with Serving(tmp_path, "--max-num-seqs", "1", fault="die") as server, server.connect() as first:
        server.wait_ready()
        with server.connect() as second:
            server.trigger.touch()
            body = json.dumps({"prompt": "a", "max_tokens": 100, "ignore_eos": True})
            second.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            reply = server.ask(first, max_tokens=3)
            statuses = [reply.status, second.getresponse().status]
            assert sorted(statuses)[-1] == 503
        assert server.wait() == 1
        assert server.err[-1] == "Error: the engine died: MemoryError: no room\n"


@pytest.mark.slow
def test_a_hanging_pass_ends_the_server_with_the_stacks_of_all_threads(tmp_path):
    with Serving(tmp_path, "--watchdog", "0.5", fault="hang") as server, server.connect() as busy:
        server.wait_ready()
        server.trigger.touch()
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            server.ask(busy, max_tokens=5)
        assert server.wait() == EXIT_HUNG
        assert "a forward pass hangs" in server.log
        assert "_run_model" in server.log


def test_models_that_cannot_be_loaded_end_the_server_with_one_line(run_main, tmp_path):
    (tmp_path / "model").mkdir()
    result = run_main("serve", tmp_path / "model", "--port", "0")
    assert result.code == 2
    lines = result.err.splitlines()
    assert lines[0].startswith("chordal: loading model, on http://localhost:")
    assert lines[1].startswith("Error: ")
    assert lines[2:] == ["Try: chordal serve --help"]
    assert result.out == ""


def test_a_port_in_use_is_one_line_before_anything_is_loaded(run_main, monkeypatch):
    monkeypatch.setattr("chordal.generation.load", lambda *_, **__: pytest.fail("loaded"))
    [taken] = run.bind(ServerSettings(host="127.0.0.1", port=0))
    with taken:
        port = taken.getsockname()[1]
        result = run_main("serve", "--host", "127.0.0.1", "--port", port)
    assert result.code == 1
    assert result.err == (
        f"Error: cannot listen at port {port} of 127.0.0.1: Address already in use. "
        "Use another --port; 0 takes a free one.\n"
    )


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 300, "::g"])
def test_a_host_that_is_not_here_is_an_error_of_one_line(host):
    with pytest.raises(ChordalError) as error:
        run.bind(ServerSettings(host=host, port=0, allow_no_key=True))
    assert "\n" not in str(error.value)
    assert not isinstance(error.value, InputError)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_let_in_with_a_key_or_a_flag_only(host):
    with pytest.raises(InputError, match="CHORDAL_API_KEY"):
        run.bind(ServerSettings(host=host, port=0))
    if host == "::" and not socket.has_dualstack_ipv6():
        return
    for settings in (
        ServerSettings(host=host, port=0, api_keys=("secret",)),
        ServerSettings(host=host, port=0, allow_no_key=True),
    ):
        for one in run.bind(settings):
            one.close()


def test_localhost_is_bound_on_this_machine_only_at_one_port():
    bound = run.bind(ServerSettings(host="localhost", port=0))
    names = [one.getsockname() for one in bound]
    for one in bound:
        one.close()
    assert {name[0] for name in names} <= {"127.0.0.1", "::1"}
    assert len({name[1] for name in names}) == 1


def test_letting_everybody_in_warns(run_main, monkeypatch):
    monkeypatch.setattr("chordal.generation.load", lambda *_, **__: (_ for _ in ()).throw(InputError("stop")))
    result = run_main("serve", "--host", "0.0.0.0", "--port", "0", "--allow-no-key")
    assert "WARNING: no API key" in result.err
    assert "WARNING" not in run_main("serve", "--port", "0", "--allow-no-key").err


def test_a_log_that_cannot_be_written_is_one_line_and_exit_1(run_main, tmp_path):
    result = run_main("serve", "--port", "0", "--log-file", tmp_path / "none" / "log")
    assert result.code == 1
    assert result.err.startswith("Error: cannot write --log-file ")
    assert len(result.err.splitlines()) == 1


def test_the_log_goes_to_stderr_and_the_file_and_leaves_no_trace(capsys, tmp_path):
    settings = ServerSettings(log_file=str(tmp_path / "log"))
    logger = logging.getLogger("chordal.server")
    before = list(logger.handlers), logger.level, logger.propagate
    with contextlib.ExitStack() as stack:
        for handler in run._log_handlers(settings):
            stack.callback(handler.close)
            stack.enter_context(run._logging_to(handler))
        logger.info("one line")
        logging.getLogger("uvicorn.error").info("not this")
    assert (list(logger.handlers), logger.level, logger.propagate) == before
    for text in (capsys.readouterr().err, (tmp_path / "log").read_text()):
        assert text.endswith("INFO one line\n")
        assert "not this" not in text


def test_what_is_not_installed_is_one_line_that_says_how(monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "prometheus_client" else object())
    with pytest.raises(InputError, match=r"prometheus-client.*pip install 'chordal\[serve\]'"):
        run.check_installed()


def test_settings_never_show_a_key():
    assert "secret" not in repr(ServerSettings(api_keys=("secret",)))


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: loc"])
def test_a_connection_without_a_request_is_hung_up(monkeypatch, sent):
    monkeypatch.setattr(run, "_HEAD_TIMEOUT_S", 0.1)
    monkeypatch.setattr(run, "_KEEP_ALIVE_S", 0.2)
    [bound] = run.bind(ServerSettings(host="127.0.0.1", port=0))
    port = bound.getsockname()[1]

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    server = run._make_server(app)
    thread = threading.Thread(target=lambda: server.run(sockets=[bound]))
    thread.start()
    try:
        for first in (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                if first:
                    connection.sendall(first)
                    connection.recv(1)
                connection.sendall(sent)
                while connection.recv(1000):
                    pass
    finally:
        server.should_exit = True
        thread.join()
