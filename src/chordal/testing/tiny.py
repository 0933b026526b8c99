"""Seeded transformers models of two layers, and what stands around them in a test.

They are random, so their text means nothing, but attention, positions and cache are the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from chordal.forward import Ints, Reading
from chordal.models.family import Family, Kind
from chordal.models.language_model import LanguageModel
from chordal.models.runner import Request, Runner

TINY_VOCAB = 32
TINY_EOS = 30
TINY_MASK = 31
TINY_POISON = TINY_VOCAB
"""A token no model can give, with an embedding that is not a number: whoever reads it gets no logits."""

_CAUSAL = {"qwen3": "Qwen3", "llama": "Llama", "qwen2": "Qwen2", "olmo2": "Olmo2"}


class Alphabet:
    """A tokenizer of one character a token: 0 is "a", and special tokens have no text."""

    chat_template = None
    letters = "abcdefghijklmnopqrstuvwxyz .,"

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Give the token of each letter."""
        return {"input_ids": [self.letters.index(letter) for letter in text]}

    def decode(self, tokens: Sequence[int] | Ints, skip_special_tokens: bool = True) -> str:
        """Give the letters of the tokens."""
        return "".join(self.letters[token] for token in tokens if token < len(self.letters))


def tiny_backbone(
    arch: str = "qwen3",
    *,
    seed: int = 0,
    num_layers: int = 2,
    window: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """Make a seeded transformers model of `TINY_VOCAB` tokens.

    Args:
        arch: "qwen3", "llama", "qwen2" or "olmo2".
        seed: Of its weights.
        num_layers: Layers.
        window: Most tokens of a sequence.
        dtype: Of its weights; in float64 no sum is so close that the shape of a batch decides it.
    """
    config_class = getattr(transformers, _CAUSAL[arch] + "Config")
    config = config_class(
        vocab_size=TINY_VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=window,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, _CAUSAL[arch] + "ForCausalLM")(config)
        for weight in model.parameters():
            # Wider than for training, so that logits differ clearly and depend on the context.
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.25)
    return model.to(dtype).eval()


def tiny_model(
    kind: Kind = "causal",
    *,
    shift: int | None = None,
    block_length: int = 4,
    arch: str = "qwen3",
    seed: int = 0,
    num_layers: int = 2,
    window: int = 64,
    max_rows: int = 16,
    dtype: torch.dtype = torch.float64,
) -> LanguageModel:
    """Make a model of any kind, ready for the engine.

    Among masks the mask token has the largest logit of all: a decoder that could commit it would.

    Args:
        kind: "causal", "masked", "block" or "masked_causal".
        shift: Of the family; None is what the kind usually has.
        block_length: Of the block kind.
        arch: See `tiny_backbone`, as the next three.
        seed: Of its weights.
        num_layers: Layers.
        window: Most tokens of a sequence.
        max_rows: Sequences at once, at most.
        dtype: Of its weights.
    """
    model = tiny_backbone(arch, seed=seed, num_layers=num_layers, window=window, dtype=dtype)
    with torch.no_grad():
        if kind != "causal":
            states = model.base_model(input_ids=torch.full((1, 8), TINY_MASK)).last_hidden_state
            model.get_output_embeddings().weight[TINY_MASK] = states.mean((0, 1))
        known = model.get_input_embeddings().weight
        poison = torch.full_like(known[:1], float("nan"))
        model.set_input_embeddings(torch.nn.Embedding.from_pretrained(torch.cat([known, poison])))
    family = Family(
        kind=kind,
        mask_id=None if kind == "causal" else TINY_MASK,
        shift=(1 if kind == "causal" else 0) if shift is None else shift,
        block_length=block_length if kind == "block" else None,
        eos_ids=(TINY_EOS,),
    )
    return LanguageModel(model, family, Alphabet(), name=f"tiny {kind}", max_rows=max_rows)


def random_prompt(length: int, seed: int = 0) -> Ints:
    """Give a prompt of letters."""
    return np.random.default_rng([seed, length]).integers(0, len(Alphabet.letters), length)


class CountingModel:
    """A model that remembers what it was asked.

    Args:
        model: Does the work.

    Attributes:
        calls: The requests of each forward pass.
    """

    def __init__(self, model: Runner) -> None:
        self.model = model
        self.name, self.family, self.window = model.name, model.family, model.window
        self.vocab_size, self.max_rows, self.tokenizer = model.vocab_size, model.max_rows, model.tokenizer
        self.device, self.dtype = model.device, model.dtype
        self.calls: list[list[Request]] = []

    def run(self, requests: Sequence[Request]) -> list[Reading]:
        """Note the requests and run them."""
        self.calls.append(list(requests))
        return self.model.run(requests)

    def move_row(self, source: int, target: int) -> None:
        """Move a row of the model."""
        self.model.move_row(source, target)

    def free_row(self, row: int, *, clear: bool = False) -> None:
        """Free a row of the model."""
        self.model.free_row(row, clear=clear)
