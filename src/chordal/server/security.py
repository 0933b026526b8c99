"""What stands between the network and the application: keys, hosts, size limits, request ids, the log.

Each rule is a small ASGI application around the next one, and `secure` puts them in their order. None of
them reads more of a request than its headers, except `Bodies`, which reads the body whole, within a limit
and a time, so that the application behind it cannot be made to wait or to hold more.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
import re
import secrets
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from urllib.parse import quote

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chordal.errors import InputError
from chordal.server.errors import APIError

logger = logging.getLogger("chordal.server")

KEY_VARIABLE = "CHORDAL_API_KEY"
OPEN_PATH = "/health"

_Header = tuple[bytes, bytes]

_PRINTABLE = re.compile(rb"[!-~]{1,128}")  # ASCII without spaces
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/\s]+)(:[0-9]{0,5})?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@*]+")
_JSON = re.compile(rb'application/json\s*(;\s*charset\s*=\s*"?utf-?8"?\s*)?;?\s*', re.IGNORECASE)

# Characters of what a client sent that one line of the log may show.
_LOGGED_PATH, _LOGGED_USER, _LOGGED_TEXT = 200, 64, 4000


class Keys:
    """The API keys that are accepted; what is kept are their digests, so that nothing can show a key.

    Args:
        keys: Printable ASCII without spaces and commas, each at least one character; none at all for a
            server that asks for none.
        source: Where they were given, for messages.

    Raises:
        InputError: A key is empty or holds other characters. The message does not repeat it.
    """

    def __init__(self, keys: Iterable[str] = (), *, source: str = "--api-key") -> None:
        given = list(keys)
        for number, key in enumerate(given, 1):
            if not (key.isascii() and key.isprintable() and key) or " " in key or "," in key:
                raise InputError(
                    f"an API key must be printable ASCII characters without spaces and commas; key {number} "
                    f"of {source} {'has others' if key else 'is empty'}. Correct it, or leave {source} out."
                )
        self._digests = [_digest(key.encode()) for key in given]

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"Keys({len(self)})"

    def tenant(self, key: bytes) -> str | None:
        """Give the name of whoever has this key, "key-1" for the first; None if it is none of them.

        Compares with every key, each in constant time.
        """
        given = _digest(key)
        found = [hmac.compare_digest(digest, given) for digest in self._digests]
        return f"key-{found.index(True) + 1}" if any(found) else None


def read_keys(options: Seq[str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """Read the keys of the command line and those of `CHORDAL_API_KEY`, which holds them with commas between.

    Both count, the command line's first. Nothing is stripped: a variable that is set and empty is an error,
    never a server without keys.

    Args:
        options: Values of `--api-key`. Other users of the machine see them in the process list.
        environment: As `os.environ`.

    Raises:
        InputError: A key is empty or holds a character that it may not.
    """
    variable = environment.get(KEY_VARIABLE)
    named = [] if variable is None else variable.split(",")
    Keys(options)
    Keys(named, source=KEY_VARIABLE)
    return (*options, *named)


def is_local(host: str) -> bool:
    """Whether a server bound to this host is reached from this machine only."""
    return host.lower() == "localhost" or _is_loopback(host)


def escape(text: str, limit: int) -> str:
    r"""Make text of a client fit for a line of the log: ASCII, control characters as `\n` or `\x1b`.

    Args:
        text: Any text, also with lone surrogates.
        limit: Characters of it to show; "..." stands for the rest.
    """
    shown = text[:limit].encode("unicode_escape").decode("ascii")
    return shown + "..." if len(text) > limit else shown


def secure(
    app: ASGIApp,
    *,
    keys: Seq[str],
    host: str,
    max_body_bytes: int,
    body_timeout_s: float,
    cors: Seq[str] = (),
    log_prompts: bool = False,
) -> ASGIApp:
    """Put an application behind all rules of this module.

    The application finds in `scope["state"]` the `request_id`, and with keys the `tenant`: a name for the
    key, never the key. It may leave a `user` there for the log.

    Args:
        app: The application.
        keys: Accepted keys. Without any, only requests that name this server as their host are answered.
        host: Name or address the server is bound to.
        max_body_bytes: Largest body of a request, at least 1.
        body_timeout_s: Seconds in which a body must have arrived.
        cors: Origins whose pages may read answers, e.g. "https://example.org"; "*" for all.
        log_prompts: Log the bodies of requests and answers too, escaped and cut.

    Raises:
        InputError: A key or an origin cannot be one, or all origins are allowed on a server without a key.
    """
    app = Bodies(app, max_body_bytes, body_timeout_s)
    # Without a key, what protects the server is that browsers keep other pages' scripts away from it.
    app = Authentication(app, Keys(keys)) if keys else Hosts(app, host)
    if cors:
        app = _cors(app, cors, has_keys=bool(keys))
    if log_prompts:
        app = BodyLog(app)
    return RequestIds(BrowserRules(AccessLog(app)))


class Layer(ABC):
    """A rule: an application around the next one. Start and shutdown pass it by, websockets end here."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""
        if scope["type"] == "http":
            await self.handle(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403
        else:
            await self.app(scope, receive, send)

    @abstractmethod
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""


class RequestIds(Layer):
    """Give each request an id, which its response carries.

    A client's `X-Request-Id` of 1 to 128 printable ASCII characters without spaces is taken over.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        given = _values(scope, b"x-request-id")
        accepted = len(given) == 1 and _PRINTABLE.fullmatch(given[0])
        request_id = given[0].decode("ascii") if accepted else uuid.uuid4().hex
        state = {**scope.get("state", {}), "request_id": request_id}
        header = (b"x-request-id", request_id.encode("ascii"))
        await self.app({**scope, "state": state}, receive, _with_headers(send, [header]))


class BrowserRules(Layer):
    """Tell browsers not to guess types and not to show the page inside another one.

    There it could be clicked on unseen, with a key that the browser remembers.
    """

    _HEADERS = ((b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"))

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        await self.app(scope, receive, _with_headers(send, self._HEADERS))


class AccessLog(Layer):
    """Log one line for each request when it is over.

    It has method, path, status ("-" if the client left before), duration, request id, tenant and user; no
    query string, header, key or text. What came from the client is escaped and cut.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        status: int | str = "-"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.perf_counter()
        try:
            await self.app(scope, receive, watched)
        except Exception:
            status = 500 if status == "-" else status
            raise
        finally:
            state = scope["state"]
            method, path = escape(scope["method"], 16), escape(_raw_path(scope), _LOGGED_PATH)
            line = f"{method} {path} {status} | {1000 * (time.perf_counter() - started):.1f} ms"
            line += f" | request {state['request_id']}"
            if tenant := state.get("tenant"):
                line += f" | tenant {tenant}"
            if user := state.get("user"):
                line += f" | user {escape(str(user), _LOGGED_USER)}"
            logger.info("%s", line)


class BodyLog(Layer):
    """Log what POST requests ask and what they are answered: prompts and texts, for debugging only."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        asked, answered = bytearray(), bytearray()

        def keep(kept: bytearray, message: Message) -> None:
            # One byte more than is shown, so that a cut can be seen.
            kept += message.get("body", b"")[: _LOGGED_TEXT + 1 - len(kept)]

        async def heard() -> Message:
            message = await receive()
            keep(asked, message)
            return message

        async def watched(message: Message) -> None:
            keep(answered, message)
            await send(message)

        try:
            await self.app(scope, heard, watched)
        finally:
            for what, body in (("asks", asked), ("is answered", answered)):
                text = escape(body.decode("latin-1"), _LOGGED_TEXT)
                logger.info("request %s %s: %s", scope["state"]["request_id"], what, text)


class Hosts(Layer):
    """Refuse requests that were meant for another host, of a server that asks for no key.

    A page of any site may let its own name point to this machine; its scripts then talk to this server as
    if it were theirs. They cannot change the Host header, which has that name.

    Args:
        app: The next application.
        host: What the server is bound to. Bound to all addresses, it answers to every address and to the
            machine's own name.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        super().__init__(app)
        self._is_wide = host in ("0.0.0.0", "::", "")
        self._names = {"localhost", host.lower()}
        if self._is_wide:
            self._names.add(socket.gethostname().lower())

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        # Only old clients that are no browsers send none.
        if not all(map(self._is_own, _values(scope, b"host"))):
            message = (
                "the Host header must name the address this server is bound to, as it asks for no key. "
                "Use that address, or start the server with an API key."
            )
            await _refuse(scope, receive, send, APIError(403, message, code="host_not_allowed"))
            return
        await self.app(scope, receive, send)

    def _is_own(self, header: bytes) -> bool:
        match = _HOST.fullmatch(header.decode("latin-1").lower())
        if match is None:
            return False
        name = match[1].strip("[]").removesuffix(".")
        return name in self._names or _is_loopback(name) or (self._is_wide and _is_address(name))


class Authentication(Layer):
    """Ask for a key on every path but `/health`, as a bearer token or as the password of Basic."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        super().__init__(app)
        self._keys = keys

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["path"] == OPEN_PATH:
            await self.app(scope, receive, send)
            return
        key = _credentials(_values(scope, b"authorization"))
        tenant = None if key is None else self._keys.tenant(key)
        if tenant is None:
            what = "no API key was given" if key is None else "the API key is not one of this server's"
            message = f"{what}. Send it as 'Authorization: Bearer KEY'."
            # At the page a browser then asks for the key by itself; elsewhere it must not.
            scheme = b'Basic realm="chordal"' if scope["path"] == "/" else b"Bearer"
            error = APIError(401, message, code="invalid_api_key")
            await _refuse(scope, receive, send, error, (b"www-authenticate", scheme))
            return
        scope["state"]["tenant"] = tenant
        await self.app(scope, receive, send)


class Bodies(Layer):
    """Read the body of a request, and pass it on only if it is JSON, small enough and soon there.

    Other types are refused also because pages of other sites can send those, and only those, without
    asking first. A body that is encoded is refused, so that none grows when it is unpacked.

    Args:
        app: The next application.
        max_bytes: Largest body.
        timeout_s: Seconds from the headers to the end of the body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        super().__init__(app)
        self._max_bytes, self._timeout_s = max_bytes, timeout_s

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if any(_exceeds(value, self._max_bytes) for value in _values(scope, b"content-length")):
            await _refuse(scope, receive, send, self._too_large("the request announces more"))
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(receive)
        except TimeoutError:
            late = f"the body must arrive within {self._timeout_s:g} s; it was not complete then."
            await _refuse(scope, receive, send, APIError(408, late, code="body_timeout"))
            return
        if body is None:  # the client left
            return
        if len(body) > self._max_bytes:
            await _refuse(scope, receive, send, self._too_large("more were sent"))
        elif body and (wrong := _wrong_type(scope)):
            error = APIError(415, wrong, code="unsupported_media_type")
            await _refuse(scope, receive, send, error, has_read_body=True)
        else:
            await self.app(scope, _replay(bytes(body), receive), send)

    def _too_large(self, found: str) -> APIError:
        message = f"the body must have at most {self._max_bytes:,} bytes; {found}."
        return APIError(413, message, code="body_too_large")

    async def _read(self, receive: Receive) -> bytearray | None:
        """Read a body to its end, or until it is too large; None if the client left before."""
        body = bytearray()
        while len(body) <= self._max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        return body


def _cors(app: ASGIApp, origins: Seq[str], *, has_keys: bool) -> ASGIApp:
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin.lower()):
            raise InputError(
                f"an origin must be scheme and host, with no path, e.g. https://example.org; got {origin!r}."
            )
    if "*" in origins and not has_keys:
        raise InputError(
            "all origins may be allowed on a server with an API key only: without one, any page a user of "
            "this machine opens could use it. Name the origins, or set an API key."
        )
    # Asks for no credentials: a page has to send the key itself, and a browser's remembered one stays out.
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        allow_private_network=True,
        expose_headers=["X-Request-Id", "Retry-After"],
    )


def _digest(key: bytes) -> bytes:
    return hmac.digest(_SECRET, key, "sha256")


# Of this process, so that digests in a core dump cannot be looked up.
_SECRET = secrets.token_bytes(32)


def _credentials(headers: Seq[bytes]) -> bytes | None:
    """Take the key out of an Authorization header; None if there is not exactly one that has a key."""
    if len(headers) != 1:
        return None
    scheme, _, value = headers[0].partition(b" ")
    value = value.strip(b" ")
    if scheme.lower() == b"bearer":
        return value or None
    if scheme.lower() == b"basic":
        try:
            _, _, password = base64.b64decode(value, validate=True).partition(b":")
        except binascii.Error:
            return None
        return password or None
    return None


def _wrong_type(scope: Scope) -> str | None:
    """Say what is wrong with the type of a body, if anything is."""
    encodings = b",".join(_values(scope, b"content-encoding")).lower()
    if encodings not in (b"", b"identity"):
        return f"the body must not be encoded; got Content-Encoding {_show(encodings)}. Send it as it is."
    types = _values(scope, b"content-type")
    if len(types) != 1 or not _JSON.fullmatch(types[0]):
        return f"the body must be application/json in UTF-8; got Content-Type {_show(b', '.join(types))}."
    return None


def _show(value: bytes) -> str:
    return f'"{escape(value.decode("latin-1"), 100)}"'


def _exceeds(content_length: bytes, limit: int) -> bool:
    # Long before its digits could be too many for int().
    return content_length.isdigit() and (len(content_length) > 18 or int(content_length) > limit)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the body once, then what the connection says: that the client left."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    error: APIError,
    *headers: _Header,
    has_read_body: bool = False,
) -> None:
    if not has_read_body and _announces_body(scope):
        # What is left of the body would have to be read before the next request.
        headers = (*headers, (b"connection", b"close"))
    await error.response()(scope, receive, _with_headers(send, headers))


def _announces_body(scope: Scope) -> bool:
    lengths = _values(scope, b"content-length")
    return bool(_values(scope, b"transfer-encoding")) or any(value.strip(b"0") for value in lengths)


def _with_headers(send: Send, headers: Iterable[_Header]) -> Send:
    """Set headers of the response, in place of its own of the same name."""
    names = {name for name, _ in headers}

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name, value) for name, value in message.get("headers", []) if name.lower() not in names]
            message = {**message, "headers": [*own, *headers]}
        await send(message)

    return sent


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key.lower() == name]


def _raw_path(scope: Scope) -> str:
    """Give the path as it was sent, with its escapes and without the query."""
    raw: bytes = scope.get("raw_path") or quote(scope["path"], errors="replace").encode()
    return raw.partition(b"?")[0].decode("latin-1")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return _is_address(host) and ipaddress.ip_address(host).is_loopback
