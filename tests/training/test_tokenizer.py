from __future__ import annotations

import itertools
import json

import pytest

from chordal.bench.tasks import TASKS
from chordal.bench.tasks.arithmetic import THINGS
from chordal.bench.tasks.edits import FUNCTIONS, IDENTIFIERS
from chordal.bench.tasks.list_ops import NAMES
from chordal.bench.tasks.puzzles import SYMBOLS
from chordal.training.recipes.tiny_mdm import MASK_ID
from chordal.training.tokenizer import train_tokenizer

WORDS = [*NAMES, *map(str, range(100)), *IDENTIFIERS, *FUNCTIONS, *THINGS, *SYMBOLS]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "\nAna",
        " Ana",
        "Ana ",
        "Ana  Ben   Cleo",
        "Ana\n\n\n  Ben\n",
        "def f(x):\n    if x > 10:\n\treturn x**2  # why\r\n",
        "12345 6.7e-9 007 1,000",
        "Größe naïve e\u0301",
        "日本語のテキスト、中文。한국어",
        "👩‍👩‍👧 🎉 \U0010ffff",
        "a\u00a0b\u3000c\u200bd\ufeffe",
        "\x00\x1f\x7f",
        "don't , . ! ? <b> {}[]|\\^~`",
    ],
)
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_prompts_and_answers_survive_a_round_trip(tokenizer):
    for task in TASKS.values():
        for instance in itertools.islice(task.instances(0), 10):
            for text in (instance.prompt, instance.answer):
                assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_words_of_the_tasks_are_one_token_at_the_start_and_after_a_blank(tokenizer):
    first = tokenizer("Ana")["input_ids"]
    tokens = {word: tokenizer(word)["input_ids"] for word in WORDS}
    assert [word for word in WORDS if len(tokens[word]) != 1] == []
    assert [word for word in WORDS if tokenizer(f"Ana {word}")["input_ids"] != first + tokens[word]] == []


def test_numbers_are_one_token_after_a_line_break(tokenizer):
    assert [n for n in range(100) if len(tokenizer(f"0\n{n}")["input_ids"]) != 2] == []


@pytest.mark.parametrize("group", ["lists", "puzzles", "arithmetic"])
def test_answers_cost_one_token_a_word(tokenizer, group):
    for task in TASKS.values():
        if task.group == group:
            for instance in itertools.islice(task.instances(0), 20):
                assert len(tokenizer(instance.answer)["input_ids"]) == len(instance.answer.split())


def test_special_tokens_are_distinct_and_the_mask_is_where_the_recipes_expect_it(tokenizer):
    names = ["<|pad|>", "<|mask|>", "<|end|>", "<|user|>", "<|assistant|>"]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert len(set(ids)) == 5
    assert [tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.eos_token_id] == ids[:3]
    assert tokenizer.mask_token_id == MASK_ID
    assert set(ids) <= set(tokenizer.all_special_ids)


def test_chat_template_marks_each_role_and_ends_each_answer(tokenizer):
    messages = [
        {"role": "user", "content": "copy: Ana"},
        {"role": "assistant", "content": "Ana"},
        {"role": "user", "content": "sort: Ben Ana"},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>copy: Ana<|assistant|>Ana<|end|><|user|>sort: Ben Ana<|assistant|>"
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False).endswith("Ana<|end|>")


def test_prompt_and_answer_encoded_apart_are_the_tokens_of_the_whole_chat(tokenizer):
    """Training joins them token by token; a chat with the answer in it must look the same."""
    for task in TASKS.values():
        instance = next(task.instances(0))
        user = {"role": "user", "content": instance.prompt}
        assistant = {"role": "assistant", "content": instance.answer}
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
        answer = tokenizer(instance.answer)["input_ids"]
        whole = tokenizer.apply_chat_template([user, assistant])["input_ids"]
        assert whole == [*prompt, *answer, tokenizer.eos_token_id]


def test_same_examples_give_the_same_tokenizer_within_the_size_asked_for(tmp_path):
    for name in ("one", "two"):
        train_tokenizer(tmp_path / name, vocab_size=400, num_examples=20)
    one, two = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert len(one["model"]["vocab"]) == 400
