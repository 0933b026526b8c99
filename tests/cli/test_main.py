from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from chordal import __version__
from chordal.cli import app, main
from chordal.testing.published_llada import write_llada

COMMANDS = [
    "generate",
    "bench",
    "compare",
    "inspect",
    "convert",
    "list",
    "plan",
    "serve",
    "trace",
    "train",
    "tune",
    "verify",
]
HEAVY = {"torch", "transformers", "tokenizers", "numpy", "rich", "safetensors"}


def examples(help_text):
    return re.findall(r"^    chordal (.*)$", help_text.partition("Examples:")[2], re.MULTILINE)


def test_help_imports_nothing_heavy():
    code = f"""
import sys
from chordal.cli import main
for args in [[], *([name] for name in {COMMANDS})]:
    main([*args, "--help"])
sys.exit(", ".join({HEAVY} & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert done.returncode == 0


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_ends_with_two_commands(capsys, command):
    assert main([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert len(examples(text)) == 2
    assert text.rstrip().endswith(examples(text)[-1])
    for example in examples(text):
        assert example.split()[0] in (command or COMMANDS)


@pytest.mark.timeout(400)  # many whole commands, one after the other
def test_the_commands_of_the_help_work_when_pasted(run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    trained = []
    monkeypatch.setattr("chordal.training.loop.train", lambda recipe, *_, **__: trained.append(recipe) or ())
    monkeypatch.setattr("chordal.training.tokenizer.train_tokenizer", lambda directory: None)
    # A server runs until it is told to end.
    monkeypatch.setattr("chordal.server.run.serve", lambda load, settings: print(*settings.served_names) or 0)
    pasted = set()
    for command in [[], *([name] for name in COMMANDS)]:
        pasted |= set(examples(run(*command, "--help").out))
    # The demo has a test of its own, on fewer prompts. Of published checkpoints there are tiny ones only.
    write_llada(tmp_path / "GSAI-ML" / "LLaDA-8B-Instruct")
    for example in sorted(pasted - {"compare --demo"}):
        result = run(*shlex.split(example))
        assert result.code == 0, (example, result.err)
        assert result.out
    assert [recipe.name for recipe in trained] == ["tiny-ar"]


def test_no_command_shows_the_help(run):
    assert run().out == run("--help").out
    assert run().code == 0


def test_module_runs_the_same_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "chordal", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"chordal {__version__}\n")


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        (["generat"], "generate", "chordal --help"),
        (["generate", "--bogus"], "--bogus", "chordal generate --help"),
        (["generate", "a", "--top-k", "many"], "--top-k", "chordal generate --help"),
        (["generate", "a", "b"], "b", "chordal generate --help"),
        (["generate", "a", "--batch-size", "0"], "--batch-size", "chordal generate --help"),
        (["compare", "--repeats", "0"], "--repeats", "chordal compare --help"),
        (["generate", "a", "--seed"], "--seed", "chordal generate --help"),
        (["bench", "serv"], "serv", "chordal bench --help"),
    ],
)
def test_misuse_is_one_line_and_one_that_points_to_help(run, args, error, hint):
    result = run(*args)
    assert result.code == 2
    assert result.out == ""
    first, second = result.err.splitlines()
    assert first.startswith("Error: ")
    assert error in first
    assert second == f"Try: {hint}"


def test_unexpected_failure_is_one_line_and_exit_1(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("chordal.generation.load", fail)
    result = run("generate", "a")
    assert result.code == 1
    assert result.err == "Error: RuntimeError: two lines (CHORDAL_DEBUG=1 shows where)\n"
    monkeypatch.setenv("CHORDAL_DEBUG", "1")
    assert "Traceback" in run("generate", "a").err


def test_interrupt_is_quiet_and_exit_130(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("chordal.generation.load", interrupt)
    assert run("generate", "a") == (130, "", "")


def test_reader_that_leaves_is_no_error():
    command = subprocess.Popen(
        [sys.executable, "-m", "chordal", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    command.stdout.close()
    assert command.stderr.read() == b""
    command.stderr.close()
    assert command.wait() == 1


def test_every_command_is_registered_once():
    names = [command.name for command in [*app.registered_commands, *app.registered_groups]]
    assert sorted(names) == sorted(COMMANDS)
