"""Every error a client can see, in one shape: ``{"error": {"message", "type", "param", "code"}}``.

ApiError (a status, a message, a type, the field at fault)
├── bad_request(...)        400  BadRequestError
├── not_found(...)          404  NotFoundError
└── whatever else raises below is turned into one by ``as_api_error``:
    ├── EngineRefusal       QueueFull 429 with Retry-After, EngineDraining 503, MergeBusy 409, the others 400
    ├── AdapterError        by the table in adapters/errors.py
    └── ChatTemplateError   400
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from manylora.adapters.errors import (
    AdapterError,
    AdapterExists,
    AdapterNotFound,
    AdapterSourceNotFound,
    RegistryStateError,
    SlotUploadFailed,
)
from manylora.server.api.context import CLIENT_GONE, REQUEST_ID, Rejection, context_in, context_of
from manylora.server.engine.errors import (
    AdaptersNeverFit,
    EngineDraining,
    EngineRefusal,
    MergeBusy,
    MergeRefused,
    QueueFull,
)
from manylora.server.model.errors import ChatTemplateError

_log = logging.getLogger(__name__)

_TYPES: Final[Mapping[int, str]] = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "ContentTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}

ERROR_TYPES: Final = frozenset({*_TYPES.values(), "InvalidUserInput"})
"""Every ``type`` an error can have."""

DRAIN_RETRY_AFTER: Final = "5"
"""Seconds after which a client of a draining server may find its successor."""
ADAPTER_RETRY_AFTER: Final = "10"
"""Seconds after which a failed upload of an adapter is tried again (``adapters.slots.RETRY_AFTER_S``)."""

_REJECTIONS: Final[Mapping[int, Rejection]] = {401: "auth", 403: "permission", 429: "rate"}


class ApiError(Exception):
    """An error with everything its response needs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
        rejection: Rejection | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.type = type or _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
        self.headers = dict(headers or {})
        self.rejection = rejection or _REJECTIONS.get(status)
        """For the metrics: why the request was turned away, if it was."""

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.status}}

    def response(self) -> Response:
        return _ErrorResponse(self)


class _ErrorResponse(JSONResponse):
    """Tells the request's context what it was, wherever it is sent from."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body(), status_code=error.status, headers=error.headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context_in(scope).failed(self._error.type, self._error.rejection)
        await super().__call__(scope, receive, send)


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def too_many_requests(message: str, retry_after: int) -> ApiError:
    return ApiError(429, message, headers={"Retry-After": str(retry_after)})


def not_found(message: str, param: str | None = None) -> ApiError:
    return ApiError(404, message, param=param)


def as_api_error(error: EngineRefusal | AdapterError | ChatTemplateError) -> ApiError:
    """The response to an error that another room raised on purpose."""
    message = str(error)
    match error:
        case QueueFull():
            return ApiError(429, message, headers={"Retry-After": str(error.retry_after)}, rejection="queue")
        case EngineDraining():
            return ApiError(503, message, headers={"Retry-After": DRAIN_RETRY_AFTER}, rejection="draining")
        case AdapterNotFound() | AdapterSourceNotFound():
            return ApiError(404, message)
        case AdapterExists():
            return ApiError(400, message, type="InvalidUserInput")
        case SlotUploadFailed():
            return ApiError(503, message)
        case RegistryStateError():
            return ApiError(500, message)
        case AdaptersNeverFit():
            return ApiError(400, message, param="adapters")
        case MergeBusy():
            return ApiError(409, message)
        case MergeRefused():
            return ApiError(400, message, param=error.param)
        case ChatTemplateError():
            return ApiError(400, message, param="messages")
        case _:
            return ApiError(400, message)


def failed(message: str | None, *, is_unavailable: bool = False, is_refusal: bool = False) -> ApiError:
    """The engine gave up on a request: the message is its FinishEvent's, fit for a client."""
    if is_unavailable:  # its adapter cannot be had now; others are served
        return ApiError(503, message or "The adapter is not available.", headers={"Retry-After": ADAPTER_RETRY_AFTER})
    if is_refusal:
        return bad_request(message or "The request asks for what cannot be done.")
    return ApiError(500, message or "The request failed inside the server.")


def aborted() -> ApiError:
    """A request was cut short from inside, which only a shutdown does. What it had so far is no answer."""
    return ApiError(
        503, "The request was aborted: the server is shutting down.", headers={"Retry-After": DRAIN_RETRY_AFTER}
    )


def _methods_at(routes: Sequence[BaseRoute], path: str) -> list[str]:
    """What a path takes. The router, which gives up at the first route of the path, knows that one's methods only."""
    found = (route.methods or set() for route in routes if isinstance(route, Route) and route.path_regex.match(path))
    return sorted({method for methods in found for method in methods})


def install_error_handlers(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Make every error of ``app``, its router's own included, have the one shape. ``routes`` are all of its own."""

    async def on_api_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_refusal(_request: Request, error: Exception) -> Response:
        assert isinstance(error, EngineRefusal | AdapterError | ChatTemplateError)
        return as_api_error(error).response()

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message, headers = error.detail, dict(error.headers or {})
        if error.status_code == HTTPStatus.NOT_FOUND:
            message = f"There is no {request.method} {request.url.path} here."
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            message = f"{request.url.path} does not take {request.method}."
            headers["Allow"] = ", ".join(_methods_at(routes, request.url.path)) or headers.get("Allow", "")
        return ApiError(error.status_code, message, headers=headers).response()

    async def on_client_gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    async def on_bug(request: Request, error: Exception) -> Response:
        # The one boundary that catches everything: a bug in one request is answered without telling what it was.
        # Starlette raises it again afterwards, so that a test sees it, and uvicorn logs its traceback.
        _log.error("%s %s failed: %r", request.method, request.url.path, error)
        response = ApiError(500, "Internal server error; the server's log has the details.").response()
        # It is sent from outside of the middleware that does this for all others.
        response.headers[REQUEST_ID] = context_of(request).request_id
        return response

    app.add_exception_handler(ApiError, on_api_error)
    for kind in (EngineRefusal, AdapterError, ChatTemplateError):
        app.add_exception_handler(kind, on_refusal)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    app.add_exception_handler(Exception, on_bug)
