"""The options that several commands take: model, sampling, stops; and settings in the form key=value.

Options that go together are a group: a dataclass with a field for each. `grouped` makes options of them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from chordal.errors import InputError

if TYPE_CHECKING:
    from chordal.generation import Model as LoadedModel

Setting = bool | int | float | str | None
_Result = TypeVar("_Result")

DEFAULT_MODEL = "tiny-ar"

Model = Annotated[
    str,
    typer.Option(
        metavar="NAME|DIR|ID", help="Bundled model (chordal list --models), checkpoint folder or hub id."
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(metavar="NAME|DIR|ID", help="Draft model, for decoders that ask for one."),
]
Middle = Annotated[
    str | None,
    typer.Option(metavar="NAME|DIR|ID", help="Middle model, for decoders with a hierarchy of three."),
]
DraftQuantization = Annotated[
    str | None, typer.Option(metavar="BITS", help="As --quantization, for the draft model.")
]
MiddleQuantization = Annotated[
    str | None, typer.Option(metavar="BITS", help="As --quantization, for the middle model.")
]
Concurrent = Annotated[
    bool, typer.Option("--concurrent", help="Run several models at the same time where a decoder allows it.")
]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cuda if there is one, else cpu.")]
Dtype = Annotated[
    str | None, typer.Option(metavar="NAME", help="float32, bfloat16, float16 or float64; else the model's.")
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="MAP", help="auto spreads the layers over devices; or JSON, devices by name of a part."
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        metavar="BITS",
        help="int8 or int4: weights of linear layers in fewer bits; int8-dynamic: products too.",
    ),
]
TensorParallel = Annotated[
    bool, typer.Option("--tensor-parallel", help="Split every layer over the processes of torchrun.")
]
BlockLength = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Of a block-diffusion model whose files do not say it."),
]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the hub repository.")
]
Token = Annotated[str | None, typer.Option(metavar="TOKEN", help="Of the hub; else HF_TOKEN.")]
LocalFilesOnly = Annotated[
    bool, typer.Option("--local-files-only", help="Take hub repositories from the local cache only.")
]
PrefixCacheMib = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="Memory for prompts that begin alike, in MiB; 0 shares nothing."),
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
Decoder = Annotated[
    str | None, typer.Option(metavar="NAME", help="Decoder (chordal list); else the model's plain one.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Decoder setting. Repeatable.")
]
Config = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help='Decoder and settings from an object with "decoder" and "settings", YAML or JSON, as chordal '
        "tune and plan write it; --decoder and --set come first.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chosen:
    """Which model."""

    model: Model = DEFAULT_MODEL


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadingOf:
    """How to load a model that is named elsewhere: the arguments of `chordal.load` but the first."""

    draft: Draft = None
    middle: Middle = None
    draft_quantization: DraftQuantization = None
    middle_quantization: MiddleQuantization = None
    concurrent: Concurrent = False
    device: Device = None
    dtype: Dtype = None
    device_map: DeviceMap = None
    quantization: Quantization = None
    block_length: BlockLength = None
    revision: Revision = None
    token: Token = None
    local_files_only: LocalFilesOnly = False

    def load_model(self, model: str, *, max_rows: int, prefix_cache_mib: int = 0) -> LoadedModel:
        """Load a model for so many sequences at once.

        Args:
            model: Name, folder or id.
            max_rows: Sequences.
            prefix_cache_mib: Memory for prompts that begin alike. Commands that measure share nothing: what
                a prompt costs must not depend on those before it.
        """
        settings = dataclasses.asdict(self) | {"model": model}
        if self.device_map is not None and self.device_map.startswith("{"):
            try:
                settings["device_map"] = json.loads(self.device_map)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"--device-map must be auto or JSON: {error}.") from None
        from chordal.generation import load

        return load(**settings, max_rows=max_rows, prefix_cache_mib=prefix_cache_mib)


# The fields of the last base come first: --model stands on top.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading(LoadingOf, _Chosen):
    """Which model to load, and how: the arguments of `chordal.load`."""

    tensor_parallel: TensorParallel = False

    def load(self, *, max_rows: int, prefix_cache_mib: int = 0) -> LoadedModel:
        """Load the model; see `load_model`."""
        return self.load_model(self.model, max_rows=max_rows, prefix_cache_mib=prefix_cache_mib)

    def hush(self) -> bool:
        """Silence this process for good if it is one of several that run a model and not their first.

        Returns:
            Whether it is such a one.
        """
        is_other = self.tensor_parallel and os.environ.get("RANK", "0") != "0"
        if is_other and not os.environ.get("CHORDAL_DEBUG"):
            sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        return is_other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn and where texts end: fields of a request."""

    max_new_tokens: MaxNewTokens = None
    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    seed: Seed = 0
    stop: Stop = None
    ignore_eos: IgnoreEos = False
    raw: Raw = False

    def settings(self) -> dict[str, Any]:
        """Give them under their names in the library."""
        settings = dataclasses.asdict(self)
        settings["stop_strings"] = tuple(settings.pop("stop") or ())
        settings["chat"] = False if settings.pop("raw") else None
        return settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """Which decoder, with which settings."""

    decoder: Decoder = None
    set_: Set = None
    config: Config = None

    def choice(self) -> tuple[str | None, dict[str, Any]]:
        """Give the decoder's name, None for the model's plain one, and its settings.

        The settings of a file go with its decoder: another one given beside it takes none of them.
        """
        given = parse_settings(self.set_ or ())
        if self.config is None:
            return self.decoder, given
        name, settings = read_config(self.config)
        return (name, settings | given) if self.decoder in (None, name) else (self.decoder, given)


def grouped(command: Callable[..., _Result]) -> Callable[..., _Result]:
    """Let a command take groups of options: typer sees each option, the command gets the groups."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        if group := groups.get(parameter.name):
            types = get_type_hints(group, include_extras=True)
            options = [(field.name, types[field.name], field.default) for field in dataclasses.fields(group)]
        else:
            options = [(parameter.name, hints[parameter.name], parameter.default)]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=default)
            for name, hint, default in options
        ]

    @functools.wraps(command)
    def run(**given: Any) -> _Result:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        return command(**made, **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def read_config(path: str) -> tuple[str, dict[str, Any]]:
    """Read a decoder's name and its settings from a file; other keys do not matter.

    Args:
        path: YAML if it ends in .yaml or .yml, else JSON.

    Raises:
        InputError: It cannot be read, or has no decoder.
    """
    is_yaml = path.endswith((".yaml", ".yml"))
    try:
        text = Path(path).read_text(encoding="utf-8")
        document = _parse_yaml(text) if is_yaml else json.loads(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be {'YAML' if is_yaml else 'JSON'}: {error}.") from None
    name = document.get("decoder") if isinstance(document, dict) else None
    settings = document.get("settings", {}) if isinstance(document, dict) else None
    if not isinstance(name, str) or not isinstance(settings, dict):
        raise InputError(f'{path} must hold an object with "decoder", a name, and "settings", an object.')
    return name, settings


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


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
