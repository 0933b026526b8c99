"""`chordal serve`: models behind OpenAI's API, and a playground."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chordal.cli import options
from chordal.errors import InputError

if TYPE_CHECKING:
    from chordal.generation import Model

EXAMPLES = """\b
Examples:
  chordal serve tiny-ar --decoder prompt_lookup
  chordal serve tiny-ar tiny-mdm --draft tiny-draft --port 8080 --timeout 60
"""


@options.grouped
def serve(
    *,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Bundled models, checkpoint folders or hub ids; else tiny-ar. --draft, --middle, --revision "
            "and --block-length are for the first.",
        ),
    ] = None,
    loading: options.LoadingOf,
    decoding: options.Decoding,
    host: Annotated[str, typer.Option(metavar="HOST", help="Where to listen.")] = "localhost",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="TCP port; 0 takes a free one.")
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Ask for this key. Better CHORDAL_API_KEY, which is in no process list. Repeatable.",
        ),
    ] = None,
    allow_no_key: Annotated[
        bool, typer.Option("--allow-no-key", help="Let other machines in without a key.")
    ] = False,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name of each model in requests, in order; of one model, aliases."),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(metavar="N", min=1, help="Texts of one model decoded at once.")
    ] = 64,
    max_queue: Annotated[
        int, typer.Option(metavar="N", min=0, help="Texts that may wait beyond those; more get 429.")
    ] = 256,
    max_model_len: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Most tokens of prompt and answer; else the model's window."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="S", min=0, help="Longest a request may take; 0 is no limit.")
    ] = 600.0,
    shutdown_timeout: Annotated[
        float, typer.Option(metavar="S", min=0, help="After a signal: seconds for what still runs.")
    ] = 30.0,
    watchdog: Annotated[
        float, typer.Option(metavar="S", min=0, help="Give up if a forward pass takes longer; 0 never does.")
    ] = 300.0,
    max_body: Annotated[int, typer.Option(metavar="BYTES", min=1024, help="Largest body of a request.")] = 1
    << 20,
    prefix_cache_mib: options.PrefixCacheMib = 256,
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Let pages of this origin call the server. Repeatable."),
    ] = None,
    log_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Log to this file too, not only to stderr.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log prompts and answers.")] = False,
    vllm_metrics: Annotated[
        bool, typer.Option("--vllm-metrics", help="Give the metrics under vLLM's names, too.")
    ] = False,
    playground: Annotated[bool, typer.Option(help="Serve the playground at /.")] = True,
) -> int:
    """Serve models behind OpenAI's API, with a playground."""
    from chordal.server import run

    run.check_installed()
    from chordal.server.security import read_keys
    from chordal.server.settings import ServerSettings

    chosen = list(models or [options.DEFAULT_MODEL])
    names = _names(chosen, served_model_name or [])
    decoder, settings = decoding.choice()
    server = ServerSettings(
        host=host,
        port=port,
        served_names=tuple(names),
        api_keys=read_keys(api_key or (), os.environ),
        allow_no_key=allow_no_key,
        decoder=decoder,
        decoder_settings=settings,
        max_num_seqs=max_num_seqs,
        max_queue=max_queue,
        max_model_len=max_model_len,
        timeout_s=timeout or None,
        shutdown_timeout_s=shutdown_timeout,
        watchdog_s=watchdog or None,
        max_body_bytes=max_body,
        prefix_cache_mib=prefix_cache_mib,
        cors_origins=tuple(cors or ()),
        log_prompts=log_prompts,
        log_file=log_file,
        vllm_metrics=vllm_metrics,
        playground=playground,
    )

    def load() -> Mapping[str, Model]:
        others = dataclasses.replace(
            loading,
            draft=None,
            middle=None,
            draft_quantization=None,
            middle_quantization=None,
            revision=None,
            block_length=None,
        )
        loaded = {
            model: (loading if model == chosen[0] else others).load_model(
                model, max_rows=max_num_seqs, prefix_cache_mib=prefix_cache_mib
            )
            for model in dict.fromkeys(chosen)
        }
        _check_decoder(loaded, decoder, settings)
        return {name: loaded[model] for name, model in names.items()}

    return run.serve(load, server)


def _names(models: list[str], given: list[str]) -> dict[str, str]:
    """Give each name in requests its model.

    Raises:
        InputError: There are not as many names as models, or two models would have one name.
    """
    if len(models) == 1 and given:
        models = models * len(given)
    if given and len(given) != len(models):
        raise InputError(
            f"--served-model-name must be given once for each model; got {len(given)} for {len(models)}."
        )
    # The path of a folder is nobody's business but this machine's.
    names = given or [Path(model).resolve().name if Path(model).is_dir() else model for model in models]
    if "" in names or any(not name.isprintable() for name in names):
        raise InputError("--served-model-name must be printable text.")
    if len(set(names)) < len(names):
        raise InputError(
            f"models must have different names; got {', '.join(names)}. Use --served-model-name."
        )
    return dict(zip(names, models, strict=True))


def _check_decoder(models: Mapping[str, Model], name: str | None, settings: Mapping[str, object]) -> None:
    """Check the default decoder, and say of an approximate one what is not known of it.

    Raises:
        InputError: It fits none of the models, or its settings are wrong.
    """
    from chordal.cli.lineup import note_unmeasured
    from chordal.generation import Request
    from chordal.registry import decoder_class

    fitting = list(models.values())
    if name is not None:
        cls = decoder_class(name)
        fitting = [
            model
            for model in fitting
            if cls.fits(model.family) and model.engine.models.keys() >= set(cls.needs_models)
        ]
    # One that fits none says itself why.
    for model in fitting or list(models.values())[:1]:
        chosen = model.decoder(Request(decoder=name, config=settings))
        if name is not None:
            note_unmeasured(model, [chosen])
