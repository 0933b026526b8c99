"""Errors in OpenAI's form: what the client did wrong, or that we did, and never how the server is made."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from chordal import strict_json
from chordal.errors import ChordalError, DecodingError, InputError
from chordal.server.worker import QueueFullError, UnavailableError

logger = logging.getLogger("chordal.server")

# Deeper JSON is refused: what reads it later recurses.
MAX_JSON_DEPTH = 64
# More digits are no 64-bit number.
_MAX_DIGITS = 20
_SHOWN = 64
_MAX_PARAM, _MAX_MESSAGE = 256, 2000
_MAY_BE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

# Seconds after which a server that loads or ends may be asked again.
RETRY_AFTER_S = 5


class APIError(Exception):
    """An error as the client sees it.

    Attributes:
        status: HTTP status.
        message: What must hold, what was given, what to do.
        param: Dotted path of the field that is wrong, e.g. "messages.0.content".
        code: A word that programs compare, e.g. "model_not_found".
        retry_after_s: When to try again, if that may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def to_dict(self) -> dict[str, Any]:
        """Give the object that answers and streams carry."""
        kind = _KINDS.get(self.status)
        if kind is None:
            kind = "internal_server_error" if self.status >= 500 else "invalid_request_error"
        # What was sent is not sent back whole.
        param = None if self.param is None else _encodable(self.param[:_MAX_PARAM])
        error = {
            "message": _encodable(_cut(self.message, _MAX_MESSAGE)),
            "type": kind,
            "param": param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        """Make the response."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 504:
            # OpenAI's clients try again after a 5xx, which would take as long once more.
            headers["X-Should-Retry"] = "false"
        return JSONReply(self.to_dict(), self.status, headers)


class JSONReply(Response):
    """A JSON document; ASCII, so that any text of a model can be sent."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Write the body."""
        return strict_json.dumps(content, ensure_ascii=True).encode()


def api_error(error: BaseException, *, param: str | None = None, request_id: str = "") -> APIError:
    """Say what an error means for the client; what nobody foresaw is logged and not shown.

    Args:
        error: Any.
        param: Field that an `InputError` is about.
        request_id: Told to the client with an error of ours, to be found in the log.
    """
    match error:
        case APIError():
            return error
        case InputError():
            return APIError(400, str(error), param=param)
        case QueueFullError():
            return APIError(429, str(error), code="queue_full", retry_after_s=error.retry_after_s)
        case UnavailableError():
            return APIError(503, str(error), code="unavailable", retry_after_s=RETRY_AFTER_S)
        case TimeoutError():
            return APIError(504, str(error) or "the request took too long.", code="timeout")
        case MemoryError() | torch.OutOfMemoryError():
            return APIError(
                503,
                "the server has no memory left for this request; make it smaller, or try again later.",
                code="out_of_memory",
                retry_after_s=RETRY_AFTER_S,
            )
        case DecodingError():
            return APIError(500, f"decoding failed: {error}", code="decoding_failed")
    logger.error("request %s failed", request_id, exc_info=error)
    told = f" Its log knows more of request {request_id}." if request_id else ""
    return APIError(500, f"the server failed.{told}", code="internal_error")


def parse_json(body: bytes) -> Any:
    """Read a request body strictly: Unicode, no key twice, no NaN, no number beyond all use, not too deep.

    Raises:
        APIError: With status 400.
    """
    try:
        document = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_int=_int,
            parse_float=_float,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise APIError(
            400, f"the body must be UTF-8; byte {error.start} is not.", code="invalid_json"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise APIError(400, f"the body must be JSON: {error}.", code="invalid_json") from None
    _check_depth(document)
    if _MAY_BE_SURROGATE.search(body):
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise APIError(
                400, "the body must be Unicode text; it holds half a surrogate pair.", code="invalid_json"
            ) from None
    if not isinstance(document, dict):
        raise APIError(400, "the body must be a JSON object.", code="invalid_json")
    return document


def validation_error(errors: Seq[Any]) -> APIError:
    """Make one error of what pydantic found: of the first field that is wrong, where it is wrong."""
    first = errors[0]
    same_field = [error for error in errors if error["loc"][:2] == first["loc"][:2]]
    # Of the alternatives of a field, the one that was understood furthest.
    error = max(same_field, key=lambda one: len(one["loc"]))
    path = ".".join(str(part) for part in error["loc"][1:] if not _is_alternative(part))
    context: Mapping[str, Any] = error.get("ctx") or {}
    if error["type"] == "refused":
        if context["param"]:
            path = f"{path}.{context['param']}" if path else context["param"]
            return APIError(400, context["message"], param=path)
        return APIError(400, f"{path} {context['message']}.", param=path)
    if error["type"] == "missing":
        return APIError(
            400, f"the field `{path}` is required." if path else "the body is missing.", param=path
        )
    must = re.sub(r"^\w+ should\b", "must", error["msg"])
    given = error.get("input")
    shown = f"; got {_short(given)}" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return APIError(400, f"{path or 'the body'} {must}{shown}.", param=path or None)


def add_handlers(app: FastAPI) -> None:
    """Have every error of an application answered in OpenAI's form."""

    async def known(request: Request, error: Exception) -> Response:
        return api_error(error, request_id=request_id(request)).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return validation_error(error.errors()).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {404: "no such route.", 405: "this route has no such method."}.get(
            error.status_code, str(error.detail)
        )
        response = APIError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    for kind in (APIError, ChordalError, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, gone)


def request_id(request: Request) -> str:
    """Give the id of a request, as its response carries it."""
    return str(request.scope.get("state", {}).get("request_id", ""))


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _short(value: Any) -> str:
    shown = repr(value) if not isinstance(value, (bool, type(None))) else json.dumps(value)
    return _cut(shown, _SHOWN)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def _is_alternative(part: Any) -> bool:
    """Whether a part of a location names a member of a union and no field."""
    return isinstance(part, str) and (part in ("str", "int", "float") or "[" in part)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"numbers must have at most {_MAX_DIGITS} digits")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{digits[:_SHOWN]} is too large a number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_short(twice)} is there twice")
    return found


def _check_depth(document: Any) -> None:
    level = [document]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            part
            for whole in level
            if isinstance(whole, (dict, list))
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> APIError:
    return APIError(400, f"the body must not be nested deeper than {MAX_JSON_DEPTH}.", code="invalid_json")
