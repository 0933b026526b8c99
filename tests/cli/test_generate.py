from __future__ import annotations

import io
import json
import re
import sys

import pytest

import chordal
from chordal.decoders.autoregressive import Autoregressive
from chordal.errors import DecodingError
from chordal.trace import read_trace

PROMPT = "copy: Ana Ben Cleo"
RECORD = [
    "prompt",
    "text",
    "tokens",
    "finish_reason",
    "stop_reason",
    "alternatives",
    "model",
    "decoder",
    "promise",
    "config",
]
COUNTERS = {
    "forwards",
    "committed_tokens",
    "tokens_per_forward",
    "positions_fed",
    "draft_tokens",
    "accepted_tokens",
    "wall_s",
}


@pytest.fixture
def fail_on(monkeypatch):
    """Make decoding of prompts that contain a token raise an error."""
    decode = Autoregressive.decode

    def install(model, text, error):
        [*_, token] = model.tokenizer(text)["input_ids"]

        def failing(self, seq):
            if token in seq.prompt:
                raise error
            yield from decode(self, seq)

        monkeypatch.setattr(Autoregressive, "decode", failing)

    return install


@pytest.fixture
def tiny_ar(zoo_dir):
    return chordal.load(zoo_dir / "tiny-ar")


def test_json_is_one_document_with_the_documented_keys(run):
    result = run("generate", PROMPT, "--max-new-tokens", 8, "--json")
    assert result.code == 0
    assert result.err == ""
    assert list(result.json) == [*RECORD, "stats"]
    assert result.json["stats"].keys() >= COUNTERS
    assert result.json["prompt"] == PROMPT
    assert len(result.json["tokens"]) == result.json["stats"]["committed_tokens"]


@pytest.fixture
def offer_two(monkeypatch):
    """Make plain decoding offer what it finds, and the same backwards."""
    decode = Autoregressive.decode

    def offering(self, seq):
        yield from decode(self, seq)
        seq.offer(seq.output, -1.25)
        seq.offer(seq.output[::-1], -2.5)

    monkeypatch.setattr(Autoregressive, "decode", offering)


def test_every_text_that_was_found_is_shown(run, offer_two, write_jsonl):
    shown = run("generate", PROMPT, "--max-new-tokens", 4, "--ignore-eos", "--json").json
    first, second = shown["alternatives"]
    assert first == {
        "tokens": shown["tokens"], "text": shown["text"], "score": -1.25, "finish_reason": "length",
    }  # fmt: skip
    assert (second["tokens"], second["score"]) == (shown["tokens"][::-1], -2.5)
    [record] = run("generate", "--file", write_jsonl(PROMPT), "--max-new-tokens", 4, "--ignore-eos").lines
    assert record["alternatives"] == shown["alternatives"]


def test_other_texts_are_shown_beside_the_text_and_not_in_it(run, offer_two):
    args = "generate", PROMPT, "--max-new-tokens", 4, "--ignore-eos"
    first, second = (other["text"] for other in run(*args, "--json").json["alternatives"])
    shown = run(*args)
    assert shown.out == first + "\n"
    assert shown.err == f"alternative 2 (-2.50): {second}\n"


@pytest.mark.parametrize(
    ("model", "decoder", "pairs"),
    [
        ("tiny-ar", "autoregressive", {}),
        ("tiny-ar", "prompt_lookup", {"num_draft": 3}),
        ("tiny-mdm", "low_confidence", {"num_steps": 4, "block_length": None}),
        ("tiny-mdm", "threshold", {"threshold": 0.5, "feed": "dual"}),
        ("tiny-block", "block_diffusion", {"num_steps": 2}),
    ],
)
def test_result_is_what_the_library_gives(run, zoo_dir, model, decoder, pairs):
    pairs_given = [text for name, value in pairs.items() for text in ("--set", f"{name}={value}")]
    shown = run(
        "generate", PROMPT, "--model", model, "--decoder", decoder, *pairs_given,
        "--max-new-tokens", 8, "--temperature", 0.7, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01,
        "--repetition-penalty", 1.2, "--seed", 5, "--ignore-eos", "--json",
    )  # fmt: skip
    [given] = chordal.load(zoo_dir / model).generate(
        PROMPT, decoder=decoder, config=pairs, max_new_tokens=8, temperature=0.7, top_k=50, top_p=0.9,
        min_p=0.01, repetition_penalty=1.2, seed=5, ignore_eos=True,
    )  # fmt: skip
    assert shown.json["tokens"] == given.tokens
    assert shown.json["text"] == given.text
    assert shown.json["promise"] == given.promise
    assert pairs.items() <= shown.json["config"].items()


def test_text_alone_goes_to_stdout_and_counters_to_stderr(run):
    text = run("generate", PROMPT, "--max-new-tokens", 8, "--json").json["text"]
    result = run("generate", PROMPT, "--max-new-tokens", 8, "--stats")
    assert result.out == text + "\n"
    assert result.err.startswith("8 tokens | 8 forwards | 1.00 tokens/forward | ")


def test_options_are_accepted_with_underscores(run):
    dashes = run("generate", PROMPT, "--max-new-tokens", 4, "--ignore-eos")
    assert run("generate", PROMPT, "--max_new_tokens=4", "--ignore_eos").out == dashes.out


def test_prompt_is_read_from_a_pipe(run):
    given = run("generate", PROMPT, "--max-new-tokens", 4, "--json").json["tokens"]
    for args in ([], ["-"]):
        piped = run("generate", *args, "--max-new-tokens", 4, "--json", stdin=PROMPT + "\n").json
        assert piped["prompt"] == PROMPT
        assert piped["tokens"] == given


def test_stop_strings_and_raw_reach_the_model(run):
    text = run("generate", PROMPT, "--max-new-tokens", 8).out.rstrip("\n")
    raw = run("generate", PROMPT, "--max-new-tokens", 8, "--raw").out.rstrip("\n")
    assert raw != text
    stop = text[len(text) // 2]
    cut = run("generate", PROMPT, "--max-new-tokens", 8, "--stop", stop, "--json").json
    assert (cut["text"], cut["stop_reason"]) == (text.partition(stop)[0], stop)


def test_terminal_gets_the_text_as_it_comes(run, terminal, monkeypatch):
    text = run("generate", PROMPT, "--max-new-tokens", 8, "--json").json["text"]
    writes = []

    def run_and_record(self, written):
        writes.append(written)
        return len(written)

    monkeypatch.setattr(type(sys.stdout), "write", run_and_record)
    run("generate", PROMPT, "--max-new-tokens", 8)
    assert "".join(writes) == text + "\n"
    assert len([written for written in writes if written.strip()]) > 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "tiny-arr"], ["unknown model", "tiny-ar"]),
        (["--decoder", "prompt_lokup"], ["unknown decoder", "Did you mean", "prompt_lookup"]),
        (["--decoder", ""], ["unknown decoder"]),
        (["--decoder", "threshold"], ["needs a masked model", "autoregressive"]),
        (["--model", "tiny-mdm", "--decoder", "prompt_lookup"], ["needs a causal model", "low_confidence"]),
        (["--decoder", "prompt_lookup", "--set", "nm_draft=3"], ["setting 'nm_draft'", "num_draft"]),
        (["--decoder", "prompt_lookup", "--set", "num_draft=-1"], ["num_draft must be at least 0", "-1"]),
        (["--decoder", "prompt_lookup", "--set", "num_draft=x"], ["must be a whole number", "'x'"]),
        (["--set", "num_draft"], ["key=value"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--temperature", "nan"], ["temperature"]),
        (["--top-p", "2"], ["top_p"]),
        (["--top-k", "-1"], ["top_k"]),
        (["--min-p", "2"], ["min_p"]),
        (["--repetition-penalty", "0"], ["repetition_penalty"]),
        (["--max-new-tokens", "0"], ["max_new_tokens"]),
        (["--max-new-tokens", "300"], ["window of 256"]),
        (["--stop", ""], ["stop strings"]),
        (["--device", "abacus"], ["device 'abacus'"]),
        (["--dtype", "int8"], ["dtype", "int8"]),
        (["--draft", "tiny-drft"], ["unknown model 'tiny-drft'"]),
        (["--model", "tiny-mdm", "--set", "num_steps=1", "--max-new-tokens", "40"], ["number of blocks"]),
        (["--model", "tiny-block", "--set", "num_steps=5"], ["at most the block length 4"]),
        (["--watch", "--json"], ["--watch"]),
        (["--output", "missing/file"], ["cannot write missing/file"]),
        (["--trace", "."], ["cannot write ."]),
        (["--file", "prompts.jsonl"], ["leave out PROMPT"]),
    ],
)
def test_bad_option_is_one_clear_line_and_exit_2(run, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    result = run("generate", PROMPT, *args)
    assert (result.code, result.out) == (2, "")
    first, second = result.err.splitlines()
    assert first.startswith("Error: ")
    assert all(word in first for word in words)
    assert second == "Try: chordal generate --help"


@pytest.mark.parametrize(
    ("prompt", "stdin", "words"),
    [
        ([""], "", "must not be empty"),
        ([" \n"], "", "must not be empty"),
        ([], "", "must not be empty"),
        ([], b"\xff\xfe", "utf-8"),
        (["\udcff"], "", "Unicode"),
        (["Ana " * 300], "", "window of 256"),
    ],
)
def test_bad_prompt_is_one_clear_line_and_exit_2(run, prompt, stdin, words):
    result = run("generate", *prompt, stdin=stdin)
    assert (result.code, result.out) == (2, "")
    assert words in result.err.splitlines()[0]
    assert len(result.err.splitlines()) == 2


def test_without_a_prompt_a_terminal_is_not_waited_for(run):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    result = run("generate", stdin=Terminal("typed later"))
    assert result.code == 2
    assert "no prompt" in result.err


@pytest.mark.parametrize("damage", ["empty", "no weights", "half config", "half weights", "pickle"])
def test_damaged_checkpoint_is_one_clear_line_and_exit_2(run, zoo_dir, tmp_path, damage):
    folder = tmp_path / "model"
    folder.mkdir()
    if damage != "empty":
        for file in (zoo_dir / "tiny-ar").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "half config":
        config.write_bytes(config.read_bytes()[:40])
    elif damage == "half weights":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif damage == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    result = run("generate", PROMPT, "--model", folder)
    assert (result.code, result.out) == (2, "")
    assert str(folder) in result.err.splitlines()[0]
    assert len(result.err.splitlines()) == 2


def test_decoding_that_fails_is_exit_1(run, tiny_ar, fail_on):
    fail_on(tiny_ar, "Cleo", DecodingError("it broke"))
    assert run("generate", PROMPT) == (1, "", "Error: it broke\n")


def test_file_gives_one_record_a_line_in_input_order(run, write_jsonl):
    prompts = [f"copy: {'Ana ' * (1 + index % 5)}Ben" for index in range(20)]
    path = write_jsonl(*({"id": index, "prompt": prompt} for index, prompt in enumerate(prompts)))
    result = run("generate", "--file", path, "--max-new-tokens", 4, "--batch-size", 2)
    assert (result.code, result.err) == (0, "")
    assert [record["id"] for record in result.lines] == list(range(20))
    assert [record["prompt"] for record in result.lines] == prompts
    alone = run("generate", prompts[3], "--max-new-tokens", 4, "--json").json
    assert result.lines[3]["tokens"] == alone["tokens"]


def test_file_takes_text_messages_and_ids(run, write_jsonl, tiny_ar):
    messages = [{"role": "user", "content": PROMPT}]
    ids = tiny_ar.encode(PROMPT).tolist()
    path = write_jsonl(PROMPT, {"prompt": PROMPT}, {"messages": messages}, {"prompt": ids})
    records = run("generate", "--file", path, "--max-new-tokens", 4).lines
    assert [record["prompt"] for record in records] == [PROMPT, PROMPT, messages, ids]
    assert len({tuple(record["tokens"]) for record in records}) == 1


def test_file_may_come_through_a_pipe(run):
    result = run("generate", "--file", "-", "--max-new-tokens", 2, stdin='"Ana"\n"Ben"\n')
    assert [record["prompt"] for record in result.lines] == ["Ana", "Ben"]


def test_results_win_over_keys_that_are_passed_on(run, write_jsonl):
    [record] = run("generate", "--file", write_jsonl({"prompt": "Ana", "text": "mine", "note": "kept"})).lines
    assert record["text"] != "mine"
    assert record["note"] == "kept"


def test_bad_lines_are_named_and_the_others_run(run, write_jsonl):
    path = write_jsonl(
        {"prompt": "Ana"}, b"{", b"", {"prompt": ""}, {"prompt": "Ana " * 300}, {"prompt": "Ben"}
    )
    result = run("generate", "--file", path, "--max-new-tokens", 2)
    assert result.code == 2
    assert [record["prompt"] for record in result.lines] == ["Ana", "Ben"]
    errors = result.err.splitlines()
    assert [line.partition(": ")[2].partition(": ")[0] for line in errors] == [
        f"{path}, line {number}" for number in (2, 4, 5)
    ]
    assert "not JSON" in errors[0]
    assert "empty" in errors[1]
    assert "window" in errors[2]


def test_settings_that_fit_no_line_are_one_error(run, write_jsonl):
    path = write_jsonl("Ana", "Ben")
    for args in (["--max-new-tokens", 0], ["--max-new-tokens", 999], ["--top-p", 9], ["--decoder", "x"]):
        result = run("generate", "--file", path, *args)
        assert (result.code, result.out) == (2, "")
        assert len(result.err.splitlines()) == 2


def test_line_whose_decoding_fails_does_not_stop_the_others(run, write_jsonl, tiny_ar, fail_on):
    fail_on(tiny_ar, "Cleo", DecodingError("it broke"))
    path = write_jsonl("Ana", "Cleo", "Ben")
    result = run("generate", "--file", path, "--max-new-tokens", 2)
    assert result.code == 1
    assert result.err == f"Error: {path}, line 2: it broke\n"
    assert [record["finish_reason"] == "error" for record in result.lines] == [False, True, False]
    assert result.lines[1]["error"] == "it broke"


def test_what_is_written_is_kept_when_the_run_is_interrupted(run, write_jsonl, tmp_path, tiny_ar, fail_on):
    fail_on(tiny_ar, "Cleo", KeyboardInterrupt())
    path, output = write_jsonl(*["Ana"] * 20, "Cleo"), tmp_path / "results.jsonl"
    result = run("generate", "--file", path, "--output", output, "--max-new-tokens", 2, "--batch-size", 1)
    assert (result.code, result.out, result.err) == (130, "", "")
    assert len([json.loads(line) for line in output.read_text().splitlines()]) == 16


def test_output_replaces_what_the_file_held(run, write_jsonl, tmp_path):
    output = tmp_path / "results.jsonl"
    output.write_text("old\n" * 50)
    assert run("generate", "--file", write_jsonl("Ana"), "--output", output, "--max-new-tokens", 2).out == ""
    [record] = [json.loads(line) for line in output.read_text().splitlines()]
    assert record["prompt"] == "Ana"


def test_command_that_cannot_work_leaves_the_output_as_it_was(run, write_jsonl, tmp_path):
    output = tmp_path / "results.jsonl"
    output.write_text("old")
    assert run("generate", "--file", write_jsonl("Ana"), "--output", output, "--model", "none").code == 2
    assert output.read_text() == "old"


def test_output_onto_the_prompts_is_refused(run, write_jsonl):
    path = write_jsonl("Ana")
    result = run("generate", "--file", path, "--output", path)
    assert result.code == 2
    assert path.read_text() == '"Ana"\n'


def test_output_that_cannot_be_written_fails_before_the_model_is_loaded(run, monkeypatch, tmp_path):
    monkeypatch.setattr("chordal.generation.load", lambda *_, **__: pytest.fail("loaded"))
    for option in ("--output", "--trace"):
        assert run("generate", PROMPT, option, tmp_path).code == 2


def test_missing_prompt_file_is_one_clear_line(run, tmp_path):
    result = run("generate", "--file", tmp_path / "none.jsonl")
    assert result.code == 2
    assert result.err.startswith(f"Error: cannot read {tmp_path / 'none.jsonl'}: ")


def test_counters_of_a_file_are_summed(run, write_jsonl):
    result = run(
        "generate", "--file", write_jsonl(*["Ana"] * 3), "--max-new-tokens", 4, "--ignore-eos", "--stats"
    )
    assert result.err.startswith("12 tokens | 12 forwards | 1.00 tokens/forward | ")


def test_prompts_of_a_file_share_what_they_begin_with_unless_told_otherwise(run, write_jsonl):
    header = "sort: Mia Leo Ana Ben Cleo Dan Eva Finn Gus Hal " * 3
    path = write_jsonl(*(header + name for name in ("Ida", "Jon", "Kim", "Lou")))
    given = ["generate", "--file", path, "--max-new-tokens", 4, "--ignore-eos", "--stats"]
    grouped, alone = run(*given), run(*given, "--prefix-cache-mib", 0)
    as_they_come = run(*given, "--no-prefix-groups")
    for shared in (grouped, as_they_come):
        assert [one["tokens"] for one in shared.lines] == [one["tokens"] for one in alone.lines]
        cached = [one["stats"]["cached_tokens"] for one in shared.lines]
        assert cached.count(0) == 1
        assert f"| {sum(cached):,} prompt tokens shared |" in shared.err
    assert {one["stats"]["cached_tokens"] for one in alone.lines} == {0}
    assert "shared" not in alone.err


def test_settings_that_are_not_finite_are_written_as_text(run, tmp_path):
    args = ["--model", "tiny-mdm", "--decoder", "threshold", "--set", "threshold=inf", "--max-new-tokens", 2]
    result = run("generate", PROMPT, *args, "--json", "--trace", tmp_path / "trace.jsonl")
    assert result.json["config"]["threshold"] == "inf"
    assert read_trace(tmp_path / "trace.jsonl").header["config"]["threshold"] == "inf"


def test_trace_tells_what_was_committed_when(run, tmp_path):
    path = tmp_path / "trace.jsonl"
    args = ["--model", "tiny-mdm", "--decoder", "threshold", "--set", "threshold=0.1", "--max-new-tokens", 6]
    shown = run("generate", PROMPT, *args, "--ignore-eos", "--json", "--trace", path).json
    trace = read_trace(path)
    assert trace.header["prompt"] == PROMPT
    assert trace.header["config"] == shown["config"]
    by_position = {
        position: token
        for event in trace.events
        for position, token in zip(event.positions, event.tokens, strict=True)
    }
    assert [by_position[position] for position in sorted(by_position)] == shown["tokens"]
    assert trace.end["stats"] == shown["stats"]


def test_the_passes_of_a_draft_model_are_shown_too(run, write_jsonl):
    draft = [
        "--decoder",
        "draft_model",
        "--draft",
        "tiny-ar",
        "--max-new-tokens",
        6,
        "--ignore-eos",
        "--stats",
    ]
    for given in (["copy: Ana"], ["--file", write_jsonl({"prompt": "copy: Ana"}, {"prompt": "copy: Ben"})]):
        assert re.search(r"tokens/forward \| [1-9]\d* draft forwards \|", run("generate", *given, *draft).err)
    assert "draft forwards" not in run("generate", "copy: Ana", "--stats").err
