"""The harness's own models of OpenAI's API against a running server; `make harness` installs it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import requests

import chordal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: make harness")
    pytest.importorskip("tenacity", reason="the harness lacks what it needs to ask servers: make harness")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

from chordal.bridges.lm_eval import ChordalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:::lm_eval"),
    pytest.mark.filterwarnings("ignore:::datasets"),
    pytest.mark.filterwarnings("ignore:::transformers"),
]

ZOO = Path(chordal.__file__).parent / "models" / "zoo"
PROMPTS = {
    "reverse: Ana Ben Cleo Dan": "Dan Cleo Ben Ana",
    "copy: Mia Leo": "Mia Leo",
    "sort: Leo Ana": "Ana Leo",
}
PAIRS = [
    ("copy: Ana Ben", " Ana Ben"),
    ("copy: Ana Ben", " Ben"),
    ("copy: Ana Ben", " Ana Cleo"),
    ("sort: Leo Ana ", "Ana Leo"),
    ("sort: Leo Ana\n", "w\u00f6 \U0001f600"),
    ("", "Ana Ben"),
    ("Leo", " Dan"),
    ("Ana Ben Cleo " * 10, "Dan"),
]


def instances(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("a task", doc, 1))
        for doc, one in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def ours():
    """The bridge, which asks the library and no server."""
    return ChordalLM("tiny-ar", batch_size=4)


@pytest.fixture
def theirs(server):
    """Make the harness's model of text completions."""

    def make(model="tiny-ar", kind=LocalCompletionsAPI, route="completions", **arguments):
        arguments = {"tokenizer_backend": "remote", "max_retries": 1, "max_length": 1024} | arguments
        return kind(model=model, base_url=f"{server.base_url}/v1/{route}", **arguments)

    return make


LOCAL = {"tokenizer_backend": "huggingface", "tokenizer": str(ZOO / "tiny-ar")}


# Likelihoods.


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tokenizer_backend": "auto", "batch_size": 3},
        LOCAL,
        LOCAL | {"num_concurrent": 4, "batch_size": 2},
        LOCAL | {"tokenized_requests": False},
    ],
    ids=["remote", "auto", "local", "concurrent", "text"],
)
def test_loglikelihoods_are_those_of_the_library(theirs, ours, arguments):
    model = theirs(**arguments)
    # As text, a token before a text without context cannot be told from its writing.
    asked = instances("loglikelihood", *[pair for pair in PAIRS if pair[0] or model.tokenized_requests])
    expected = ours.loglikelihood(asked, disable_tqdm=True)
    found = model.loglikelihood(asked, disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-3)
    assert [one[1] for one in found] == [one[1] for one in expected]


def test_tokenizer_is_found_by_itself(theirs, server, ours):
    tokenizer = theirs(tokenizer_backend="auto").tokenizer
    assert type(tokenizer).__name__ == "RemoteTokenizer"
    assert tokenizer.eos_token_id == ours.tokenizer.eos_token_id
    turns = [{"role": "user", "content": "copy: Ana"}]
    assert tokenizer.apply_chat_template(turns) == ours.apply_chat_template(turns)
    text = "w\u00f6rld \U0001f600\n Ana"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_rolling_loglikelihoods_are_those_of_the_library(theirs, ours):
    """The second text takes several windows, each as long as one can be."""
    texts = instances("loglikelihood_rolling", ("Ana Ben Cleo",), ("Mia Leo Dan 7 " * 150,))
    found = theirs(**LOCAL).loglikelihood_rolling(texts, disable_tqdm=True)
    ours = ChordalLM(ours.model, max_length=1022)  # they keep a token for the answer, and one more
    expected = ours.loglikelihood_rolling(texts, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-4)


def test_likelihood_of_a_diffusion_model_is_refused_with_the_reason(theirs, caplog):
    model = theirs("tiny-mdm", tokenizer_backend="huggingface", tokenizer=str(ZOO / "tiny-mdm"))
    with pytest.raises(requests.HTTPError, match="400"):
        model.loglikelihood(instances("loglikelihood", PAIRS[0]), disable_tqdm=True)
    assert "need an autoregressive model; tiny-mdm is masked" in caplog.text


# Generation.


@pytest.mark.parametrize("model", ["tiny-ar", "tiny-mdm"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tokenizer_backend": "none", "eos_string": "<|end|>"},
        LOCAL | {"num_concurrent": 3, "batch_size": 2},
    ],
    ids=["remote", "none", "concurrent"],
)
def test_generated_text_is_that_of_the_library(theirs, model, arguments):
    ours = ChordalLM(model, batch_size=4)
    asked = instances(
        "generate_until",
        *[
            (ours.apply_chat_template([{"role": "user", "content": prompt}]), {"max_gen_toks": 24})
            for prompt in PROMPTS
        ],
        ("Mia", {"until": ["e", "o", "\n"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}),
    )
    found = theirs(model, **arguments).generate_until(asked, disable_tqdm=True)
    assert found[0] == "Dan Cleo Ben Ana"
    expected = ours.generate_until(asked, disable_tqdm=True)
    assert [one.removeprefix(" ") for one in found] == expected


def test_as_many_stop_strings_as_tasks_have_are_taken(theirs):
    """Tasks that write programs have five, and the harness adds the end of the text."""
    until = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    asked = instances("generate_until", ("copy: Ana", {"until": until, "max_gen_toks": 8}))
    [text] = theirs().generate_until(asked, disable_tqdm=True)
    assert text


# The harness itself.


@pytest.fixture
def tasks(harness_tasks):
    return harness_tasks(PROMPTS)


def evaluate(model, names, tasks, **more):
    return lm_eval.simple_evaluate(
        model=model,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=not more,
        bootstrap_iters=0,
        **more,
    )["results"]


def test_tasks_run_over_text_completions(theirs, tasks):
    found = evaluate(theirs(**LOCAL), ["lists_write", "lists_choose"], tasks)
    assert found["lists_write"]["exact_match,none"] == 1
    assert found["lists_choose"]["acc,none"] == 1


@pytest.mark.parametrize("model", ["tiny-ar", "tiny-mdm", "tiny-block"])
def test_tasks_run_over_chats(theirs, tasks, model):
    lm = theirs(model, LocalChatCompletion, "chat/completions", tokenizer_backend=None, num_concurrent=2)
    found = evaluate(lm, ["lists_write"], tasks)["lists_write"]["exact_match,none"]
    assert found == evaluate(ChordalLM(model), ["lists_write"], tasks)["lists_write"]["exact_match,none"] > 0


def test_server_with_a_key_is_asked_with_it(make_server, tasks, monkeypatch):
    """As on the command line, where the key comes from the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", "right-key")
    with make_server(("tiny-ar",), api_keys=("right-key",)) as closed:
        found = evaluate(
            "local-completions",
            ["lists_choose"],
            tasks,
            model_args=f"model=tiny-ar,base_url={closed.base_url}/v1/completions,max_length=1024,"
            "tokenizer_backend=remote,auth_token=right-key,max_retries=1",
        )
    assert "acc,none" in found["lists_choose"]
