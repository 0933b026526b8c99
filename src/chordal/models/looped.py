"""A looped ("recurrent-depth") causal language model: a few layers, repeated as often as one likes.

    e = prelude(tokens)
    s = fresh
    repeat r times:  s = core(adapter(norm(s), e))
    logits = head(norm(coda(s)))

Huginn's shape (arXiv 2502.05171) made of transformers' Qwen3 layers. Every loop of the core has keys
and values of its own, so a cache holds as many layers as the model unrolled has. Loops are counted from
the last: with fewer loops than usual it is the first ones that are missing, so that a token that went
through few sees what the others ended with.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from chordal.errors import CheckpointError
from chordal.models.family import Family

MODEL_TYPE = "chordal_looped"

# Standard deviation of a fresh state: sqrt(2 / 5d), times the embedding scale sqrt(d) (2502.05171, 4.1).
_FRESH_STD = math.sqrt(2 / 5)


class LoopedConfig(Qwen3Config):
    """Settings of a looped model; all others are those of its Qwen3 layers.

    Attributes:
        num_prelude_layers: Layers before the core.
        num_core_layers: Layers of the core.
        num_coda_layers: Layers behind the core.
        num_loops: How often the core is run unless something else is asked for.
        num_cached_loops: Loops whose keys and values are kept apart; earlier loops share their places
            with later ones, the last is always kept. None keeps all of `num_loops`.
    """

    model_type = MODEL_TYPE

    num_prelude_layers: int = 1
    num_core_layers: int = 2
    num_coda_layers: int = 1
    num_loops: int = 8
    num_cached_loops: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_cached_loops is None:
            self.num_cached_loops = self.num_loops
        # What a cache needs to know: layers with keys and values of their own.
        self.num_hidden_layers = (
            self.num_prelude_layers + self.num_core_layers * self.num_cached_loops + self.num_coda_layers
        )
        self.layer_types = ["full_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)


def fresh_states(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw what positions start from: a normal law cut at three standard deviations."""
    states = torch.empty(shape)
    cut = 3 * _FRESH_STD
    return nn.init.trunc_normal_(states, std=_FRESH_STD, a=-cut, b=cut, generator=generator)


@dataclass
class LoopedOutput(BaseModelOutputWithPast):
    """What the backbone gives.

    Attributes:
        states: Output of the last loop, `[B, T, D]`.
        embeds: What every loop was given beside the state, `[B, T, D]`.
    """

    states: Tensor | None = None
    embeds: Tensor | None = None


class LoopedModel(Qwen3PreTrainedModel):
    """The backbone: tokens to hidden states."""

    config_class = LoopedConfig

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        first_coda = config.num_hidden_layers - config.num_coda_layers
        first_core = config.num_prelude_layers
        self.prelude = _layers(config, 0, config.num_prelude_layers)
        self.core = _layers(config, first_core, config.num_core_layers)
        self.coda = _layers(config, first_coda, config.num_coda_layers)
        self.state_norm = Qwen3RMSNorm(width, eps=eps)
        self.adapter = nn.Linear(2 * width, width, bias=False)
        self.norm = Qwen3RMSNorm(width, eps=eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self._fresh_PD: Tensor | None = None
        self.post_init()

    def fresh(self, positions_BT: Tensor) -> Tensor:
        """Give the state that each position starts from: always the same, or no pass could be repeated."""
        if self._fresh_PD is None:
            shape = (self.config.max_position_embeddings, self.config.hidden_size)
            self._fresh_PD = fresh_states(shape, torch.Generator().manual_seed(0)).to(positions_BT.device)
        return self._fresh_PD[positions_BT]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        states: Tensor | None = None,
        past_embeds: Tensor | None = None,
        momentum: Tensor | float = 0.0,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> LoopedOutput:
        """Run prelude, loops and coda.

        Args:
            input_ids: Tokens, `[B, T]`.
            attention_mask: A prepared mask `[B, 1, T, S]`, or None for causal.
            position_ids: Positions, `[B, T]`.
            past_key_values: A cache of `num_hidden_layers` layers.
            use_cache: As transformers has it; a cache that is given is used.
            num_loops: How often the core is run; None takes the model's own number.
            states: What the positions start from, `[B, T, D]`; None for fresh ones.
            past_embeds: What an earlier pass gave as `embeds`, `[B, T, D]`.
            momentum: Share of `past_embeds` in those of this pass, `[B, T, 1]`.
            inputs_embeds: What the tokens' embeddings would be, `[B, T, D]`, instead of `input_ids`.
            **kwargs: For the attention.
        """
        inner = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(inner.shape[1], device=inner.device)[None]
        if attention_mask is None or attention_mask.ndim < 4:
            attention_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inner,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        given = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(inner, position_ids),
            **kwargs,
        }
        config = self.config
        for layer in self.prelude:
            inner = layer(inner, past_key_values=past_key_values, **given)
        if past_embeds is not None:
            inner = torch.lerp(inner, past_embeds.to(inner.dtype), momentum)
        embeds = inner
        inner = self.fresh(position_ids.expand(inner.shape[:2])) if states is None else states
        inner = inner.to(embeds.dtype)
        count = config.num_loops if num_loops is None else num_loops
        for loop in range(count):
            at = (config.num_loops - count + loop) % config.num_cached_loops
            cache = None
            if past_key_values is not None:
                cache = _Shifted(past_key_values, at * config.num_core_layers)
            inner = self.adapter(torch.cat([self.state_norm(inner), embeds], -1))
            for layer in self.core:
                inner = layer(inner, past_key_values=cache, **given)
        looped = inner
        for layer in self.coda:
            inner = layer(inner, past_key_values=past_key_values, **given)
        return LoopedOutput(
            last_hidden_state=self.norm(inner),
            past_key_values=past_key_values,
            states=looped,
            embeds=embeds,
        )


class LoopedForCausalLM(Qwen3PreTrainedModel):
    """The backbone with an output embedding."""

    config_class = LoopedConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        self.model = LoopedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Give logits; see `LoopedModel.forward` for the arguments."""
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return CausalLMOutputWithPast(
            logits=self.lm_head(output.last_hidden_state), past_key_values=output.past_key_values
        )


def looped_family(family: Family, config: LoopedConfig) -> Family:
    """Add to the facts of a checkpoint what its config says of its loops.

    Raises:
        CheckpointError: The model is not causal.
    """
    if family.kind != "causal":
        raise CheckpointError(f"config.json: a looped model must be causal; chordal.family is {family.kind}.")
    return dataclasses.replace(family, num_loops=config.num_loops, vocab_size=config.vocab_size)


class _Shifted:
    """A cache whose layers are addressed from another one on: those of one loop of the core."""

    def __init__(self, cache: Any, by: int) -> None:
        self.cache, self.by = cache, by

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Write and read the layer of this loop."""
        return self.cache.update(keys, values, layer_idx + self.by, *args, **kwargs)


def _layers(config: LoopedConfig, first: int, count: int) -> nn.ModuleList:
    return nn.ModuleList([Qwen3DecoderLayer(config, first + index) for index in range(count)])


AutoConfig.register(MODEL_TYPE, LoopedConfig, exist_ok=True)
AutoModelForCausalLM.register(LoopedConfig, LoopedForCausalLM, exist_ok=True)
