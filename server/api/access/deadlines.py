"""A request's time is limited, from its arrival to the end of its answer.

What generates aborts its requests at ``RequestContext.deadline`` by itself, as only it knows what to tell a client
that has half an answer (``api.generation``, ``api.streaming``). All else is cut off here, a little later: a body that
trickles in, an adapter that is long to load, a prompt that is long to be tokenised, a client that does not read on.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manylora.server.api.context import context_in
from manylora.server.api.errors import ApiError

_SPARE_S: Final = 5.0
"""Seconds for aborted requests to end and to be answered for."""


async def within_deadline(app: ASGIApp, timeout: float | None, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ASYNC109 - becomes a deadline for all that follows
    """Run ``app`` for at most ``timeout`` seconds; then answer 504, or end the connection of an answer that began."""
    if timeout is None:
        await app(scope, receive, send)
        return
    deadline = asyncio.get_running_loop().time() + timeout
    context_in(scope).deadline = deadline
    has_begun = False

    async def sending(message: Message) -> None:
        nonlocal has_begun
        has_begun = True
        await send(message)

    try:
        async with asyncio.timeout_at(deadline + _SPARE_S) as limit:
            await app(scope, receive, sending)
    except TimeoutError:
        if not limit.expired():
            raise
        if not has_begun:  # else the server closes the connection, as the answer has no end
            await timed_out().response()(scope, receive, send)


def timed_out() -> ApiError:
    """504: the time is up (--request-timeout), and the request was aborted."""
    return ApiError(504, "The request took longer than this server allows, and was aborted.")
