"""Hostile requests: made from the published schema, and by hand for every field there is."""

from __future__ import annotations

import json

import hypothesis
import pytest

schemathesis = pytest.importorskip("schemathesis", reason="makes requests from the schema")

from chordal.server.schema import (  # noqa: E402
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

PROMPT = "reverse: Ana Ben Cleo Dan"
MESSAGES = [{"role": "user", "content": PROMPT}]

# Path, what every request has, and the fields.
ENDPOINTS = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}, ChatRequest),
    "completion": ("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}, CompletionRequest),
    "tokenize": ("/tokenize", {"prompt": PROMPT}, TokenizeRequest),
    "detokenize": ("/detokenize", {"tokens": [5, 6]}, DetokenizeRequest),
}


def names_of(model):
    return [field.alias or name for name, field in model.model_fields.items()]


# Each is one more way in.
ROUTES = {path for path, _, _ in ENDPOINTS.values()} | {
    "/", "/health", "/metrics", "/version", "/tokenizer_info", "/v1/models", "/v1/models/{name}",
    "/v1/decoders",
}  # fmt: skip

FIELDS = [(endpoint, name) for endpoint, (_, _, model) in ENDPOINTS.items() for name in names_of(model)]


def post(server, path, body):
    """Send a document, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.client.post(path, content=content, headers={"Content-Type": "application/json"})


def strict(text):
    """Read JSON that every client can read."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def check_error(document):
    """Check that a document is OpenAI's error object, and give the error."""
    assert document.keys() == {"error"}
    error = document["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    json.dumps(error, ensure_ascii=False).encode()
    return error


def check_answer(response):
    """Check that a response is an answer or an error as clients know them, and never our fault."""
    kind = response.headers["content-type"]
    if response.status_code != 200:
        error = check_error(strict(response.content.decode()))
        # Who gives a request no time gets none.
        assert response.status_code < 500 or error["code"] == "timeout", error
    elif kind.startswith("text/event-stream"):
        *events, end, rest = response.content.decode().split("\n\n")
        assert rest == ""
        documents = [
            strict(event.removeprefix("data: "))
            for event in [*events, *([] if end == "data: [DONE]" else [end])]
            if not event.startswith(":")
        ]
        for document in documents:
            if "error" in document:
                assert check_error(document)["code"] == "timeout"
                assert end != "data: [DONE]"
    elif kind.startswith("application/json"):
        strict(response.content.decode())


def fuzz(server, operation, mode, num):
    """Send requests to a route that are, or that are not, as the schema has them; give their statuses."""
    seen = set()
    method, is_right = operation.method.upper(), mode == schemathesis.GenerationMode.POSITIVE

    @hypothesis.settings(
        max_examples=num if method == "POST" else max(3, num // 5),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode), hypothesis.strategies.integers(0, 7))
    def send(case, chosen):
        if method != "POST":
            check_answer(server.client.request(method, case.formatted_path, params=case.query))
            return
        body = case.body
        # Else hardly one would name a model that is served, hold tokens that it has, and agree with itself.
        if chosen and is_right:
            prompt = PROMPT if operation.path == "/tokenize" else [PROMPT] * min(chosen, 3)
            own = {"prompt": prompt, "messages": MESSAGES, "tokens": [5, 6]}
            kept = [name for name in body if name != "model" and ("prompt" not in body or name != "messages")]
            kept = [name for at, name in enumerate(kept) if name in own or chosen < 3 or at % 7 == chosen % 7]
            body = {name: own.get(name, body[name]) for name in kept}
        response = post(server, case.formatted_path, body)
        check_answer(response)
        seen.add(response.status_code)

    send()
    return seen


@pytest.mark.parametrize("num", [12, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_every_request_made_from_the_schema_has_an_answer_or_an_error_of_openai(
    make_server, check_healthy, num
):
    # A short window, so that what is right is soon done.
    with make_server(("tiny-ar", "tiny-mdm"), max_model_len=48, max_n=3) as small:
        schema = schemathesis.openapi.from_dict(small.client.get("/openapi.json").json())
        operations = [found.ok() for found in schema.get_all_operations()]
        assert {operation.path for operation in operations} == ROUTES
        for operation in operations:
            if operation.path != "/":  # the page
                statuses = fuzz(small, operation, schemathesis.GenerationMode.POSITIVE, num)
                assert "/v1/" not in operation.path or operation.method != "post" or {200, 400} <= statuses
            if operation.method == "post":
                assert fuzz(small, operation, schemathesis.GenerationMode.NEGATIVE, num) <= {400, 415}
        check_healthy(small)


# Of no field, or of those in KIND only.
JUNK = {
    "true": True,
    "a number": 7,
    "half": 0.5,
    "one as a float": 1.0,
    "minus one": -1,
    "a text": "x",
    "a number as text": "1",
    "an empty text": "",
    "a list": [True],
    "a list of lists": [[[]]],
    "an object": {"x": {"y": None}},
    "10^18": 10**18,
    "2^63": 2**63,
    "-2^63-1": -(2**63) - 1,
    "1e308": 1e308,
    "a long text": "x" * 100_000,
    "control characters": "\x00\x1b[2J\r\n\x7f\u2028\u202e",
    "many": [0] * 50_000,
}

_INTEGERS = {"a number", "minus one", "10^18"}
_NUMBERS = _INTEGERS | {"half", "one as a float", "1e308", "2^63"}
_TEXTS = {key for key, value in JUNK.items() if isinstance(value, str)}
# What each field may take of the junk; of those that are not here, nothing.
TAKEN = {
    "model": set(),
    "prompt": _TEXTS - {"an empty text"} | {"many"},
    "temperature": _NUMBERS - {"minus one"},
    "top_p": {"half", "one as a float"},
    "min_p": {"half", "one as a float"},
    "top_k": _INTEGERS,
    "repetition_penalty": {"a number", "half", "one as a float"},
    "presence_penalty": {"half", "one as a float", "minus one"},
    "frequency_penalty": {"half", "one as a float", "minus one"},
    "max_tokens": {"a number"},
    "max_completion_tokens": set(),  # it would have to be what max_tokens is
    "n": {"a number"},
    "stop": _TEXTS - {"an empty text", "a long text"},
    "include_stop_str_in_output": {"true"},
    "ignore_eos": {"true"},
    "seed": _INTEGERS,
    "stream": {"true"},
    "user": {"a text", "a number as text", "an empty text", "control characters"},
    "skip_special_tokens": {"true"},
    "truncate_prompt_tokens": {"a number", "10^18"},
    "return_token_ids": {"true"},
    "request_id": {"a text", "a number as text"},
    "cache_salt": {"a text", "a number as text", "control characters"},
    "logprobs": {"a number"},
    "echo": {"true"},
    "add_generation_prompt": {"true"},
    "add_special_tokens": {"true"},
    "return_token_strs": {"true"},
    "tokens": {"many"},
}
TAKEN_BY = {
    ("chat", "logprobs"): {"true"},
    ("tokenize", "prompt"): _TEXTS,
    ("tokenize", "add_generation_prompt"): set(),  # goes with messages
}


@pytest.mark.parametrize(("endpoint", "name"), FIELDS)
def test_no_field_takes_what_it_cannot_use(healthy, endpoint, name):
    path, plain, _ = ENDPOINTS[endpoint]
    taken = TAKEN_BY.get((endpoint, name), TAKEN.get(name, set()))
    for what, value in JUNK.items():
        response = post(healthy, path, plain | {name: value})
        check_answer(response)
        if what in taken:
            # A text too long for the window is wrong in another way.
            told = response.json()["error"]["code"] if response.status_code != 200 else None
            assert told in (None, "context_length_exceeded"), (what, response.text)
            continue
        error = check_error(response.json())
        is_unknown = error["code"] == "model_not_found"
        assert response.status_code == (404 if is_unknown else 400), what
        assert error["param"].split(".")[0] == name, (what, error)
        assert len(response.content) < 5000, "what was sent must not come back whole"


@pytest.mark.parametrize(
    "literal", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999", "1" * 400, "0x1", "01"]
)
def test_numbers_that_json_does_not_have_are_refused_wherever_they_stand(healthy, literal):
    for place in (
        '"temperature": %s', '"top_p": %s', '"seed": %s', '"max_tokens": %s', '"nope": %s',
        '"prompt": [5, %s]', '"logit_bias": {"5": %s}', '"chordal": {"timeout": %s}',
        '"chordal": {"settings": {"x": [%s]}}',
    ):  # fmt: skip
        response = post(healthy, "/v1/completions", f"{{{place % literal}}}".encode())
        assert response.status_code == 400
        assert check_error(response.json())["code"] == "invalid_json", place


def nested(depth, inner):
    for _ in range(depth):
        inner = {"a": [inner]}
    return inner


_NESTED = {
    "settings": '"prompt": "x", "chordal": {"settings": {"num_draft": %s}}',
    "schema": '"prompt": "x", "response_format": {"type": "json_schema", '
    '"json_schema": {"name": "a", "schema": {"properties": {"b": {"enum": [%s]}}}}}',
    "kwargs": '"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"x": %s}',
    "content": '"messages": [{"role": "user", "content": %s}]',
    "prompt": '"prompt": %s',
    "stop": '"prompt": "x", "stop": %s',
    "logit_bias": '"prompt": "x", "logit_bias": {"5": %s}',
    "unknown": '"prompt": "x", "nope": %s',
}


@pytest.mark.parametrize("place", _NESTED)
def test_nesting_is_refused_or_read_and_never_overflows(healthy, place):
    path = "/v1/chat/completions" if '"messages"' in _NESTED[place] else "/v1/completions"
    for deep in (json.dumps(nested(20, 1)), json.dumps(nested(40, 1)), "[" * 20_000 + "]" * 20_000):
        response = post(healthy, path, f"{{{_NESTED[place] % deep}}}".encode())
        check_answer(response)
        assert response.status_code in ((200, 400) if place == "schema" else (400,))


_NO_JSON = {
    "BOM": "\ufeff".encode() + b'{"prompt": "x"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "UTF-32": '{"prompt": "x"}'.encode("utf-32-le"),
    "Latin-1": b'{"prompt": "caf\xe9"}',
    "a surrogate in bytes": b'{"prompt": "\xed\xa0\x80"}',
    "more bytes than needed": b'{"prompt": "\xc0\xaf"}',
    "a bare line break": b'{"prompt": "a\nb"}',
    "two documents": b'{"prompt": "a"}{"prompt": "b"}',
    "something behind": b'{"prompt": "a"} x',
    "other quotes": b"{'prompt': 'a'}",
    "a trailing comma": b'{"prompt": "a",}',
    "an escape of others": b'{"prompt": "\\x41"}',
    "zeros": bytes(100),
    "open objects": b"{" * 5000,
    "open keys": b'{"a":' * 5000,
    "backslashes": b'"' + b"\\" * 100_001,
    "a key twice": b'{"prompt": "a", "prompt": "b"}',
    "a key twice inside": b'{"prompt": "a", "chordal": {"settings": {"x": 1, "x": 2}}}',
    "half a pair": b'{"prompt": "\\ud83d"}',
    "half a pair in a key": b'{"\\udc00": 1}',
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_bytes_that_are_no_json_are_refused(healthy, endpoint):
    for what, content in _NO_JSON.items():
        response = post(healthy, ENDPOINTS[endpoint][0], content)
        assert response.status_code == 400, what
        assert check_error(response.json())["code"] == "invalid_json", what


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_unknown_fields_are_refused_in_an_error_of_bounded_size(healthy, endpoint):
    path, plain, _ = ENDPOINTS[endpoint]
    for name in (
        "",
        "\x00",
        "a.b",
        "__class__",
        "self",
        "model_config",
        "{message}",
        "x" * 100_000,
        "\u202eresu",
    ):
        response = post(healthy, path, plain | {name: 1})
        assert response.status_code == 400
        assert "unknown field" in check_error(response.json())["message"]
        assert len(response.content) < 5000


def test_names_inside_a_field_come_back_cut(healthy):
    long = "x" * 100_000
    for fields in (
        {"model": "x" * 256},
        {"logit_bias": {long: 1}},
        {"logit_bias": {"5": long}},
        {"stop": [1, long]},
        {"response_format": {"type": long}},
        {"response_format": {"type": "text", long: 1}},
        {"stream": True, "stream_options": {long: 1}},
        {"chordal": {long: 1}},
        {"chordal": {"decoder": "x" * 64}},
        {"chordal": {"settings": {long: 1}}},
        {"chordal": {"decoder": "prompt_lookup", "settings": {"match": long}}},
        {"chordal": {"decoder": "prompt_lookup", "settings": {"num_draft": [long]}}},
    ):
        response = post(healthy, "/v1/completions", {"prompt": "x"} | fields)
        assert response.status_code in (400, 404), fields.keys()
        check_error(response.json())
        assert len(response.content) < 5000, fields.keys()
    messages = [
        {"role": long, "content": "x"},
        {"role": "user", "content": [{"type": long}]},
        {"role": "user", long: 1},
    ]
    for message in messages:
        response = post(healthy, "/v1/chat/completions", {"messages": [message]})
        assert response.status_code == 400
        assert len(response.content) < 5000


_CHARACTERS = [
    "\x00", "a\x00b", "\x1b[31m", "\ufffe", "\U0010ffff", "e" + "\u0301" * 400, "\u202e" * 50, "<|eos|>",
    "\ufffd", "\x7f\x80", "\U0001f468\u200d\U0001f469", "a\r\n\u2028", "{{ 7 * 7 }}{% raw %}", "%s %n {0}",
]  # fmt: skip


def test_any_character_may_stand_in_a_prompt(healthy):
    for text in _CHARACTERS:
        for path, asked in (
            ("/v1/completions", {"prompt": text, "echo": True}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
            (
                "/v1/chat/completions",
                {"messages": MESSAGES, "stop": text[:200], "user": text[:256], "stream": True},
            ),
        ):
            response = post(healthy, path, asked | {"max_tokens": 2})
            assert response.status_code == 200, (text, response.text)
            check_answer(response)
            if asked.get("echo"):
                assert response.json()["choices"][0]["text"].startswith(text)


def test_a_prompt_beyond_the_window_is_refused_without_being_decoded(healthy):
    for prompt in ("Ana " * 100_000, ["Ana " * 5000] * 20, list(range(5, 800)) * 50):
        response = post(healthy, "/v1/completions", {"prompt": prompt, "max_tokens": 1})
        assert response.status_code == 400
        assert check_error(response.json())["code"] == "context_length_exceeded"
