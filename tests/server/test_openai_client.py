"""The client that most programs use, against a running server: what it shows is what the library gives."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from typing import Literal

import openai
import pydantic
import pytest

import chordal
from chordal.decoders.autoregressive import Autoregressive
from chordal.errors import DecodingError

ASK = "reverse: Ana Ben Cleo Dan"
ANSWER = "Dan Cleo Ben Ana"
MESSAGES = [{"role": "user", "content": ASK}]
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
LOOKUP = {"decoder": "prompt_lookup"}
SAMPLED = {"temperature": 1.2, "seed": 11}
WRITES_ON = {"extra_body": {"ignore_eos": True}}

# Model, fields of the client, and the same for the library.
CASES = {
    "greedy": ("tiny-ar", {"temperature": 0}, {}),
    "seed": ("tiny-ar", SAMPLED, SAMPLED),
    "top_p": ("tiny-ar", SAMPLED | {"top_p": 0.7}, SAMPLED | {"top_p": 0.7}),
    "engine's own": (
        "tiny-ar",
        SAMPLED | {"extra_body": {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2}},
        SAMPLED | {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2},
    ),
    "stop": ("tiny-ar", {"temperature": 0, "stop": ["Ben", "Zoe"]}, {"stop_strings": ["Ben", "Zoe"]}),
    "one stop": ("tiny-ar", {"temperature": 0, "stop": "en"}, {"stop_strings": "en"}),
    "logit_bias": (
        "tiny-ar",
        SAMPLED | {"logit_bias": {"300": 8, "301": -100}},
        SAMPLED | {"logit_bias": {300: 8.0, 301: -100.0}},
    ),
    "penalties": (
        "tiny-ar",
        {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5, **WRITES_ON},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5, "ignore_eos": True},
    ),
    "prompt_lookup": (
        "tiny-ar",
        SAMPLED | {"extra_body": {"chordal": {**LOOKUP, "settings": {"num_draft": 3}}}},
        SAMPLED | {"decoder": "prompt_lookup", "config": {"num_draft": 3}},
    ),
    "draft model": (
        "tiny-ar",
        SAMPLED | {"extra_body": {"chordal": {"decoder": "draft_model"}}},
        SAMPLED | {"decoder": "draft_model"},
    ),
    "masked": ("tiny-mdm", {"temperature": 0}, {}),
    "masked, drawn": (
        "tiny-mdm",
        SAMPLED | {"top_p": 0.9, "stop": "Ben", "frequency_penalty": 0.5},
        SAMPLED | {"top_p": 0.9, "stop_strings": "Ben", "frequency_penalty": 0.5},
    ),
    "masked, threshold": (
        "tiny-mdm",
        {"temperature": 0, "extra_body": {"chordal": {"decoder": "threshold"}}},
        {"decoder": "threshold"},
    ),
    "block": ("tiny-block", {"temperature": 0, **WRITES_ON}, {"ignore_eos": True}),
}


class Answer(pydantic.BaseModel):
    """How sure a name is."""

    name: Literal["Ana", "Ben"]
    sure: bool
    next: Literal[1, 2, 3] | None


@pytest.fixture(scope="module")
def library():
    """The models of the server once more, for the engines of the others belong to its thread."""
    return {
        "tiny-ar": chordal.load("tiny-ar", draft="tiny-draft"),
        "tiny-mdm": chordal.load("tiny-mdm"),
        "tiny-block": chordal.load("tiny-block"),
    }


@pytest.fixture(scope="module")
def make_client():
    """Make a client of a server, of the given class, that tries once."""

    def make(server, kind=openai.OpenAI, **more):
        own = {"base_url": f"{server.base_url}/v1", "api_key": "any", "max_retries": 0}
        return kind(**(own | more))

    return make


@pytest.fixture(scope="module")
def client(server, make_client):
    with make_client(server) as client:
        yield client


@pytest.fixture(scope="module")
def spare():
    """A model for servers with settings of their own, one at a time."""
    return chordal.load("tiny-ar")


LONG = {"model": "tiny-ar", "prompt": ASK, "max_tokens": 1000, **WRITES_ON}


def run(server, make_client, work, **more):
    """Run a coroutine with an asynchronous client."""

    async def main():
        async with make_client(server, openai.AsyncOpenAI, **more) as client:
            return await work(client)

    return asyncio.run(main())


def wait_running(server, num=1, seconds=20):
    end = time.monotonic() + seconds
    while server.worker.num_running < num:
        assert time.monotonic() < end, "nothing began"
        time.sleep(0.005)


def usage_of(answer):
    return [getattr(answer.usage, name) for name in COUNTS]


def joined(chunks, index=0):
    """Join the text of one answer of a stream."""
    mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join((one.delta.content if hasattr(one, "delta") else one.text) or "" for one in mine)


def reasons(chunks, index=0):
    mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return [choice.finish_reason for choice in mine if choice.finish_reason]


# Texts and counts.


@pytest.mark.parametrize("case", CASES)
def test_chat_is_what_the_library_gives(client, server, make_client, library, case):
    model, fields, settings = CASES[case]
    [expected] = library[model].generate(ASK, max_new_tokens=16, **settings)
    counts = [expected.num_prompt, len(expected.tokens), expected.num_prompt + len(expected.tokens)]
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 16, **fields}

    def check(text, reason, usage):
        assert (text, reason, usage) == (expected.text, expected.finish_reason, counts)

    answer = client.chat.completions.create(**asked)
    check(answer.choices[0].message.content, answer.choices[0].finish_reason, usage_of(answer))
    *chunks, last = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    check(joined(chunks), *reasons(chunks), usage_of(last))
    assert last.choices == [] and all(chunk.usage is None for chunk in chunks)

    async def both(client):
        answer = await client.chat.completions.create(**asked)
        stream = await client.chat.completions.create(**asked, stream=True)
        return answer, [chunk async for chunk in stream]

    answer, chunks = run(server, make_client, both)
    check(answer.choices[0].message.content, answer.choices[0].finish_reason, usage_of(answer))
    check(joined(chunks), *reasons(chunks), counts)


@pytest.mark.parametrize("case", CASES)
def test_completion_is_what_the_library_gives(client, server, make_client, library, case):
    model, fields, settings = CASES[case]
    tokenizer = library[model].tokenizer
    prompt = tokenizer(ASK)["input_ids"]
    [expected] = library[model].generate([prompt], max_new_tokens=16, **settings)
    counts = [len(prompt), len(expected.tokens), len(prompt) + len(expected.tokens)]
    asked = {"model": model, "prompt": ASK, "max_tokens": 16, **fields}

    def check(text, reason, usage):
        # What continues a text keeps the space it begins with.
        assert text.removeprefix(" ") == expected.text.removeprefix(" ")
        assert (reason, usage) == (expected.finish_reason, counts)

    answer = client.completions.create(**asked)
    check(answer.choices[0].text, answer.choices[0].finish_reason, usage_of(answer))
    if expected.stop_reason is None:
        assert ASK + answer.choices[0].text == tokenizer.decode(
            prompt + expected.tokens, skip_special_tokens=True
        )
    *chunks, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert joined(chunks) == answer.choices[0].text
    check(joined(chunks), *reasons(chunks), usage_of(last))

    async def both(client):
        whole = await client.completions.create(**{**asked, "prompt": prompt})
        stream = await client.completions.create(**asked, stream=True)
        return whole, [chunk async for chunk in stream]

    whole, chunks = run(server, make_client, both)
    check(whole.choices[0].text, whole.choices[0].finish_reason, usage_of(whole))
    check(joined(chunks), *reasons(chunks), counts)


def test_chat_goes_on_with_the_answer_that_was_given(client, library):
    """Programs send the object back as they got it."""
    first = client.chat.completions.create(model="tiny-ar", messages=MESSAGES, temperature=0)
    turns = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "copy: Mia Leo"}]
    second = client.chat.completions.create(model="tiny-ar", messages=turns, temperature=0, max_tokens=16)
    said = [*MESSAGES, {"role": "assistant", "content": ANSWER}, turns[-1]]
    [expected] = library["tiny-ar"].generate(said, max_new_tokens=16)
    assert second.choices[0].message.content == expected.text
    assert second.usage.prompt_tokens == expected.num_prompt


def test_chat_goes_on_after_an_empty_answer(client, library):
    end = library["tiny-ar"].tokenizer.eos_token_id
    first = client.chat.completions.create(
        model="tiny-ar", messages=MESSAGES, temperature=0, logit_bias={str(end): 100}
    )
    assert (first.choices[0].message.content, first.usage.completion_tokens) == ("", 1)
    turns = [*MESSAGES, first.choices[0].message, *MESSAGES]
    second = client.chat.completions.create(model="tiny-ar", messages=turns, temperature=0, max_tokens=16)
    said = [*MESSAGES, {"role": "assistant", "content": ""}, *MESSAGES]
    [expected] = library["tiny-ar"].generate(said, max_new_tokens=16)
    assert second.choices[0].message.content == expected.text


@pytest.mark.parametrize("model", ["tiny-ar", "tiny-mdm"])
def test_answers_to_one_prompt_have_seeds_that_follow(client, library, model):
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 12, "n": 3, **SAMPLED}
    expected = [
        library[model].generate(ASK, max_new_tokens=12, temperature=1.2, seed=11 + at)[0] for at in range(3)
    ]
    answer = client.chat.completions.create(**asked)
    assert [choice.message.content for choice in answer.choices] == [one.text for one in expected]
    assert answer.usage.completion_tokens == sum(len(one.tokens) for one in expected)
    assert answer.usage.prompt_tokens == expected[0].num_prompt
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert [joined(chunks, at) for at in range(3)] == [one.text for one in expected]
    assert [reasons(chunks, at) for at in range(3)] == [[one.finish_reason] for one in expected]


def test_prompts_of_one_request_are_answered_in_order(client, library):
    tokenizer = library["tiny-ar"].tokenizer
    texts = [ASK, "copy: Mia Leo", "sort: Leo Ana"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    expected = library["tiny-ar"].generate(ids, max_new_tokens=8)
    for prompts in (texts, ids):
        asked = {"model": "tiny-ar", "prompt": prompts, "max_tokens": 8, "temperature": 0, "n": 2}
        answer = client.completions.create(**asked)
        assert [choice.index for choice in answer.choices] == list(range(6))
        found = [choice.text.removeprefix(" ") for choice in answer.choices]
        assert found == [one.text for one in expected for _ in range(2)]
        total = sum(len(one.tokens) for one in expected)
        assert usage_of(answer)[:2] == [sum(map(len, ids)), 2 * total]
        chunks = list(client.completions.create(**asked, stream=True))
        assert [joined(chunks, at) for at in range(6)] == [choice.text for choice in answer.choices]


@pytest.mark.parametrize("model", ["tiny-ar", "tiny-mdm"])
def test_seed_gives_the_same_answer_twice_and_beside_others(client, server, make_client, model):
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 24, **SAMPLED, **WRITES_ON}
    alone = [client.chat.completions.create(**asked).choices[0].message.content for _ in range(2)]
    assert alone[0] == alone[1]

    async def crowd(client):
        others = [
            client.completions.create(model=name, prompt=ASK, max_tokens=8 + 5 * at, **WRITES_ON)
            for name in ("tiny-ar", "tiny-mdm")
            for at in range(6)
        ]
        mine = [client.chat.completions.create(**asked) for _ in range(3)]
        return (await asyncio.gather(*others[:6], *mine, *others[6:]))[6:9]

    beside = run(server, make_client, crowd)
    assert {answer.choices[0].message.content for answer in beside} == {alone[0]}


# Log-probabilities.


@pytest.mark.parametrize(
    ("model", "vendor", "settings"),
    [
        ("tiny-ar", {}, {}),
        ("tiny-ar", LOOKUP, {"decoder": "prompt_lookup"}),
        ("tiny-ar", {"decoder": "draft_model"}, {"decoder": "draft_model"}),
        ("tiny-mdm", {}, {}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_the_library(client, library, model, vendor, settings, stream):
    tokenizer = library[model].tokenizer
    law = {"temperature": 0.8, "seed": 11}
    settings = {"max_new_tokens": 12, "logprobs": 3, **law, **settings}
    fields = {"model": model, "max_tokens": 12, **law, "extra_body": {"chordal": vendor}}

    def logprobs_of(answer):
        told = [choice.logprobs for chunk in answer for choice in chunk.choices if choice.logprobs]
        return told if stream else told[:1]

    [expected] = library[model].generate(ASK, **settings)
    answer = client.chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=3, stream=stream, **fields
    )
    told = logprobs_of(answer if stream else [answer])
    content = [entry for one in told for entry in one.content]
    written = b"".join(bytes(entry.bytes) for entry in content).decode()
    assert written == " " + tokenizer.decode(expected.tokens)
    assert [bytes(entry.bytes).decode() for entry in content] == [entry.token for entry in content]
    for entry, ours in zip(content, expected.logprobs, strict=True):
        assert entry.logprob == pytest.approx(ours.logprob, abs=1e-3)
        likely = [logprob for _, logprob in ours.top]
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(likely, abs=1e-3)

    prompt = tokenizer(ASK)["input_ids"]
    [expected] = library[model].generate([prompt], **settings)
    answer = client.completions.create(prompt=ASK, logprobs=3, stream=stream, **fields)
    told = logprobs_of(answer if stream else [answer])
    tokens = [token for one in told for token in one.tokens]
    assert "".join(tokens) == tokenizer.decode(prompt + expected.tokens)[len(ASK) :]
    found = [logprob for one in told for logprob in one.token_logprobs]
    assert found == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-3)
    tops = [top for one in told for top in one.top_logprobs]
    assert all(3 <= len(top) <= 4 and token in top for token, top in zip(tokens, tops, strict=True))
    offsets = [offset for one in told for offset in one.text_offset]
    assert offsets == [len("".join(tokens[:at])) for at in range(len(tokens))]


def test_greedy_token_is_the_likeliest_of_those_told(client):
    answer = client.chat.completions.create(
        model="tiny-ar", messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=5
    )
    for entry in answer.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 5
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob


# Answers of a given form.


@pytest.mark.parametrize("vendor", [{}, LOOKUP])
def test_json_object_is_a_form(client, library, vendor):
    # Left to itself so small a model would open strings and never close them.
    close = library["tiny-ar"].tokenizer.convert_tokens_to_ids("}")
    answer = client.chat.completions.create(
        model="tiny-ar",
        messages=MESSAGES,
        response_format={"type": "json_object"},
        logit_bias={str(close): 100},
        temperature=0,
        extra_body={"chordal": vendor},
    )
    [choice] = answer.choices
    assert (json.loads(choice.message.content), choice.finish_reason) == ({}, "stop")


@pytest.mark.parametrize("vendor", [{}, LOOKUP, {"decoder": "draft_model"}])
def test_class_is_a_form_and_comes_back_as_an_object(client, server, make_client, vendor):
    asked = {
        "model": "tiny-ar",
        "messages": MESSAGES,
        "response_format": Answer,
        "max_tokens": 200,
        **SAMPLED,
        "extra_body": {"chordal": vendor},
    }
    answer = client.chat.completions.parse(**asked)
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Answer)
    assert choice.message.parsed == Answer.model_validate_json(choice.message.content)
    with client.chat.completions.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == choice.message.parsed
    again = run(server, make_client, lambda client: client.chat.completions.parse(**asked))
    assert again.choices[0].message.parsed == choice.message.parsed


def test_schema_is_a_form(client):
    schema = {"type": "array", "items": {"enum": ["Ana", 7]}, "minItems": 2, "maxItems": 2}
    answer = client.chat.completions.create(
        model="tiny-ar",
        messages=MESSAGES,
        response_format={"type": "json_schema", "json_schema": {"name": "two", "schema": schema}},
        max_tokens=100,
        temperature=0,
    )
    found = pydantic.TypeAdapter(list[Literal["Ana", 7]]).validate_json(answer.choices[0].message.content)
    assert len(found) == 2


def test_form_that_is_cut_off_is_known_to_be(client):
    """The client raises an error of its own for this reason to end."""
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="tiny-ar", messages=MESSAGES, response_format=Answer, max_tokens=3
        )


def test_form_of_a_diffusion_model_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="autoregressive") as caught:
        client.chat.completions.parse(model="tiny-mdm", messages=MESSAGES, response_format=Answer)
    assert caught.value.param == "response_format"


# Streams.


def test_stream_helper_tells_events_and_the_whole(client, server, make_client, library):
    [expected] = library["tiny-ar"].generate(ASK, max_new_tokens=16)
    asked = {"model": "tiny-ar", "messages": MESSAGES, "temperature": 0, "max_tokens": 16}
    with client.chat.completions.stream(**asked, logprobs=True) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event.delta for event in events if event.type == "content.delta"]
    assert "".join(deltas) == expected.text
    [done] = [event for event in events if event.type == "content.done"]
    assert done.content == final.choices[0].message.content == expected.text
    assert final.choices[0].finish_reason == "stop"
    assert len(final.choices[0].logprobs.content) == len(expected.tokens)

    async def helper(client):
        options = {"include_usage": True}
        async with client.chat.completions.stream(**asked, stream_options=options) as stream:
            return await stream.get_final_completion()

    final = run(server, make_client, helper)
    assert final.choices[0].message.content == expected.text
    assert final.usage.completion_tokens == len(expected.tokens)


def test_counts_and_events_come_through(client):
    vendor = {"chordal": {"decoder": "draft_model", "counts": True, "events": True}}
    chunks = list(
        client.chat.completions.create(
            model="tiny-ar", messages=MESSAGES, temperature=0, stream=True, extra_body=vendor
        )
    )
    told = [choice.chordal for chunk in chunks for choice in chunk.choices if hasattr(choice, "chordal")]
    kinds = {event["kind"] for one in told for event in one.get("events", [])}
    assert kinds == {"commit", "draft"}
    counts = told[-1]["counts"]
    assert counts["committed_tokens"] == 5
    assert 0 < counts["forwards"] < 5


@contextmanager
def stream_opened(client, **fields):
    stream = client.completions.create(**LONG, stream=True, **fields)
    next(iter(stream))
    yield stream


@pytest.mark.parametrize("n", [1, 3])
def test_stream_that_is_closed_early_ends_its_work(client, server, slow, n):
    with stream_opened(client, n=n) as stream:
        assert server.worker.num_running == n
        stream.close()
    server.wait_idle()


def test_stream_that_is_left_ends_its_work(server, make_client, slow):
    async def leave(client):
        async with await client.completions.create(**LONG, stream=True) as stream:
            async for _ in stream:
                break
        assert await asyncio.to_thread(server.wait_idle) is None

    run(server, make_client, leave)


def test_task_that_is_cancelled_ends_its_work(server, make_client, slow):
    """Of a whole answer, while the server decodes it."""

    async def cancel(client):
        task = asyncio.ensure_future(client.completions.create(**LONG))
        await asyncio.to_thread(wait_running, server)
        task.cancel()
        await asyncio.wait({task})
        await asyncio.to_thread(server.wait_idle)

    run(server, make_client, cancel)


def test_error_in_a_stream_is_raised(client, server, monkeypatch):
    plain = Autoregressive.decode

    def decode(self, seq):
        steps = plain(self, seq)
        reading = yield next(steps)
        for _ in range(3):
            reading = yield steps.send(reading)
        raise DecodingError("logits that are not finite")

    monkeypatch.setattr(Autoregressive, "decode", decode)
    with pytest.raises(openai.APIError, match="not finite") as caught:
        list(client.chat.completions.create(model="tiny-ar", messages=MESSAGES, stream=True, **WRITES_ON))
    assert caught.value.type == "internal_server_error"
    monkeypatch.undo()
    answer = client.chat.completions.create(model="tiny-ar", messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == ANSWER


# Models, headers and errors.


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["tiny-ar", "tiny-mdm", "tiny-block"]
    model = client.models.retrieve("tiny-mdm")
    assert (model.id, model.object) == ("tiny-mdm", "model")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


def test_raw_response_has_the_id_of_the_request(client):
    asked = {"model": "tiny-ar", "messages": MESSAGES, "temperature": 0}
    raw = client.chat.completions.with_raw_response.create(**asked, extra_headers={"X-Request-Id": "abc-1"})
    assert raw.headers["x-request-id"] == "abc-1"
    assert raw.parse().choices[0].message.content == ANSWER
    own = client.chat.completions.create(**asked)
    assert own._request_id not in (None, "abc-1")
    with client.completions.with_streaming_response.create(
        model="tiny-ar", prompt=ASK, max_tokens=4, stream=True
    ) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.headers["x-request-id"]
        assert list(streamed.iter_lines())[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"chordal": {"decoder": "prompt_lockup"}}}, "chordal.decoder"),
        ({"extra_body": {"chordal": {"decoder": "threshold"}}}, "chordal.decoder"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_request_names_its_field(client, fields, param, stream):
    asked = {"model": "tiny-ar", "messages": MESSAGES, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked, stream=stream)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_model_that_is_not_served_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="tiny-arr", prompt=ASK)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    assert "tiny-ar" in caught.value.message


def test_key_is_asked_for(make_server, make_client, spare):
    with (
        make_server({"tiny-ar": spare}, api_keys=("right-key",)) as closed,
        make_client(closed, api_key="right-key") as client,
    ):
        stranger = client.with_options(api_key="wrong-key")
        for call in (
            stranger.models.list,
            lambda: stranger.completions.create(model="tiny-ar", prompt=ASK),
            lambda: stranger.completions.create(model="tiny-ar", prompt=ASK, stream=True),
        ):
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert caught.value.type == "authentication_error"
            assert "wrong-key" not in str(caught.value)
        answer = client.chat.completions.create(model="tiny-ar", messages=MESSAGES, temperature=0)
        assert answer.choices[0].message.content == ANSWER


def test_full_queue_is_a_rate_limit_and_the_client_waits_for_its_turn(make_server, make_client, spare, slow):
    with (
        make_server({"tiny-ar": spare}, max_num_seqs=1, max_queue=0) as small,
        make_client(small) as client,
        stream_opened(client) as stream,
    ):
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**LONG)
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        # As it comes, the client tries again when it is told to.
        free = threading.Timer(0.2, stream.close)
        free.start()
        short = {**LONG, "max_tokens": 2}
        answer = client.with_options(max_retries=5).completions.create(**short)
        assert answer.usage.completion_tokens == 2
        free.join()


def test_client_that_waits_no_longer_ends_its_work(client, server, slow):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(**LONG, n=2)
    server.wait_idle()


def test_deadline_of_a_request_is_an_error_that_is_not_tried_again(client, server, slow, monkeypatch):
    """A client that retries what our side fails at would take as long once more, and once more."""
    submitted, submit = [], server.worker.submit
    monkeypatch.setattr(
        server.worker, "submit", lambda *args, **more: submitted.append(args) or submit(*args, **more)
    )
    vendor = {**WRITES_ON["extra_body"], "chordal": {"timeout": 0.1}}
    with pytest.raises(openai.InternalServerError) as caught:
        client.with_options(max_retries=2).completions.create(**LONG | {"extra_body": vendor})
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    assert len(submitted) == 1
    server.wait_idle()


def test_server_that_ends_takes_nothing_new(make_server, make_client, spare, slow):
    with make_server({"tiny-ar": spare}) as ending, make_client(ending) as client:
        short = LONG | {"max_tokens": 10}
        stream = client.completions.create(**short, stream=True, stream_options={"include_usage": True})
        next(iter(stream))
        ending.worker.drain()
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**short)
        assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
        assert caught.value.response.headers["retry-after"]
        *_, last = stream
        assert last.usage.completion_tokens == 10  # what runs goes on to its end


def test_server_that_is_not_there_is_a_connection_error(server, make_client):
    with (
        make_client(server, base_url="http://127.0.0.1:9/v1") as nobody,
        pytest.raises(openai.APIConnectionError),
    ):
        nobody.models.list()
