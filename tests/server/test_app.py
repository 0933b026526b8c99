from __future__ import annotations

import threading

import pytest

import chordal
from chordal.registry import decoder_class, list_decoders, make_decoder
from chordal.server.catalog import describe_settings
from chordal.server.settings import ServerSettings

from .conftest import serve, wait_ready

ASK = "reverse: Ana Ben Cleo Dan"
POSTS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]


def test_health_is_good_once_the_models_are_loaded(server):
    response = server.client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_while_models_load_nothing_else_works():
    go_on = threading.Event()

    def load():
        assert go_on.wait(30)
        return {"tiny-ar": chordal.load("tiny-ar")}

    with serve(load) as loading:
        for response in (
            loading.client.get("/health"),
            loading.client.get("/v1/models"),
            loading.client.get("/tokenizer_info"),
            loading.post("/v1/completions", {"prompt": "x"}),
            loading.post("/tokenize", {"prompt": "x"}),
        ):
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
        assert loading.client.get("/health").json()["status"] == "loading"
        assert loading.client.get("/version").status_code == 200
        go_on.set()
        wait_ready(loading)
        assert loading.chat(ASK)["choices"][0]["message"]["content"] == "Dan Cleo Ben Ana"
        loading.worker.drain()
        assert loading.client.get("/health").json()["status"] == "draining"
        assert loading.post("/v1/completions", {"prompt": "x"}).status_code == 503


def test_models_are_listed_with_their_facts(server):
    data = server.client.get("/v1/models").json()["data"]
    assert [one["id"] for one in data] == ["tiny-ar", "tiny-mdm", "tiny-block"]
    assert [one["chordal"]["kind"] for one in data] == ["causal", "masked", "block"]
    assert server.client.get("/v1/models/tiny-mdm").json() == data[1]
    assert server.client.get("/v1/models/nope").status_code == 404


def test_decoders_are_those_that_fit_the_model_and_what_is_loaded(server):
    def names(model):
        return {one["name"] for one in server.client.get(f"/v1/decoders?model={model}").json()["data"]}

    assert "draft_model" in names("tiny-ar")
    assert not {"threshold", "specmquant"} & names("tiny-ar")
    assert "threshold" in names("tiny-mdm")
    assert not {"autoregressive", "draft_model"} & names("tiny-mdm")
    assert server.client.get("/v1/decoders?model=nope").status_code == 404


@pytest.mark.parametrize("name", [row["name"] for row in list_decoders()])
def test_settings_are_told_as_the_decoder_takes_them(name):
    """The defaults that are told make the default decoder, and each setting says what it means."""
    cls = decoder_class(name)
    told = describe_settings(cls)
    defaults = {setting["name"]: setting["default"] for setting in told}
    assert make_decoder(name, defaults).config == cls.Config()
    for setting in told:
        assert setting["help"].endswith((".", '"')), setting
        assert setting["type"]
    assert not {setting["name"] for setting in told} & set(cls.local_settings)


def test_default_decoder_of_the_server_is_for_the_models_it_fits(make_server):
    settings = {"decoder": "prompt_lookup", "decoder_settings": {"num_draft": 3}}
    with make_server(("tiny-ar", "tiny-mdm"), **settings) as running:
        counts = {"counts": True}
        told = running.chat(ASK, chordal=counts)["choices"][0]["chordal"]
        assert told["decoder"] == "prompt_lookup"
        told = running.chat(ASK, model="tiny-mdm", chordal=counts)["choices"][0]["chordal"]
        assert told["decoder"] == "low_confidence"
        facts = [one["chordal"]["default_decoder"] for one in running.client.get("/v1/models").json()["data"]]
        assert facts == ["prompt_lookup", "low_confidence"]
        repeats = {"prompt": "a b c d e f g a b c d e f g a b", "ignore_eos": True, "max_tokens": 16}
        wide = running.complete(**repeats, chordal={**counts, "settings": {"num_draft": 10}})
        narrow = running.complete(**repeats, chordal=counts)
        drafted = [one["choices"][0]["chordal"]["counts"]["draft_tokens"] for one in (wide, narrow)]
        assert drafted[0] != drafted[1]


def test_limits_of_the_server_hold(make_server):
    limits = {"max_model_len": 40, "max_n": 2, "max_prompts": 2, "max_logprobs": 3, "max_stop_chars": 4}
    with make_server(**limits) as running:
        for fields, param in (
            ({"max_tokens": 36}, "max_tokens"),
            ({"prompt": "Ana " * 60}, "prompt"),
            ({"n": 3}, "n"),
            ({"prompt": ["a"] * 3}, "prompt"),
            ({"logprobs": 4}, "logprobs"),
            ({"stop": "abcde"}, "stop"),
        ):
            response = running.post("/v1/completions", {"prompt": ASK} | fields)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert running.client.get("/v1/models").json()["data"][0]["max_model_len"] == 40
        assert running.complete(ASK, max_tokens=34, ignore_eos=True)["usage"]["completion_tokens"] == 34


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'"x"',
        b'{"model": NaN}',
        b"\xff",
        b"[" * 100_000,
        b'{"a": 1, "a": 2}',
    ],
)
def test_body_that_is_no_json_object_is_a_bad_request(server, path, body):
    response = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x", "max_tokens": 1, "prompt": "y"}',
        b'{"prompt": "x", "max_tokens": 1, "chordal": {"settings": {}, "settings": {}}}',
        b'{"prompt": "x", "max_tokens": 1, "seed": 123456789012345678901}',
    ],
)
def test_body_that_could_be_read_in_two_ways_is_a_bad_request(server, body):
    response = server.client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_body_of_another_type_is_refused(server, path, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = server.client.post(path, content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code in (400, 415)
    assert "message" in response.json()["error"]


@pytest.mark.parametrize("text", ["\\ud800", "x\\udc00", "\\ud83d"], ids=["high", "low", "half an emoji"])
def test_half_a_surrogate_pair_is_refused_in_text_that_encodes(server, text):
    for body in (
        f'{{"prompt": "{text}"}}',
        f'{{"{text}": 1}}',
        f'{{"prompt": "x", "stop": ["{text}"]}}',
        f'{{"prompt": "x", "model": "{text}"}}',
    ):
        response = server.client.post(
            "/v1/completions", content=body.encode(), headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 400
        response.content.decode("utf-8")
        assert response.json()["error"]["message"]


def test_other_routes_and_methods_are_errors_of_the_same_form(server):
    for response, status in (
        (server.client.get("/nope"), 404),
        (server.client.get("/docs"), 404),
        (server.client.get("/v1/completions"), 405),
        (server.client.delete("/v1/models"), 405),
        (server.client.post("/health"), 405),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_schema_of_the_api_is_published(server):
    document = server.client.get("/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    assert "ChatRequest" in document["components"]["schemas"]
    assert "422" not in str(document["paths"])


def test_request_id_is_given_back(server):
    response = server.client.get("/health", headers={"X-Request-Id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"
    assert server.client.get("/health").headers["x-request-id"]


def test_user_goes_to_the_access_log(server, caplog):
    with caplog.at_level("INFO", logger="chordal.server"):
        server.complete(ASK, user="Ana\nevil")
    [line] = [record.getMessage() for record in caplog.records if "user" in record.getMessage()]
    assert "user Ana\\nevil" in line
    assert ASK not in caplog.text


def test_every_route_but_health_needs_the_key(make_server):
    with make_server(api_keys=("secret-key",)) as closed:
        routes = closed.client.get("/openapi.json").json()["paths"]
        assert "/metrics" in routes and "/" in routes
        for path, methods in routes.items():
            for method in methods:
                response = closed.client.request(method, path, headers={"Authorization": "Bearer wrong"})
                assert response.status_code == (200 if path == "/health" else 401), path
        assert closed.chat(ASK)["choices"][0]["message"]["content"] == "Dan Cleo Ben Ana"


def test_what_a_decoder_learnt_of_one_user_does_not_speed_up_another(make_server):
    """With decoders that remember, and with prompts that are cached."""
    keys = ("first-key", "second-key")
    remember = {"decoder": "token_recycling", "settings": {"scope": "session"}, "counts": True}
    body = {
        "prompt": "c a b " * 12,
        "max_tokens": 32,
        "temperature": 0,
        "ignore_eos": True,
        "chordal": remember,
    }

    with make_server(api_keys=keys) as running:

        def counts(key, **more):
            headers = {"Authorization": f"Bearer {key}"}
            response = running.post("/v1/completions", body | more, headers=headers)
            counts = response.json()["choices"][0]["chordal"]["counts"]
            return counts["forwards"], counts["cached_tokens"]

        fresh = counts(keys[0])
        again = counts(keys[0])
        assert again[0] < fresh[0]  # or the rest would show nothing
        assert counts(keys[1]) == fresh
        assert counts(keys[0], cache_salt="x") == fresh
        assert counts(keys[1], cache_salt="x") == fresh


def test_bad_requests_leave_the_server_as_it_was(server):
    before = server.chat(ASK)
    for body in (
        {"prompt": [10**15]},
        {"prompt": "x", "chordal": {"decoder": "jacobi", "settings": {"window": 0}}},
        {
            "prompt": "x",
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 1}}},
        },
    ):
        assert server.post("/v1/completions", body).status_code == 400
    server.wait_idle()
    assert server.chat(ASK)["choices"] == before["choices"]


def test_playground_can_be_left_out(make_server):
    with make_server(playground=False) as running:
        assert running.client.get("/").status_code == 404
    assert ServerSettings().playground


def test_metrics_and_page_are_there(server):
    assert "chordal:" in server.client.get("/metrics").text
    page = server.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
