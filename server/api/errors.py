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
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from manylora.adapters.errors import (
    AdapterError,
    AdapterExists,
    AdapterNotFound,
    AdapterSourceNotFound,
    RegistryStateError,
    SlotUploadFailed,
)
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
    409: "ConflictError",
    413: "ContentTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}

DRAIN_RETRY_AFTER: Final = "5"
"""Seconds after which a client of a draining server may find its successor."""
ADAPTER_RETRY_AFTER: Final = "10"
"""Seconds after which a failed upload of an adapter is tried again (``adapters.slots.RETRY_AFTER_S``)."""

_CLIENT_GONE: Final = 499
"""nginx's status for a client that left; nobody reads it, but an access log may show it."""


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
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.type = type or _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.status}}

    def response(self) -> Response:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def not_found(message: str, param: str | None = None) -> ApiError:
    return ApiError(404, message, param=param)


def as_api_error(error: EngineRefusal | AdapterError | ChatTemplateError) -> ApiError:
    """The response to an error that another room raised on purpose."""
    message = str(error)
    match error:
        case QueueFull():
            return ApiError(429, message, headers={"Retry-After": str(error.retry_after)})
        case EngineDraining():
            return ApiError(503, message, headers={"Retry-After": DRAIN_RETRY_AFTER})
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


def failed(message: str | None, *, is_unavailable: bool = False) -> ApiError:
    """The engine gave up on a request: the message is its FinishEvent's, fit for a client."""
    if is_unavailable:  # its adapter cannot be had now; others are served
        return ApiError(503, message or "The adapter is not available.", headers={"Retry-After": ADAPTER_RETRY_AFTER})
    return ApiError(500, message or "The request failed inside the server.")


def aborted() -> ApiError:
    """A request was cut short from inside, which only a shutdown does. What it had so far is no answer."""
    return ApiError(
        503, "The request was aborted: the server is shutting down.", headers={"Retry-After": DRAIN_RETRY_AFTER}
    )


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of ``app``, its router's own included, have the one shape."""

    async def on_api_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_refusal(_request: Request, error: Exception) -> Response:
        assert isinstance(error, EngineRefusal | AdapterError | ChatTemplateError)
        return as_api_error(error).response()

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = error.detail
        if error.status_code == HTTPStatus.NOT_FOUND:
            message = f"There is no {request.method} {request.url.path} here."
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            message = f"{request.url.path} does not take {request.method}."
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def on_client_gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=_CLIENT_GONE)

    async def on_bug(request: Request, error: Exception) -> Response:
        # The one boundary that catches everything: a bug in one request is answered without telling what it was.
        # Starlette raises it again afterwards, so that a test sees it, and uvicorn logs its traceback.
        _log.error("%s %s failed: %r", request.method, request.url.path, error)
        return ApiError(500, "Internal server error; the server's log has the details.").response()

    app.add_exception_handler(ApiError, on_api_error)
    for kind in (EngineRefusal, AdapterError, ChatTemplateError):
        app.add_exception_handler(kind, on_refusal)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    app.add_exception_handler(Exception, on_bug)
