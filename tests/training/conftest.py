from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from chordal.training.tokenizer import train_tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """At these sizes several threads only wait for each other, on a busy machine for very long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(directory, num_examples=150)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)
