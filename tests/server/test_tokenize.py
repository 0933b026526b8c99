from __future__ import annotations

import pytest

TEXT = "hello w\u00f6rld \U0001f600\nx"


def test_text_goes_to_tokens_and_back(server, models):
    got = server.post("/tokenize", {"prompt": TEXT, "return_token_strs": True}).json()
    assert got["tokens"] == models["tiny-ar"].tokenizer(TEXT)["input_ids"]
    assert got["count"] == len(got["tokens"]) == len(got["token_strs"])
    assert got["max_model_len"] == 1024
    assert server.post("/detokenize", {"tokens": got["tokens"]}).json() == {"prompt": TEXT}


@pytest.mark.parametrize("model", ["tiny-ar", "tiny-mdm", "tiny-block"])
@pytest.mark.parametrize("text", [TEXT, "Ana", "a  b\t\tc\n\n", "copy: Ana<|end|>", "\u4e2d\u6587 \u00e9"])
def test_every_model_gives_back_the_text(server, model, text):
    tokens = server.post("/tokenize", {"model": model, "prompt": text}).json()["tokens"]
    got = server.post("/detokenize", {"model": model, "tokens": tokens})
    assert got.json() == {"prompt": text}


def test_special_tokens_of_a_text_are_tokens(server):
    """Evaluation tools find the id of the stop token so."""
    info = server.client.get("/tokenizer_info").json()
    assert (
        server.post("/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False}).json()["count"]
        == 1
    )
    assert info["bos_token"] is None
    assert "message" in info["chat_template"]


def test_messages_are_tokenized_as_a_chat_is(server):
    turns = [{"role": "user", "content": "hi <|end|>"}]
    got = server.post("/tokenize", {"messages": turns}).json()["tokens"]
    assert got == server.chat(messages=turns, return_token_ids=True)["prompt_token_ids"]


def test_empty_text_has_no_tokens(server):
    assert server.post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "nope": True}, "nope"),
        ("/detokenize", {"tokens": [890]}, "tokens"),
        ("/detokenize", {"tokens": [10**15]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_wrong_value_is_refused_with_its_field(server, path, body, param):
    response = server.post(path, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_model_that_is_not_served_is_not_found(server, path):
    body = {"prompt": "a"} if path == "/tokenize" else {"tokens": [5]}
    assert server.post(path, {**body, "model": "nope"}).status_code == 404
