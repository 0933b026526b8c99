from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import socket
import threading
import time

import pytest
import uvicorn

from chordal.errors import InputError
from chordal.server.security import KEY_VARIABLE, Keys, escape, is_local, read_keys, secure

JSON = [("content-type", "application/json")]
HOST = ("host", "localhost:8000")
PAUSE, LEAVE = object(), object()


class Answer:
    """What an application sent."""

    def __init__(self, messages):
        self.messages = messages
        start = [message for message in messages if message["type"] == "http.response.start"]
        assert len(start) <= 1
        self.status = start[0]["status"] if start else None
        self.header_list = start[0]["headers"] if start else []
        self.headers = {name.decode(): value.decode("latin-1") for name, value in self.header_list}
        self.body = b"".join(message.get("body", b"") for message in messages)

    @property
    def error(self):
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and error["type"]
        return error


def call(app, path="/v1/models", method="GET", headers=(HOST,), body=b"", chunks=None, scope=()):
    """Send one request; headers are text or bytes, a body comes whole or in chunks."""
    raw = [tuple(part.encode() if isinstance(part, str) else part for part in pair) for pair in headers]
    parts = [body] if chunks is None else list(chunks)
    num_received = 0

    async def receive():
        nonlocal num_received
        num_received += 1
        if num_received > len(parts):
            return {"type": "http.disconnect"}
        part = parts[num_received - 1]
        if part is PAUSE:
            await asyncio.Event().wait()
        if part is LEAVE:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": num_received < len(parts)}

    messages = []

    async def send(message):
        messages.append(message)

    given = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": raw,
        **dict(scope),
    }
    asyncio.run(app(given, receive, send))
    answer = Answer(messages)
    answer.num_received = num_received
    return answer


async def echo(scope, receive, send):
    """Answer with what the application sees."""
    if scope["type"] != "http":
        await send({"type": "seen"})
        return
    message = await receive()
    assert not message["more_body"]
    state = {key: value for key, value in scope["state"].items() if isinstance(value, str)}
    seen = {"state": state, "path": scope["path"], "body": message["body"].decode("latin-1")}
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": json.dumps(seen).encode()})


def secured(app=echo, *, keys=(), host="localhost", max_body_bytes=1000, body_timeout_s=5.0, **more):
    return secure(
        app, keys=keys, host=host, max_body_bytes=max_body_bytes, body_timeout_s=body_timeout_s, **more
    )


def bearer(key):
    return [HOST, ("authorization", b"Bearer " + (key.encode() if isinstance(key, str) else key))]


def basic(text):
    return [HOST, ("authorization", b"Basic " + base64.b64encode(text.encode()))]


def seen(answer):
    assert answer.status == 200, answer.body
    return json.loads(answer.body)


PATHS = [
    "/",
    "/v1/models",
    "/v1/completions",
    "/metrics",
    "/unknown",
    "/health/",
    "//health",
    "/Health",
    "/docs",
]


class TestKeys:
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "TRACE", "BREW"])
    def test_every_path_but_health_asks_for_a_key(self, path, method):
        answer = call(secured(keys=["Secret"]), path, method)
        assert answer.status == 401
        assert answer.error["type"] == "authentication_error"
        assert answer.error["code"] == "invalid_api_key"
        assert answer.error["param"] is None
        scheme = 'Basic realm="chordal"' if path == "/" else "Bearer"
        assert answer.headers["www-authenticate"] == scheme

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_health_is_open(self, method):
        assert call(secured(keys=["Secret"]), "/health", method).status == 200

    @pytest.mark.parametrize(
        "headers",
        [
            [],
            bearer(""),
            bearer("wrong"),
            bearer("secret"),
            bearer("SECRET"),
            bearer("Secret2"),
            bearer("Secre"),
            bearer("Secret Secret"),
            bearer(b"Secret\xff"),
            bearer("Sécret"),
            bearer(b"\xff\xfe\x00"),
            [("authorization", "Secret")],
            [("authorization", "Bearer")],
            [("authorization", "")],
            [("authorization", "Token Secret")],
            [("authorization", b"B\xe9arer Secret")],
            [("authorization", "Basic Secret")],
            [("authorization", "Basic !!!")],
            [("authorization", b"Basic \xff\xff")],
            [("authorization", b"Basic !" + base64.b64encode(b":Secret"))],
            basic("Secret"),
            basic("Secret:"),
            basic(":wrong"),
            basic("Secret:wrong"),
            [*bearer("Secret"), ("authorization", "Bearer Secret")],
            [*bearer("wrong"), ("authorization", "Bearer Secret")],
            [("api-key", "Secret")],
            [("x-api-key", "Secret")],
        ],
    )
    def test_anything_but_one_right_key_is_refused(self, headers):
        answer = call(secured(keys=["Secret"]), headers=headers)
        assert answer.status == 401
        assert "secret" not in answer.body.decode().lower()

    @pytest.mark.parametrize(
        "headers",
        [
            bearer("Secret"),
            [("authorization", "bearer Secret")],
            [("Authorization", "BEARER  Secret ")],
            basic("anyone:Secret"),
            basic(":Secret"),
        ],
    )
    def test_the_right_key_opens(self, headers):
        assert seen(call(secured(keys=["Secret"]), headers=headers))["state"]["tenant"] == "key-1"

    def test_a_password_may_hold_colons(self):
        assert call(secured(keys=["a:b:c"]), headers=basic("me:a:b:c")).status == 200

    def test_a_key_in_the_query_is_none(self):
        scope = {"query_string": b"key=Secret&api_key=Secret"}
        assert call(secured(keys=["Secret"]), scope=scope).status == 401

    def test_each_key_is_a_tenant_of_its_own_that_does_not_tell_the_key(self):
        app = secured(keys=["first", "second"])
        tenants = [seen(call(app, headers=bearer(key)))["state"]["tenant"] for key in ("first", "second")]
        assert tenants == ["key-1", "key-2"]

    def test_without_keys_there_is_no_tenant(self):
        assert "tenant" not in seen(call(secured()))["state"]

    def test_a_client_cannot_name_its_tenant(self):
        headers = [*bearer("first"), ("tenant", "key-2"), ("x-tenant", "key-2")]
        assert seen(call(secured(keys=["first", "second"]), headers=headers))["state"]["tenant"] == "key-1"

    def test_every_key_is_compared_whichever_is_right(self, monkeypatch):
        compared = []
        real = __import__("hmac").compare_digest
        monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(a) or real(a, b))
        keys = Keys(["one", "two", "three"])
        for given in (b"one", b"three", b"none"):
            compared.clear()
            keys.tenant(given)
            assert len(compared) == 3

    def test_a_refused_body_is_not_read(self):
        answer = call(
            secured(keys=["Secret"]), method="POST", headers=[("content-length", "5")], body=b"12345"
        )
        assert (answer.status, answer.num_received) == (401, 0)
        assert answer.headers["connection"] == "close"

    def test_a_refusal_keeps_the_connection_if_there_is_no_body(self):
        for headers in ([], [("content-length", "0")]):
            assert "connection" not in call(secured(keys=["Secret"]), headers=headers).headers

    def test_keys_are_not_shown(self):
        keys = Keys(["Secret"])
        assert "Secret" not in repr(keys) + str(keys) + repr(vars(keys))

    @pytest.mark.parametrize(
        "key", ["", " ", "Secret ", " Secret", "a b", "a\tb", "a\n", "a,b", "é", "\udcff", "\x7f"]
    )
    def test_a_key_that_cannot_be_one_is_refused_and_not_repeated(self, key):
        for make in (
            lambda: Keys(["good", key]),
            lambda: read_keys([key], {}),
            lambda: secured(keys=[key]),
        ):
            with pytest.raises(InputError, match=r"printable ASCII.* key \d of --api-key") as raised:
                make()
            assert not key.strip() or repr(key) not in str(raised.value)

    @pytest.mark.parametrize("value", ["", ",", "a,", ",a", "a,,b", "a, b", " a", "a\n"])
    def test_a_variable_that_is_set_must_hold_keys(self, value):
        with pytest.raises(InputError, match=KEY_VARIABLE):
            read_keys(["good"], {KEY_VARIABLE: value})

    def test_keys_come_from_options_and_environment(self):
        assert read_keys([], {}) == ()
        assert read_keys(["a"], {}) == ("a",)
        assert read_keys(["a", "b"], {KEY_VARIABLE: "c,d"}) == ("a", "b", "c", "d")


class TestHosts:
    @pytest.mark.parametrize(
        "host",
        [
            "localhost",
            "localhost:8000",
            "LOCALHOST",
            "localhost.",
            "127.0.0.1",
            "127.0.0.1:1",
            "127.8.9.1",
            "[::1]",
            "[::1]:80",
        ],
    )
    def test_names_of_this_machine_are_answered(self, host):
        assert call(secured(), headers=[("host", host)]).status == 200

    @pytest.mark.parametrize(
        "host",
        [
            "",
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "localhost:8000.evil.example",
            "127.0.0.1.evil.example",
            "evil.example@localhost",
            "localhost@evil.example",
            "[::1].evil.example",
            "::1",
            "128.0.0.1",
            "192.168.0.1",
            "0.0.0.0",
            "localhost:x",
            "localhost\n",
            "localhost/",
            b"\xff\xfe",
            b"local\x00host",
        ],
    )
    def test_other_hosts_are_refused_without_a_key(self, host):
        answer = call(secured(), headers=[("host", host)])
        assert answer.status == 403
        assert answer.error["code"] == "host_not_allowed"
        assert call(secured(keys=["a"]), headers=[*bearer("a")[1:], ("host", host)]).status == 200

    def test_health_is_no_exception(self):
        assert call(secured(), "/health", headers=[("host", "evil.example")]).status == 403

    def test_of_several_hosts_all_must_be_right(self):
        assert call(secured(), headers=[HOST, ("host", "evil.example")]).status == 403

    def test_no_host_is_no_browser(self):
        assert call(secured(), headers=[]).status == 200

    def test_the_bound_name_is_answered(self):
        app = secured(host="Box.lan")
        assert call(app, headers=[("host", "box.lan:8000")]).status == 200
        assert call(app, headers=[("host", "other.lan")]).status == 403

    @pytest.mark.parametrize("bound", ["0.0.0.0", "::"])
    def test_bound_to_all_addresses_names_of_others_are_refused(self, bound):
        app = secured(host=bound)
        for host in ("192.168.0.7:8000", "[2001:db8::1]:8000", socket.gethostname()):
            assert call(app, headers=[("host", host)]).status == 200
        assert call(app, headers=[("host", "evil.example")]).status == 403

    def test_local_hosts_are_told_from_others(self):
        assert all(map(is_local, ["localhost", "LocalHost", "127.0.0.1", "127.1.2.3", "::1"]))
        assert not any(map(is_local, ["0.0.0.0", "::", "", "192.168.0.1", "example.org", "localhost.evil"]))


class TestBodies:
    def test_a_body_reaches_the_application_whole(self):
        more = {"method": "POST", "headers": [HOST, *JSON]}
        assert seen(call(secured(max_body_bytes=4), body=b"1234", **more))["body"] == "1234"
        more["headers"] = [*more["headers"], ("content-length", "4")]
        assert (
            seen(call(secured(max_body_bytes=4), chunks=[b"1", b"", b"23", b"4"], **more))["body"] == "1234"
        )

    @pytest.mark.parametrize("length", ["1001", "99999999999999999999", "9" * 5000])
    def test_an_announced_size_over_the_limit_is_refused_unread(self, length):
        answer = call(secured(), method="POST", headers=[HOST, *JSON, ("content-length", length)])
        assert (answer.status, answer.num_received) == (413, 0)
        assert "1,000 bytes" in answer.error["message"]
        assert answer.headers["connection"] == "close"

    def test_a_size_that_is_no_number_does_not_pass_the_limit(self):
        headers = [HOST, *JSON, ("content-length", b"\xb2")]
        assert call(secured(), method="POST", headers=headers, body=b"1" * 1001).status == 413
        assert call(secured(), method="POST", headers=headers, body=b"1").status == 200

    def test_chunks_are_counted_as_they_come(self):
        answer = call(secured(), method="POST", headers=[HOST, *JSON], chunks=[b"1" * 300] * 100)
        assert (answer.status, answer.num_received) == (413, 4)

    def test_a_body_that_comes_slowly_ends_in_time(self):
        app = secured(body_timeout_s=0.05)
        answer = call(
            app, method="POST", headers=[HOST, *JSON, ("content-length", "2")], chunks=[b"1", PAUSE]
        )
        assert answer.status == 408
        assert answer.error["type"] == "invalid_request_error"
        assert answer.headers["connection"] == "close"

    def test_the_time_limit_is_of_the_body_and_not_of_the_answer(self):
        async def slow(scope, receive, send):
            await asyncio.sleep(0.2)
            await echo(scope, receive, send)

        assert call(secured(slow, body_timeout_s=0.05)).status == 200

    def test_a_client_that_leaves_gets_nothing(self):
        assert call(secured(), method="POST", headers=[HOST, *JSON], chunks=[b"1", LEAVE]).messages == []

    @pytest.mark.parametrize(
        "encoding", ["gzip", "br", "deflate", "zstd", "identity, gzip", "GZIP", "x", b"\xff"]
    )
    def test_encoded_bodies_are_refused(self, encoding):
        headers = [HOST, *JSON, ("content-encoding", encoding)]
        answer = call(secured(), method="POST", headers=headers, body=b"x")
        assert answer.status == 415
        assert "Content-Encoding" in answer.error["message"]

    def test_identity_is_no_encoding(self):
        headers = [HOST, *JSON, ("content-encoding", "Identity")]
        assert call(secured(), method="POST", headers=headers, body=b"{}").status == 200

    @pytest.mark.parametrize(
        "types",
        [
            [],
            ["text/plain"],
            ["application/x-www-form-urlencoded"],
            ["multipart/form-data; boundary=application/json"],
            ["text/plain; application/json"],
            ["application/jsonp"],
            ["application/json; charset=latin-1"],
            ["application/json", "text/plain"],
            ["application/json, text/plain"],
            ["application/json\x1b[31m"],
            [b"\xff\xfe"],
        ],
    )
    def test_other_types_are_refused(self, types):
        headers = [HOST, *[("content-type", value) for value in types]]
        answer = call(secured(), method="POST", headers=headers, body=b"{}")
        assert answer.status == 415
        assert "\x1b" not in answer.error["message"]

    @pytest.mark.parametrize(
        "value",
        [
            "application/json",
            "Application/JSON",
            "application/json;charset=utf-8",
            'application/json; charset="UTF-8"',
        ],
    )
    def test_json_is_taken(self, value):
        headers = [HOST, ("content-type", value)]
        assert call(secured(), method="POST", headers=headers, body=b"{}").status == 200

    def test_without_a_body_the_application_decides(self):
        assert call(secured(), method="POST").status == 200

    def test_the_client_leaving_is_still_told(self):
        async def waits(scope, receive, send):
            first, second = await receive(), await receive()
            assert (first["type"], second["type"]) == ("http.request", "http.disconnect")
            await echo(scope, _once, send)

        async def _once():
            return {"type": "http.request", "body": b"", "more_body": False}

        assert call(secured(waits), method="POST", headers=[HOST, *JSON], body=b"{}").status == 200


class TestRequestIds:
    @pytest.mark.parametrize("given", ["a", "!" * 128, "req-1/2:3~"])
    def test_an_id_is_taken_over_and_echoed(self, given):
        answer = call(secured(), headers=[HOST, ("X-Request-Id", given)])
        assert answer.headers["x-request-id"] == seen(answer)["state"]["request_id"] == given

    @pytest.mark.parametrize(
        "given",
        ["", "!" * 129, "a b", "a\tb", "a\x1b[31mb", "a\r\nSet-Cookie: x", "a\x7f", "é", b"\xff", b"a\x00"],
    )
    def test_others_are_replaced(self, given):
        answer = call(secured(), headers=[HOST, ("x-request-id", given)])
        made = answer.headers["x-request-id"]
        assert len(made) == 32 and int(made, 16) >= 0
        assert [name for name, _ in answer.header_list].count(b"x-request-id") == 1

    def test_two_ids_are_none(self):
        answer = call(secured(), headers=[HOST, ("x-request-id", "a"), ("x-request-id", "b")])
        assert len(answer.headers["x-request-id"]) == 32

    def test_an_answer_has_one_id_whatever_the_application_says(self):
        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Request-ID", b"own")]})
            await send({"type": "http.response.body"})

        answer = call(secured(app), headers=[HOST, ("x-request-id", "mine")])
        assert [value for name, value in answer.header_list if name.lower() == b"x-request-id"] == [b"mine"]

    def test_ids_differ(self):
        assert len({call(secured()).headers["x-request-id"] for _ in range(20)}) == 20

    @pytest.mark.parametrize(
        ("app", "more", "status"),
        [
            (secured(keys=["a"]), {}, 401),
            (secured(), {"headers": [("host", "evil.example")]}, 403),
            (secured(), {"headers": [HOST, ("content-length", "5000")]}, 413),
            (secured(), {"headers": [HOST], "method": "POST", "body": b"{}"}, 415),
        ],
    )
    def test_errors_carry_it_and_what_browsers_go_by(self, app, more, status):
        answer = call(app, **{**more, "headers": [*more.get("headers", ()), ("x-request-id", "mine")]})
        assert answer.status == status
        assert answer.headers["x-request-id"] == "mine"
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.error


class TestLog:
    @pytest.fixture
    def log(self, caplog):
        caplog.set_level(logging.INFO, "chordal.server")
        return caplog

    def test_a_request_is_one_line(self, log):
        async def app(scope, receive, send):
            scope["state"]["user"] = "alice\nroot"
            await echo(scope, receive, send)

        scope = {"query_string": b"q=private"}
        headers = [*bearer("Secret"), ("x-request-id", "r1")]
        assert call(secured(app, keys=["Secret"]), "/v1/models", headers=headers, scope=scope).status == 200
        [line] = log.messages
        assert line.startswith("GET /v1/models 200 | ")
        assert line.endswith(r" ms | request r1 | tenant key-1 | user alice\nroot")
        assert log.records[0].name == "chordal.server"

    @pytest.mark.parametrize(
        "path",
        [
            "/a\nGET / 200",
            "/a\r\n",
            "/\x1b[31mred",
            "/\x7f",
            "/\x85",
            "/\u2028",
            "/\ud800",
            "/\u202e",
            "/" + "x" * 9000,
        ],
    )
    @pytest.mark.parametrize("is_raw", [True, False])
    def test_nothing_a_client_sends_breaks_a_line(self, log, path, is_raw):
        scope = {"path": path, "raw_path": path.encode("utf-8", "surrogatepass") if is_raw else None}
        headers = [HOST, ("x-request-id", "a\nb"), ("user-agent", "a\nb")]
        call(secured(), scope=scope, headers=headers, method="GE\nT")
        [line] = log.messages
        assert line.isascii() and line.isprintable()
        assert line.startswith(r"GE\nT /")
        assert len(line) < 1500

    def test_an_encoded_line_break_stays_encoded(self, log):
        call(secured(), scope={"path": "/a\nb", "raw_path": b"/a%0Ab"})
        assert "GET /a%0Ab 200" in log.text

    def test_keys_queries_and_bodies_are_not_in_it(self, log):
        app = secured(keys=["Secret"])
        for key in ("Secret", "Wr0ng"):
            headers = [*bearer(key), *JSON]
            call(
                app,
                method="POST",
                headers=headers,
                body=b'{"prompt":"private"}',
                scope={"query_string": b"private"},
            )
        assert len(log.messages) == 2
        for word in ("Secret", "Wr0ng", "private"):
            assert word not in log.text

    def test_refusals_failures_and_clients_that_leave_are_logged(self, log):
        async def fails(scope, receive, send):
            raise RuntimeError("broken")

        call(secured(keys=["a"]))
        call(secured(), method="POST", headers=[HOST, *JSON], chunks=[b"1", LEAVE])
        with pytest.raises(RuntimeError, match="broken"):
            call(secured(fails))
        assert [line.split(" ")[2] for line in log.messages] == ["401", "-", "500"]

    def test_texts_are_logged_on_request_only_and_escaped(self, log):
        body = b'{"prompt": "my\x1b[31m \xc3\xa9 text' + b"x" * 9000 + b'"}'
        headers = [HOST, *JSON, ("x-request-id", "r1")]
        more = {"method": "POST", "headers": headers, "body": body}
        call(secured(max_body_bytes=10000), **more)
        assert "my" not in log.text
        log.clear()
        call(secured(max_body_bytes=10000, log_prompts=True), **more)
        asks, answer, _ = log.messages
        assert asks.startswith('request r1 asks: {"prompt": "my\\x1b[31m')
        assert answer.startswith('request r1 is answered: {"state"')
        assert asks.endswith("xxx...")
        assert all(line.isascii() and line.isprintable() and len(line) < 17000 for line in (asks, answer))

    def test_only_posts_have_texts_to_log(self, log):
        call(secured(log_prompts=True), "/metrics")
        assert len(log.messages) == 1

    def test_a_query_in_the_raw_path_is_not_logged(self, log):
        call(secured(), scope={"raw_path": b"/v1/models?q=private"})
        assert "private" not in log.text

    def test_a_refused_request_has_no_text_to_log(self, log):
        more = {"method": "POST", "headers": [HOST, *JSON], "body": b"private"}
        call(secured(keys=["a"], log_prompts=True), **more)
        assert "private" not in log.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("a\nb\r\t", r"a\nb\r\t"),
        ("\x1b[31m\x00\x7f", r"\x1b[31m\x00\x7f"),
        ("\x85\xa0\xe9", r"\x85\xa0\xe9"),
        ("\u2028\u202e\ud800", r"\u2028\u202e\ud800"),
        ("\\n", r"\\n"),
        ("\U0001f600", r"\U0001f600"),
        ("x" * 21, "x" * 20 + "..."),
    ],
)
def test_escaped_text_is_one_printable_line(text, shown):
    assert escape(text, 20) == shown


class TestCors:
    PREFLIGHT = (
        ("host", "localhost"),
        ("origin", "https://good.example"),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization, content-type, x-stainless-os"),
    )

    def test_off_by_default(self):
        for headers in (self.PREFLIGHT, [HOST, ("origin", "https://good.example")]):
            for app in (secured(), secured(keys=["a"])):
                answer = call(app, method="OPTIONS", headers=headers)
                assert not any(name.startswith("access-control") for name in answer.headers)

    def test_a_preflight_needs_no_key_and_the_request_does(self):
        app = secured(keys=["a"], cors=["https://good.example"])
        answer = call(app, method="OPTIONS", headers=self.PREFLIGHT)
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in answer.headers
        refused = call(app, headers=[HOST, ("origin", "https://good.example")])
        assert refused.status == 401
        assert refused.headers["access-control-allow-origin"] == "https://good.example"

    def test_other_origins_stay_out(self):
        app = secured(cors=["https://good.example"])
        headers = [
            ("origin", "https://bad.example") if name == "origin" else (name, value)
            for name, value in self.PREFLIGHT
        ]
        answer = call(app, method="OPTIONS", headers=headers)
        assert answer.status == 400
        assert "access-control-allow-origin" not in answer.headers

    @pytest.mark.parametrize(
        "origin",
        [
            "",
            "good.example",
            "https://good.example/",
            "https://good.example/path",
            "null",
            "https://*.example",
        ],
    )
    def test_what_can_be_no_origin_is_refused(self, origin):
        with pytest.raises(InputError, match="scheme and host"):
            secured(cors=[origin])

    def test_all_origins_need_a_key(self):
        with pytest.raises(InputError, match="API key"):
            secured(cors=["*"])
        answer = call(secured(keys=["a"], cors=["*"]), method="OPTIONS", headers=self.PREFLIGHT)
        assert answer.headers["access-control-allow-origin"] == "*"


def test_websockets_are_closed_before_they_open():
    sent = []

    async def send(message):
        sent.append(message)

    for app in (secured(), secured(keys=["a"]), secured(keys=["a"], cors=["*"])):
        sent.clear()
        asyncio.run(app({"type": "websocket", "path": "/", "headers": []}, None, send))
        assert sent == [{"type": "websocket.close", "code": 1008}]


def test_start_and_shutdown_reach_the_application():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(secured(keys=["a"], cors=["*"], log_prompts=True)({"type": "lifespan"}, None, send))
    assert sent == [{"type": "seen"}]


@contextlib.contextmanager
def listening(app):
    """Run an application under uvicorn; gives its port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off", http="h11"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def port():
    with listening(secured(max_body_bytes=1 << 20, body_timeout_s=0.5)) as port:
        yield port


class TestUnderUvicorn:
    """What only a real connection shows."""

    def talk(self, port, *parts):
        """Send parts and read until the server closes."""
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            for part in parts:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(part)
            got = b""
            with contextlib.suppress(ConnectionError):
                while data := connection.recv(65536):
                    got += data
        return got

    HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    def test_a_body_that_announces_too_much_is_refused_at_once(self, port):
        got = self.talk(port, self.HEAD + b"Content-Length: 1048577\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 413 ")

    def test_chunks_without_end_are_refused(self, port):
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        got = self.talk(port, self.HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 20)
        assert got.startswith(b"HTTP/1.1 413 ")

    def test_a_body_that_never_ends_is_given_up(self, port):
        for length in (b"Content-Length: 100", b"Transfer-Encoding: chunked"):
            got = self.talk(port, self.HEAD + length + b"\r\n\r\n" + b"1\r\n{\r\n")
            assert got.startswith(b"HTTP/1.1 408 ")

    def test_a_client_that_waits_to_be_asked_for_its_body_is_told_no(self, port):
        got = self.talk(port, self.HEAD + b"Expect: 100-continue\r\nContent-Length: 9999999\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 413 ")

    @pytest.mark.parametrize(
        ("method", "target"),
        [("TRACE", "/"), ("BREW", "/"), ("HEAD", "/health"), ("GET", "/a%0d%0ab"), ("GET", "/%ff")],
    )
    def test_odd_requests_are_answered_and_the_next_one_too(self, port, method, target):
        odd = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        last = b"GET /last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        got = self.talk(port, odd + last)
        assert got.count(b"HTTP/1.1 200 OK") == 2
        assert b'"/last"' in got

    def test_an_upgrade_is_no_way_in(self):
        upgrade = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        with listening(secured(keys=["a"])) as port:
            assert (
                b" 401 "
                in self.talk(port, upgrade.replace(b"Upgrade\r\n", b"Upgrade, close\r\n", 1)).split(b"\r\n")[
                    0
                ]
            )
