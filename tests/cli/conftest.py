"""A zoo of tiny random models, and a way to run the command line inside the test."""

from __future__ import annotations

import io
import json
import sys
from typing import NamedTuple

import pytest
import torch

from chordal.cli import main

MASK_ID = 1
FACTS = {
    "tiny-ar": {"family": "causal"},
    "tiny-mdm": {"family": "masked", "mask_token_id": MASK_ID},
    "tiny-block": {"family": "block", "mask_token_id": MASK_ID, "block_length": 4},
}


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def lines(self):
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture(scope="session")
def zoo_dir(tmp_path_factory, make_backbone, tokenizer):
    """A folder of random models of each kind under the names of the bundled ones."""
    zoo = tmp_path_factory.mktemp("zoo")
    for name, facts in FACTS.items():
        model = make_backbone(
            "qwen3", dtype=torch.float32, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id
        )
        model.config.chordal = facts
        model.save_pretrained(zoo / name)
        tokenizer.save_pretrained(zoo / name)
        count = sum(p.numel() for p in model.parameters())
        (zoo / name / "training.json").write_text(json.dumps({"parameters": count}))
    return zoo


@pytest.fixture
def run(zoo_dir, monkeypatch, capsys):
    """Run a command line on the tiny zoo; `stdin` is a stream, or what is piped into it."""
    monkeypatch.setattr("chordal.models.checkpoint.zoo_dir", lambda: zoo_dir)

    def run(*args, stdin=""):
        if isinstance(stdin, (str, bytes)):
            data = stdin if isinstance(stdin, bytes) else stdin.encode()
            stdin = io.TextIOWrapper(io.BytesIO(data), "utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        return Result(main([str(arg) for arg in args]), *capsys.readouterr())

    return run


@pytest.fixture
def terminal(monkeypatch):
    """Make standard output look like a terminal."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("chordal.cli.console.is_terminal", lambda stream: stream is sys.stdout)
    for module in ("generate", "trace", "watch"):
        monkeypatch.setattr(f"chordal.cli.{module}.is_terminal", lambda stream: stream is sys.stdout)


@pytest.fixture
def write_jsonl(tmp_path):
    """Write values as lines of JSON; bytes are written as they are."""

    def write(*lines):
        path = tmp_path / "prompts.jsonl"
        encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"".join(line + b"\n" for line in encoded))
        return path

    return write
