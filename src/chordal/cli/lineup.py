"""Which decoders take part: `--decoders`, `--config`, or all that fit; and those nobody measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chordal.cli import options
from chordal.cli.console import note
from chordal.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chordal.bench.compare import Contender
    from chordal.decoders.decoder import Decoder
    from chordal.generation import Model


def read_lineup(decoders: str | None, config: str | None) -> list[Contender] | None:
    """Give the decoders that were asked for, None if all that fit are wanted.

    Raises:
        InputError: The list or the file cannot be read.
    """
    from chordal.bench.compare import Contender

    lineup = [Contender(*options.read_config(config))] if config is not None else []
    lineup += parse_decoders(decoders) if decoders is not None else []
    return lineup or None


def parse_decoders(text: str) -> list[Contender]:
    """Read "a,b:x=1,y=2": an item with an equals sign but no colon is one more setting of the last.

    Raises:
        InputError: There is no name, or a setting without a value.
    """
    from chordal.bench.compare import Contender

    groups: list[tuple[str, list[str]]] = []
    for item in text.split(","):
        name, colon, first = item.strip().partition(":")
        if not colon and "=" in name and groups:
            groups[-1][1].append(name)
        elif name:
            groups.append((name, [first] if colon else []))
    if not groups:
        raise InputError("--decoders needs at least one name; chordal list shows them.")
    return [Contender(name, options.parse_settings(pairs)) for name, pairs in groups]


def all_that_fit(model: Model) -> list[Contender]:
    """Give every decoder that runs on a model with the other models there are."""
    from chordal.bench.compare import Contender
    from chordal.registry import decoder_class, decoder_names

    classes = {name: decoder_class(name) for name in decoder_names()}
    return [
        Contender(name)
        for name, cls in classes.items()
        if cls.fits(model.family) and model.engine.models.keys() >= set(cls.needs_models)
    ]


def decoders_of(lineup: Iterable[Contender]) -> list[Decoder]:
    """Make the decoders of a lineup.

    Raises:
        InputError: There is no such decoder or setting.
    """
    from chordal.registry import make_decoder

    return [make_decoder(one.decoder, one.settings) for one in lineup]


def note_unmeasured(model: Model, decoders: Iterable[Decoder]) -> None:
    """Say on stderr of each approximate decoder that its quality on this model was never measured."""
    from chordal.bench.guard import notice

    for decoder in decoders:
        if (words := notice(model, decoder)) is not None:
            note(words)
