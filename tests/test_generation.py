from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers

import chordal
from chordal.decoders.autoregressive import Autoregressive
from chordal.decoders.prompt_lookup import PromptLookup, PromptLookupConfig
from chordal.engine import Engine
from chordal.errors import InputError, PromptError, UnknownNameError
from chordal.forward import Causal, Forward, Logits
from chordal.generation import Model, Request
from chordal.models.family import Family
from chordal.models.language_model import LanguageModel
from chordal.testing.tiny import Alphabet

WINDOW = 256
QUESTION = [{"role": "user", "content": "sort: Cleo Ana Ben"}]


class Fragile(Autoregressive):
    """Breaks on prompts of more than three tokens."""

    def decode(self, seq):
        if seq.num_prompt > 3:
            raise RuntimeError("too heavy")
        return (yield from super().decode(seq))


@pytest.fixture(scope="module")
def make(make_model, tokenizer):
    """Give a model of any kind with a real tokenizer, ready to generate."""

    def make(kind="causal", *, chat=True, max_rows=4, eos_ids=None, **more):
        text = copy.deepcopy(tokenizer)
        if not chat:
            text.chat_template = None
        family = Family(
            kind=kind,
            mask_id=None if kind in ("causal", "uniform") else tokenizer.mask_token_id,
            shift=1 if kind == "causal" else 0,
            block_length=4 if kind in ("block", "uniform") else None,
            vocab_size=len(tokenizer),
            eos_ids=(tokenizer.eos_token_id,) if eos_ids is None else eos_ids,
        )
        size = {"vocab_size": len(tokenizer)}
        return Model(Engine(make_model("llama", family, tokenizer=text, max_rows=max_rows, **size, **more)))

    return make


@pytest.fixture
def model(make):
    return make()


def refusal(kind, function, *args, **settings):
    with pytest.raises(kind) as error:
        function(*args, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# Prompts.


def test_text_goes_into_the_chat_template_if_there_is_one(model, tokenizer):
    [message] = QUESTION
    wrapped = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    plain = tokenizer(message["content"])["input_ids"]
    assert wrapped != plain
    assert model.encode(message["content"]).tolist() == wrapped
    assert model.encode(message["content"], chat=True).tolist() == wrapped
    assert model.encode(message["content"], chat=False).tolist() == plain


def test_without_a_template_text_stays_as_it_is(make, tokenizer):
    model = make(chat=False)
    assert model.encode("sort: Ana").tolist() == tokenizer("sort: Ana")["input_ids"]
    assert (
        refusal(InputError, model.encode, "sort: Ana", chat=True)
        == "tiny has no chat template; use chat=False."
    )
    assert refusal(InputError, model.encode, QUESTION) == (
        "tiny has no chat template; give text instead of messages."
    )


def test_messages_become_the_chat_of_the_template(model, tokenizer):
    chat = [
        *QUESTION,
        {"role": "assistant", "content": "Ana Ben Cleo"},
        {"role": "user", "content": "copy: Ana"},
    ]
    want = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert model.encode(chat).tolist() == want


@pytest.mark.parametrize("prompt", [[5, 6, 7], (5, 6, 7), np.array([5, 6, 7]), np.array([5, 6, 7], np.uint8)])
def test_token_ids_are_taken_as_they_are(model, prompt):
    assert model.encode(prompt).tolist() == [5, 6, 7]
    assert model.encode(prompt).dtype == np.int64
    [result] = model.generate(prompt, max_new_tokens=1)
    assert result.prompt is prompt


def test_a_list_may_hold_prompts_of_every_form(model):
    prompts = ["copy: Ana", [5, 6, 7], QUESTION, np.array([8, 9])]
    results = model.generate(prompts, max_new_tokens=2)
    assert [result.prompt for result in results] == prompts
    alone = [model.generate([prompt], max_new_tokens=2)[0].tokens for prompt in prompts]
    assert [result.tokens for result in results] == alone
    assert model.generate(QUESTION, max_new_tokens=2)[0].tokens == alone[2]
    assert model.generate([]) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt must not be empty."),
        (" \n\t", "the prompt must not be empty."),
        ([[]], "the prompt must not be empty."),
        ([[3, 5000]], "token ids must be from 0 to {last}; got 3 to 5000."),
        ([[-1, 3]], "token ids must be from 0 to {last}; got -1 to 3."),
        ([["copy:", "Ana"]], "a prompt must be text, token ids or chat messages; got ['copy:', 'Ana']."),
        ([[1.5, 2]], "a prompt must be text, token ids or chat messages; got [1.5, 2]."),
        ([[2**70]], "a prompt must be text, token ids or chat messages; got [1180591620717411303424]."),
        ([[[1, 2], [3]]], "a prompt must be text, token ids or chat messages; got [[1, 2], [3]]."),
        ([[[1, 2], [3, 4]]], "a prompt must be text, token ids or chat messages; got [[1, 2], [3, 4]]."),
        (5, "a prompt must be text, token ids or chat messages; got 5."),
        (None, "a prompt must be text, token ids or chat messages; got None."),
        (["copy: Ana", 5], "a prompt must be text, token ids or chat messages; got 5."),
        (b"copy: Ana", "a prompt must be text, token ids or chat messages; got b'copy: Ana'."),
        ({}, "a prompt must be text, token ids or chat messages; got {{}}."),
        ("Ana \ud83c Ben", "the prompt must be Unicode text; it holds a surrogate."),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused(model, tokenizer, prompt, message):
    assert refusal(PromptError, model.generate, prompt) == message.format(last=len(tokenizer) - 1)


def test_messages_the_template_refuses_are_refused(model):
    assert refusal(PromptError, model.generate, [{"role": "user"}]).startswith(
        "the chat template of tiny refuses the messages: "
    )


def test_the_mask_token_in_a_prompt_is_refused(make, tokenizer):
    mask = tokenizer.mask_token_id
    message = f"a prompt must not contain the mask token (id {mask})."
    model = make("masked")
    assert refusal(PromptError, model.generate, [[5, mask, 6]]) == message
    assert refusal(PromptError, model.generate, f"copy: {tokenizer.mask_token}") == message
    assert make().generate([5, mask, 6], max_new_tokens=1)[0].error is None


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("decoder", 5, "text, a Decoder or none"),
        ("config", 3, "a mapping from texts to values or none"),
        ("max_new_tokens", "5", "a whole number or none"),
        ("max_new_tokens", 2.0, "a whole number or none"),
        ("max_new_tokens", True, "a whole number or none"),
        ("temperature", "hot", "a number"),
        ("top_p", None, "a number"),
        ("seed", 1.5, "a whole number"),
        ("logit_bias", [1], "a mapping from whole numbers to numbers or none"),
        ("constraint", "json", "a Constraint or none"),
        ("stop_strings", [1], "text or a list of texts"),
        ("stop_token_ids", 3, "a list of whole numbers"),
        ("logprobs", "all", "a whole number or none"),
        ("cache_salt", 4, "text"),
        ("chat", "yes", "true, false or none"),
    ],
)
def test_a_value_of_the_wrong_type_says_what_must_be_given(model, name, value, must):
    said = f"{name} must be {must}; got {value!r}."
    assert refusal(InputError, model.generate, "copy: Ana", **{name: value}) == said
    assert refusal(InputError, Request, **{name: value}) == said


# The window.


def test_prompt_and_answer_may_fill_the_window_exactly(model):
    for num in (WINDOW - 1, WINDOW - 10):
        [result] = model.generate([[5] * num], max_new_tokens=WINDOW - num, ignore_eos=True)
        assert (result.finish_reason, len(result.tokens)) == ("length", WINDOW - num)


def test_one_token_more_than_the_window_is_refused(model):
    assert refusal(PromptError, model.generate, [[5] * 250], max_new_tokens=7) == (
        "prompt and new tokens must fit the model's window of 256; got 250 and 7. "
        "Use max_new_tokens=6 or a shorter prompt."
    )
    for num in (WINDOW, WINDOW + 100):
        assert refusal(PromptError, model.generate, [[5] * num], max_new_tokens=1) == (
            "the prompt must leave room for an answer in the model's window of 256 tokens; "
            f"it has {num}. Shorten it."
        )


@pytest.mark.parametrize(
    ("num_prompt", "length"), [(10, 64), (WINDOW - 64, 64), (WINDOW - 63, 63), (WINDOW - 1, 1)]
)
def test_without_a_length_there_are_64_new_tokens_or_what_the_window_leaves(model, num_prompt, length):
    assert model.sequence([5] * num_prompt, Request()).stop.max_new_tokens == length


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"temprature": 1},
            "unknown argument 'temprature'. Did you mean temperature or trace? Known: ",
        ),
        ({"decoder": "prompt_lokup"}, "unknown decoder 'prompt_lokup'. Did you mean prompt_lookup"),
        ({"decoder": ""}, "unknown decoder ''."),
        ({"decoder": "threshold"}, "threshold needs a masked model; this one is causal."),
        ({"config": {"num_draft": 2}}, "unknown autoregressive setting 'num_draft'."),
        ({"decoder": "prompt_lookup", "config": {"num_draft": -2}}, "num_draft must be at least 0; got -2."),
        (
            {"decoder": PromptLookup(), "config": {"num_draft": 2}},
            "settings belong to a decoder given by name",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0."),
        ({"temperature": float("nan")}, "temperature must be a finite number of at least 0; got nan."),
        ({"top_p": 0}, "top_p must be above 0 and at most 1; got 0."),
        ({"stop_strings": ["END", ""]}, "stop strings must not be empty."),
        ({"stop_strings": ""}, "stop strings must not be empty."),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_before_anything_runs(model, settings, message):
    assert refusal(InputError, model.generate, "copy: Ana", **settings).startswith(message)
    assert refusal(InputError, model.stream, "copy: Ana", **settings).startswith(message)
    assert (model.engine.has_work, model.engine.passes) == (False, {"target": 0})


def test_an_unknown_argument_is_an_unknown_name(model):
    with pytest.raises(UnknownNameError):
        model.generate("copy: Ana", maxnewtokens=3)


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [
        ("causal", "autoregressive"),
        ("masked", "low_confidence"),
        ("block", "block_diffusion"),
        ("masked_causal", "wedlm"),
        ("uniform", "renoise"),
    ],
)
def test_every_kind_of_model_has_its_plain_decoder(make, kind, decoder):
    [result] = make(kind).generate("copy: Ana", max_new_tokens=6)
    assert (result.decoder, result.error) == (decoder, None)
    assert result.promise == ("exact" if kind == "causal" else "approximate")


def test_a_decoder_may_come_with_its_config(model):
    settings = {"max_new_tokens": 30, "ignore_eos": True}
    ready = PromptLookup(PromptLookupConfig(num_draft=3, max_ngram=2))
    [one] = model.generate("copy: Ana Ana Ana", decoder=ready, **settings)
    [two] = model.generate(
        "copy: Ana Ana Ana", decoder="prompt_lookup", config={"num_draft": 3, "max_ngram": 2}, **settings
    )
    assert one.tokens == two.tokens
    assert one.stats["draft_tokens"] == two.stats["draft_tokens"] > 0


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model):
    settings = {"temperature": 1.5, "max_new_tokens": 20, "ignore_eos": True}
    [one, two] = model.generate(["copy: Ana", "copy: Ana"], seed=5, **settings)
    [three] = model.generate("copy: Ana", seed=5, **settings)
    [other] = model.generate("copy: Ana", seed=-6, **settings)
    assert one.tokens == two.tokens == three.tokens != other.tokens


def test_sampling_settings_reach_the_law(model):
    settings = {"max_new_tokens": 20, "ignore_eos": True}
    [greedy] = model.generate("copy: Ana", **settings)
    for only_the_best in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        [result] = model.generate("copy: Ana", temperature=2.0, **only_the_best, **settings)
        assert result.tokens == greedy.tokens


@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_the_repetition_penalty_is_that_of_transformers(make, make_backbone, tokenizer, penalty):
    model = make(dtype=torch.float32, eos_ids=())
    prompt = model.encode("copy: Ana Ben Ana")
    tokens = torch.from_numpy(prompt)[None]
    want = make_backbone("llama", torch.float32, vocab_size=len(tokenizer)).generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        repetition_penalty=penalty,
        max_new_tokens=30,
        do_sample=False,
    )
    for decoder in ("autoregressive", "prompt_lookup"):
        [result] = model.generate([prompt], decoder=decoder, repetition_penalty=penalty, max_new_tokens=30)
        assert result.tokens == want[0, len(prompt) :].tolist()


def test_a_stop_token_ends_the_text_unless_it_is_ignored(make):
    settings = {"max_new_tokens": 12, "temperature": 1.0}
    [free] = make(eos_ids=()).generate("copy: Ana", **settings)
    assert (free.finish_reason, free.stop_reason) == ("length", None)
    model = make(eos_ids=(free.tokens[4],))
    [stopped] = model.generate("copy: Ana", **settings)
    end = free.tokens.index(free.tokens[4]) + 1
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", free.tokens[4])
    assert stopped.tokens == free.tokens[:end]
    assert stopped.text == model.decode(np.array(free.tokens[: end - 1]))
    [ignored] = model.generate("copy: Ana", ignore_eos=True, **settings)
    assert ignored.tokens == free.tokens


def test_a_stop_string_ends_the_text_alone_or_in_a_list(make):
    model = make(eos_ids=())
    settings = {"max_new_tokens": 12, "temperature": 1.0}
    [free] = model.generate("copy: Ana", **settings)
    stop = free.text[5:8]
    for stop_strings in (stop, [stop], ["never said", stop]):
        [result] = model.generate("copy: Ana", stop_strings=stop_strings, **settings)
        assert (result.finish_reason, result.stop_reason) == ("stop", stop)
        assert result.text == free.text[: free.text.index(stop)]


# Results.


def test_a_result_says_what_it_is(model):
    [result] = model.generate("copy: Ana", max_new_tokens=3, ignore_eos=True)
    assert (result.prompt, result.model, result.decoder) == ("copy: Ana", "tiny", "autoregressive")
    assert (result.finish_reason, result.stop_reason, result.error, result.trace) == (
        "length",
        None,
        None,
        None,
    )
    assert result.text == model.decode(np.array(result.tokens))
    assert result.stats["forwards"] == result.stats["committed_tokens"] == len(result.tokens) == 3
    assert result.stats["tokens_per_forward"] == 1


def test_a_trace_holds_every_commit(model):
    [result] = model.generate("copy: Ana", max_new_tokens=5, ignore_eos=True, trace=True)
    assert [event.kind for event in result.trace] == ["commit"] * 5
    assert np.concatenate([event.tokens for event in result.trace]).tolist() == result.tokens
    [chunk] = [chunk for chunk in model.stream("copy: Ana", max_new_tokens=5, trace=True) if chunk.result]
    assert chunk.result.trace


def test_results_come_in_order_and_are_told_as_they_finish(make):
    """Five prompts on two rows; the short ones finish first."""
    model, told = make(max_rows=2, eos_ids=()), []
    prompts = [[5 + at] * 3 for at in range(5)]
    results = model.generate(prompts, max_new_tokens=4, on_finish=lambda *pair: told.append(pair))
    assert [result.prompt for result in results] == prompts
    assert [index for index, _ in told] == [0, 1, 2, 3, 4]
    assert all(results[index] is result for index, result in told)

    stops = {at: results[at].tokens[0] for at in range(5)}
    model, told = make(max_rows=5, eos_ids=(stops[3],)), []
    results = model.generate(prompts, max_new_tokens=4, on_finish=lambda index, _: told.append(index))
    assert told[0] == 3
    assert sorted(told) == [0, 1, 2, 3, 4]
    assert [result.prompt for result in results] == prompts


def test_a_prompt_that_fails_does_not_lose_the_others(model):
    prompts = [[5, 6], [5, 6, 7, 8], [9, 9]]
    told = []
    results = model.generate(
        prompts,
        decoder=Fragile(),
        max_new_tokens=3,
        ignore_eos=True,
        on_finish=lambda index, _: told.append(index),
    )
    assert [result.finish_reason for result in results] == ["length", "error", "length"]
    assert str(results[1].error) == "too heavy"
    assert (results[1].text, results[1].tokens) == ("", [])
    assert sorted(told) == [0, 1, 2]
    assert results[0].tokens == model.generate([[5, 6]], max_new_tokens=3, ignore_eos=True)[0].tokens


def test_a_bad_prompt_in_a_list_is_found_before_anything_runs(model):
    assert (
        refusal(PromptError, model.generate, ["copy: Ana", "copy: Ben", ""])
        == "the prompt must not be empty."
    )
    assert (model.engine.has_work, model.engine.passes) == (False, {"target": 0})


def test_an_exception_while_results_are_told_frees_every_row(make):
    def interrupt(index, result):
        raise KeyboardInterrupt

    model = make(max_rows=1)
    with pytest.raises(KeyboardInterrupt):
        model.generate([[5, 6], [7, 8, 9]], max_new_tokens=4, on_finish=interrupt)
    assert (model.engine.has_work, model.engine.num_live) == (False, 0)


# Streams.


@pytest.mark.parametrize("settings", [{}, {"decoder": "prompt_lookup"}, {"temperature": 1.0, "seed": 3}])
def test_the_pieces_of_a_stream_add_up_to_the_text(model, settings):
    settings = {"max_new_tokens": 30, "ignore_eos": True, **settings}
    [want] = model.generate("copy: Ana Ben", **settings)
    *pieces, last = model.stream("copy: Ana Ben", **settings)
    assert "".join(piece.text for piece in pieces) + last.text == want.text == last.result.text
    assert last.result.tokens == want.tokens
    assert len(pieces) > 1
    assert all(piece.text and piece.result is None for piece in pieces)
    assert not any("\ufffd" in piece.text for piece in pieces[:-1]) or "\ufffd" in want.text


def test_listeners_hear_a_stream(model):
    heard = []
    *_, last = model.stream(
        "copy: Ana",
        max_new_tokens=4,
        ignore_eos=True,
        listeners=[lambda seq, event: heard.append(event.tokens)],
    )
    assert np.concatenate(heard).tolist() == last.result.tokens


def test_a_prompt_is_checked_when_a_stream_is_asked_for_not_when_it_is_read(model):
    assert refusal(PromptError, model.stream, "") == "the prompt must not be empty."


def test_nothing_runs_before_a_stream_is_read(model):
    model.stream("copy: Ana")
    assert (model.engine.has_work, model.engine.passes) == (False, {"target": 0})


def test_closing_a_stream_early_frees_its_row(model):
    stream = model.stream("copy: Ana", max_new_tokens=30, ignore_eos=True)
    next(stream)
    assert model.engine.num_live == 1
    stream.close()
    assert (model.engine.has_work, model.engine.num_live) == (False, 0)
    assert model.generate("copy: Ana", max_new_tokens=3)[0].error is None


def test_a_stream_that_fails_says_so_in_its_result(model):
    [last] = model.stream([5, 6, 7, 8], decoder=Fragile(), max_new_tokens=3)
    assert last.text == ""
    assert (last.result.finish_reason, str(last.result.error)) == ("error", "too heavy")


def test_streams_and_batches_on_one_model_do_not_meet(make):
    model = make(max_rows=2, eos_ids=())
    prompts = ["copy: Ana", "sort: Cleo Ben Ana", "reverse: Dan Eva"]
    want = [make(eos_ids=()).generate(prompt, max_new_tokens=9)[0].tokens for prompt in prompts]
    streams = [model.stream(prompt, max_new_tokens=9) for prompt in prompts[:2]]
    results, got = {}, None
    while len(results) < 2:
        for at, stream in enumerate(streams):
            for chunk in stream:
                if chunk.result:
                    results[at] = chunk.result.tokens
                break
        got = got or model.generate(prompts[2], max_new_tokens=9)[0].tokens
    assert [results[0], results[1], got] == want


def test_all_texts_of_a_decoder_that_finds_several_are_in_the_result(model):
    class Pair(Autoregressive):
        def decode(self, seq):
            yield from super().decode(seq)
            seq.offer(seq.output, -1.0)
            seq.offer(seq.output[:2], -3.0)

    results = model.generate(["copy: Ana", "copy: Ben"], decoder=Pair(), max_new_tokens=4, ignore_eos=True)
    for result in results:
        first, second = result.alternatives
        assert (first.tokens.tolist(), first.text) == (result.tokens, result.text)
        assert (second.tokens.tolist(), second.text) == (result.tokens[:2], model.decode(second.tokens))
    assert model.generate("copy: Ana", max_new_tokens=2)[0].alternatives == []


def test_a_search_refuses_to_sample_before_anything_runs(model):
    class Search(Autoregressive):
        name, samples = "search", False

    for ask in (model.generate, model.stream):
        assert refusal(InputError, ask, "copy: Ana", decoder=Search(), temperature=0.5) == (
            "search is a search and draws no tokens; temperature must be 0, got 0.5. Leave it out, or use a "
            "decoder that samples."
        )
    assert model.engine.passes == {"target": 0}
    assert model.generate("copy: Ana", decoder=Search(), max_new_tokens=2)[0].error is None


# Loading.


def test_a_loaded_folder_generates(checkpoint_dir):
    model = chordal.load(checkpoint_dir, device="cpu", dtype="float64", max_rows=2)
    assert isinstance(model, chordal.Model)
    assert (model.name, model.engine.max_rows, model.engine.target.model.dtype) == ("tiny", 2, torch.float64)
    assert list(model.engine.models) == ["target"]
    results = model.generate(["copy: Ana", "copy: Ben", "copy: Cleo"], max_new_tokens=4)
    assert [result.error for result in results] == [None] * 3
    assert results[0].model == "tiny"


@pytest.mark.parametrize("names", [("draft",), ("middle",), ("draft", "middle")], ids=" and ".join)
def test_other_models_stand_beside_the_target(checkpoint_dir, names):
    model = chordal.load(
        str(checkpoint_dir), **dict.fromkeys(names, checkpoint_dir), max_rows=3, dtype="float64"
    )
    assert list(model.engine.models) == ["target", *names]
    for loaded in model.engine.models.values():
        assert (loaded.max_rows, loaded.dtype) == (3, torch.float64)
    assert model.generate("copy: Ana", max_new_tokens=2)[0].error is None


def test_each_model_has_its_own_quantisation(checkpoint_dir):
    pytest.importorskip("torchao")
    model = chordal.load(
        checkpoint_dir,
        draft=checkpoint_dir,
        middle=checkpoint_dir,
        draft_quantization="int8",
        middle_quantization="int8-dynamic",
    )
    kinds = {
        name: str(
            type(
                getattr(loaded.model, "hf_quantizer", None)
                and loaded.model.config.quantization_config.quant_type
            )
        )
        for name, loaded in model.engine.models.items()
    }
    assert "NoneType" in kinds["target"]
    assert "Int8WeightOnlyConfig" in kinds["draft"]
    assert "Int8DynamicActivation" in kinds["middle"]


@pytest.mark.parametrize("name", ["draft", "middle"])
def test_the_quantisation_of_a_model_that_is_not_there_is_refused(checkpoint_dir, name):
    assert refusal(InputError, chordal.load, checkpoint_dir, **{f"{name}_quantization": "int8"}) == (
        f"{name}_quantization needs a {name} model; give {name}=... too, or leave it out."
    )


@pytest.mark.parametrize("extra", [-3, 7])
def test_a_model_whose_table_is_filled_up_otherwise_drafts_all_the_same(
    checkpoint_dir, make_backbone, tokenizer, tmp_path, extra
):
    """As the sizes of one family do; sampled, as both laws are compared token by token then."""
    vocab_size = len(tokenizer) + extra
    make_backbone("llama", torch.float32, vocab_size=vocab_size).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = chordal.load(checkpoint_dir, draft=tmp_path, middle=tmp_path)
    prompt = [len(tokenizer) - 1, 5, 6, len(tokenizer) - 1, 5]
    plain = model.generate([prompt], max_new_tokens=8, ignore_eos=True)
    for decoder in ("draft_model", "specmquant"):
        assert (
            model.generate([prompt], decoder=decoder, max_new_tokens=8, ignore_eos=True)[0].tokens
            == plain[0].tokens
        )
        [sampled] = model.generate(
            [prompt], decoder=decoder, max_new_tokens=8, temperature=1.0, ignore_eos=True
        )
        assert sampled.error is None
        assert sampled.stats["draft_tokens"] > 0


def test_models_that_work_together_need_one_tokenizer(checkpoint_dir, make_backbone, tokenizer, tmp_path):
    make_backbone("llama", torch.float32, vocab_size=99).save_pretrained(tmp_path)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<another>"])
    other.save_pretrained(tmp_path)
    for name in ("draft", "middle"):
        assert refusal(InputError, chordal.load, checkpoint_dir, **{name: tmp_path}) == (
            f"models that work together need one tokenizer; {checkpoint_dir.name} and {tmp_path.name} have "
            f"vocabularies of {len(tokenizer)} and 99 tokens that differ. Use a smaller model of the "
            f"target's family."
        )


# Log-probabilities, and what a request adjusts.


@pytest.mark.parametrize("name", ["tiny-ar", "tiny-mdm"])
def test_each_token_has_its_log_probability_and_the_likeliest_beside_it(name):
    model = chordal.load(name)
    [result] = model.generate("reverse: Ana Ben Cleo", max_new_tokens=8, logprobs=3)
    assert [one.token for one in result.logprobs] == result.tokens
    for one in result.logprobs:
        assert len(one.top) == 3
        assert one.logprob <= one.top[0][1] <= 0
    assert result.logprobs[0].token == result.logprobs[0].top[0][0]  # greedy


def test_nobody_pays_for_log_probabilities_who_does_not_ask(model):
    [result] = model.generate("reverse: Ana Ben", max_new_tokens=4)
    assert result.logprobs == []


def test_a_decoder_that_reads_no_log_probabilities_says_so(model):
    message = refusal(InputError, model.generate, "a", decoder="diverse_beam", logprobs=1)
    assert message.startswith(
        "diverse_beam does not read the log-probabilities of its tokens; got logprobs=1."
    )


def test_stop_token_ids_end_a_text_besides_the_models_own(model):
    [free] = model.generate("reverse: Ana Ben Cleo Dan", max_new_tokens=12, ignore_eos=True)
    token = free.tokens[2]
    [stopped] = model.generate(
        "reverse: Ana Ben Cleo Dan", max_new_tokens=12, ignore_eos=True, stop_token_ids=[token]
    )
    assert stopped.tokens == free.tokens[: free.tokens.index(token) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": {-1: 1.0}}, "logit_bias must hold token ids from 0 to "),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias must hold token ids from 0 to "),
        ({"logit_bias": {1: float("nan")}}, "logit_bias must be within +-1e6"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids must hold token ids from 0 to "),
        ({"seed": 2**63}, "seed must be a 64-bit integer; got 9223372036854775808."),
        ({"logprobs": -1}, "logprobs must be at least 0; got -1."),
        ({"presence_penalty": float("inf")}, "presence_penalty must be a finite number; got inf."),
    ],
)
def test_what_a_request_cannot_adjust_is_refused(model, settings, message):
    assert refusal(InputError, model.generate, "copy: Ana", **settings).startswith(message)


def learned_positions(window, seed):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=32,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=window,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config).double()
    return LanguageModel(model, Family(kind="causal"), Alphabet(), name=f"gpt2-{window}")


def test_a_draft_model_whose_positions_end_before_the_text_is_refused_before_anything_runs():
    model = Model(Engine({"target": learned_positions(64, 0), "draft": learned_positions(24, 1)}))
    fits, plain = (
        model.generate([[3, 4, 5]], decoder=decoder, max_new_tokens=21)
        for decoder in ("draft_model", "autoregressive")
    )
    assert fits[0].error is None
    assert fits[0].tokens == plain[0].tokens
    message = refusal(PromptError, model.generate, [[3, 4, 5]], decoder="draft_model", max_new_tokens=22)
    assert message.startswith("prompt and new tokens must fit the 24 positions of gpt2-24, the draft model")
    [free] = model.generate([[3, 4, 5]], max_new_tokens=22)
    assert free.error is None


def test_a_position_beyond_the_table_of_a_model_is_an_error_and_no_read_outside_of_it():
    model = learned_positions(8, 0)
    at = np.array([8])
    with pytest.raises(InputError, match="gpt2-8 has 8 positions; got 8"):
        model.run([(0, Forward(np.array([1]), at, Causal(), Logits(np.array([0])), slots=at))])
