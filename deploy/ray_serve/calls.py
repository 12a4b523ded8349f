"""A request from another process, answered by the application in this one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final

from manylora.deploy.ray_serve.routes import Body, Message, Scope

_log = logging.getLogger(__name__)

App = Callable[[Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

_CHUNK: Final = 1 << 20
_LEAVE_S: Final = 10.0
"""Seconds for the application to notice that nobody listens any more."""


async def call(app: App, scope: Scope, body: Body) -> AsyncGenerator[list[Message], None]:
    """Run ``app`` on one request and yield what it sends, as much at a time as there is. When the generator is closed
    before the end, the application is told that its client is gone."""
    bell = asyncio.Event()
    gone = asyncio.Event()
    sent: list[Message] = []

    is_over = False

    async def send(message: Message) -> None:
        nonlocal is_over
        is_over = message["type"] == "http.response.body" and not message.get("more_body", False)
        sent.append(message)
        bell.set()

    task = asyncio.ensure_future(app(dict(scope), _receiving(body, gone), send))
    task.add_done_callback(lambda _: bell.set())
    try:
        while not task.done() or sent:
            await bell.wait()
            bell.clear()
            messages, sent[:] = list(sent), []
            if messages:
                yield messages
        if (error := task.exception()) is not None:
            if not is_over:
                raise error
            _log.error("the application failed after its answer", exc_info=error)  # which is Starlette's 500
    finally:
        gone.set()
        if not task.done():
            await asyncio.wait([task], timeout=_LEAVE_S)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):  # nobody is there to be told
                await task


async def whole(app: App, scope: Scope, body: Body) -> list[Message]:
    """All that ``app`` sends."""
    return [message async for messages in call(app, scope, body) for message in messages]


def _receiving(body: Body, gone: asyncio.Event) -> Callable[[], Awaitable[Message]]:
    """``receive`` of one request: its body, then nothing until the client is gone."""
    chunks = _chunks(body)

    async def receive() -> Message:
        chunk = await anext(chunks, None)
        if chunk is not None:
            return {"type": "http.request", "body": chunk[0], "more_body": chunk[1]}
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def _chunks(body: Body) -> AsyncGenerator[tuple[bytes, bool], None]:
    """The body in pieces, each with whether there are more."""
    if body.path is None:
        yield body.data, False
        return
    with await asyncio.to_thread(open, body.path, "rb") as file:
        while data := await asyncio.to_thread(file.read, _CHUNK):
            yield data, True
    yield b"", False
