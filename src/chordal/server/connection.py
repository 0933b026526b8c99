"""A client that goes away, during an answer or a stream: its work ends at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chordal import strict_json
from chordal.server.mailbox import Ticket, Update

logger = logging.getLogger("chordal.server")

T = TypeVar("T")

# A comment so often keeps proxies from closing a stream in which nothing happens.
PING_S = 15.0
# A client that takes nothing for so long is given up.
STALL_S = 60.0
# A stream begins with its first update, or after so long: an error that comes before has its own status.
_STATUS_S = 1.0


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for something as long as the client does.

    Raises:
        ClientDisconnect: The client went away; the work was cancelled.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _cancel(task, gone)


class Updates:
    """The updates of a ticket, of which the first may be looked at before the others are taken."""

    def __init__(self, ticket: Ticket | None) -> None:
        self.ticket = ticket
        self._first: asyncio.Task[Update] | None = None

    async def begin(self) -> Update | None:
        """Wait for the first update, but not for long.

        Returns:
            The first update, which is still to come again; None if there is none yet.
        """
        if self.ticket is None:
            return None
        self._first = asyncio.ensure_future(_next(self.ticket))
        await asyncio.wait({self._first}, timeout=_STATUS_S)
        return self._first.result() if self._first.done() else None

    async def __aiter__(self) -> AsyncIterator[Update]:
        """Give all updates."""
        if self._first is not None:
            yield await self._first
        if self.ticket is not None:
            async for update in self.ticket:
                yield update

    def cancel(self) -> None:
        """End the work."""
        if self._first is not None:
            self._first.cancel()
        if self.ticket is not None:
            self.ticket.cancel()


class EventStream(Response):
    """Server-sent events, one document each; a pause is filled with comments, an error ends them.

    Args:
        documents: What is sent; one with the key "error" is the last, and no [DONE] follows it.
        close: Called when it is over, however it ends.
    """

    media_type = "text/event-stream"

    def __init__(self, documents: AsyncIterator[dict[str, Any]], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._documents, self._close = documents, close
        self._num_put = self._num_putting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client is gone.

        Raises:
            ConnectionError: The client takes nothing; dropping the connection is all that is left.
        """
        self._send = send
        writing = asyncio.ensure_future(self._write())
        gone = asyncio.ensure_future(_disconnect(receive))
        stalled = asyncio.ensure_future(self._keep_alive())
        try:
            await asyncio.wait({writing, gone, stalled}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
            elif stalled.done():
                raise ConnectionError("the client reads nothing")
        finally:
            self._close()
            await _cancel(writing, gone, stalled)

    async def _write(self) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        has_failed = False
        async for document in self._documents:
            has_failed = "error" in document
            await self._put(b"data: %b\n\n" % strict_json.dumps(document, ensure_ascii=True).encode())
        await self._put(b"" if has_failed else b"data: [DONE]\n\n", is_last=True)

    async def _put(self, body: bytes, *, is_last: bool = False) -> None:
        # Several tasks may put at once: each is one call, and so stays in one piece.
        self._num_putting += 1
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})
        self._num_putting -= 1
        self._num_put += 1

    async def _keep_alive(self) -> None:
        """Fill pauses with comments, and return when the client has taken nothing for too long.

        Beside the writing: a timer for each of its events would cost as much as the event.
        """
        num_put, silent_s = 0, 0.0
        while True:
            await asyncio.sleep(pause_s := min(PING_S, STALL_S))
            silent_s = silent_s + pause_s if self._num_put == num_put else 0.0
            num_put = self._num_put
            if self._num_putting:
                if silent_s >= STALL_S:
                    return
            elif silent_s >= PING_S:
                try:
                    async with asyncio.timeout(STALL_S):
                        await self._put(b": ping\n\n")
                except TimeoutError:
                    return


class _EndError(Exception):
    """Nothing more comes. A task cannot raise StopAsyncIteration to whoever waits for it."""


async def _next(source: AsyncIterator[T]) -> T:
    try:
        return await anext(source)
    except StopAsyncIteration:
        raise _EndError from None


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
