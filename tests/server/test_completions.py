from __future__ import annotations

import json

import numpy as np
import pytest
import torch

PROMPT = "reverse: Ana Ben Cleo Dan"


def refusal(server, status=400, **fields):
    """Give the error of a completion that is refused."""
    response = server.post("/v1/completions", {"model": "tiny-ar", "prompt": PROMPT} | fields)
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_answer_has_the_form_of_openai(server):
    answer = server.complete()
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny-ar")
    [choice] = answer["choices"]
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


def test_text_is_what_the_library_gives(server, models):
    ids = models["tiny-ar"].tokenizer(PROMPT)["input_ids"]
    answer = server.complete(ids, return_token_ids=True)["choices"][0]
    [plain] = models["tiny-ar"].generate([ids], max_new_tokens=8)
    assert answer["token_ids"] == plain.tokens
    assert answer["prompt_token_ids"] == ids


def test_prompt_and_answer_join_without_a_lost_space(server, models):
    answer = server.complete(echo=True, return_token_ids=True)["choices"][0]
    tokens = answer["prompt_token_ids"] + answer["token_ids"]
    assert answer["text"] == models["tiny-ar"].tokenizer.decode(tokens)


def test_several_prompts_with_several_answers_each_are_in_order(server):
    prompts = [PROMPT, "sort: c b a"]
    both = server.complete(prompts, n=2, temperature=1, seed=5, return_token_ids=True)
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    for at, prompt in enumerate(prompts):
        alone = server.complete(prompt, n=2, temperature=1, seed=5, return_token_ids=True)
        for one, other in zip(both["choices"][2 * at :], alone["choices"], strict=False):
            assert one["token_ids"] == other["token_ids"]
    assert both["usage"]["completion_tokens"] == sum(len(one["token_ids"]) for one in both["choices"])
    assert both["usage"]["prompt_tokens"] == sum(
        len(both["choices"][at]["prompt_token_ids"]) for at in (0, 2)
    )


def test_first_of_several_answers_is_the_one_that_is_given_alone(server):
    alone = server.complete(temperature=1, seed=9, max_tokens=16)
    several = server.complete(temperature=1, seed=9, max_tokens=16, n=3)
    texts = [choice["text"] for choice in several["choices"]]
    assert texts[0] == alone["choices"][0]["text"]
    assert len(set(texts)) > 1


def test_same_seed_gives_the_same_answer(server):
    answers = {
        server.complete(temperature=1, seed=-(2**63), max_tokens=16)["choices"][0]["text"] for _ in range(3)
    }
    assert len(answers) == 1


def test_without_a_seed_answers_differ_and_counts_tell_it(server):
    chosen = {"temperature": 1.5, "max_tokens": 24}
    one, other = (server.complete(**chosen, chordal={"counts": True})["choices"][0] for _ in range(2))
    assert one["text"] != other["text"]
    again = server.complete(**chosen, seed=one["chordal"]["counts"]["seed"])
    assert again["choices"][0]["text"] == one["text"]


def test_temperature_that_is_left_out_is_one(server):
    fields = {"seed": 3, "max_tokens": 16}
    body = {"model": "tiny-ar", "prompt": PROMPT, **fields}
    default = server.post("/v1/completions", body).json()
    assert default["choices"][0]["text"] == server.complete(temperature=1, **fields)["choices"][0]["text"]


def test_search_takes_temperature_zero_if_none_is_given(server):
    body = {"model": "tiny-ar", "prompt": PROMPT, "max_tokens": 4}
    search = {"decoder": "diverse_beam"}
    assert server.post("/v1/completions", {**body, "chordal": search}).status_code == 200
    assert refusal(server, temperature=1, chordal=search)["param"] == "chordal.decoder"


def test_logprobs_of_prompt_and_answer_are_those_of_the_model(server, models):
    """The model's own log-softmax, taken by transformers without a cache."""
    answer = server.complete(echo=True, logprobs=3, return_token_ids=True)["choices"][0]
    tokens = answer["prompt_token_ids"] + answer["token_ids"]
    backbone = models["tiny-ar"].engine.target.model
    with torch.no_grad():
        expected = backbone(torch.tensor([tokens])).logits[0].double().log_softmax(-1).numpy()
    got = answer["logprobs"]
    assert got["token_logprobs"][0] is None and got["top_logprobs"][0] is None
    own = expected[np.arange(len(tokens) - 1), tokens[1:]]
    assert got["token_logprobs"][1:] == pytest.approx(own, abs=2e-3)
    likeliest = np.sort(expected[:-1], axis=1)[:, -3:]
    for told, best in zip(got["top_logprobs"][1:], likeliest, strict=True):
        assert sorted(told.values())[-3:] == pytest.approx(best, abs=2e-3)
        assert 3 <= len(told) <= 4


def test_prompt_alone_is_scored_as_evaluation_tools_ask(server):
    with_one = server.complete(echo=True, logprobs=1, max_tokens=1)["choices"][0]
    alone = server.complete(echo=True, logprobs=1, max_tokens=0)
    assert alone["choices"][0]["text"] == PROMPT
    assert alone["choices"][0]["finish_reason"] == "length"
    assert alone["usage"]["completion_tokens"] == 0
    own = alone["choices"][0]["logprobs"]["token_logprobs"]
    assert own[1:] == pytest.approx(with_one["logprobs"]["token_logprobs"][1:-1], abs=1e-4)
    assert len(with_one["logprobs"]["tokens"]) == len(own) + 1


def test_long_prompt_is_scored_as_a_short_one(server, models):
    """Prompts longer than what is read in one pass give the same as the model at once."""
    tokens = np.random.default_rng(0).integers(5, 800, 700).tolist()
    answer = server.complete(tokens, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    with torch.no_grad():
        logits = models["tiny-ar"].engine.target.model(torch.tensor([tokens])).logits[0]
    expected = logits.double().log_softmax(-1)[torch.arange(699), torch.tensor(tokens[1:])]
    assert answer["logprobs"]["token_logprobs"][1:] == pytest.approx(expected.numpy(), abs=5e-3)


def test_prompt_of_one_token_is_scored(server):
    got = server.complete([7], echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]
    assert got["token_logprobs"] == [None]


def test_prompt_without_tokens_to_write_or_score_is_echoed(server):
    answer = server.complete(echo=True, max_tokens=0)
    assert answer["choices"][0]["text"] == PROMPT


def test_offsets_find_the_tokens_in_the_text(server):
    choice = server.complete(echo=True, logprobs=0)["choices"][0]
    text, got = choice["text"], choice["logprobs"]
    for token, start in zip(got["tokens"][1:], got["text_offset"][1:], strict=True):
        assert text[start:].startswith(token)


def test_scoring_a_prompt_needs_an_autoregressive_model(server):
    error = refusal(server, model="tiny-mdm", echo=True, logprobs=1, max_tokens=1)
    assert error["param"] == "logprobs"
    assert "autoregressive" in error["message"]


@pytest.mark.parametrize("chordal", [{}, {"decoder": "draft_model"}, {"decoder": "prompt_lookup"}])
def test_logprobs_while_speculating_are_those_of_plain_decoding(server, chordal):
    plain = server.complete(logprobs=2, max_tokens=16)["choices"][0]["logprobs"]
    drafted = server.complete(logprobs=2, max_tokens=16, chordal=chordal)["choices"][0]["logprobs"]
    assert drafted["tokens"] == plain["tokens"]
    assert drafted["token_logprobs"] == pytest.approx(plain["token_logprobs"], abs=1e-3)


@pytest.mark.parametrize("model", ["tiny-mdm", "tiny-block"])
def test_logprobs_while_diffusing_are_told_for_every_token(server, model):
    got = server.complete(model=model, logprobs=1, max_tokens=8, ignore_eos=True)["choices"][0]["logprobs"]
    assert len(got["tokens"]) == 8
    assert all(number <= 0 for number in got["token_logprobs"])


@pytest.mark.parametrize("model", ["tiny-ar", "tiny-mdm", "tiny-block"])
def test_limit_is_never_passed_and_usage_is_exact(server, model):
    for num in (1, 3, 7):
        answer = server.complete(model=model, max_tokens=num, ignore_eos=True, return_token_ids=True)
        assert len(answer["choices"][0]["token_ids"]) == num == answer["usage"]["completion_tokens"]
        assert answer["choices"][0]["finish_reason"] == "length"


def test_answer_without_a_limit_has_64_tokens(server):
    body = {"model": "tiny-ar", "prompt": PROMPT, "temperature": 0, "ignore_eos": True}
    assert server.post("/v1/completions", body).json()["usage"]["completion_tokens"] == 64


def test_stop_token_is_counted_and_told(server):
    plain = server.complete(max_tokens=16, return_token_ids=True)["choices"][0]["token_ids"]
    stopped = server.complete(max_tokens=16, return_token_ids=True, stop_token_ids=[plain[2]])
    [choice] = stopped["choices"]
    end = plain.index(plain[2]) + 1
    assert choice["token_ids"] == plain[:end]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", plain[2])
    assert stopped["usage"]["completion_tokens"] == end


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_is_told_and_left_in_the_text_only_if_asked(server, include):
    text = server.complete(max_tokens=16)["choices"][0]["text"]
    stop = text[5:8]
    [choice] = server.complete(max_tokens=16, stop=["@@", stop], include_stop_str_in_output=include)[
        "choices"
    ]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["text"] == text[: text.index(stop) + (len(stop) if include else 0)]


def test_stop_string_of_the_prompt_ends_nothing(server):
    plain = server.complete(max_tokens=4)
    assert server.complete(max_tokens=4, stop="Ana Ben Cleo")["choices"] == plain["choices"]


def test_bias_forces_and_bans_tokens(server):
    forced = server.complete(max_tokens=3, logit_bias={"300": 100}, return_token_ids=True)
    assert forced["choices"][0]["token_ids"] == [300] * 3
    plain = server.complete(max_tokens=3, return_token_ids=True)["choices"][0]["token_ids"]
    banned = server.complete(max_tokens=3, logit_bias={str(plain[0]): -100}, return_token_ids=True)
    assert plain[0] not in banned["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    "fields", [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 5}]
)
@pytest.mark.parametrize("model", ["tiny-ar", "tiny-mdm"])
def test_penalties_change_a_text_that_repeats(server, model, fields):
    chosen = {"model": model, "max_tokens": 24, "temperature": 2, "seed": 1, "return_token_ids": True}
    assert server.complete(**chosen, **fields)["choices"] != server.complete(**chosen)["choices"]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e-30},
        {"temperature": 1e30},
        {"temperature": 1e300},
        {"top_p": 1e-30, "temperature": 1},
        {"min_p": 1, "temperature": 1},
        {"top_k": 2**62, "temperature": 1},
        {"top_k": -1},
        {"top_k": 0},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100},
        {"seed": 2**63 - 1, "temperature": 1, "n": 2},
        {"user": "a\nb\x1b[0m"},
        {"truncate_prompt_tokens": 2},
        {"truncate_prompt_tokens": 10**18},
    ],
)
@pytest.mark.parametrize("model", ["tiny-ar", "tiny-mdm"])
def test_extreme_values_in_range_are_decoded(server, model, fields):
    answer = server.complete(model=model, max_tokens=4, ignore_eos=True, **({"temperature": 0} | fields))
    assert answer["usage"]["completion_tokens"] == 4 * fields.get("n", 1)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [5, 890]}, "prompt"),
        ({"prompt": [[5], [10**15]]}, "prompt.1"),
        ({"logit_bias": {"890": 1}}, "logit_bias"),
        ({"stop_token_ids": [890]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"stop": "x" * 100_000}, "stop"),
        ({"n": 17}, "n"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"chordal": {"decoder": "drafty"}}, "chordal.decoder"),
        ({"chordal": {"decoder": "threshold"}}, "chordal.decoder"),
        ({"chordal": {"decoder": "specmquant"}}, "chordal.decoder"),
        (
            {"chordal": {"decoder": "prompt_lookup", "settings": {"num_drafts": 3}}},
            "chordal.settings.num_drafts",
        ),
        (
            {"chordal": {"decoder": "prompt_lookup", "settings": {"num_draft": 0.5}}},
            "chordal.settings.num_draft",
        ),
        (
            {"chordal": {"decoder": "prompt_lookup", "settings": {"num_draft": -1}}},
            "chordal.settings.num_draft",
        ),
        (
            {"chordal": {"decoder": "prompt_lookup", "settings": {"num_draft": 65}}},
            "chordal.settings.num_draft",
        ),
        (
            {"chordal": {"decoder": "jacobi", "settings": {"num_branches": 10**9}}},
            "chordal.settings.num_branches",
        ),
        ({"chordal": {"decoder": "aded", "settings": {"corpus": "/etc/passwd"}}}, "chordal.settings.corpus"),
        (
            {"chordal": {"decoder": "first_finish", "settings": {"answer": "(a+)+b"}}},
            "chordal.settings.answer",
        ),
        ({"chordal": {"decoder": "rsd", "settings": {"widths": "9999,9"}}}, "chordal.settings.widths"),
        (
            {"chordal": {"decoder": "token_recycling", "settings": {"tree": "99999999"}}},
            "chordal.settings.tree",
        ),
        ({"chordal": {"settings": {"threshold": 1}}}, "chordal.settings.threshold"),
    ],
)
def test_what_the_model_or_the_server_cannot_take_is_refused_with_its_field(server, fields, param):
    assert refusal(server, **fields)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [5, 1, 6]}, "prompt"),  # the mask token
        ({"prompt": "x <|mask|> y"}, "prompt"),
        ({"chordal": {"decoder": "autoregressive"}}, "chordal.decoder"),
        ({"chordal": {"settings": {"block_length": 10**6}}}, "chordal.settings.block_length"),
        ({"chordal": {"settings": {"num_steps": 0}}}, "chordal.settings.num_steps"),
        (
            {"chordal": {"decoder": "threshold", "settings": {"threshold": "high"}}},
            "chordal.settings.threshold",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_a_diffusion_model_cannot_take_is_refused_with_its_field(server, fields, param):
    assert refusal(server, model="tiny-mdm", **fields)["param"] == param


@pytest.mark.parametrize("name", ["", "nope", "tiny-ar\n", "gpt-4"])
def test_model_that_is_not_served_is_not_found(server, name):
    error = refusal(server, status=404, model=name)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_request_that_names_no_model_gets_the_first(server):
    response = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1})
    assert response.json()["model"] == "tiny-ar"


def test_prompt_and_answer_may_fill_the_window_and_no_more(server, models):
    window = models["tiny-ar"].engine.target.window
    prompt = [7] * (window - 4)
    exactly = server.complete(prompt, max_tokens=4, ignore_eos=True)
    assert exactly["usage"]["total_tokens"] == window
    error = refusal(server, prompt=prompt, max_tokens=5)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert str(window) in error["message"] and str(window - 4) in error["message"]
    for num in (window, window + 1, 3 * window):
        assert refusal(server, prompt=[7] * num)["code"] == "context_length_exceeded"
    assert refusal(server, prompt=[7], max_tokens=10**18)["code"] == "context_length_exceeded"
    rest = server.complete(prompt, max_tokens=None, ignore_eos=True)
    assert rest["usage"]["completion_tokens"] == 4


def test_whole_window_may_be_scored(server, models):
    window = models["tiny-ar"].engine.target.window
    got = server.complete([7] * window, echo=True, logprobs=0, max_tokens=0)
    assert len(got["choices"][0]["logprobs"]["tokens"]) == window


def test_truncated_prompt_keeps_its_last_tokens(server):
    got = server.complete([7, 8, 9, 10], truncate_prompt_tokens=2, return_token_ids=True)
    assert got["choices"][0]["prompt_token_ids"] == [9, 10]
    assert got["usage"]["prompt_tokens"] == 2


def test_special_tokens_are_shown_only_if_asked(server):
    fields = {"logit_bias": {"4": 100}, "max_tokens": 2}
    assert server.complete(**fields)["choices"][0]["text"] == ""
    shown = server.complete(**fields, skip_special_tokens=False)["choices"][0]["text"]
    assert shown == "<|assistant|>" * 2


def test_id_of_the_request_is_part_of_the_answers_id(server):
    assert server.complete(request_id="abc.1")["id"] == "cmpl-abc.1"


def test_counts_add_up(server):
    drafting = {"decoder": "prompt_lookup", "counts": True}
    [choice] = server.complete("a b c d a b c d a b", max_tokens=16, ignore_eos=True, chordal=drafting)[
        "choices"
    ]
    told = choice["chordal"]
    assert (told["decoder"], told["promise"]) == ("prompt_lookup", "exact")
    counts = told["counts"]
    assert counts["committed_tokens"] == 16
    assert counts["tokens_per_forward"] == pytest.approx(16 / counts["forwards"], abs=1e-3)
    assert counts["acceptance_rate"] == pytest.approx(counts["accepted_tokens"] / counts["draft_tokens"])
    assert counts["queue_s"] >= 0


@pytest.mark.parametrize("decoder", ["draft_model", "prompt_lookup", "jacobi", "token_recycling"])
def test_exact_decoders_give_the_same_answer(server, decoder):
    plain = server.complete(max_tokens=24)["choices"][0]["text"]
    assert server.complete(max_tokens=24, chordal={"decoder": decoder})["choices"][0]["text"] == plain


def test_settings_of_a_decoder_have_an_effect(server):
    def forwards(**settings):
        options = {"decoder": "threshold", "settings": settings, "counts": True}
        answer = server.complete(model="tiny-mdm", max_tokens=16, ignore_eos=True, chordal=options)
        return answer["choices"][0]["chordal"]["counts"]["forwards"]

    assert forwards(threshold=0.0, block_length=16) == 1
    assert forwards(threshold=2.0, block_length=16) == 16


@pytest.mark.parametrize("decoder", ["autoregressive", "prompt_lookup", "draft_model"])
def test_json_is_written_where_it_is_asked_for(server, decoder):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "t", "schema": schema, "strict": True}}
    answer = server.complete(
        max_tokens=200, temperature=1, seed=1, response_format=form, chordal={"decoder": decoder}
    )
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop"
    document = json.loads(choice["text"])
    assert document.keys() == {"a", "b"} and 0 <= document["a"] <= 9 and document["b"] in "xy"


@pytest.mark.parametrize(
    "schema",
    [{"type": "nope"}, {"$ref": "http://example.org/x"}, {"type": "integer", "minimum": 2, "maximum": 1}],
)
def test_schema_that_cannot_be_kept_is_refused(server, schema):
    form = {"type": "json_schema", "json_schema": {"name": "t", "schema": schema}}
    assert refusal(server, response_format=form)["param"] == "response_format.json_schema.schema"
