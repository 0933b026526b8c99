"""The options that several commands take: model, sampling, stops; and settings in the form key=value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from chordal.errors import InputError

Setting = bool | int | float | str | None

DEFAULT_MODEL = "tiny-ar"

Model = Annotated[
    str, typer.Option(metavar="NAME|DIR", help="Bundled model (chordal list --models) or checkpoint folder.")
]
Draft = Annotated[
    str | None,
    typer.Option(metavar="NAME|DIR", help="Draft model, for decoders that ask for one."),
]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cuda if there is one, else cpu.")]
Dtype = Annotated[
    str | None, typer.Option(metavar="NAME", help="float32, bfloat16, float16 or float64; else the model's.")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="Most new tokens; the canvas of a masked-diffusion model."),
]
Temperature = Annotated[float, typer.Option(metavar="T", help="0 takes the most likely token.")]
TopK = Annotated[int, typer.Option(metavar="K", help="Keep the K most likely tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(metavar="P", help="Keep the most likely tokens up to probability P.")]
MinP = Annotated[float, typer.Option(metavar="P", help="Keep tokens P times as likely as the best.")]
RepetitionPenalty = Annotated[
    float, typer.Option(metavar="F", help="Above 1 makes tokens that occurred less likely.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Same seed, same output.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End the text before TEXT. Repeatable.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on behind the model's stop tokens.")]
Raw = Annotated[bool, typer.Option("--raw", help="Leave out the model's chat template.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

_WORDS: dict[str, Setting] = {"true": True, "false": False, "none": None, "null": None}


def parse_settings(pairs: Iterable[str]) -> dict[str, Setting]:
    """Read settings in the form key=value; values as in YAML: numbers, true, false, none, else text.

    Raises:
        InputError: Something without a key or an equals sign.
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InputError(f"a setting must have the form key=value; got {pair!r}.")
        settings[key.strip().replace("-", "_")] = _parse_value(value.strip())
    return settings


def _parse_value(text: str) -> Setting:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text
