from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "tokenizers", "numpy", "rich", "httpx2"}


@pytest.fixture
def serve(run, openai_server):
    """Run the command against the fake server; what is given later comes first."""

    def serve(*args):
        return run("bench", "serve", "--base-url", openai_server.url, *args)

    return serve


@pytest.fixture
def prompts(tmp_path):
    """Write prompts that tell the server what to do with them into a file."""

    def prompts(*scripts):
        path = tmp_path / "prompts.jsonl"
        whole = ({"chunks": ["a"], "usage": [3, 2], **script} for script in scripts)
        path.write_text("".join(json.dumps({"prompt": json.dumps(script)}) + "\n" for script in whole))
        return path

    return prompts


def test_levels_are_rows_of_a_table_that_fits_100_columns(serve):
    result = serve("--tasks", "copy,reverse", "--concurrency", "1,2", "--num-requests", 4)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 100
    levels = [line.split() for line in lines if re.match(r" +[12] +\d", line)]
    assert [(words[0], words[2], words[3]) for words in levels] == [("1", "4", "0"), ("2", "4", "0")]
    assert [line for line in lines if "100.0% [51-100]" in line]
    for name in ("TTFT", "ITL", "TPOT", "E2EL"):
        assert len([line for line in lines if name in line]) == 2
    assert lines[-1].startswith("fake at http://127.0.0.1:")
    assert lines[-1].endswith("chat: copy, reverse; each request as soon as one ends")
    assert result.err == ""


def test_json_says_what_was_sent_and_what_came_back(serve, openai_server):
    document = serve(
        "--tasks", "copy,sort", "--concurrency", 3, "--num-requests", 6, "--warmup", 2, "--temperature", 0.5,
        "--seed", 7, "--max-tokens", 9, "--extra-body", '{"top_k": 4, "chordal": {"decoder": "threshold"}}',
        "--counts", "--json",
    ).json  # fmt: skip
    conditions, [level] = document["conditions"], document["levels"]
    fields = {"temperature": 0.5, "seed": 7, "top_k": 4, "chordal": {"decoder": "threshold", "counts": True}}
    assert conditions["fields"] == fields
    assert (conditions["model"], conditions["base_url"]) == ("fake", openai_server.url)
    assert [(task["name"], task["num_prompts"], task["grader"]) for task in conditions["tasks"]] == [
        ("copy", 4, "same_text"),
        ("sort", 4, "same_text"),
    ]
    assert (level["concurrency"], level["num_requests"], level["num_ok"]) == (3, 6, 6)
    assert level["quality"]["num_graded"] == 6
    assert len(openai_server.requests) == 2 + 6
    for body in openai_server.requests:
        assert {name: body[name] for name in fields} == fields
        assert body["max_tokens"] == 9


def test_what_is_not_asked_for_is_not_sent(serve, openai_server):
    assert serve("--tasks", "copy", "--concurrency", 1, "--num-requests", 1).code == 0
    assert {*openai_server.requests[0]} == {
        "model", "messages", "stream", "stream_options", "max_tokens", "temperature"
    }  # fmt: skip


def test_texts_of_full_length_are_not_graded(serve, openai_server):
    result = serve("--tasks", "copy", "--concurrency", 1, "--num-requests", 1, "--ignore-eos")
    assert openai_server.requests[0]["ignore_eos"] is True
    assert "accuracy" not in result.out


def test_counts_of_chordal_are_a_column(serve, prompts):
    file = prompts({"usage": [3, 8], "counts": {"forwards": 2, "committed_tokens": 8}})
    result = serve("--data", file, "--concurrency", 1, "--num-requests", 1, "--counts", "--warmup", 0)
    assert "4.00" in result.out
    assert "forward" in result.out


def test_file_holds_the_document_and_every_request_but_no_text(serve, tmp_path):
    out = tmp_path / "load.json"
    out.write_text("what was there " * 1000)
    result = serve("--tasks", "copy", "--concurrency", "1,2", "--num-requests", 3, "--json", "--out", out)
    kept = json.loads(out.read_text())
    requests = [level.pop("requests") for level in kept["levels"]]
    assert kept == result.json
    assert [len(sent) for sent in requests] == [3, 3]
    assert {request["right"] for sent in requests for request in sent} == {True}
    assert "text" not in requests[0][0]


def test_enough_prompts_are_made_that_none_comes_twice(serve, prompts):
    numbers = ("--concurrency", "1,2", "--num-requests", 5, "--warmup", 3)
    result = serve("--tasks", "copy,reverse", *numbers, "--json")
    assert sum(task["num_prompts"] for task in result.json["conditions"]["tasks"]) >= 13
    assert result.err == ""
    assert "Repeated: " in serve("--data", prompts({}), *numbers).err


def test_a_rate_has_no_limit_unless_one_is_given(serve):
    level = serve("--tasks", "copy", "--request-rate", 1000, "--num-requests", 3, "--json").json["levels"][0]
    assert (level["concurrency"], level["request_rate"], level["num_ok"]) == (None, 1000.0, 3)
    result = serve("--tasks", "copy", "--request-rate", 1000, "--num-requests", 3, "--concurrency", 2)
    assert "1000 requests/s asked for" in result.out


def test_the_number_of_requests_grows_with_the_concurrency(serve):
    levels = serve("--tasks", "copy", "--concurrency", "2,20", "--json").json["levels"]
    assert [level["num_requests"] for level in levels] == [64, 80]


def test_failures_are_lines_and_all_of_them_exit_1(serve, prompts):
    file = prompts({"fault": 503}, {"fault": "error"}, {})
    result = serve("--data", file, "--concurrency", 1, "--num-requests", 3, "--warmup", 0)
    assert result.code == 0
    assert set(result.err.splitlines()) == {
        "Failed at 1 at once: 1 x status 503: planted [2J fault",
        "Failed at 1 at once: 1 x error event: planted error",
    }
    result = serve(
        "--data", prompts({"fault": "cut"}), "--concurrency", 1, "--num-requests", 1, "--warmup", 0
    )
    assert result.code == 1


def test_a_server_that_counts_no_tokens_is_told(serve, prompts):
    file = prompts({"usage": None})
    result = serve("--data", file, "--concurrency", 1, "--num-requests", 1, "--warmup", 0)
    assert result.code == 0
    assert result.err == (
        "No usage at 1 at once: the server did not count the tokens of 1 answers, so no tokens are told.\n"
    )


def test_nobody_there_is_one_line_and_exit_1(serve):
    result = serve("--base-url", "http://127.0.0.1:1")
    assert (result.code, result.out) == (1, "")
    [line] = result.err.splitlines()
    assert line.startswith("Error: no server answers at http://127.0.0.1:1: ")


def test_an_unknown_model_shows_what_the_server_says(serve):
    result = serve("--model", "other", "--tasks", "copy")
    assert (result.code, result.out) == (1, "")
    assert result.err == "Error: the first request failed: status 404: no model other\n"


def test_the_key_is_taken_from_the_environment_and_never_shown(serve, openai_server, monkeypatch, tmp_path):
    openai_server.api_key = "sekret-1"
    quick = ("--tasks", "copy", "--concurrency", 1, "--num-requests", 1, "--out", tmp_path / "load.json")
    for name, other in (("OPENAI_API_KEY", "sekret-1"), ("CHORDAL_API_KEY", "sekret-1")):
        monkeypatch.setenv(name, other)
        result = serve(*quick, "--json")
        assert result.code == 0, result.err
        assert "sekret" not in result.out + result.err + (tmp_path / "load.json").read_text()
        monkeypatch.setenv(name, "sekret-2")
    # Chordal's own comes before the other, and what is given before both.
    refused = serve(*quick)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("Error: the server refuses the key (401): Incorrect API key")
    assert "sekret" not in refused.err
    assert serve(*quick, "--api-key", "sekret-1").code == 0


def test_ctrl_c_shows_what_there_is_and_exits_130(serve, openai_server, prompts, tmp_path):
    sent = []

    def interrupt(body):
        sent.append(body)
        if len(sent) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    openai_server.on_request = interrupt
    out = tmp_path / "load.json"
    result = serve(
        "--data", prompts({"chunks": ["a"] * 20}), "--concurrency", "1,8", "--num-requests", 1000,
        "--warmup", 0, "--out", out,
    )  # fmt: skip
    assert result.code == 130
    assert "Interrupted at 1 at once: 3 requests were done." in result.err
    assert "TTFT" in result.out
    [level] = json.loads(out.read_text())["levels"]
    assert (level["num_ok"], level["is_complete"]) == (3, False)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--concurrency", "1,x"], "--concurrency"),
        (["--concurrency", "0"], "--concurrency"),
        (["--concurrency", ""], "--concurrency"),
        (["--extra-body", "{"], "--extra-body must be JSON"),
        (["--extra-body", "[]"], "--extra-body must be a JSON object"),
        (["--extra-body", '{"x": NaN}'], "NaN"),
        (["--extra-body", '{"n": 2}'], "n cannot be"),
        (["--extra-body", '{"chordal": 3}', "--counts"], '"chordal"'),
        (["--request-rate", "0"], "request rate"),
        (["--duration", "0"], "duration"),
        (["--timeout", "0"], "--timeout"),
        (["--timeout", "nan"], "--timeout"),
        (["--temperature", "nan"], "--temperature"),
        (["--endpoint", "responses"], "--endpoint"),
        (["--num-requests", "0"], "--num-requests"),
        (["--tasks", "nothing"], "unknown task 'nothing'"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--base-url", "localhost"], "http://"),
        (["--bogus"], "--bogus"),
    ],
)
def test_misuse_is_one_line_and_one_that_points_to_help(serve, openai_server, args, error):
    result = serve(*args)
    assert (result.code, result.out) == (2, "")
    first, second = result.err.splitlines()
    assert first.startswith("Error: ")
    assert error in first
    assert second == "Try: chordal bench serve --help"
    assert openai_server.requests == []


def test_options_of_bench_in_front_are_refused_and_its_own_take_underscores(run, serve):
    result = run("bench", "--seed", 3, "serve")
    assert result.code == 2
    assert result.err.startswith("Error: options of serve go behind its name.")
    assert serve("--num_requests", 1, "--concurrency", 1, "--tasks", "copy").code == 0


def test_the_commands_of_the_help_work_when_pasted(run, serve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = run("bench", "serve", "--help").out
    examples = re.findall(r"^    chordal bench serve (.*)$", text.partition("Examples:")[2], re.MULTILINE)
    assert len(examples) == 2
    assert text.rstrip().endswith(examples[-1])
    for example in examples:
        result = serve(*shlex.split(example), "--num-requests", 2)
        assert result.code == 0, (example, result.err)
        assert result.out


def test_help_imports_nothing_heavy_and_a_load_no_torch():
    code = f"""
import sys
from chordal.cli import main
main(["bench", "serve", "--help"])
print(*({HEAVY} & set(sys.modules)), file=sys.stderr)
main(["bench", "serve", "--base-url", "http://127.0.0.1:1"])
print(*({{"torch", "transformers"}} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    first, error, last = done.stderr.splitlines()
    assert (first, last) == ("", "")
    assert error.startswith("Error: no server answers")
