"""Counters of the server in Prometheus' form, under the names that others already read.

A request is one sequence here: a prompt with `n` answers is n requests, and so are n prompts. What a
request used is counted when it ends, from its own counters (docs/metrics.md), all of it at once: whatever
is read, and whenever, the sums agree.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from chordal.generation import Generation, Job, Model
from chordal.sequence import Event
from chordal.stats import TARGET

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

FINISHED_REASONS = ("stop", "length", "cancelled", "timeout", "error")
REJECTION_REASONS = ("queue_full", "unavailable", "other")
# Of drafts longer than this, the last one stands for all positions behind it.
MAX_POSITIONS = 32

_OTHER = "other"
_MODEL = ("model_name",)
_DECODER = ("model_name", "decoder")

_FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUEST_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200)


@dataclass
class _Progress:
    """What is known of a request before it ends."""

    model: str
    is_started: bool = False
    has_tokens: bool = False
    first_token_s: float | None = None
    num_drafts: int = 0
    accepted_at: list[int] = field(default_factory=lambda: [0] * MAX_POSITIONS)


class Metrics:
    """All metrics of a server; it watches the worker, whose thread calls everything but `scrape`.

    Args:
        model_names: Names the models are served under: the values of `model_name`, which never come from a
            request.
        vllm_names: Give what vLLM has too under its names as well.
    """

    def __init__(self, model_names: Iterable[str], *, vllm_names: bool = False) -> None:
        self._model_names = tuple(model_names)
        self._shared_prefixes = ("chordal:", "vllm:") if vllm_names else ("chordal:",)
        self._shared, self._own = CollectorRegistry(), CollectorRegistry()
        self._lock = threading.Lock()
        self._models: dict[str, Model] = {}
        self._passes: dict[tuple[str, str], int] = {}
        self._open: dict[int, _Progress] = {}
        self._num_running: defaultdict[str, int] = defaultdict(int)

        def counter(name: str, help_: str, labels: Iterable[str] = _MODEL) -> Counter:
            return Counter(name, help_, labels, registry=self._shared)

        def histogram(name: str, help_: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(name, help_, _MODEL, buckets=tuple(buckets), registry=self._shared)

        def own(name: str, help_: str, labels: Iterable[str] = _DECODER) -> Counter:
            return Counter(name, help_, labels, registry=self._own)

        self._running = Gauge(
            "num_requests_running", "Requests being decoded.", _MODEL, registry=self._shared
        )
        self._waiting = Gauge("num_requests_waiting", "Requests in the queue.", _MODEL, registry=self._shared)
        self._usage = Gauge(
            "kv_cache_usage_perc",
            "Cache rows in use, a share from 0 to 1 of those there are; a request has one row.",
            _MODEL,
            registry=self._shared,
        )
        self._drafts = counter("spec_decode_num_drafts", "Drafts that were verified.")
        self._draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens proposed for verification.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Proposed tokens that were kept.")
        self._accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos",
            f"Proposed tokens that were kept, by place in the draft; {MAX_POSITIONS - 1} and all behind.",
            (*_MODEL, "position"),
        )
        self._steps = counter("diffusion_num_denoising_steps", "Forward passes of diffusion decoders.")
        self._canvas = counter(
            "diffusion_num_canvas_positions", "Positions diffusion decoders fed, prompt included."
        )
        self._diffused = counter("diffusion_num_committed_tokens", "Tokens of diffusion decoders' results.")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that ended.")
        self._generated = counter("generation_tokens", "Tokens of the results of requests that ended.")
        self._success = counter(
            "request_success", "Requests that ended, for any reason.", (*_MODEL, "finished_reason")
        )
        self._rejections = counter("admission_rejections", "Calls that were turned away.", ("reason",))
        self._first_token_s = histogram(
            "time_to_first_token_seconds",
            "From admission to the first token, waiting included.",
            _FIRST_TOKEN_S,
        )
        self._between_s = histogram(
            "inter_token_latency_seconds", "Between one arrival of tokens and the next.", _PER_TOKEN_S
        )
        self._per_token_s = histogram(
            "request_time_per_output_token_seconds",
            "From the first token to the end, divided by the tokens behind the first.",
            _PER_TOKEN_S,
        )
        self._whole_s = histogram("e2e_request_latency_seconds", "From admission to the end.", _REQUEST_S)
        self._queue_s = histogram("request_queue_time_seconds", "From admission to the start.", _REQUEST_S)

        self._admitted = own("requests_admitted", "Requests taken in.", _MODEL)
        self._engine_passes = own(
            "engine_passes",
            "Forward passes of each model, prefill included; one serves all requests in the batch.",
            (*_MODEL, "engine_model"),
        )
        self._finished = own("requests_finished", "Requests that ended.")
        self._committed = own("committed_tokens", "Tokens of the results.")
        self._forwards = own(
            "forward_passes",
            "Forward passes each request took part in, by model, prefill excluded.",
            (*_DECODER, "engine_model"),
        )
        self._decoder_drafts = own("draft_tokens", "Tokens proposed for verification.")
        self._decoder_accepted = own("accepted_tokens", "Proposed tokens that were kept.")
        self._show_zeros()

    def attach(self, models: Mapping[str, Model]) -> None:
        """Learn which model is served under which name; before the first request of any."""
        with self._lock:
            self._models = {name: model for name, model in models.items() if name in self._model_names}

    def admitted(self, job: Job) -> None:
        """Count a request that was taken in."""
        with self._lock:
            progress = self._open[id(job)] = _Progress(self._name(job))
            self._admitted.labels(progress.model).inc()
            self._waiting.labels(progress.model).inc()

    def rejected(self, reason: str) -> None:
        """Count a call that was turned away."""
        self._rejections.labels(reason if reason in REJECTION_REASONS else _OTHER).inc()

    def started(self, job: Job, queue_s: float) -> None:
        """Count a request that left the queue after some seconds."""
        with self._lock:
            progress = self._open[id(job)]
            progress.is_started = True
            self._waiting.labels(progress.model).dec()
            self._queue_s.labels(progress.model).observe(queue_s)
            self._run(job, progress.model, 1)

    def first_token(self, job: Job, seconds: float) -> None:
        """Note when the first token came, in seconds since admission."""
        with self._lock:
            progress = self._open[id(job)]
            progress.first_token_s = seconds
            self._first_token_s.labels(progress.model).observe(seconds)

    def tokens(self, job: Job, num: int, seconds_since_last: float) -> None:
        """Note how long after the last tokens the next ones came, however many."""
        with self._lock:
            progress = self._open[id(job)]
            if progress.has_tokens:  # nothing was before the first ones
                self._between_s.labels(progress.model).observe(seconds_since_last)
            progress.has_tokens = True

    def drafted(self, job: Job, event: Event) -> None:
        """Note what of a draft was kept."""
        with self._lock:
            progress = self._open[id(job)]
            progress.num_drafts += 1
            for position in range(event.num_accepted):
                progress.accepted_at[min(position, MAX_POSITIONS - 1)] += 1

    def finished(self, job: Job, result: Generation, seconds: float) -> None:
        """Count all that a request used; `seconds` are those since its admission."""
        stats = result.stats
        num_tokens, forwards = stats["committed_tokens"], stats["forwards"]
        with self._lock:
            progress = self._open.pop(id(job))
            model, decoder = progress.model, result.decoder
            if progress.is_started:
                self._run(job, model, -1)
            else:
                self._waiting.labels(model).dec()
            self._success.labels(model, _finished_reason(result)).inc()
            self._whole_s.labels(model).observe(seconds)
            if progress.first_token_s is not None and num_tokens > 1:
                self._per_token_s.labels(model).observe((seconds - progress.first_token_s) / (num_tokens - 1))

            self._prompt_tokens.labels(model).inc(result.num_prompt)
            self._queries.labels(model).inc(result.num_prompt)
            self._hits.labels(model).inc(stats["cached_tokens"])
            self._generated.labels(model).inc(num_tokens)
            self._drafts.labels(model).inc(progress.num_drafts)
            self._draft_tokens.labels(model).inc(stats["draft_tokens"])
            self._accepted.labels(model).inc(stats["accepted_tokens"])
            for position, num in enumerate(progress.accepted_at):
                if num:
                    self._accepted_at.labels(model, str(position)).inc(num)
            if job.decoder.family == "diffusion":
                self._steps.labels(model).inc(forwards)
                self._canvas.labels(model).inc(stats["positions_fed"])
                self._diffused.labels(model).inc(num_tokens)

            self._finished.labels(model, decoder).inc()
            self._committed.labels(model, decoder).inc(num_tokens)
            self._decoder_drafts.labels(model, decoder).inc(stats["draft_tokens"])
            self._decoder_accepted.labels(model, decoder).inc(stats["accepted_tokens"])
            for engine_model, num in {TARGET: forwards, **stats["draft_forwards"]}.items():
                self._forwards.labels(model, decoder, engine_model).inc(num)

    def ticked(self, num_running: int, num_waiting: int) -> None:
        """Take over what the engines count; who runs and who waits is known from the requests."""
        with self._lock:
            for name, model in self._models.items():
                for engine_model, num in model.engine.passes.items():
                    before = self._passes.get((name, engine_model), 0)
                    self._passes[name, engine_model] = num
                    self._engine_passes.labels(name, engine_model).inc(num - before)

    def scrape(self) -> bytes:
        """Give all metrics as text of type `CONTENT_TYPE`, all as of one moment."""
        with self._lock:
            families = [
                _named(prefix, family)
                for prefix in self._shared_prefixes
                for family in self._shared.collect()
            ]
            families += [_named("chordal:", family) for family in self._own.collect()]
        return generate_latest(_Families(families))

    def _show_zeros(self) -> None:
        """Show what has not happened as 0: who reads a rate needs the value before the first event."""
        plain = [self._running, self._waiting, self._usage, self._drafts, self._draft_tokens, self._accepted]
        plain += [self._steps, self._canvas, self._diffused, self._queries, self._hits, self._prompt_tokens]
        plain += [self._generated, self._admitted, self._first_token_s, self._between_s, self._per_token_s]
        for name in self._model_names:
            for metric in [*plain, self._whole_s, self._queue_s]:
                metric.labels(name)
            for reason in FINISHED_REASONS:
                self._success.labels(name, reason)
        for reason in REJECTION_REASONS:
            self._rejections.labels(reason)

    def _run(self, job: Job, name: str, change: int) -> None:
        """Show that one request more or less is running."""
        self._num_running[name] += change
        self._running.labels(name).set(self._num_running[name])
        self._usage.labels(name).set(min(1.0, self._num_running[name] / job.model.engine.max_rows))

    def _name(self, job: Job) -> str:
        """Give the name a job's model is served under."""
        for name, model in self._models.items():
            if model is job.model:
                return name
        return job.model.name if job.model.name in self._model_names else _OTHER


@dataclass(frozen=True)
class _Families:
    """What prometheus_client writes out."""

    families: list[Metric]

    def collect(self) -> Iterator[Metric]:
        yield from self.families


def _named(prefix: str, family: Metric) -> Metric:
    """Copy a family under a prefix, without the times at which its series began."""
    copy = Metric(prefix + family.name, family.documentation, family.type)
    copy.samples = [
        sample._replace(name=prefix + sample.name)
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    return copy


def _finished_reason(result: Generation) -> str:
    if isinstance(result.error, TimeoutError):
        return "timeout"
    return result.finish_reason if result.finish_reason in FINISHED_REASONS else "error"
