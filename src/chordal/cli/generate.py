"""`chordal generate`: decode one prompt, or a file of them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from chordal import strict_json
from chordal.cli import options
from chordal.cli.console import is_terminal, note, open_output, progress
from chordal.cli.lineup import note_unmeasured
from chordal.cli.prompts import PromptLine, count_prompts, open_prompts, read_prompts
from chordal.errors import InputError

if TYPE_CHECKING:
    from chordal.generation import Generation, Model

EXAMPLES = """\b
Examples:
  chordal generate "reverse: Ana Ben Cleo Dan" --decoder prompt_lookup --stats --trace trace.jsonl
  chordal generate --model tiny-mdm --decoder threshold --watch "sort: Mia Leo Ana"
"""

# Prompts of a file that are handed over at once, in batches: what is read ahead, and held in memory.
_BATCHES_AHEAD = 8


@options.grouped
def generate(
    *,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Text; else standard input.")
    ] = None,
    loading: options.Loading,
    decoding: options.Decoding,
    sampling: options.Sampling,
    file: Annotated[
        str | None,
        typer.Option(
            metavar="JSONL",
            help='Many prompts, one JSON object a line with "prompt" or "messages" ("-": standard input). '
            "Results are JSON lines in the same order; other keys are passed on.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="With --file: prompts decoded at once.")
    ] = 16,
    prefix_cache_mib: options.PrefixCacheMib = 256,
    prefix_groups: Annotated[
        bool, typer.Option(help="With --file: decode prompts that begin alike side by side.")
    ] = True,
    output: Annotated[str | None, typer.Option(metavar="FILE", help="Where results go; else stdout.")] = None,
    json_: options.Json = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print the counters on stderr.")] = False,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write every draft and commit, for chordal trace.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show tokens where and when they are committed, by forward pass.")
    ] = False,
    watch_delay: Annotated[
        float, typer.Option(metavar="S", min=0, help="With --watch: seconds to wait after a forward pass.")
    ] = 0.05,
) -> int:
    """Decode a prompt, or a file of them."""
    if loading.hush():
        output = trace = None
    if watch and (json_ or output):
        raise InputError("--watch draws on standard output; leave out --json and --output.")
    if file is not None and (prompt is not None or watch or trace):
        raise InputError(
            "--file takes many prompts; leave out PROMPT, --watch and --trace, which are for one."
        )
    reads_stdin = file == "-" or (file is None and prompt in (None, "-"))
    if loading.tensor_parallel and reads_stdin:
        raise InputError("processes cannot share standard input; give PROMPT, or a file to --file.")
    if file is None:
        prompt = _one_prompt(prompt)
    decoder, config = decoding.choice()
    settings = {"decoder": decoder, "config": config, **sampling.settings()}
    with contextlib.ExitStack() as stack:
        # Files are opened before the model is loaded: what cannot work fails at once.
        lines = stack.enter_context(open_prompts(file)) if file is not None else None
        outputs = {path: stack.enter_context(open_output(path)) for path in (output, trace) if path}
        if output and file and Path(file).exists() and Path(file).samefile(output):
            raise InputError(f"{output} holds the prompts; write the results to another file.")

        from chordal.generation import make_request

        if lines is None:
            loaded = loading.load(max_rows=1)
        else:
            loaded = loading.load(max_rows=batch_size, prefix_cache_mib=prefix_cache_mib)
        out = outputs[output] if output else sys.stdout
        if lines is not None:
            source = "stdin" if file == "-" else str(file)
            job = _FileJob(loaded, settings, source, out, group_prefixes=prefix_groups)
            _empty(outputs.values())
            job.run(read_prompts(lines), count_prompts(lines), batch_size)
            exit_code, wall_s = job.exit_code, job.wall_s
            counters: Mapping[str, Any] = job.totals
        else:
            _empty(outputs.values())
            result = _decode_one(
                loaded,
                settings,
                prompt,
                out=out,
                as_json=json_,
                trace=outputs[trace] if trace else None,
                watch_delay=watch_delay if watch else None,
            )
            exit_code, counters, wall_s = 0, _counters(result.stats), result.stats["wall_s"]
    note_unmeasured(loaded, [loaded.decoder(make_request(settings))])
    if stats:
        note(_stats_line(counters, wall_s))
    return exit_code


def _empty(files: Iterable[TextIO]) -> None:
    for file in files:
        with contextlib.suppress(OSError):  # pipes and devices hold nothing to cut
            file.truncate(0)


def _one_prompt(given: str | None) -> str:
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise InputError("no prompt; give one as argument, through a pipe, or with --file.")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input must be {error.encoding} text.") from None


def _decode_one(
    model: Model,
    settings: dict[str, Any],
    prompt: Any,
    *,
    out: TextIO,
    as_json: bool,
    trace: TextIO | None,
    watch_delay: float | None,
) -> Generation:
    """Decode one prompt and show it: as JSON, as a canvas, or as text, streamed to a terminal."""
    from chordal.cli.watch import CanvasView
    from chordal.generation import make_request
    from chordal.trace import TraceWriter

    request = make_request(settings)
    writer = TraceWriter(trace, model, prompt, request) if trace else None
    view = CanvasView(model.tokenizer, watch_delay) if watch_delay is not None else None
    listeners = [listener for listener in (writer, view) if listener is not None]
    is_live = not as_json and view is None and is_terminal(out)
    result: Generation | None = None
    with view or contextlib.nullcontext():
        for chunk in model.stream(prompt, listeners=listeners, **settings):
            if is_live:
                out.write(chunk.text)
                out.flush()
            result = chunk.result
    assert result is not None, "the last chunk of a stream has the result"
    if writer is not None:
        writer.end(result)
    if is_live:
        out.write("\n")
    if result.error is not None:
        raise result.error
    if as_json:
        config = dataclasses.asdict(model.decoder(request).config)
        print(strict_json.dumps(_record(result, config)), file=out)
    elif view is not None:
        view.finish(result)
    elif not is_live:
        print(result.text, file=out)
    if not as_json:
        for number, other in enumerate(result.alternatives[1:], 2):
            text = other.text.replace("\n", "\\n")
            note(f"alternative {number} ({other.score:.2f}): {text}")
    return result


class _FileJob:
    """Decodes a file of prompts and writes each result as soon as all before it are written.

    Args:
        model: The model.
        settings: Fields of the request.
        source: Name of the file in messages.
        out: Where results go.
        group_prefixes: Decode prompts that begin alike side by side.

    Attributes:
        exit_code: 2 if a line was bad, else 1 if decoding one failed, else 0.
        totals: Sums of the counters of all results.
        wall_s: Seconds the job took.
    """

    def __init__(
        self, model: Model, settings: dict[str, Any], source: str, out: TextIO, *, group_prefixes: bool
    ) -> None:
        from chordal.generation import make_request

        self._model, self._settings, self._source, self._out = model, settings, source, out
        self._request, self._group_prefixes = make_request(settings), group_prefixes
        self._config = dataclasses.asdict(model.decoder(self._request).config)
        # Settings that fit no prompt are one error of the command, not one of each line.
        model.sequence("a", self._request)
        self.exit_code = 0
        self.totals: Counter[str] = Counter()
        self.wall_s = 0.0

    def run(self, lines: Iterable[PromptLine], total: int | None, batch_size: int) -> None:
        """Decode every line that can be."""
        started = time.perf_counter()
        is_shown = self._out is not sys.stdout or not is_terminal(sys.stdout)
        with progress(total, "prompts", shown=is_shown) as advance:
            checked = (line for line in lines if self._fits(line))
            while chunk := list(itertools.islice(checked, _BATCHES_AHEAD * batch_size)):
                self._decode(chunk, lambda: advance(self.totals["prompts"]))
        self.wall_s = time.perf_counter() - started

    def _fits(self, line: PromptLine) -> bool:
        try:
            if line.error is not None:
                raise line.error
            self._model.sequence(line.prompt, self._request)
        except InputError as error:
            self._complain(line, error, exit_code=2)
            return False
        return True

    def _decode(self, chunk: Sequence[PromptLine], advance: Callable[[], None]) -> None:
        waiting: dict[int, Generation] = {}
        order = deque(enumerate(chunk))

        def take(index: int, result: Generation) -> None:
            waiting[index] = result
            while order and order[0][0] in waiting:
                following, line = order.popleft()
                self._write(line, waiting.pop(following))
                advance()

        prompts, group = [line.prompt for line in chunk], self._group_prefixes
        self._model.generate(prompts, on_finish=take, group_prefixes=group, **self._settings)

    def _write(self, line: PromptLine, result: Generation) -> None:
        record = {**line.extra, **_record(result, self._config)}
        if result.error is not None:
            record["error"] = str(result.error)
            self._complain(line, result.error, exit_code=1)
        print(strict_json.dumps(record), file=self._out, flush=True)
        self.totals.update(_counters(result.stats))
        self.totals["prompts"] += 1

    def _complain(self, line: PromptLine, error: Exception, exit_code: int) -> None:
        note(f"Error: {self._source}, line {line.number}: {' '.join(str(error).split())}")
        self.exit_code = max(self.exit_code, exit_code)


_SUMMED = (
    "committed_tokens",
    "forwards",
    "positions_fed",
    "cached_tokens",
    "draft_tokens",
    "accepted_tokens",
)


def _counters(stats: Mapping[str, Any]) -> dict[str, int]:
    """Give the counters that add up over prompts, with the passes of all models beside the target."""
    return {key: stats[key] for key in _SUMMED} | {"draft_forwards": sum(stats["draft_forwards"].values())}


def _record(result: Generation, config: dict[str, Any]) -> dict[str, Any]:
    """Give a result as plain values under the names of the JSON output."""
    return {
        "prompt": result.prompt,
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "alternatives": [
            {**dataclasses.asdict(other), "tokens": other.tokens.tolist()} for other in result.alternatives
        ],
        "model": result.model,
        "decoder": result.decoder,
        "promise": result.promise,
        "config": config,
        "stats": result.stats,
    }


def _stats_line(stats: Mapping[str, Any], wall_s: float) -> str:
    tokens, forwards = stats["committed_tokens"], stats["forwards"]
    parts = [
        f"{tokens:,} tokens",
        f"{forwards:,} forwards",
        f"{tokens / forwards if forwards else 0:.2f} tokens/forward",
        f"{stats['draft_forwards']:,} draft forwards" if stats["draft_forwards"] else "",
        f"{stats['positions_fed']:,} positions fed",
        f"{stats['cached_tokens']:,} prompt tokens shared" if stats["cached_tokens"] else "",
        f"{stats['accepted_tokens']:,} of {stats['draft_tokens']:,} drafts kept",
        f"{wall_s:.3f} s",
        f"{tokens / max(wall_s, 1e-9):,.0f} tok/s",
    ]
    return " | ".join(part for part in parts if part and not part.startswith("0 of 0"))
