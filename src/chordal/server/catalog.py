"""What a server offers: its models, and the decoders that fit one, with their settings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from functools import cache
from typing import Any

from chordal.decoders.decoder import Decoder
from chordal.generation import Model
from chordal.registry import decoder_class, decoder_names

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def describe_model(name: str, model: Model, created: int, max_model_len: int, decoder: str) -> dict[str, Any]:
    """Describe a served model in OpenAI's form, with our facts in a field of their own.

    Args:
        name: Name it is served under.
        model: The model.
        created: When it was loaded, in Unix seconds.
        max_model_len: Most tokens of prompt and answer together.
        decoder: Of requests that name none.
    """
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "chordal",
        "max_model_len": max_model_len,
        "chordal": {
            "name": model.name,
            "kind": model.family.kind,
            "window": model.engine.target.window,
            "vocab_size": model.engine.target.vocab_size,
            "default_decoder": decoder,
            "has_chat_template": bool(getattr(model.tokenizer, "chat_template", None)),
            "models": list(model.engine.models),
        },
    }


def describe_decoders(model: Model) -> list[dict[str, Any]]:
    """Describe the decoders that run on a model, with the models that are loaded beside it."""
    found = []
    for name in decoder_names():
        cls = decoder_class(name)
        if cls.fits(model.family) and set(cls.needs_models) <= set(model.engine.models):
            found.append(
                {
                    "name": name,
                    "promise": cls.promise,
                    "exact_when": cls.exact_when,
                    "paper": cls.paper,
                    "family": cls.family,
                    "samples": cls.samples,
                    "constrains": cls.constrains,
                    "tells_logprobs": cls.tells_logprobs,
                    "settings": describe_settings(cls),
                }
            )
    return found


@cache
def describe_settings(cls: type[Decoder]) -> list[dict[str, Any]]:
    """Describe the settings that requests may give a decoder.

    Returns:
        For each its name, its type ("boolean", "integer", "number", "string" or "null", or several with bars
        between them), its choices or None, its default, and what it means. A type beside those of the choices
        stands for any value of it.
    """
    hints, helps = typing.get_type_hints(cls.Config), _helps(cls.Config)
    return [
        {
            "name": field.name,
            **_describe_type(hints[field.name]),
            "default": None if field.default is dataclasses.MISSING else field.default,
            "help": helps.get(field.name, ""),
        }
        for field in dataclasses.fields(cls.Config)
        if field.name not in cls.local_settings
    ]


def _describe_type(hint: Any) -> dict[str, Any]:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if is_union else (hint,)
    choices = [one for option in options if _is_literal(option) for one in typing.get_args(option)]
    named = [_TYPES[option] for option in options if option in _TYPES]
    named += sorted({_TYPES[type(choice)] for choice in choices} - set(named))
    if type(None) in options:
        named.append("null")
    return {"type": "|".join(named), "choices": choices or None}


def _is_literal(option: Any) -> bool:
    return typing.get_origin(option) is typing.Literal


def _helps(cls: type[Any]) -> dict[str, str]:
    """Read the texts under the fields of a dataclass; none where there is no source."""
    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            [body] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError, SyntaxError, ValueError):
            continue
        assert isinstance(body, ast.ClassDef)
        for line, text in zip(body.body, body.body[1:], strict=False):
            match line, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    helps[name] = inspect.cleandoc(words).replace("\n", " ")
    return helps
