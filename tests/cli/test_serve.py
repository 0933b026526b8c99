from __future__ import annotations

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from chordal.errors import InputError
from chordal.server.settings import ServerSettings

OF_ONE_MODEL = [
    "--draft", "d", "--middle", "m", "--draft-quantization", "int4", "--middle-quantization", "int8",
    "--revision", "main", "--block-length", "8",
]  # fmt: skip


@pytest.fixture
def served(monkeypatch):
    """What `chordal serve` would serve: the function that loads, and the settings."""
    calls = []
    monkeypatch.setattr("chordal.server.run.serve", lambda *given: calls.append(given) or 0)
    monkeypatch.delenv("CHORDAL_API_KEY", raising=False)
    return calls


@pytest.fixture
def loads(monkeypatch):
    """What `chordal.load` is called with; nothing is loaded."""
    calls = []
    monkeypatch.setattr("chordal.generation.load", lambda **settings: calls.append(settings))
    monkeypatch.setattr("chordal.cli.serve._check_decoder", lambda *_: None)
    return calls


def test_without_options_the_bundled_model_is_served_to_this_machine(run, served):
    assert run("serve") == (0, "", "")
    [(load, settings)] = served
    assert settings == ServerSettings(served_names=("tiny-ar",))
    assert list(load()) == ["tiny-ar"]


def test_every_option_reaches_the_server(run, served, monkeypatch):
    monkeypatch.setenv("CHORDAL_API_KEY", "three,four")
    result = run(
        "serve", "tiny-mdm", "--host", "0.0.0.0", "--port", 80, "--api-key", "one", "--api-key", "two",
        "--allow-no-key", "--served-model-name", "a", "--served-model-name", "b", "--max-num-seqs", 3,
        "--max-queue", 4, "--max-model-len", 100, "--timeout", 5, "--shutdown-timeout", 6, "--watchdog", 7,
        "--max-body", 2048, "--prefix-cache-mib", 9, "--cors", "https://a.example", "--log-file", "log",
        "--log-prompts", "--vllm-metrics", "--no-playground", "--decoder", "threshold", "--set",
        "threshold=0.7",
    )  # fmt: skip
    assert result == (0, "", "")
    [(_, settings)] = served
    assert settings == ServerSettings(
        host="0.0.0.0",
        port=80,
        served_names=("a", "b"),
        api_keys=("one", "two", "three", "four"),
        allow_no_key=True,
        decoder="threshold",
        decoder_settings={"threshold": 0.7},
        max_num_seqs=3,
        max_queue=4,
        max_model_len=100,
        timeout_s=5,
        shutdown_timeout_s=6,
        watchdog_s=7,
        max_body_bytes=2048,
        prefix_cache_mib=9,
        cors_origins=("https://a.example",),
        log_prompts=True,
        log_file="log",
        vllm_metrics=True,
        playground=False,
    )


def test_zero_is_no_limit(run, served):
    run("serve", "--timeout", 0, "--watchdog", 0)
    assert (served[0][1].timeout_s, served[0][1].watchdog_s) == (None, None)


def test_decoder_and_settings_come_from_a_file(run, served, tmp_path):
    path = tmp_path / "tuned.yaml"
    path.write_text("decoder: prompt_lookup\nsettings: {num_draft: 3}\n")
    run("serve", "--config", path, "--set", "match=last")
    [(_, settings)] = served
    assert (settings.decoder, settings.decoder_settings) == (
        "prompt_lookup",
        {"num_draft": 3, "match": "last"},
    )


def test_what_is_of_one_model_goes_with_the_first(run, served, loads):
    run(
        "serve",
        "a/b",
        "c/d",
        "--dtype",
        "float16",
        "--max-num-seqs",
        5,
        "--prefix-cache-mib",
        6,
        *OF_ONE_MODEL,
    )
    [(load, settings)] = served
    assert settings.served_names == ("a/b", "c/d")
    assert list(load()) == ["a/b", "c/d"]
    first, second = loads
    for given in (first, second):
        assert (given["dtype"], given["max_rows"], given["prefix_cache_mib"]) == ("float16", 5, 6)
    names = [option[2:].replace("-", "_") for option in OF_ONE_MODEL[::2]]
    assert [first[name] for name in names] == ["d", "m", "int4", "int8", "main", 8]
    assert [second[name] for name in names] == [None] * 6


def test_one_model_may_have_several_names_and_is_loaded_once(run, served):
    run("serve", "tiny-ar", "--served-model-name", "gpt", "--served-model-name", "other")
    [(load, settings)] = served
    models = load()
    assert list(models) == list(settings.served_names) == ["gpt", "other"]
    assert models["gpt"] is models["other"]


def test_a_folder_is_served_under_its_own_name_not_its_path(run, served, zoo_dir):
    run("serve", f"{zoo_dir / 'tiny-mdm'}/", "tiny-ar")
    [(load, settings)] = served
    assert settings.served_names == ("tiny-mdm", "tiny-ar")
    assert [model.name for model in load().values()] == ["tiny-mdm", "tiny-ar"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tiny-ar", "tiny-mdm", "--served-model-name", "a"], "once for each model; got 1 for 2"),
        (["tiny-ar", "tiny-ar"], "models must have different names; got tiny-ar, tiny-ar"),
        (["--served-model-name", ""], "printable"),
        (["--served-model-name", "a\nb"], "printable"),
        (["--tensor-parallel"], "--tensor-parallel"),
        (["--model", "tiny-mdm"], "--model"),
        (["--port", "65536"], "--port"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--max-queue", "-1"], "--max-queue"),
        (["--timeout", "nan"], "--timeout"),
        (["--timeout", "-1"], "--timeout"),
        (["--api-key", ""], "key 1 of --api-key is empty"),
    ],
)
def test_misuse_is_one_clear_line_and_exit_2(run, served, args, words):
    result = run("serve", *args)
    assert (result.code, result.out) == (2, "")
    assert words in result.err.splitlines()[0]
    assert result.err.splitlines()[1:] == ["Try: chordal serve --help"]
    assert served == []


def test_an_empty_key_in_the_environment_is_an_error_not_an_open_server(run, served, monkeypatch):
    monkeypatch.setenv("CHORDAL_API_KEY", "")
    result = run("serve")
    assert (result.code, served) == (2, [])
    assert "CHORDAL_API_KEY" in result.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tiny-ar", "--decoder", "threshold"], "threshold needs a"),
        (["tiny-ar", "--decoder", "draft_model"], "draft"),
        (["tiny-ar", "--decoder", "no_such"], "unknown decoder"),
        (["tiny-ar", "--decoder", "prompt_lookup", "--set", "no_such=1"], "no_such"),
        (["tiny-ar", "--set", "no_such=1"], "no_such"),
    ],
)
def test_a_default_decoder_that_no_model_can_use_ends_the_loading(run, served, args, words):
    run("serve", *args)
    [(load, _)] = served
    with pytest.raises(InputError, match=words):
        load()


def test_a_default_decoder_need_not_fit_every_model(run, served, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CHORDAL_STATE", str(tmp_path))  # where nothing was measured
    run("serve", "tiny-ar", "tiny-mdm", "--decoder", "threshold")
    [(load, _)] = served
    assert list(load()) == ["tiny-ar", "tiny-mdm"]
    assert "threshold with these settings is approximate" in capsys.readouterr().err


def test_what_is_not_installed_is_said_before_anything_else(run, served, monkeypatch):
    monkeypatch.setattr("chordal.server.run.find_spec", lambda name: None)
    result = run("serve")
    assert result.code == 2
    assert "pip install 'chordal[serve]'" in result.err
