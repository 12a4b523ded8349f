"""What is known of one HTTP request all the way through: its id, who sent it, and what became of it."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manylora.server.api.access.callers import ANYBODY, Caller
from manylora.server.engine.request import FinishEvent
from manylora.server.logs import current_request

REQUEST_ID: Final = "x-request-id"

Rejection = Literal["auth", "permission", "rate", "queue", "draining"]
"""Why a request was turned away without being looked into further."""

CLIENT_GONE: Final = 499
"""nginx's status for a client that left before it was answered; nobody reads it, but logs and metrics show it."""

_KEY: Final = "manylora.context"
_HEADER: Final = REQUEST_ID.encode()
_VALID: Final = re.compile(rb"[!-~]{1,128}")
"""Visible ASCII: nothing that could end a log line, or a word of it."""


@dataclass
class RequestContext:
    """``caller`` is anybody until the key has been looked at (``api.access.auth``). What follows it is filled in on the
    way, for the log, the metrics and the trace."""

    request_id: str
    caller: Caller = ANYBODY
    deadline: float | None = None
    """The event loop's time at which the answer must be over; None if it may take any."""
    is_late: bool = False
    """Whether the request was aborted because of that."""
    arrived: float = field(default_factory=time.monotonic)
    """``time.monotonic()`` seconds."""
    model: str | None = None
    """The model that was asked for, whether it exists or not."""
    prompt_tokens: int | None = None
    """Of all prompts, each once however many choices continue it; None if nothing was submitted."""
    submitted: list[int] = field(default_factory=list)
    """Of each choice that was submitted, the tokens of its prompt and the most that it may generate."""
    finished: list[FinishEvent] = field(default_factory=list)
    """Of each choice that has ended."""
    error_type: str | None = None
    """The ``type`` of the error that was answered, in a stream too."""
    rejection: Rejection | None = None
    status: int | None = None
    """As sent; None before."""
    trace_id: str | None = None
    """Hexadecimal; None if requests are not traced."""
    is_client_gone: bool = False
    """Whether the client left before it had all of its answer."""

    def failed(self, error_type: str, rejection: Rejection | None = None) -> None:
        """The request is being answered with an error."""
        self.error_type, self.rejection = error_type, rejection


Observer = Callable[[Scope, RequestContext], None]
"""Told of each request when it is over; must not raise."""


def context_of(request: Request) -> RequestContext:
    return context_in(request.scope)


def context_in(scope: Scope) -> RequestContext:
    context: RequestContext = scope[_KEY]
    return context


class ContextMiddleware:
    """The outermost: gives every request its context, every response its request's id, and tells ``observer`` of each.

    The id is the client's ``x-request-id`` if there is exactly one and it is 1 to 128 visible ASCII characters, and
    otherwise one of our own.
    """

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = scope[_KEY] = RequestContext(_request_id(scope))
        # Not reset at the end: the server logs what the application raised, in this same task, which is the request's.
        current_request.set(context.request_id)
        header = (_HEADER, context.request_id.encode())
        is_answered = False

        async def sending(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                if context.status is None:
                    context.status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            elif not message.get("more_body", False):
                is_answered = True
            await send(message)

        async def receiving() -> Message:
            message = await receive()
            # A server says so of every client in the end, when it has its answer.
            if message["type"] == "http.disconnect" and not is_answered:
                context.is_client_gone = True
                if context.status is None:
                    context.status = CLIENT_GONE
            return message

        try:
            await self._app(scope, receiving, sending)
        except asyncio.CancelledError:  # the server ends and waits no longer
            context.failed("ServiceUnavailableError")
            context.status = context.status or 503
            raise
        except Exception:
            context.failed("InternalServerError")
            context.status = context.status or 500  # Starlette is about to answer so, outside of this
            raise
        finally:
            if context.is_client_gone:
                context.failed("ClientDisconnected")  # and not what became of its request because of that
            self._observer(scope, context)


def _request_id(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == _HEADER]
    if len(given) == 1 and _VALID.fullmatch(given[0]):
        return str(given[0], "ascii")
    return uuid.uuid4().hex
