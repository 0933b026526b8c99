"""Run the server: listen first, load beside it, end in good order.

The process ends with code 0 after a first SIGTERM or SIGINT, when running requests are done or were cut
off; at once after a second one, with 128 plus its number; with 130 after a SIGINT before the models are
loaded; with 1 if the engine died, and with `worker.EXIT_HUNG` if it hung. What keeps it from starting is
raised. Until the requests are done it goes on listening: `/health` says 503, new work is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from chordal.errors import ChordalError, InputError
from chordal.server.settings import ServerSettings

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from chordal.generation import Model
    from chordal.server.worker import Worker

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_BACKLOG = 2048
_MAX_HEAD_BYTES = 64 << 10
# A head that takes longer to arrive, the first or a later one of a connection, never will.
_HEAD_TIMEOUT_S = 30.0
# Longer than that of common clients and proxies, which then never send into a connection being closed.
_KEEP_ALIVE_S = 75
# For answers that are there to reach their clients; whoever does not read by then does not read.
_FLUSH_S = 2.0

_log = logging.getLogger("chordal.server")


class EngineDiedError(ChordalError):
    """The engine's thread ended with an error while it served."""


def check_installed() -> None:
    """Check that all that the server needs is installed.

    Raises:
        InputError: It is not.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        names = " and ".join(name.replace("_", "-") for name in missing)
        raise InputError(f"the server needs {names}, not installed here: pip install 'chordal[serve]'.")


def bind(settings: ServerSettings) -> list[socket.socket]:
    """Listen at every address of the host; port 0 takes a free one, the same for all.

    Raises:
        InputError: Other machines would reach the server, there is no key, and nobody said that is meant.
        ChordalError: The host has no address here, or the port cannot be had.
    """
    host, port = settings.host, settings.port
    where = f"port {port} of {host}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ChordalError(
            f"--host must be a name or an address of this machine; got {host!r}: {error}."
        ) from None
    wide = [str(address[0]) for *_, address in found if not _is_loopback(str(address[0]))]
    if wide and not settings.api_keys and not settings.allow_no_key:
        raise InputError(
            f"{host} ({wide[0]}) can be reached from other machines, and there is no API key. Set "
            f"CHORDAL_API_KEY, or use --host localhost, or let everybody in with --allow-no-key."
        )
    bound: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            if bound:
                address = (address[0], bound[0].getsockname()[1], *address[2:])
            try:
                bound.append(_bind_one(family, kind, protocol, address))
            except OSError as error:
                # "localhost" names an IPv6 address also where there is no IPv6.
                if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL) and len(found) > 1:
                    continue
                raise
        if not bound:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except OSError as error:
        for one in bound:
            one.close()
        advice = " Use another --port; 0 takes a free one." if error.errno == errno.EADDRINUSE else ""
        raise ChordalError(f"cannot listen at {where}: {error.strerror}.{advice}") from None
    return bound


def serve(load: Callable[[], Mapping[str, Model]], settings: ServerSettings) -> int:
    """Serve until a signal ends it.

    Args:
        load: Gives the models by the names they are served under; called once the port is bound, in the
            thread that runs them.
        settings: How to serve.

    Returns:
        The exit code.

    Raises:
        InputError: Something the server was given cannot be used.
        ChordalError: The port cannot be had, the log cannot be written, or the engine died.
    """
    with contextlib.ExitStack() as stack:
        for handler in _log_handlers(settings):
            stack.callback(handler.close)
            stack.enter_context(_logging_to(handler))
        sockets = bind(settings)
        for one in sockets:
            stack.callback(one.close)
        url = _url(settings.host, sockets[0].getsockname()[1])
        names = ", ".join(settings.served_names)
        if not settings.api_keys and not all(_is_loopback(one.getsockname()[0]) for one in sockets):
            _say("WARNING: no API key is asked for: whoever reaches this address may use the models.")
        _say(f"loading {names}, on {url}")

        # From here on: what is imported next takes seconds.
        events = _Events()
        stack.enter_context(_signals(events))
        from chordal.server.app import create_app
        from chordal.server.metrics import Metrics
        from chordal.server.security import secure
        from chordal.server.worker import Worker

        metrics = Metrics(settings.served_names, vllm_names=settings.vllm_metrics)

        def load_all() -> Mapping[str, Model]:
            models = load()
            metrics.attach(models)
            return models

        worker = Worker(
            load_all,
            max_queue=settings.max_queue,
            max_running=settings.max_num_seqs,
            watchdog_s=settings.watchdog_s,
            observer=metrics,
            on_ready=events.ready,
            on_death=lambda error: events.dead(),
        )
        app = secure(
            create_app(worker, settings, metrics),
            keys=settings.api_keys,
            host=settings.host,
            max_body_bytes=settings.max_body_bytes,
            body_timeout_s=settings.body_timeout_s,
            cors=settings.cors_origins,
            log_prompts=settings.log_prompts,
        )
        page = " (playground at /)" if settings.playground else ""
        server = _Session(app, worker, settings, sockets, events, f"{names} on {url}{page}")
        asyncio.run(server.run())
        if worker.state == "dead":
            assert worker.error is not None
            if not worker.models:
                raise worker.error
            raise EngineDiedError(f"the engine died: {type(worker.error).__name__}: {worker.error}")
        if worker.is_alive():
            # It loads, or its pass hangs; nothing but the end of the process interrupts either.
            _exit_now(1 if worker.models else _code_unready(events.first))
        return 0


class _Events:
    """What the signal handlers and the engine's thread tell the event loop."""

    def __init__(self) -> None:
        self.first: int | None = None  # signal
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told: set[str] = set()
        self._happened: dict[str, asyncio.Event] = {}

    def bind(self) -> None:
        """Tie them to the running loop; what happened before counts."""
        self._happened = {name: asyncio.Event() for name in ("ready", "end")}
        self._loop = asyncio.get_running_loop()
        for name in self._told:
            self._happened[name].set()

    def ready(self) -> None:
        self._tell("ready")

    def dead(self) -> None:
        self._tell("end")

    def signal(self, number: int) -> None:
        if self.first is not None:
            _exit_now(128 + number)
        if self._loop is None:
            _exit_now(_code_unready(number))
        self.first = number
        self._tell("end")

    async def wait(self, name: str) -> None:
        await self._happened[name].wait()

    def _tell(self, name: str) -> None:
        self._told.add(name)
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # closed: over anyway
                self._loop.call_soon_threadsafe(self._happened[name].set)


class _Session:
    """The event loop's side of a server, from the first connection it takes to the last it closes."""

    def __init__(
        self,
        app: ASGIApp,
        worker: Worker,
        settings: ServerSettings,
        sockets: list[socket.socket],
        events: _Events,
        greeting: str,
    ) -> None:
        self._app, self._worker, self._settings = app, worker, settings
        self._sockets, self._events, self._greeting = sockets, events, greeting

    async def run(self) -> None:
        self._events.bind()
        server = _make_server(self._app)
        serving = asyncio.create_task(server.serve(self._sockets))
        self._worker.start()
        greeting = asyncio.create_task(self._greet())
        ending = asyncio.create_task(self._events.wait("end"))
        await asyncio.wait([serving, ending], return_when=asyncio.FIRST_COMPLETED)
        greeting.cancel()
        ending.cancel()
        if not serving.done():
            if (num := self._worker.num_unfinished) and self._worker.state != "dead":
                _log.info("ending: %d texts have %g s to finish", num, self._settings.shutdown_timeout_s)
            await asyncio.to_thread(self._worker.stop, self._settings.shutdown_timeout_s)
            await self._flush(server)
            server.should_exit = True
        await serving

    async def _greet(self) -> None:
        await self._events.wait("ready")
        print(f"chordal: {self._greeting}", flush=True)

    async def _flush(self, server: uvicorn.Server) -> None:
        """Let answers reach their clients, then hang up on those who do not take them."""
        state, loop = server.server_state, asyncio.get_running_loop()
        until = loop.time() + _FLUSH_S
        while state.tasks and loop.time() < until:
            await asyncio.sleep(0.01)
        if state.tasks:
            for connection in list(state.connections):
                if (transport := getattr(connection, "transport", None)) is not None:
                    transport.abort()
            await asyncio.sleep(0.1)  # their handlers notice


def _make_server(app: ASGIApp) -> uvicorn.Server:
    """Make a uvicorn server that leaves signals, logs and the application's order to us."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        """Hangs up when the head of a request does not arrive; uvicorn waits for the first one for ever."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._hang_up)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._head_timer.cancel()
            self._head_timer = self.loop.call_later(_KEEP_ALIVE_S + _HEAD_TIMEOUT_S, self._hang_up)

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_timer.cancel()
            super().connection_lost(exc)

        def _hang_up(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    class Server(uvicorn.Server):
        def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
            return contextlib.nullcontext()

    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
    )
    return Server(config)


@contextlib.contextmanager
def _signals(events: _Events) -> Iterator[None]:
    """Let signals end the server in good order; only a main thread can be told of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda got, _: events.signal(got)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log_handlers(settings: ServerSettings) -> list[logging.Handler]:
    """Make what the log goes to.

    Raises:
        ChordalError: The file cannot be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if settings.log_file is not None:
        try:
            handlers.append(logging.FileHandler(settings.log_file, encoding="utf-8"))
        except OSError as error:
            raise ChordalError(f"cannot write --log-file {settings.log_file}: {error.strerror}.") from None
    return handlers


@contextlib.contextmanager
def _logging_to(handler: logging.Handler) -> Iterator[None]:
    """Log to a handler: what this server says, and what goes wrong below it."""
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    levels = {"chordal.server": logging.INFO, "uvicorn.error": logging.WARNING, "asyncio": logging.WARNING}
    loggers = {logging.getLogger(name): level for name, level in levels.items()}
    before = {logger: (logger.level, logger.propagate) for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, (level, propagate) in before.items():
            logger.setLevel(level)
            logger.propagate = propagate
            logger.removeHandler(handler)


def _bind_one(family: int, kind: int, protocol: int, address: tuple[object, ...]) -> socket.socket:
    one = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share the port
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
        # At once: two that only bound a port could both go on and load their models.
        one.listen(_BACKLOG)
    except OSError:
        one.close()
        raise
    return one


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _code_unready(number: int | None) -> int:
    """Give the exit code after a signal before the models are loaded."""
    return 128 + signal.SIGINT if number == signal.SIGINT else 0


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _say(message: str) -> None:
    print(f"chordal: {message}", file=sys.stderr, flush=True)


def _exit_now(code: int) -> None:
    """End the process without waiting for any thread."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
