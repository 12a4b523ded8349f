"""Server-sent events, straight onto ASGI: what is there to send goes out in one write.

A token of a stream that keeps up goes by neither ASGI nor a task: it is rendered and written as it arrives
(``body_writer``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from manylora.server.api.chunks import Chunks
from manylora.server.api.context import RequestContext
from manylora.server.api.errors import ApiError
from manylora.server.api.generation import abort_all, aborting, failure
from manylora.server.api.state import EventStream
from manylora.server.body_writer import BodyWriter, writer_in
from manylora.server.engine.request import Event, TokenEvent

_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the stream
]


class EventStreamResponse(Response):
    """The choices' events as frames, interleaved as they come. The requests are aborted when the client leaves.

    The status is sent with the first output, so that a request that fails before it has any gets an honest one;
    after that an error is a last frame.
    """

    def __init__(self, streams: Sequence[EventStream], chunks: Chunks, context: RequestContext) -> None:
        super().__init__()
        self._context = context
        self._streams = streams
        self._chunks = chunks
        self._has_begun = False
        self._writer: BodyWriter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._writer = writer_in(scope)
        if self._writer is not None and len(self._streams) == 1:  # those of several choices share a write a step
            self._streams[0].offer_to(self._write_now)
        # A server may raise OSError when the client is gone; then there is nobody left to tell.
        async with aborting(receive, self._streams, self._context):
            with contextlib.suppress(OSError):
                error = await self._send_events(send)
                if error is None:
                    return
                if self._has_begun:
                    self._context.failed(error.type)
                    await self._write(send, f"data: {json.dumps(error.body())}\n\n", more=False)
                else:
                    await error.response()(scope, receive, send)

    async def _send_events(self, send: Send) -> ApiError | None:
        """Send until every choice has ended, or one ended with an error, which is returned when all have ended."""
        chunks, n_open = self._chunks, len(self._streams)
        error: ApiError | None = None
        async with contextlib.aclosing(_batches(self._streams)) as batches:
            async for batch in batches:
                frames: list[str] = []
                for index, event in batch:
                    if isinstance(event, TokenEvent):
                        if error is None:
                            frames.append(chunks.tokens(index, event))
                        continue
                    n_open -= 1
                    self._context.finished.append(event)
                    if error is not None:
                        continue
                    error = failure(event, self._context)
                    if error is None:
                        frames.append(chunks.finish(index, event))
                    else:
                        abort_all(self._streams)  # and wait for what they have computed, which is to be counted
                if n_open == 0 and error is None:
                    frames.append(chunks.end())
                data = "".join(frames)
                if data:
                    await self._write(send, data, more=n_open > 0 or error is not None)
        return error

    def _write_now(self, event: TokenEvent) -> bool:
        """What ``_send_events`` would do with it if it were woken, if that can be done at once. Until the head is sent
        that cannot be."""
        writer = self._writer
        if writer is None or not writer.is_free():
            return False
        frame = self._chunks.tokens(0, event)
        if frame:
            writer.write(frame.encode())
        return True

    async def _write(self, send: Send, data: str, *, more: bool) -> None:
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": data.encode(), "more_body": more})


async def _batches(streams: Sequence[EventStream]) -> AsyncGenerator[list[tuple[int, Event]], None]:
    """The events of all streams with their stream's index; each time, as many as there are."""
    if len(streams) == 1:
        async for event in streams[0]:
            yield [(0, event)]
        return

    loop = asyncio.get_running_loop()
    arrived: list[tuple[int, Event]] = []
    bell = loop.create_future()

    def ring(_done: object = None) -> None:
        if not bell.done():
            bell.set_result(None)

    async def pump(index: int, stream: EventStream) -> None:
        async for event in stream:
            arrived.append((index, event))
            ring()

    pumps = asyncio.gather(*(pump(index, stream) for index, stream in enumerate(streams)))
    pumps.add_done_callback(ring)
    try:
        while not pumps.done() or arrived:
            await bell
            # The events of a step are delivered at once, so every pump that has one has run before this goes on.
            bell = loop.create_future()
            batch, arrived = arrived, []
            if batch:
                yield batch
        pumps.result()  # raises what a stream raised
    finally:
        pumps.cancel()
