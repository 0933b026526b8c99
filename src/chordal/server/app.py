"""The application: OpenAI's routes and those of open engines, over one worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from chordal import __version__
from chordal.generation import Model
from chordal.server.catalog import describe_decoders, describe_model
from chordal.server.connection import EventStream, Updates, unless_gone
from chordal.server.errors import (
    RETRY_AFTER_S,
    APIError,
    JSONReply,
    add_handlers,
    api_error,
    parse_json,
    request_id,
)
from chordal.server.metrics import CONTENT_TYPE, Metrics
from chordal.server.playground import playground_page
from chordal.server.prepare import Preparer
from chordal.server.respond import Answer
from chordal.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorReply,
    TokenizeRequest,
)
from chordal.server.settings import ServerSettings
from chordal.server.tokens import TokenTexts
from chordal.server.worker import Worker

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request cannot be answered."},
    "5XX": {"model": ErrorReply, "description": "The server cannot answer."},
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or events of a stream.",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    **_ERRORS,
}


class _StrictRequest(Request):
    """A request whose body is read strictly."""

    async def json(self) -> Any:
        """Give the body."""
        return self._document

    async def read(self) -> None:
        """Read the body; an error must be seen before the framework takes it for one of its own."""
        self._document = parse_json(await self.body())


class _Route(APIRoute):
    """A route whose body is JSON, and nothing else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Give the handler."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.method == "POST":
                # Whoever sends no type is told here, before the framework takes the bytes for the body.
                if "content-type" not in request.headers:
                    raise APIError(415, "the body must be application/json; no Content-Type was given.")
                strict = _StrictRequest(request.scope, request.receive)
                await strict.read()
                request = strict
            return await handler(request)

        return handle


class _Server:
    """What the routes share.

    Args:
        worker: Decodes.
        settings: Limits and defaults.
    """

    def __init__(self, worker: Worker, settings: ServerSettings) -> None:
        self.worker, self.settings = worker, settings
        self.preparer = Preparer(worker, settings)
        self.started = int(time.time())
        self._texts: dict[int, TokenTexts] = {}

    async def generate(self, request: Request, body: ChatRequest | CompletionRequest) -> Response:
        """Answer a request for text, whole or as a stream."""
        state = request.scope.setdefault("state", {})
        if body.user:
            state["user"] = body.user
        tenant = str(state.get("tenant", ""))
        ticket = None
        try:
            prepared = await unless_gone(request, self.preparer.prepare(body, tenant))
            answer = Answer(body, prepared, self._texts_of(prepared.model))
            if jobs := [*prepared.scorings, *prepared.jobs]:
                limits = [one for one in (body.chordal.timeout, self.settings.timeout_s) if one is not None]
                ticket = self.worker.submit(
                    jobs,
                    timeout_s=min(limits, default=None),
                    stream=bool(body.stream),
                    events=body.chordal.events,
                )
            if not body.stream:
                return JSONReply(await unless_gone(request, answer.whole(ticket)))
            updates = Updates(ticket)
            first = await unless_gone(request, updates.begin())
            if first is not None and first.result is not None and first.result.error is not None:
                raise first.result.error
        except BaseException as error:
            if ticket is not None:
                ticket.cancel()
            if isinstance(error, ClientDisconnect) or not isinstance(error, Exception):
                raise
            raise api_error(error, request_id=request_id(request)) from error
        return EventStream(answer.chunks(aiter(updates)), updates.cancel)

    def describe(self, name: str) -> dict[str, Any]:
        """Describe a served model."""
        model = self.worker.models[name]
        decoder, _ = self.preparer.default_decoder(model)
        return describe_model(name, model, self.started, self.preparer.limit(model), decoder)

    def tokenizer_info(self, model: Model) -> dict[str, Any]:
        """Tell what evaluation tools ask of a tokenizer."""
        tokenizer = model.tokenizer
        return {
            **{name: getattr(tokenizer, name, None) for name in ("eos_token", "bos_token", "pad_token")},
            "chat_template": getattr(tokenizer, "chat_template", None),
            "vocab_size": model.engine.target.vocab_size,
            "model_max_length": self.preparer.limit(model),
        }

    def _texts_of(self, model: Model) -> TokenTexts:
        if id(model) not in self._texts:
            self._texts[id(model)] = TokenTexts(model.tokenizer)
        return self._texts[id(model)]


def create_app(worker: Worker, settings: ServerSettings, metrics: Metrics | None = None) -> FastAPI:
    """Make the application, without what `chordal.server.security` puts around it.

    Args:
        worker: Decodes; it may still load.
        settings: Limits and defaults.
        metrics: What `/metrics` gives; None has no such route.
    """
    server = _Server(worker, settings)
    app = FastAPI(
        title="Chordal",
        version=__version__,
        summary="Several tokens per forward pass, behind OpenAI's API.",
        docs_url=None,
        redoc_url=None,
    )
    add_handlers(app)
    app.include_router(_openai_routes(server))
    app.include_router(_tokenizer_routes(server))
    app.include_router(_state_routes(server, metrics))
    return app


def _openai_routes(server: _Server) -> APIRouter:
    router = APIRouter(route_class=_Route)

    @router.post("/v1/chat/completions", responses=_ANSWERS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await server.generate(request, body)

    @router.post("/v1/completions", responses=_ANSWERS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        return await server.generate(request, body)

    @router.get("/v1/models", responses=_ERRORS)
    async def models() -> Response:
        """List the served models."""
        return JSONReply(
            {"object": "list", "data": [server.describe(name) for name in server.preparer.models()]}
        )

    @router.get("/v1/models/{name:path}", responses=_ERRORS)
    async def model(name: str) -> Response:
        """Describe a served model."""
        return JSONReply(server.describe(server.preparer.model(name)[0]))

    @router.get("/v1/decoders", responses=_ERRORS)
    async def decoders(model: str | None = None) -> Response:
        """List the decoders that a model can be decoded with, and their settings."""
        found = describe_decoders(server.preparer.model(model)[1])
        return JSONReply({"object": "list", "data": found})

    return router


def _tokenizer_routes(server: _Server) -> APIRouter:
    router = APIRouter(route_class=_Route)

    @router.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Turn a text, or messages, into token ids."""
        return JSONReply(await unless_gone(request, server.preparer.tokenize(body)))

    @router.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Turn token ids into text."""
        text = await unless_gone(request, server.preparer.detokenize(body.model, body.tokens))
        return JSONReply({"prompt": text})

    @router.get("/tokenizer_info", responses=_ERRORS)
    async def tokenizer_info(model: str | None = None) -> Response:
        """Tell what evaluation tools ask of a tokenizer; of the first model, if none is named."""
        return JSONReply(server.tokenizer_info(server.preparer.model(model)[1]))

    return router


def _state_routes(server: _Server, metrics: Metrics | None) -> APIRouter:
    router = APIRouter(route_class=_Route)

    @router.get("/health", responses=_ERRORS)
    async def health() -> Response:
        """Say whether requests are taken; why not is the status of a 503."""
        state = server.worker.state
        if state == "ready":
            return JSONReply({"status": "ok"})
        return JSONReply({"status": state}, 503, {"Retry-After": str(RETRY_AFTER_S)})

    @router.get("/version")
    async def version() -> Response:
        """Give the version."""
        return JSONReply({"version": __version__})

    if server.settings.playground:

        @router.get("/", response_class=HTMLResponse)
        async def playground() -> Response:
            """Give the playground."""
            return HTMLResponse(playground_page(), headers={"Cache-Control": "no-cache"})

    if metrics is not None:

        @router.get("/metrics", response_class=PlainTextResponse)
        async def scrape() -> Response:
            """Give the metrics in Prometheus' form."""
            return Response(metrics.scrape(), media_type=CONTENT_TYPE)

    return router
