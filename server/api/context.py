"""What is known of one HTTP request all the way through: its id, and who sent it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Final

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from manylora.server.api.callers import ANYBODY, Caller

_KEY: Final = "manylora.context"


@dataclass
class RequestContext:
    """``caller`` is anybody until the key has been looked at (``api.auth``)."""

    request_id: str
    caller: Caller = ANYBODY


def context_of(request: Request) -> RequestContext:
    context: RequestContext = request.scope[_KEY]
    return context


def context_in(scope: Scope) -> RequestContext:
    context: RequestContext = scope[_KEY]
    return context


class ContextMiddleware:
    """The outermost: gives every request its context."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope[_KEY] = RequestContext(uuid.uuid4().hex)
        await self._app(scope, receive, send)
