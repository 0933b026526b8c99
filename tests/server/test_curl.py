"""The server as curl sees it: what is sent, byte by byte."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")

JSON = "Content-Type: application/json"
ASK = {"model": "tiny-ar", "messages": [{"role": "user", "content": "copy: Mia Leo"}], "temperature": 0}


@pytest.fixture
def curl(server):
    """Call a route of the server, or of another."""

    def call(path, *arguments, body=None, at=server):
        if body is not None:
            arguments += ("-H", JSON, "-d", body if isinstance(body, str) else json.dumps(body))
        command = ["curl", "-q", "-sS", "--noproxy", "*", "--max-time", "60", "-w", "\n%{http_code}"]
        done = subprocess.run([*command, *arguments, at.base_url + path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answer, _, status = done.stdout.rpartition("\n")
        return int(status), answer

    return call


def test_health_and_models(curl):
    assert curl("/health") == (200, '{"status": "ok"}')
    status, answer = curl("/v1/models")
    assert status == 200
    assert [model["id"] for model in json.loads(answer)["data"]] == ["tiny-ar", "tiny-mdm", "tiny-block"]


@pytest.mark.parametrize("model", ["tiny-ar", "tiny-mdm"])
def test_chat_and_completion(curl, model):
    status, answer = curl("/v1/chat/completions", body=ASK | {"model": model, "max_tokens": 16})
    assert status == 200
    assert json.loads(answer)["choices"][0]["message"]["content"] == "Mia Leo"
    status, answer = curl("/v1/completions", body={"model": model, "prompt": "copy:", "max_tokens": 8})
    assert status == 200
    assert json.loads(answer)["usage"]["completion_tokens"] <= 8


def test_stream_is_lines_of_data_with_a_blank_one_after_each(curl):
    status, sent = curl("/v1/chat/completions", "-N", body=ASK | {"stream": True})
    assert status == 200
    *events, end, rest = sent.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    chunks = []
    for event in events:
        assert event.startswith("data: {") and "\n" not in event and "\r" not in event
        chunks.append(json.loads(event.removeprefix("data: ")))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == "Mia Leo"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_headers_of_a_stream_keep_proxies_from_holding_it_back(curl):
    _, sent = curl("/v1/chat/completions", "-i", body=ASK | {"stream": True})
    head = sent.replace("\r\n", "\n").partition("\n\n")[0].lower()
    assert "content-type: text/event-stream; charset=utf-8" in head
    assert "cache-control: no-cache" in head
    assert "x-accel-buffering: no" in head
    assert "content-length" not in head


def test_metrics_count(curl):
    curl("/v1/chat/completions", body=ASK)
    status, text = curl("/metrics")
    assert status == 200
    assert 'model_name="tiny-ar"' in text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        (ASK | {"tools": [{}]}, "tools"),
        (ASK | {"temprature": 1}, "temprature"),
        ('{"messages": [', None),
    ],
)
def test_bad_request_is_an_error_in_json(curl, body, param):
    status, answer = curl("/v1/chat/completions", body=body)
    error = json.loads(answer)["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)


def test_form_is_not_taken_for_json(curl):
    """What curl sends if nobody names a type."""
    status, answer = curl("/v1/chat/completions", "-d", json.dumps(ASK))
    assert status in (400, 415)
    assert "application/json" in json.loads(answer)["error"]["message"]


def test_key_is_asked_for(curl, make_server):
    with make_server(api_keys=("right-key",)) as closed:
        status, answer = curl("/v1/models", at=closed)
        assert (status, json.loads(answer)["error"]["type"]) == (401, "authentication_error")
        assert curl("/v1/models", "-H", "Authorization: Bearer wrong", at=closed)[0] == 401
        assert curl("/v1/models", "-H", "Authorization: Bearer right-key", at=closed)[0] == 200
        assert curl("/", "-u", "anyone:right-key", at=closed)[0] == 200
        assert curl("/health", at=closed)[0] == 200


@pytest.mark.parametrize(("size", "status"), [(900_000, 400), (2_000_000, 413)])
def test_large_body_is_answered_whether_it_was_asked_for_or_not(curl, tmp_path, size, status):
    """Before one of these curl waits until the server says 100 Continue, or has already answered."""
    body = tmp_path / "body.json"
    body.write_text(json.dumps(ASK | {"messages": [{"role": "user", "content": "x" * size}]}))
    found, answer = curl(
        "/v1/chat/completions", "-H", JSON, "-H", "Expect: 100-continue", "--data-binary", f"@{body}"
    )
    assert found == status
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


def test_interrupted_stream_ends_its_work(server, slow):
    body = ASK | {"stream": True, "max_tokens": 900, "ignore_eos": True, "n": 4}
    command = ["curl", "-q", "-sSN", "--noproxy", "*", "-H", JSON, "-d", json.dumps(body)]
    with subprocess.Popen(
        [*command, f"{server.base_url}/v1/chat/completions"], stdout=subprocess.PIPE
    ) as running:
        assert running.stdout.readline().startswith(b"data: ")
        running.kill()
    server.wait_idle()
