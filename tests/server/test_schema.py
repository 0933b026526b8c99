from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from chordal.server.errors import APIError, parse_json, validation_error
from chordal.server.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields):
    return ChatRequest.model_validate({"messages": _MESSAGES} | fields)


def complete(**fields):
    return CompletionRequest.model_validate({"prompt": "hi"} | fields)


def refusal(make, **fields):
    """Give the error object of a request that is refused."""
    with pytest.raises(ValidationError) as caught:
        make(**fields)
    # As the framework has it, the body is the first part of every location.
    errors = [error | {"loc": ("body", *error["loc"])} for error in caught.value.errors()]
    error = validation_error(errors)
    assert error.status == 400
    document = error.to_dict()["error"]
    json.dumps(document, ensure_ascii=False).encode()  # the text must encode
    return document


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": "1"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.0}, "top_k"),
        ({"top_k": 2**63}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e30}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": float("-inf")}, "frequency_penalty"),
        ({"n": 0}, "n"),
        ({"n": "2"}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids.0"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"nope": True}}, "stream_options.nope"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        ({"user": 5}, "user"),
        ({"user": "x" * 257}, "user"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": "a\n"}, "request_id"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"chordal": {"nope": 1}}, "chordal.nope"),
        ({"chordal": {"settings": []}}, "chordal.settings"),
        ({"chordal": {"timeout": 0}}, "chordal.timeout"),
        ({"chordal": {"events": True}}, "chordal.events"),
        ({"model": 5}, "model"),
    ],
)
@pytest.mark.parametrize("make", [chat, complete])
def test_wrong_value_is_refused_with_its_field(make, fields, param):
    assert refusal(make, **fields)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": " \n\t"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [*_MESSAGES, {"role": "user", "content": " "}]}, "messages.1.content"),
        ({"messages": [{"role": "user", "content": "hi", "name": "Ana"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": "hi", "type": "tool"}]}, "messages.0.type"),
        ({"messages": [{"role": "user", "content": "hi", "nope": 1}]}, "messages.0.nope"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"echo": True}, "echo"),
        ({"prompt": "hi"}, "prompt"),
    ],
)
def test_wrong_value_of_a_chat_is_refused_with_its_field(fields, param):
    assert refusal(chat, **fields)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", " "]}, "prompt.1"),
        ({"prompt": [1, -1]}, "prompt.0.1"),
        ({"prompt": [2**70]}, "prompt.0.0"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"messages": _MESSAGES}, "messages"),
    ],
)
def test_wrong_value_of_a_completion_is_refused_with_its_field(fields, param):
    assert refusal(complete, **fields)["param"] == param


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "auto"),
        ("bad_words", ["x"]),
        ("allowed_token_ids", [1]),
        ("min_tokens", 1),
        ("min_tokens", False),
        ("priority", 1),
        ("metadata", {"a": "b"}),
        ("store", True),
        ("chat_template", "{{ messages }}"),
        ("guided_json", {}),
        ("vllm_xargs", {"diffusion_max_steps": 4}),
    ],
)
@pytest.mark.parametrize("make", [chat, complete])
def test_known_but_unsupported_field_is_refused_by_name(make, name, value):
    error = refusal(make, **{name: value})
    assert error["param"] == name
    assert f"`{name}` is not supported" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"tools": None, "bad_words": None, "suffix": None, "best_of": None, "priority": 0},
        {"logit_bias": {}},
        {"n": 3, "best_of": 3},
        {"best_of": 1},
        {"min_tokens": 0},
        {"store": False, "metadata": {}},
        {"max_tokens": None, "stop": None, "n": None, "seed": None, "chordal": None, "logit_bias": None},
    ],
)
@pytest.mark.parametrize("make", [chat, complete])
def test_field_that_changes_nothing_is_taken(make, fields):
    make(**fields)


def test_unknown_field_is_refused_with_near_matches():
    error = refusal(chat, temprature=1)
    assert error["param"] == "temprature"
    assert "Did you mean temperature" in error["message"]


def test_message_as_the_openai_client_gives_it_back_is_taken():
    answer = {"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "tool_calls": None}
    assert len(chat(messages=[*_MESSAGES, answer]).messages) == 2
    assert chat(messages=[*_MESSAGES, {**answer, "content": ""}]).messages[1].text == ""


def test_message_may_say_that_it_is_one():
    """As older versions of evaluation tools write it."""
    assert chat(messages=[_MESSAGES[0] | {"type": "text"}]) == chat(messages=_MESSAGES)


def test_text_parts_stand_on_lines_of_their_own():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "a\nb"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_of_all_four_kinds_are_taken(prompt, prompts):
    assert complete(prompt=prompt).prompt == prompts


def test_keys_of_logit_bias_are_token_ids():
    assert chat(logit_bias={"7": -100, "12": 1.5}).logit_bias == {7: -100.0, 12: 1.5}


def test_json_schema_without_strictness_is_refused():
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": False}}
    assert refusal(chat, response_format=form)["param"] == "response_format.json_schema.strict"


def test_missing_field_is_named():
    error = refusal(lambda: ChatRequest.model_validate({}))
    assert (error["param"], error["message"]) == ("messages", "the field `messages` is required.")


def test_message_shows_a_long_value_cut():
    error = refusal(chat, temperature="x" * 10_000)
    assert len(error["message"]) < 200


@pytest.mark.parametrize("fields", [{}, {"prompt": "a", "messages": _MESSAGES}, {"messages": []}])
def test_tokenize_takes_a_text_or_messages(fields):
    refusal(lambda: TokenizeRequest.model_validate(fields))


def test_detokenize_takes_token_ids_only():
    assert refusal(lambda: DetokenizeRequest.model_validate({"tokens": [1, "2"]}))["param"] == "tokens.1"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"a": 1',
        b"[]",
        b"5",
        b'"x"',
        b"null",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1, "a": 2}',
        b'{"a": "\xff"}',
        b"\xff\xfe{\x00}\x00",
        rb'{"a": "\ud800"}',
        rb'{"a": ["x\uDC00\ud83d"]}',
        rb'{"\udfff": 1}',
        b'{"a": ' * 100_000,
        b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"a": ' + b'{"b": ' * 100 + b"1" + b"}" * 101,
    ],
)
def test_body_that_is_no_plain_json_object_is_refused(body):
    with pytest.raises(APIError) as caught:
        parse_json(body)
    assert caught.value.status == 400
    json.dumps(caught.value.to_dict(), ensure_ascii=False).encode()


def test_escaped_surrogate_pair_is_a_character():
    assert parse_json(rb'{"a": "\ud83d\ude00"}') == {"a": "\U0001f600"}


def test_json_is_read_to_the_depth_that_schemas_need():
    document = {"a": 1}
    for _ in range(40):
        document = {"properties": document}
    assert parse_json(json.dumps(document).encode()) == document


def test_error_text_with_a_surrogate_encodes():
    error = APIError(400, "got '\ud800'", param="a\udc00")
    assert json.dumps(error.to_dict(), ensure_ascii=False).encode()
