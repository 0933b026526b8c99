"""Run the harness on local tasks; `make harness` installs it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings

import pytest
import transformers

from chordal.errors import ChordalError, InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: make harness")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

from chordal.bridges.lm_eval import ChordalLM
from chordal.generation import load

pytestmark = [
    pytest.mark.filterwarnings("ignore:::lm_eval"),
    pytest.mark.filterwarnings("ignore:::datasets"),
    pytest.mark.filterwarnings("ignore:::transformers"),
]

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
    ("", "Ana Ben"),
    ("Leo", " Dan"),
]


def requests(kind, *arguments, repeats=1):
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("a task", doc, repeats))
        for doc, one in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def model():
    return load("tiny-ar", max_rows=4)


@pytest.fixture(scope="module")
def theirs(checkpoint_dir):
    """The harness's own model, random weights in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint_dir)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")


@pytest.fixture(scope="module")
def ours(checkpoint_dir):
    return ChordalLM(str(checkpoint_dir), batch_size=3)


@pytest.fixture
def tasks(harness_tasks):
    return harness_tasks(PROMPTS)


# Likelihoods.


def test_loglikelihoods_are_those_of_the_harness_own_model(theirs, ours):
    expected = theirs.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
    assert [one[1] for one in found] == [one[1] for one in expected]


def test_a_context_that_is_too_long_is_cut_as_there(theirs, ours):
    pairs = [("Ana Ben Cleo " * 200 + "Dan", " Mia Leo"), ("Ana Ben Cleo " * 200 + "Dan", " Mia")]
    expected = theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)


def test_rolling_loglikelihoods_are_those_of_the_harness_own_model(theirs, ours):
    texts = [("Ana Ben Cleo",), ("Mia Leo Dan 7 " * 150,), ("Ben",)]  # the second takes several windows
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-2, rel=1e-5)


def test_many_continuations_of_a_context_are_split_where_the_window_ends(ours):
    pairs = [("copy: Ana", f" {number}" * 60) for number in range(9)]
    together = ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    alone = [ours.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)[0] for pair in pairs]
    assert [one[0] for one in together] == pytest.approx([one[0] for one in alone], abs=1e-4)


@pytest.mark.parametrize("name", ["tiny-mdm", "tiny-block"])
def test_diffusion_models_prefer_what_is_right(name):
    lm = ChordalLM(name, batch_size=8, num_samples=8)
    pairs = []
    for prompt, answer in PROMPTS.items():
        context = lm.apply_chat_template([{"role": "user", "content": prompt}])
        pairs += [(context, answer), (context, "Zoe Kim")]
    scores = [one[0] for one in lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)]
    assert all(right > wrong + 1 for right, wrong in zip(scores[::2], scores[1::2], strict=True))
    text = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("Ana Ben",)), disable_tqdm=True)
    assert math.isfinite(text[0])


# Generation.


def test_generated_text_is_that_of_the_harness_own_model(theirs, ours):
    asked = [
        ("copy: Ana Ben", {"max_gen_toks": 12}),
        ("Mia", {"until": ["e", "o"], "max_gen_toks": 9, "do_sample": False}),
    ]
    expected = theirs.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert ours.generate_until(requests("generate_until", *asked), disable_tqdm=True) == expected


def test_the_decoder_and_its_settings_are_used_and_counted(model, tmp_path):
    path = tmp_path / "stats.jsonl"
    lm = ChordalLM(model, decoder="prompt_lookup", stats=str(path), **{"decoder.num_draft": 3})
    context = lm.apply_chat_template([{"role": "user", "content": "copy: Ana Ben Cleo Dan Mia Leo"}])

    [text] = lm.generate_until(requests("generate_until", (context, {"max_gen_toks": 24})), disable_tqdm=True)

    assert text == "Ana Ben Cleo Dan Mia Leo"
    info = lm.get_model_info()
    assert info["decoder"] == "prompt_lookup" and info["decoder_settings"]["num_draft"] == 3
    [line] = [json.loads(line) for line in path.read_text().splitlines()]
    assert line["task"] == "a task" and line["finish_reason"] == "stop"
    assert line["accepted_tokens"] > 0
    counted = info["decoder_stats"]
    assert counted["tokens_per_forward"] == line["tokens_per_forward"] > 1
    assert counted["texts"] == 1 and counted["forwards"] == line["forwards"]


def test_settings_come_from_a_file_too(model, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"decoder": "prompt_lookup", "settings": {"num_draft": 5}}))
    assert ChordalLM(model, config=str(path)).decoder.config.num_draft == 5
    assert ChordalLM(model, config=str(path), **{"decoder.num_draft": 2}).decoder.config.num_draft == 2
    assert ChordalLM(model, config=str(path), decoder="autoregressive").decoder.name == "autoregressive"


def test_a_prompt_that_is_sampled_again_gets_another_text_and_a_run_the_same(model):
    asked = [("reverse: Ana", {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12})] * 4
    lm = ChordalLM(model)
    first = lm.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert len(set(first)) > 1
    assert lm.generate_until(requests("generate_until", *asked), disable_tqdm=True) == first
    other = ChordalLM(model, seed=9).generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert other != first


def test_a_text_that_fails_fails_the_run(model, monkeypatch):
    lm = ChordalLM(model)

    def decode(seq):
        raise RuntimeError("broken")
        yield

    monkeypatch.setattr(lm.decoder, "decode", decode)
    with pytest.raises(ChordalError, match="a task failed: broken"):
        lm.generate_until(requests("generate_until", ("copy: Ana", {})), disable_tqdm=True)
    assert not model.engine.has_work


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decodr": "x"}, "unknown model argument 'decodr'. Did you mean decoder"),
        ({"trust_remote_code": True}, "unknown model argument 'trust_remote_code'"),
        ({"decoder.num_drafts": 3, "decoder": "prompt_lookup"}, "Did you mean num_draft"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "many"}, "batch_size"),
        ({"likelihood": "exact"}, "method"),
        ({"decoder": "threshold"}, "needs a masked"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        ChordalLM("tiny-ar", **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "unknown generation setting 'num_beams'"),
        ({"max_gen_toks": 100_000}, "must leave room"),
        ({"top_p": 2.0, "do_sample": True}, "top_p"),
    ],
)
def test_wrong_generation_settings_are_refused(model, settings, message):
    with pytest.raises(InputError, match=message):
        ChordalLM(model).generate_until(
            requests("generate_until", ("copy: Ana", settings)), disable_tqdm=True
        )


def test_a_model_without_a_likelihood_says_so(model):
    lm = ChordalLM(model, likelihood="monte_carlo")
    with pytest.raises(InputError, match="taken by chain"):
        lm.loglikelihood(requests("loglikelihood", ("a", " b")), disable_tqdm=True)


# The harness itself.


def test_the_harness_runs_local_tasks_with_a_decoder(model, tasks):
    found = lm_eval.simple_evaluate(
        model=ChordalLM(model, decoder="prompt_lookup"),
        tasks=["lists_write", "lists_choose"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert found["results"]["lists_write"]["exact_match,none"] == 1
    assert found["results"]["lists_choose"]["acc,none"] == 1
    assert found["config"]["decoder_stats"]["texts"] == len(PROMPTS)


def test_the_command_line_of_the_harness_has_the_model(tasks, tmp_path):
    command = [sys.executable, "-m", "chordal.bridges.lm_eval", "run", "--model", "chordal", "--model_args"]
    arguments = "pretrained=tiny-ar,decoder=prompt_lookup,decoder.num_draft=4"
    rest = [
        "--tasks",
        "lists_write",
        "--include_path",
        tasks,
        "--batch_size",
        "auto",
        "--apply_chat_template",
    ]
    done = subprocess.run(
        [*command, arguments, *rest, "--output_path", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "tokens per forward" in done.stderr
    [path] = (tmp_path / "out").rglob("results*.json")
    results = json.loads(path.read_text())
    assert results["results"]["lists_write"]["exact_match,none"] == 1
    assert results["config"]["decoder_settings"]["num_draft"] == 4


def test_a_wrong_argument_on_the_command_line_is_one_line(tasks):
    command = [sys.executable, "-m", "chordal.bridges.lm_eval", "run", "--model", "chordal", "--model_args"]
    rest = ["--tasks", "lists_write", "--include_path", tasks]
    done = subprocess.run([*command, "decoder=promt_lookup", *rest], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "Error: unknown decoder 'promt_lookup'. Did you mean prompt_lookup"
    )
