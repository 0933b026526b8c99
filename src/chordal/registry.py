"""Decoders by name: the built-in table and the entry points of plug-ins, imported when first used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from chordal.errors import InputError, UnknownNameError
from chordal.fields import make_config

if TYPE_CHECKING:
    from chordal.decoders.decoder import Decoder

ENTRY_POINT_GROUP = "chordal.decoders"

_BUILT_IN = {
    "autoregressive": "chordal.decoders.autoregressive:Autoregressive",
    "prompt_lookup": "chordal.decoders.prompt_lookup:PromptLookup",
    "copyspec": "chordal.decoders.copyspec:CopySpec",
    "aggressive": "chordal.decoders.aggressive:Aggressive",
    "jacobi": "chordal.decoders.jacobi:Jacobi",
    "token_recycling": "chordal.decoders.token_recycling:TokenRecycling",
    "aded": "chordal.decoders.aded:ADED",
    "superposed": "chordal.decoders.superposed:Superposed",
    "diverse_beam": "chordal.decoders.diverse_beam:DiverseBeam",
    "entropy_adaptive": "chordal.decoders.entropy_adaptive:EntropyAdaptive",
    "first_finish": "chordal.decoders.first_finish:FirstFinish",
    "draft_model": "chordal.decoders.draft_model:DraftModel",
    "rsd": "chordal.decoders.rsd:RSD",
    "pearl": "chordal.decoders.pearl:PEARL",
    "specmquant": "chordal.decoders.specmquant:SpecMQuant",
    "low_confidence": "chordal.decoders.low_confidence:LowConfidence",
    "threshold": "chordal.decoders.threshold:ThresholdDecoder",
    "localleap": "chordal.decoders.localleap:LocalLeapDecoder",
    "credit_decoding": "chordal.decoders.credit_decoding:CreditDecoding",
    "prophet": "chordal.decoders.prophet:ProphetDecoder",
    "denoise": "chordal.decoders.denoise:Denoise",
    "ccd": "chordal.decoders.ccd:CCD",
    "des": "chordal.decoders.des:DES",
    "window_diffusion": "chordal.decoders.window_diffusion:WindowDiffusion",
    "ete": "chordal.decoders.ete:ETE",
    "block_diffusion": "chordal.decoders.block_diffusion:BlockDiffusion",
    "freedave": "chordal.decoders.freedave:FreeDave",
    "fast_dllm_v2": "chordal.decoders.fast_dllm_v2:FastDLLMv2",
    "s2d2": "chordal.decoders.s2d2:S2D2",
    "wedlm": "chordal.decoders.wedlm:WeDLM",
    "renoise": "chordal.decoders.renoise:Renoise",
    "recurrent_depth": "chordal.decoders.recurrent_depth:RecurrentDepth",
    "loop_speculative": "chordal.decoders.loop_speculative:LoopSpeculative",
}


def decoder_names() -> list[str]:
    """List the names of all decoders, built-in ones first."""
    plugins = {entry.name for entry in metadata.entry_points(group=ENTRY_POINT_GROUP)}
    return [*_BUILT_IN, *sorted(plugins - set(_BUILT_IN))]


def decoder_class(name: str) -> type[Decoder]:
    """Import a decoder by name.

    Raises:
        UnknownNameError: No decoder has that name.
    """
    target = _BUILT_IN.get(name)
    if target is None:
        for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
            if entry.name == name:
                loaded: type[Decoder] = entry.load()
                return loaded
        raise UnknownNameError("decoder", name, decoder_names())
    module, attribute = target.split(":")
    found: type[Decoder] = getattr(importlib.import_module(module), attribute)
    return found


def make_decoder(decoder: str | Decoder, settings: Mapping[str, Any] | None = None) -> Decoder:
    """Make a decoder from a name and its settings, or pass one through.

    Args:
        decoder: Name, or a decoder that already has its config.
        settings: Fields of its config; the others keep their defaults.

    Raises:
        UnknownNameError: No such decoder or setting.
        InputError: A value of the wrong type or outside its range.
    """
    if not isinstance(decoder, str):
        if settings:
            raise InputError("settings belong to a decoder given by name; this one has its config already.")
        return decoder
    cls = decoder_class(decoder)
    return cls(make_config(cls.Config, settings or {}, f"{decoder} setting"))


def list_decoders() -> list[dict[str, Any]]:
    """Describe every decoder: name, family, promise, when it is exact, needs, paper."""
    rows = []
    for name in decoder_names():
        cls = decoder_class(name)
        rows.append(
            {
                "name": name,
                "family": cls.family,
                "promise": cls.promise,
                "exact_when": cls.exact_when,
                "needs": [_need(cls, need) for need in cls.needs],
                "paper": cls.paper,
            }
        )
    return rows


def _need(cls: type[Decoder], need: str) -> str:
    return " + ".join([f"{need} MoE" if cls.needs_experts else need, *cls.needs_models])
