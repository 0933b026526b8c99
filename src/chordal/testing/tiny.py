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
from chordal.models.architecture import num_experts_of
from chordal.models.diffusion_gemma import DiffusionGemma
from chordal.models.family import Family, Kind
from chordal.models.language_model import LanguageModel
from chordal.models.looped import LoopedConfig, LoopedForCausalLM, looped_family
from chordal.models.looped_runner import LoopedLanguageModel
from chordal.models.runner import Move, Request, Runner

TINY_VOCAB = 32
TINY_EOS = 30
TINY_MASK = 31
TINY_POISON = TINY_VOCAB
"""A token no model can give, with an embedding that is not a number: whoever reads it gets no logits."""

TINY_LOOPS = 4
"""How often a looped model runs its core."""

TINY_SLIDING_WINDOW = 6
"""How far sliding layers see, of the models that have some."""

_RUNNERS = {"diffusion_gemma": DiffusionGemma, "looped": LoopedLanguageModel}
_CAUSAL = {"qwen3": "Qwen3", "llama": "Llama", "qwen2": "Qwen2", "olmo2": "Olmo2"}

TINY_EXPERTS = 8
"""Experts of a layer, of the models that have some; a token takes two."""

_MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", {"num_experts": TINY_EXPERTS, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {"num_experts": TINY_EXPERTS, "norm_topk_prob": False}),
    # As LLaDA2: biased sigmoids, groups of experts, a shared expert beside them.
    "glm4_moe": (
        "Glm4Moe",
        {
            "n_routed_experts": TINY_EXPERTS,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 0,
            "use_qk_norm": True,
        },
    ),
}


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
        arch: "qwen3", "llama", "qwen2", "olmo2", "qwen3_moe", "olmoe", "glm4_moe", "looped" or
            "diffusion_gemma".
        seed: Of its weights.
        num_layers: Layers; of a looped model those of its core.
        window: Most tokens of a sequence.
        dtype: Of its weights; in float64 no sum is so close that the shape of a batch decides it.
    """
    shape: dict[str, Any] = {
        "vocab_size": TINY_VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": window,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch == "diffusion_gemma":
            model = _diffusion_gemma(shape)
        elif arch == "looped":
            del shape["num_hidden_layers"]
            model = LoopedForCausalLM(
                LoopedConfig(
                    **shape, num_core_layers=num_layers, num_loops=TINY_LOOPS, tie_word_embeddings=False
                )
            )
        elif arch in _MIXTURES:
            model = _mixture(arch, shape)
        else:
            config = getattr(transformers, _CAUSAL[arch] + "Config")(**shape, tie_word_embeddings=False)
            model = getattr(transformers, _CAUSAL[arch] + "ForCausalLM")(config)
        for weight in model.parameters():
            # Wider than for training, so that logits differ clearly and depend on the context.
            if weight.dim() >= 2:
                torch.nn.init.normal_(weight, std=0.25)
        if arch == "diffusion_gemma":
            # Fed what it said, it would double every rounding error in each step.
            torch.nn.init.normal_(model.model.decoder.self_conditioning.down_proj.weight, std=0.025)
    return model.to(dtype).eval()


def _mixture(arch: str, shape: dict[str, Any]) -> Any:
    """Make a mixture of experts in every layer."""
    name, more = _MIXTURES[arch]
    more = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, **more}
    config = getattr(transformers, name + "Config")(**shape, **more, tie_word_embeddings=False)
    model = getattr(transformers, name + "ForCausalLM")(config)
    model.set_experts_implementation("eager")  # the others have no float64
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(bias, std=0.25)
    return model


def _diffusion_gemma(shape: dict[str, Any]) -> Any:
    """Make a DiffusionGemma of sliding layers and full ones in turn; no image is ever shown to it."""
    num_layers = shape["num_hidden_layers"]
    kinds = ["full_attention" if at % 2 else "sliding_attention" for at in range(num_layers)]
    config = transformers.DiffusionGemmaConfig(
        text_config={
            **shape,
            "layer_types": [*kinds[:-1], "full_attention"],
            "sliding_window": TINY_SLIDING_WINDOW,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        },
        vision_config={
            "model_type": "gemma4_vision",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "patch_size": 2,
            "position_embedding_size": 4,
        },
        canvas_length=4,
    )
    model = transformers.DiffusionGemmaForBlockDiffusion(config)
    model.set_experts_implementation("eager")  # the others have no float64
    return model


def tiny_model(
    kind: Kind = "causal",
    *,
    shift: int | None = None,
    block_length: int = 4,
    arch: str | None = None,
    seed: int = 0,
    num_layers: int = 2,
    window: int = 64,
    max_rows: int = 16,
    dtype: torch.dtype = torch.float64,
) -> LanguageModel:
    """Make a model of any kind, ready for the engine.

    Among masks the mask token has the largest logit of all: a decoder that could commit it would.

    Args:
        kind: "causal", "masked", "block", "masked_causal" or "uniform".
        shift: Of the family; None is what the kind usually has.
        block_length: Of the block kind, and of the canvas of the uniform kind.
        arch: See `tiny_backbone`, as the next three; None is "diffusion_gemma" for the uniform kind and
            "qwen3" for the others.
        seed: Of its weights.
        num_layers: Layers.
        window: Most tokens of a sequence.
        max_rows: Sequences at once, at most.
        dtype: Of its weights.
    """
    arch = arch or ("diffusion_gemma" if kind == "uniform" else "qwen3")
    model = tiny_backbone(arch, seed=seed, num_layers=num_layers, window=window, dtype=dtype)
    has_mask = kind not in ("causal", "uniform")
    with torch.no_grad():
        if has_mask:
            states = model.base_model(input_ids=torch.full((1, 8), TINY_MASK)).last_hidden_state
            model.get_output_embeddings().weight[TINY_MASK] = states.mean((0, 1))
        known = model.get_input_embeddings().weight
        poisoned = torch.cat([known, torch.full_like(known[:1], float("nan"))])
        # Where weights are tied, those of the output stay as they are.
        model.get_input_embeddings().weight = torch.nn.Parameter(poisoned)
    family = Family(
        kind=kind,
        mask_id=TINY_MASK if has_mask else None,
        shift=(1 if kind == "causal" else 0) if shift is None else shift,
        block_length=block_length if kind in ("block", "uniform") else None,
        vocab_size=TINY_VOCAB if kind == "uniform" else None,
        num_experts=num_experts_of(model.config.get_text_config()),
        eos_ids=(TINY_EOS,),
    )
    runner = _RUNNERS.get(arch, LanguageModel)
    if arch == "looped":
        family = looped_family(family, model.config)
    return runner(model, family, Alphabet(), name=f"tiny {kind}", max_rows=max_rows)


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
        self.device, self.dtype, self.packs = model.device, model.dtype, model.packs
        self.calls: list[list[Request]] = []

    def run(self, requests: Sequence[Request]) -> list[Reading]:
        """Note the requests and run them."""
        self.calls.append(list(requests))
        return self.model.run(requests)

    def move_slots(self, moves: Sequence[Move]) -> None:
        """Move slots of the model."""
        self.model.move_slots(moves)

    def read_slots(self, row: int, start: int, end: int) -> torch.Tensor:
        """Read slots of the model."""
        return self.model.read_slots(row, start, end)

    def write_slots(self, row: int, held: torch.Tensor) -> None:
        """Write slots of the model."""
        self.model.write_slots(row, held)

    def release(self) -> None:
        """Release what the model caches."""
        self.model.release()

    def move_row(self, source: int, target: int) -> None:
        """Move a row of the model."""
        self.model.move_row(source, target)

    def free_row(self, row: int, *, clear: bool = False) -> None:
        """Free a row of the model."""
        self.model.free_row(row, clear=clear)
