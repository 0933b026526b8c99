"""Tiny seeded models, a small tokenizer, sequences of bytes and a browser, shared by all tests."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import transformers

from chordal.models.family import Family
from chordal.models.language_model import LanguageModel
from chordal.sequence import Sequence, StopRules
from chordal.training.tokenizer import train_tokenizer

# Weights this large make a random model choose different tokens for different texts, and by a margin.
_SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "olmo2": (transformers.Olmo2Config, {"num_key_value_heads": 2}),
    "gpt_neox": (transformers.GPTNeoXConfig, {}),
    "gpt2": (transformers.GPT2Config, {}),
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """At these sizes several threads only wait for each other, on a busy machine for very long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory):
    """What a benchmark remembers goes to a folder of the tests, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHORDAL_STATE", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def make_backbone():
    """Give a new transformers model; the same arguments give the same weights.

    In float64, where no sum is so close that the shape of a batch decides it.
    """

    def make(architecture="llama", dtype=torch.float64, **settings):
        config_class, shape = _ARCHITECTURES[architecture]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                config_class(**(_SHAPE | shape | settings)), attn_implementation="sdpa"
            )
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def make_model(make_backbone):
    """Give a new `LanguageModel` with a cache of its own; the same arguments give the same weights."""

    def make(architecture="llama", family=None, *, tokenizer=None, max_rows=8, **settings):
        backbone = make_backbone(architecture, **settings)
        return LanguageModel(backbone, family or Family(), tokenizer, name="tiny", max_rows=max_rows)

    return make


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(directory, num_examples=150)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    return transformers.AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="session")
def checkpoint_dir(make_backbone, tokenizer, tmp_path_factory):
    """A folder in transformers' layout: a tiny causal model and its tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    eos = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    make_backbone("llama", torch.float32, **eos).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def make_sequence():
    """Give a sequence whose tokens are bytes of UTF-8; 0 has no text and 255 is the mask token."""

    def detokenize(tokens):
        return bytes(token for token in tokens.tolist() if token).decode(errors="replace")

    def make(prompt="ab", max_new_tokens=8, *, eos_ids=(0,), stop_strings=(), mask_id=255, **more):
        return Sequence(
            prompt=np.frombuffer(prompt.encode(), np.uint8).astype(np.int64),
            family=Family(kind="causal" if mask_id is None else "masked", mask_id=mask_id, eos_ids=eos_ids),
            stop=StopRules(max_new_tokens=max_new_tokens, eos_ids=eos_ids, stop_strings=stop_strings),
            detokenize=detokenize,
            **more,
        )

    return make


# Nothing but the page under test: no sandbox to set up as root, no calls home.
_BROWSER_FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync
""".split()


# Not for the whole session: while it is open, no other test could run an event loop of its own.
@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("needs Chromium, e.g. apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=_BROWSER_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page of 1280 x 800 to open `path.as_uri()` in; the test is marked `browser`.

    What the page logs as a warning or an error, throws, or asks the network for fails the test.
    """
    faults = []
    context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: faults.append(f"threw {error}"))
    page.on("console", lambda line: faults.append(line.text) if line.type in ("warning", "error") else None)
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(("file:", "data:", "blob:")) else faults.append(request.url)
        ),
    )
    yield page
    context.close()
    assert not faults
