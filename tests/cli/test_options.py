from __future__ import annotations

import dataclasses
import inspect
import sys

import pytest

from chordal.cli.compare import compare
from chordal.cli.generate import generate
from chordal.cli.options import Decoding, Loading, parse_settings, read_config
from chordal.errors import ChordalError, InputError
from chordal.generation import Request, load
from chordal.models.placement import place

PROMPT = "copy: Ana Ben Cleo"


@pytest.fixture
def loads(monkeypatch):
    """What `chordal.load` is called with; nothing is loaded."""
    calls = []

    def note(**settings):
        calls.append(settings)
        raise ChordalError("noted")

    monkeypatch.setattr("chordal.generation.load", note)
    return calls


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-3", -3),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("False", False),
        ("none", None),
        ("null", None),
        ("dual", "dual"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_values_are_read_as_yaml_scalars(text, value):
    [read] = parse_settings([f"key={text}"]).values()
    assert (read, type(read)) == (value, type(value))


def test_keys_may_have_dashes():
    assert parse_settings(["num-draft=5", "match=last"]) == {"num_draft": 5, "match": "last"}


@pytest.fixture
def config(tmp_path):
    """A file as `chordal plan --out` writes it."""
    path = tmp_path / "plan.json"
    path.write_text(
        '{"decoder": "prompt_lookup", "settings": {"num_draft": 2, "match": "last"}, "ladder": []}'
    )
    return path


def test_decoder_and_settings_come_from_a_file(run, config):
    result = run("generate", PROMPT, "--config", config, "--max-new-tokens", 4, "--json").json
    assert result["decoder"] == "prompt_lookup"
    assert (result["config"]["num_draft"], result["config"]["match"]) == (2, "last")


def test_flags_come_before_the_file(config):
    assert Decoding(config=str(config), set_=["num_draft=7"]).choice() == (
        "prompt_lookup",
        {"num_draft": 7, "match": "last"},
    )
    same = Decoding(config=str(config), decoder="prompt_lookup")
    assert same.choice() == ("prompt_lookup", {"num_draft": 2, "match": "last"})


def test_settings_of_a_file_are_not_those_of_another_decoder(config):
    other = Decoding(config=str(config), decoder="threshold", set_=["threshold=0.7"])
    assert other.choice() == ("threshold", {"threshold": 0.7})


def test_a_file_is_one_of_those_that_are_compared(run, config):
    quick = ["--tasks", "copy", "--num-prompts", 1, "--repeats", 1, "--max-new-tokens", 4, "--json"]
    rows = run("compare", "--config", config, *quick).json["rows"]
    assert [row["label"] for row in rows] == ["autoregressive", "prompt_lookup: num_draft=2, match=last"]
    rows = run("compare", "--config", config, "--decoders", "prompt_lookup", *quick).json["rows"]
    assert [row["label"] for row in rows][2:] == ["prompt_lookup"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "must be JSON"),
        ("[]", "must hold an object"),
        ('{"settings": {}}', "must hold an object"),
        ('{"decoder": 3}', "must hold an object"),
        ('{"decoder": "a", "settings": []}', "must hold an object"),
    ],
)
def test_a_file_without_a_decoder_is_refused(tmp_path, text, words):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_config(str(path))
    with pytest.raises(InputError, match="cannot read"):
        read_config(str(tmp_path / "nothing"))


@pytest.mark.parametrize("pair", ["num_draft", "=5", ""])
def test_setting_without_key_or_value_is_refused(pair):
    with pytest.raises(InputError, match="key=value"):
        parse_settings([pair])


@pytest.mark.parametrize("command", [generate, compare])
def test_defaults_are_those_of_the_library(command):
    parameters = inspect.signature(command).parameters
    # The command line's --trace names a file.
    fields = [field for field in dataclasses.fields(Request) if field.name in parameters.keys() - {"trace"}]
    assert len(fields) >= 8
    for field in fields:
        assert parameters[field.name].default == field.default


def test_loading_has_the_arguments_and_defaults_of_the_library():
    ours = {field.name: field.default for field in dataclasses.fields(Loading)}
    theirs = {name: one.default for name, one in inspect.signature(load).parameters.items()}
    del theirs["max_rows"]  # follows from the batch size
    del theirs["prefix_cache_mib"]  # commands that measure have no such option
    assert ours | {"model": None} == theirs | {"model": None}


@pytest.mark.parametrize("command", [["generate", PROMPT], ["compare", "--tasks", "copy"]])
def test_every_option_of_loading_reaches_the_library(run, loads, command):
    shown = run(
        *command, "--model", "a/b", "--draft", "c", "--draft-quantization", "int4", "--middle", "d",
        "--middle-quantization", "int8-dynamic", "--concurrent", "--device", "cpu", "--dtype", "float16",
        "--device-map", '{"model": 0, "lm_head": "disk"}', "--quantization", "int8", "--tensor-parallel",
        "--block-length", 8, "--revision", "main", "--token", "secret", "--local-files-only",
    )  # fmt: skip
    assert shown.err == "Error: noted\n"
    [given] = loads
    assert given == {
        "model": "a/b",
        "draft": "c",
        "draft_quantization": "int4",
        "middle": "d",
        "middle_quantization": "int8-dynamic",
        "concurrent": True,
        "device": "cpu",
        "dtype": "float16",
        "device_map": {"model": 0, "lm_head": "disk"},
        "quantization": "int8",
        "tensor_parallel": True,
        "block_length": 8,
        "revision": "main",
        "token": "secret",
        "local_files_only": True,
        "max_rows": 1,
        "prefix_cache_mib": 0,
    }


def test_device_map_may_be_a_word(run, loads):
    run("generate", PROMPT, "--device-map", "auto")
    assert loads[0]["device_map"] == "auto"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--device-map", "{model: 0}"], "--device-map must be auto or JSON"),
        (["--device-map", "everywhere"], "device_map must be auto, "),
        (["--device-map", "auto", "--device", "cpu"], "exclude each other"),
        (["--quantization", "int2"], "quantization must be int8, int8-dynamic or int4"),
        (["--tensor-parallel"], "torchrun"),
        (["--block-length", "8"], "block_length is for published block-diffusion models"),
    ],
)
def test_bad_way_of_loading_is_one_clear_line_and_exit_2(run, args, words):
    shown = run("generate", PROMPT, *args)
    assert (shown.code, shown.out) == (2, "")
    assert words in shown.err.splitlines()[0]
    assert len(shown.err.splitlines()) == 2


def test_of_several_processes_only_the_first_speaks_and_writes(run, monkeypatch, tmp_path):
    monkeypatch.setattr("chordal.models.placement._split", lambda torch: place("cpu"))
    args = ["generate", PROMPT, "--tensor-parallel", "--max-new-tokens", 4, "--stats"]
    args += ["--output", tmp_path / "text", "--trace", tmp_path / "trace"]
    monkeypatch.setenv("RANK", "1")
    for stream in ("stdout", "stderr"):  # they are replaced
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    assert run(*args) == (0, "", "")
    sys.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_several_processes_speaks(run, monkeypatch):
    monkeypatch.setattr("chordal.models.placement._split", lambda torch: place("cpu"))
    monkeypatch.setenv("RANK", "0")
    alone = run("generate", PROMPT, "--max-new-tokens", 4)
    assert alone.out
    assert run("generate", PROMPT, "--max-new-tokens", 4, "--tensor-parallel").out == alone.out


@pytest.mark.parametrize("args", [[], ["-"], ["--file", "-"]])
def test_several_processes_do_not_share_standard_input(run, args):
    shown = run("generate", *args, "--tensor-parallel", stdin=PROMPT)
    assert shown.code == 2
    assert "processes cannot share standard input" in shown.err


def test_a_yaml_file_is_read_by_its_ending(tmp_path):
    path = tmp_path / "tuned.yaml"
    path.write_text("decoder: threshold\nsettings:\n  threshold: 0.8\n  feed: dual\nwhy: 'fast: it is'\n")
    assert read_config(str(path)) == ("threshold", {"threshold": 0.8, "feed": "dual"})
    path.write_text("decoder: [threshold\n")
    with pytest.raises(InputError, match=r"tuned\.yaml must be YAML"):
        read_config(str(path))
    path.write_text("- threshold\n")
    with pytest.raises(InputError, match="must hold an object"):
        read_config(str(path))
