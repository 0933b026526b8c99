"""What a server is told once, when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How to serve; models and how to load them are not part of it.

    Attributes:
        host: Name or address to listen on.
        port: TCP port; 0 takes a free one.
        served_names: Names the models are served under, in the order they are loaded; the first is the
            one for requests that name none.
        api_keys: Any of them opens every route; without one only this machine is served.
        allow_no_key: Listen wider than this machine without a key.
        decoder: Default decoder, None for each model's plain one.
        decoder_settings: Its settings.
        max_num_seqs: Sequences of one model decoded at once, at least 1.
        max_queue: Sequences that may wait beyond those, at least 0.
        max_model_len: Most tokens of prompt and answer together; None leaves each model's window.
        timeout_s: Longest a request may take, waiting included; None is no limit. A request may ask for less.
        shutdown_timeout_s: How long running requests may go on after a signal to end.
        watchdog_s: A tick longer than this ends the process; None never does.
        max_body_bytes: Largest body of a request; encoded ones are refused.
        body_timeout_s: How long a body may take to arrive.
        max_prompts: Most prompts of one request.
        max_n: Most answers to one prompt (`n`).
        max_stop: Most stop strings of one request, at most 16.
        max_stop_chars: Longest stop string in characters.
        max_logprobs: Most alternatives per token.
        max_draft: Largest value of a decoder setting that says how many tokens to draft or texts to keep.
        prefix_cache_mib: Memory for caches of prompt prefixes per model; 0 turns them off.
        cors_origins: Origins whose pages may call this server; none by default.
        log_prompts: Whether prompts and answers may be logged.
        log_file: Where the log goes beside stderr.
        vllm_metrics: Also give the metrics under vLLM's names.
        playground: Whether `/` is the playground.
    """

    host: str = "localhost"
    port: int = 8000
    served_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_no_key: bool = False

    decoder: str | None = None
    decoder_settings: Mapping[str, Any] = field(default_factory=dict)

    max_num_seqs: int = 64
    max_queue: int = 256
    max_model_len: int | None = None
    timeout_s: float | None = 600.0
    shutdown_timeout_s: float = 30.0
    watchdog_s: float | None = 300.0

    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 30.0
    max_prompts: int = 64
    max_n: int = 16
    max_stop: int = 16
    max_stop_chars: int = 256
    max_logprobs: int = 20
    max_draft: int = 64
    prefix_cache_mib: int = 256

    cors_origins: tuple[str, ...] = ()
    log_prompts: bool = False
    log_file: str | None = None
    vllm_metrics: bool = False
    playground: bool = True
