"""Load on an OpenAI-compatible server, ours or another: what it answers, how fast, and how well.

Requests are streamed and timed from outside; docs/load.md defines each figure. A chunk may hold any
number of tokens, so tokens are what the server's `usage` says, or nothing: they are never guessed
from chunks or by tokenizing the text again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from chordal.bench import metrics
from chordal.errors import ChordalError, InputError

try:
    import httpx2
except ModuleNotFoundError:
    raise InputError(
        "a load needs httpx2, which is not installed. Install it: pip install 'chordal[serve]'."
    ) from None

if TYPE_CHECKING:
    from chordal.bench.tasks.workload import Workload
    from chordal.generation import Prompt

Endpoint = Literal["chat", "completions"]
Record: TypeAlias = dict[str, Any]

OWN_FIELDS = frozenset({"model", "prompt", "messages", "stream", "stream_options", "max_tokens", "n"})
"""Fields of a request that only `run_load` sets."""

_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

# Most characters shown of what a server says went wrong.
_MESSAGE_LENGTH = 300

# Seconds that an idle connection is kept: fewer than servers keep theirs, so that none closes one just as
# a request goes out on it.
_KEEPALIVE_S = 2.0


class ServerError(ChordalError):
    """A server is not there, refuses the key, or does not answer as OpenAI's do."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where requests go.

    Attributes:
        base_url: With or without "/v1" at its end.
        api_key: Sent as a bearer token; never shown.
        timeout_s: Most seconds of a whole request.

    Raises:
        InputError: The URL is none of a server, or the key cannot be sent.
    """

    base_url: str = "http://localhost:8000"
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        scheme, _, rest = self.base_url.partition("://")
        if scheme not in ("http", "https") or not rest.strip("/") or not self.base_url.isprintable():
            raise InputError(
                f"the URL of a server must begin with http:// or https://; got {self.base_url!r}."
            )
        if "@" in rest.partition("/")[0]:
            raise InputError("the URL of a server must hold no password; give the key with --api-key.")
        object.__setattr__(self, "base_url", self.base_url.rstrip("/").removesuffix("/v1").rstrip("/"))
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise InputError("the API key must be printable ASCII, without line breaks.")

    def said(self, text: str) -> str:
        """Make one short printable line of what the server said, the key left out should it repeat it."""
        if self.api_key:
            text = text.replace(self.api_key, "...")
        line = "".join(char if char.isprintable() else " " for char in text)
        return " ".join(line.split())[:_MESSAGE_LENGTH]

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        # A compressed stream would be timed by when the compressor lets go of it.
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        return headers | ({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})


@dataclass(frozen=True, kw_only=True)
class Level:
    """One load, kept up until its requests are sent or its time is over.

    Attributes:
        concurrency: Most requests at once, at least 1; None is no limit.
        num_requests: Requests to send, at least 1; None as many as the time allows.
        duration_s: Seconds to send in; what is on its way then is waited for.
        request_rate: Mean requests a second of a Poisson process; infinity sends one as soon as the
            concurrency allows.
    """

    concurrency: int | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    request_rate: float = math.inf

    def __post_init__(self) -> None:
        if any(number is not None and number < 1 for number in (self.concurrency, self.num_requests)):
            raise InputError("the concurrency and the number of requests of a load must be at least 1.")
        if self.num_requests is None and self.duration_s is None:
            raise InputError("a load needs an end: a number of requests or a duration.")
        if self.duration_s is not None and not self.duration_s > 0:
            raise InputError(f"the duration must be above 0 seconds; got {self.duration_s}.")
        if not self.request_rate > 0:
            raise InputError(f"the request rate must be above 0; got {self.request_rate}.")
        if self.num_requests is None and self.concurrency is None and math.isinf(self.request_rate):
            raise InputError("a duration needs a concurrency or a request rate.")


@dataclass(kw_only=True)
class Answer:
    """What became of one request.

    Attributes:
        task: Name of its workload.
        index: Of its prompt in the workload.
        delay_s: Seconds it was due before it was sent, because the concurrency was reached.
        e2el_s: Seconds from sending it to the end of its answer.
        chunk_s: Seconds from sending it to each chunk with text, thinking included.
        text: The answer, thinking excluded.
        finish_reason: As the server said.
        prompt_tokens: Of the server's usage, None if it sent none.
        output_tokens: Likewise.
        counts: Chordal's counters, None if the server sent none.
        failure: Kind of failure, None for a whole answer: "status N", "connection", "timeout",
            "broken stream", "error event", "bad stream".
        message: What failed, in words.
    """

    task: str
    index: int
    delay_s: float = 0.0
    e2el_s: float = 0.0
    chunk_s: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    counts: Mapping[str, Any] | None = None
    failure: str | None = None
    message: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first chunk with text."""
        return self.chunk_s[0] if self.chunk_s else None

    @property
    def itl_s(self) -> list[float]:
        """Seconds between chunks with text."""
        return [later - earlier for earlier, later in itertools.pairwise(self.chunk_s)]

    @property
    def tpot_s(self) -> float | None:
        """Seconds for each token behind the first, None where there are none."""
        if not self.chunk_s or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.e2el_s - self.chunk_s[0]) / (self.output_tokens - 1)

    def fail(self, kind: str, message: str) -> None:
        """Note the first failure."""
        if self.failure is None:
            self.failure, self.message = kind, message


class EventReader:
    """Reads the events of a streamed answer into an `Answer`, in pieces as they arrive.

    Args:
        answer: Filled in place.
    """

    def __init__(self, answer: Answer) -> None:
        self.is_over = False
        self._answer = answer
        self._line = b""

    def feed(self, data: bytes, now_s: float) -> None:
        """Take bytes that arrived `now_s` seconds after the request was sent."""
        # Lines of bytes: splitting text would also break it at U+2028, which JSON may hold as it is.
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:") or self.is_over:
                continue
            event = line.removeprefix(b"data:").strip()
            if event == b"[DONE]":
                self.end(now_s)
            else:
                self._take(event, now_s)

    def end(self, now_s: float) -> None:
        """Note the end of the stream, or of its body where nothing else ended it."""
        if self.is_over:
            return
        self.is_over = True
        self._answer.e2el_s = now_s

    def _take(self, event: bytes, now_s: float) -> None:
        answer = self._answer
        try:
            chunk = json.loads(event)
            if error := chunk.get("error"):
                answer.fail("error event", _error_text(error))
                self.end(now_s)
                return
            # A copy on every chunk counts up; the last one counts.
            if usage := chunk.get("usage"):
                answer.prompt_tokens = int(usage["prompt_tokens"])
                answer.output_tokens = int(usage["completion_tokens"])
            has_text = False
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta") or {}
                said = (choice.get("text") or "") + (delta.get("content") or "")
                thought = delta.get("reasoning_content") or delta.get("reasoning")
                has_text = has_text or bool(said or thought)
                answer.text += said
                answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                answer.counts = (choice.get("chordal") or {}).get("counts") or answer.counts
            if has_text:
                answer.chunk_s.append(now_s)
        except (ValueError, KeyError, TypeError, AttributeError):
            answer.fail(
                "bad stream", f"an event is no chunk of OpenAI's: {event[:80].decode(errors='replace')}"
            )
            self.end(now_s)


def find_model(server: Server, model: str | None = None) -> str:
    """Ask a server what it serves.

    Args:
        server: Which.
        model: Taken as it is if given: some servers load it when they are asked for it.

    Returns:
        The model, the first one served if none is given.

    Raises:
        ServerError: Nobody answers, the key is refused, or no model can be told.
    """
    try:
        response = httpx2.get(
            f"{server.base_url}/v1/models", headers=server.headers, timeout=min(server.timeout_s, 30.0)
        )
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ServerError(
            f"no server answers at {server.base_url}: {server.said(_describe(error))}."
        ) from None
    if response.status_code in (401, 403):
        raise ServerError(
            f"the server refuses the key ({response.status_code}): {_status_text(server, response)} "
            "Give --api-key, or set CHORDAL_API_KEY."
        )
    if model is not None:
        return model
    try:
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx2.HTTPError, ValueError, LookupError, TypeError):
        said = f" ({response.status_code}: {_status_text(server, response)})" if response.is_error else ""
        raise ServerError(f"{server.base_url}/v1/models names no model{said}; give --model.") from None


def run_load(
    server: Server,
    model: str,
    workloads: Seq[Workload],
    levels: Iterable[Level],
    *,
    endpoint: Endpoint = "chat",
    fields: Mapping[str, Any] | None = None,
    default_max_tokens: int = 128,
    warmup: int = 1,
    seed: int = 0,
    on_level: Callable[[Record, list[Record]], None],
    on_answer: Callable[[int, Level], None] | None = None,
) -> None:
    """Send prompts to a server under one load after the other, and measure.

    Every request takes the next prompt, the workloads in turn, so that no level is sent what a prefix
    cache knows from the level before; behind the last prompt it begins anew.

    Args:
        server: Where to.
        model: Its name there.
        workloads: What to ask; `grade` is called when a level is over.
        levels: The loads, in order.
        endpoint: Text prompts become one message of a chat; chats cannot be sent to "completions".
        fields: Sent with every request, e.g. the temperature; none of `OWN_FIELDS`.
        default_max_tokens: Where a workload does not say.
        warmup: Requests before the first level, one after the other, not measured. The first that fails
            ends the run.
        seed: Of the order of the prompts and of arrivals.
        on_level: Called after each level with its row, as `summarize` makes it, and a record of each request;
            also with what there is of a level that is interrupted.
        on_answer: Called after each request of a level with how many are done.

    Raises:
        InputError: A prompt or a field cannot be sent, or two workloads have one name.
        ServerError: A request of the warm-up failed.
    """
    own = sorted(OWN_FIELDS & set(fields or ()))
    if own:
        raise InputError(f"{', '.join(own)} cannot be among the fields of a load: it sets them itself.")
    names = [workload.name for workload in workloads]
    if len(set(names)) < len(names):
        raise InputError(f"workloads must have different names; got {', '.join(names)}.")
    common = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **(fields or {})}
    bodies = {
        workload.name: [
            _body(common | {"max_tokens": workload.max_new_tokens or default_max_tokens}, prompt, endpoint)
            for prompt in workload.prompts
        ]
        for workload in workloads
    }

    async def run_all() -> None:
        prompts = _in_turn(workloads, seed)
        # No limit of the client's own may stand before the level's.
        limits = httpx2.Limits(
            max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEPALIVE_S
        )
        async with httpx2.AsyncClient(headers=server.headers, limits=limits, timeout=None) as client:

            async def ask(workload: Workload, index: int) -> Answer:
                answer = Answer(task=workload.name, index=index)
                await _ask(client, server, _PATHS[endpoint], bodies[workload.name][index], answer)
                return answer

            for workload, index in itertools.islice(prompts, warmup):
                answer = await ask(workload, index)
                if answer.failure is not None:
                    raise ServerError(f"the first request failed: {answer.failure}: {answer.message}")
            for number, level in enumerate(levels):
                rng = random.Random(f"arrivals:{seed}:{number}")
                running = _LevelRun(level, ask, prompts, arrivals(level.request_rate, rng), on_answer)
                try:
                    await running.finish()
                finally:
                    if running.answers:
                        on_level(*running.result(workloads))

    asyncio.run(run_all())


class _LevelRun:
    """One level while it runs.

    Args:
        level: The load.
        ask: Sends a prompt, counts as in flight until it returns.
        prompts: What comes next.
        arrivals: When each request is due, in seconds from the start.
        on_answer: Told how many are done.
    """

    def __init__(
        self,
        level: Level,
        ask: Callable[[Workload, int], Any],
        prompts: Iterator[tuple[Workload, int]],
        arrivals: Iterator[float],
        on_answer: Callable[[int, Level], None] | None,
    ) -> None:
        self.answers: list[Answer] = []
        self._level, self._ask, self._prompts, self._arrivals = level, ask, prompts, arrivals
        self._on_answer = on_answer
        self._running = self._peak = 0
        self._is_complete = False
        self._started = self._ended = time.perf_counter()
        self._cpu_s = time.thread_time()

    async def finish(self) -> None:
        """Send every request and wait for every answer."""
        level = self._level
        duration_s = math.inf if level.duration_s is None else level.duration_s
        slots = asyncio.Semaphore(level.concurrency) if level.concurrency is not None else None
        async with asyncio.TaskGroup() as group:
            for due_s in itertools.islice(self._arrivals, level.num_requests):
                if due_s >= duration_s:
                    break
                await asyncio.sleep(max(0.0, due_s - self._elapsed_s()))
                if slots is not None:
                    await slots.acquire()
                now_s = self._elapsed_s()
                if now_s >= duration_s:
                    break
                delay_s = 0.0 if math.isinf(level.request_rate) else now_s - due_s
                group.create_task(self._one(*next(self._prompts), delay_s, slots))
        self._is_complete = True

    async def _one(
        self, workload: Workload, index: int, delay_s: float, slots: asyncio.Semaphore | None
    ) -> None:
        self._running += 1
        self._peak = max(self._peak, self._running)
        try:
            answer = await self._ask(workload, index)
        finally:
            self._running -= 1
            if slots is not None:
                slots.release()
        answer.delay_s = delay_s
        self._ended = time.perf_counter()
        self.answers.append(answer)
        if self._on_answer is not None:
            self._on_answer(len(self.answers), self._level)

    def result(self, workloads: Seq[Workload]) -> tuple[Record, list[Record]]:
        """Give the row of the level and a record of each request."""
        seconds = self._ended - self._started
        cpu_s = time.thread_time() - self._cpu_s
        row: Record = {
            "concurrency": self._level.concurrency,
            "request_rate": None if math.isinf(self._level.request_rate) else self._level.request_rate,
            "is_complete": self._is_complete,
            "peak_concurrency": self._peak,
            "client_load": cpu_s / seconds if seconds else 0.0,
        }
        right = grade(self.answers, workloads)
        if row["request_rate"] is not None:
            row["delay_s"] = summarize_times(answer.delay_s for answer in self.answers)
        requests = [
            {**_request(answer), "right": verdict}
            for answer, verdict in zip(self.answers, right, strict=True)
        ]
        return row | summarize(self.answers, right, seconds), requests

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._started


def arrivals(request_rate: float, rng: random.Random) -> Iterator[float]:
    """Give the times of a Poisson process for ever, in seconds; all 0 at an infinite rate.

    Args:
        request_rate: Mean events a second, above 0.
        rng: Draws the exponential gaps between them.
    """
    now_s = 0.0
    while True:
        if not math.isinf(request_rate):
            now_s += rng.expovariate(request_rate)
        yield now_s


def grade(answers: Iterable[Answer], workloads: Iterable[Workload]) -> list[bool | None]:
    """Tell for each answer whether it is right; a failed one is wrong, None is where nobody can tell."""
    graders = {workload.name: workload.grade for workload in workloads}
    return [
        None
        if (grader := graders[answer.task]) is None
        else answer.failure is None and bool(grader(answer.index, answer.text))
        for answer in answers
    ]


def summarize(answers: Seq[Answer], right: Iterable[bool | None], seconds: float) -> Record:
    """Compute the figures of requests that were sent together.

    Tokens, chunks and times are those of whole answers. A sum that some of them cannot tell is None.

    Args:
        answers: At least one.
        right: As `grade` gives it.
        seconds: From the first request to the end of the last answer.
    """
    whole = [answer for answer in answers if answer.failure is None]
    prompt_tokens = _total(answer.prompt_tokens for answer in whole)
    output_tokens = _total(answer.output_tokens for answer in whole)
    chunks = sum(len(answer.chunk_s) for answer in whole)
    counts = [answer.counts or {} for answer in whole]
    forwards = _total(count.get("forwards") for count in counts)
    committed_tokens = _total(count.get("committed_tokens") for count in counts)
    kinds = Counter(answer.failure for answer in answers if answer.failure is not None)
    messages = {answer.failure: answer.message for answer in reversed(answers)}
    graded = [verdict for verdict in right if verdict is not None]
    return {
        "num_requests": len(answers),
        "num_ok": len(whole),
        "failures": [
            {"kind": kind, "num": num, "message": messages[kind]} for kind, num in kinds.most_common()
        ],
        "num_without_usage": sum(answer.output_tokens is None for answer in whole),
        "quality": _quality(graded),
        "seconds": seconds,
        "requests_per_s": _rate(len(whole), seconds),
        "prompt_tokens": prompt_tokens,
        "prompt_tokens_per_s": _rate(prompt_tokens, seconds),
        "output_tokens": output_tokens,
        "output_tokens_per_s": _rate(output_tokens, seconds),
        "chunks": chunks,
        "tokens_per_chunk": _rate(output_tokens, chunks),
        "forwards": forwards,
        "tokens_per_forward": None
        if committed_tokens is None or forwards is None
        else metrics.tokens_per_forward(committed_tokens, forwards),
        "ttft_s": summarize_times(answer.ttft_s for answer in whole),
        "itl_s": summarize_times(itertools.chain.from_iterable(answer.itl_s for answer in whole)),
        "tpot_s": summarize_times(answer.tpot_s for answer in whole),
        "e2el_s": summarize_times(answer.e2el_s for answer in whole),
    }


def summarize_times(times: Iterable[float | None]) -> Record | None:
    """Give mean, median and the 95th and 99th percentile of the times there are, None if there are none."""
    known = sorted(time_s for time_s in times if time_s is not None)
    if not known:
        return None
    return {"mean": statistics.fmean(known)} | {f"p{rank}": percentile(known, rank) for rank in (50, 95, 99)}


def percentile(ordered: Seq[float], rank: float) -> float:
    """Give a percentile, interpolated between the values: 1, 2, 3, 4 have the 25th 1.75.

    Args:
        ordered: At least one value, ascending.
        rank: From 0, the least value, to 100, the greatest.
    """
    at = rank / 100 * (len(ordered) - 1)
    low = ordered[math.floor(at)]
    return low + (ordered[math.ceil(at)] - low) * (at - math.floor(at))


async def _ask(client: httpx2.AsyncClient, server: Server, path: str, body: bytes, answer: Answer) -> None:
    """Send a request and read its answer; whatever fails is noted in the answer."""
    reader, has_begun = EventReader(answer), False
    started = time.perf_counter()
    try:
        async with (
            asyncio.timeout(server.timeout_s),
            client.stream("POST", f"{server.base_url}{path}", content=body) as response,
        ):
            if response.status_code != 200:
                await response.aread()
                answer.fail(f"status {response.status_code}", _status_text(server, response))
            elif "text/event-stream" not in response.headers.get("content-type", ""):
                answer.fail("bad stream", "the server did not stream its answer.")
            else:
                has_begun = True
                async for data in response.aiter_bytes():
                    reader.feed(data, time.perf_counter() - started)
                    if answer.failure is not None:
                        break
                if answer.finish_reason is None:
                    answer.fail("broken stream", "it ended without a finish_reason.")
    except (TimeoutError, httpx2.HTTPError) as error:
        # Behind the end of the stream nothing of the answer can get lost.
        if reader.is_over:
            pass
        elif isinstance(error, TimeoutError):
            answer.fail("timeout", f"no whole answer within {server.timeout_s:g} s.")
        else:
            answer.fail("broken stream" if has_begun else "connection", _describe(error))
    reader.end(time.perf_counter() - started)
    answer.message = server.said(answer.message)


def _body(fields: Mapping[str, Any], prompt: Prompt, endpoint: Endpoint) -> bytes:
    is_chat = not isinstance(prompt, str) and any(isinstance(part, Mapping) for part in prompt)
    if endpoint == "completions":
        if is_chat:
            raise InputError("prompts that are chats need --endpoint chat.")
        own: Record = {"prompt": prompt}
    elif is_chat:
        own = {"messages": prompt}
    elif isinstance(prompt, str):
        own = {"messages": [{"role": "user", "content": prompt}]}
    else:
        raise InputError("prompts of token ids need --endpoint completions.")
    return json.dumps({**fields, **own}, allow_nan=False).encode()


def _in_turn(workloads: Seq[Workload], seed: int) -> Iterator[tuple[Workload, int]]:
    """Give prompts for ever, workloads in turn; inside one in an order drawn once, since files are sorted."""
    orders = []
    for workload in workloads:
        order = [*range(len(workload.prompts))]
        random.Random(f"order:{workload.name}:{seed}").shuffle(order)
        orders.append(order)
    for turn in itertools.count():
        for workload, order in zip(workloads, orders, strict=True):
            yield workload, order[turn % len(order)]


def _request(answer: Answer) -> Record:
    record = dataclasses.asdict(answer)
    # The text is as long as it likes and may be private; the gaps follow from nothing else.
    del record["text"], record["message"]
    return record


def _quality(graded: Seq[bool]) -> Record | None:
    if not graded:
        return None
    interval = metrics.wilson(sum(graded), len(graded))
    return {
        "metric": "accuracy",
        "value": statistics.fmean(graded),
        "low": interval.low,
        "high": interval.high,
        "num_right": sum(graded),
        "num_graded": len(graded),
    }


def _total(counts: Iterable[int | None]) -> int | None:
    """Sum counts; None where one is not known, or where there are none."""
    known = [*counts]
    return None if not known or None in known else sum(count for count in known if count is not None)


def _rate(amount: int | None, by: float) -> float | None:
    return None if amount is None or not by else amount / by


def _status_text(server: Server, response: httpx2.Response) -> str:
    try:
        return server.said(_error_text(response.json()))
    except ValueError:
        return server.said(response.text)


def _error_text(error: Any) -> str:
    """Find the words in an error: OpenAI's {"error": {"message"}}, FastAPI's {"detail"}, or text."""
    while isinstance(error, dict):
        inner = next((error[key] for key in ("error", "message", "detail") if error.get(key)), None)
        if inner is None:
            break
        error = inner
    return error if isinstance(error, str) else json.dumps(error)


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__
