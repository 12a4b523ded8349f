"""What clients of a fleet see: the routes of one server, answered by many. An ASGI application.

It reads no more of a request than where it has to go. Fields, limits, errors: all that is the replicas', whose answers
pass through as they are. Keys are looked at here too, by the server's own code, as no body is read for just anybody;
so a tenant's requests a second are counted where they all come by. It has words of its own only where no replica has
any: 503 if none can answer, 429 if too many wait, 504 if they wait too long, and the last event of a stream whose
replica was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from manylora.deploy.ray_serve.fleet import Changed, NotChanged, Status
from manylora.deploy.ray_serve.member import FleetLost
from manylora.deploy.ray_serve.metrics_pages import one_page
from manylora.deploy.ray_serve.relay import Overcrowded, Patience, Replicas, TooLate, Unanswered, relay
from manylora.deploy.ray_serve.routes import Body, Kind, Message, Scope, adapters_named, carried, header, kind_of
from manylora.server.api.access.auth import AuthMiddleware
from manylora.server.api.access.deadlines import timed_out
from manylora.server.api.access.keys import KeyRing
from manylora.server.api.app import routes
from manylora.server.api.context import ContextMiddleware, RequestContext
from manylora.server.api.errors import ApiError
from manylora.server.api.observing.access_log import log_request
from manylora.server.api.observing.observation import Observation
from manylora.server.config import ApiConfig

_log = logging.getLogger(__name__)

Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

FLEET_HEADER: Final = b"x-manylora-fleet"
_MULTIPART: Final = b"multipart/form-data"
_FRAMING: Final = 1 << 16
"""Bytes that multipart's own headers may take besides the files, as in ``api.managing.uploads``."""
_UPLOADS_AT_ONCE: Final = 2
_SPARE_S: Final = 30.0
"""Seconds more than a replica takes for an answer: those of waiting for one."""
_UNREACHABLE: Final = "The fleet's own process is being started again; nothing was changed, as far as it was heard of."


class FleetLike(Protocol):
    """``fleet.Fleet``, wherever it is. Methods may raise ``member.FleetLost``."""

    async def change(self, scope: Scope, body: Body) -> Changed: ...
    async def status(self) -> Status: ...


@dataclass(frozen=True)
class Page:
    """An answer that is whole."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class AllReplicas(Replicas, Protocol):
    async def ask_all(self, scope: Scope) -> Mapping[str, Page]:
        """Each replica's answer to a request without a body, by its id; of those that gave one."""
        ...


class _Gone(Exception):
    """The client has left."""


class Front:
    """The application. ``spool``: a directory that all replicas can read, for uploads on their way."""

    def __init__(
        self,
        config: ApiConfig,
        replicas: AllReplicas,
        fleet: FleetLike,
        spool: Path,
        patience: Patience | None = None,
    ) -> None:
        self._config, self._replicas, self._fleet, self._spool = config, replicas, fleet, spool
        timeout = config.request_timeout
        self._patience = patience or Patience(begin_s=None if timeout is None else timeout + _SPARE_S)
        self._uploading = asyncio.Semaphore(_UPLOADS_AT_ONCE)
        self._keys = KeyRing(config)
        self._observe = Observation(routes(), [log_request])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._handle(scope, receive, sending)
        except ApiError as error:
            await _send_error(sending, error)
        except _Gone:
            return
        except Exception:
            _log.exception("%s %s failed at the front", scope["method"], scope["path"])
            if begun:
                raise
            await _send_error(sending, ApiError(500, "Internal server error; the server's log has the details."))

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = kind_of(scope["method"], scope["path"])
        if kind is Kind.STATUS:
            await self._status(scope, send)
            return
        refusal = await self._refusal(scope)
        if refusal is not None:
            for message in refusal:
                await send(_without_own_id(scope, message))
            return
        match kind:
            case Kind.METRICS:
                await self._metrics(scope, send)
            case Kind.CHANGE:
                await self._change(scope, receive, send)
            case _:
                await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        # One byte more than is taken, so that it is a replica that says how much is taken.
        data = await _read(receive, self._config.max_body_bytes + 1)
        named = adapters_named(scope["method"], scope["path"], data)
        relaying = relay(self._replicas, named, carried(scope), Body(data), send, self._patience)
        try:
            await _unless_gone(receive, relaying)
        except Unanswered as error:
            raise ApiError(503, str(error), headers={"Retry-After": str(error.retry_after)}) from error
        except TooLate:
            raise timed_out() from None
        except Overcrowded as error:
            raise ApiError(429, str(error), headers={"Retry-After": "1"}) from error

    # --- managing adapters ---------------------------------------------------------------------------------------

    async def _change(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = (header(scope, b"content-type") or b"").partition(b";")[0].strip().lower()
        if kind != _MULTIPART:
            data = await _read(receive, self._config.max_body_bytes + 1)
            await self._make_change(scope, Body(data), send)
            return
        async with self._uploading, self._spooled(receive) as body:
            await self._make_change(scope, body, send)

    async def _make_change(self, scope: Scope, body: Body, send: Send) -> None:
        try:
            changed = await self._fleet.change(carried(scope), body)
        except NotChanged as error:
            raise ApiError(error.status, str(error), headers={"Retry-After": "5"}) from error
        except FleetLost as error:
            raise ApiError(503, _UNREACHABLE, headers={"Retry-After": "5"}) from error
        said = f"replicas={changed.replicas} incomplete={changed.missing}".encode()
        for message in changed.answer:
            if message["type"] == "http.response.start":
                message = _without_own_id(scope, message)
                message = {**message, "headers": [*message["headers"], (FLEET_HEADER, said)]}
            await send(message)

    async def _refusal(self, scope: Scope) -> list[Message] | None:
        """What the server's own check of keys answers, before anything of the body is read; None if it lets it pass."""
        passed = False
        said: list[Message] = []

        async def inner(_scope: Any, _receive: Any, _send: Any) -> None:
            nonlocal passed
            passed = True

        async def nothing() -> Message:
            return {"type": "http.disconnect"}

        async def saying(message: Message) -> None:
            said.append(message)

        def observe(scope: Any, context: RequestContext) -> None:
            if not passed:  # what passes is observed where it is answered
                self._observe(scope, context)

        checked = ContextMiddleware(AuthMiddleware(inner, self._config, self._keys), observe)
        await checked(dict(scope), nothing, saying)
        return None if passed else said

    @contextlib.asynccontextmanager
    async def _spooled(self, receive: Receive) -> AsyncIterator[Body]:
        """The body in a file, for as long as the block. One byte more than is taken, as above."""
        limit = self._config.max_upload_bytes + _FRAMING + 1
        path = self._spool / uuid.uuid4().hex
        await asyncio.to_thread(self._spool.mkdir, parents=True, exist_ok=True)
        try:
            with await asyncio.to_thread(open, path, "wb") as file:
                async for chunk in _chunks(receive, limit):
                    await asyncio.to_thread(file.write, chunk)
            yield Body(path=str(path))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    # --- about the fleet itself ----------------------------------------------------------------------------------

    async def _status(self, scope: Scope, send: Send) -> None:
        """As the routes of one server: alive is who answers, ready who has somebody to answer."""
        is_ready = scope["path"] == "/ready"
        if is_ready:
            try:
                status = await self._fleet.status()
            except FleetLost as error:
                raise ApiError(503, str(error), headers={"Retry-After": "1"}) from error
            if not status.serving:
                raise ApiError(503, "No replica is ready.", headers={"Retry-After": "1"})
        body = json.dumps({"status": "ready" if is_ready else "ok"}, separators=(",", ":")).encode()
        await _send_page(send, Page(200, [(b"content-type", b"application/json")], body))

    async def _metrics(self, scope: Scope, send: Send) -> None:
        pages = await self._replicas.ask_all(carried(scope))
        if not pages:
            raise ApiError(503, "No replica answers.", headers={"Retry-After": "1"})
        first = next(iter(pages.values()))
        refused = next((page for page in pages.values() if page.status != 200), None)
        if refused is not None:
            await _send_page(send, refused)
            return
        texts = {replica: page.body.decode() for replica, page in pages.items()}
        kept = [(name, value) for name, value in first.headers if name.lower() == b"content-type"]
        await _send_page(send, Page(200, kept, one_page(texts).encode()))


def _without_own_id(scope: Scope, message: Message) -> Message:
    """Ray's proxy adds the request's id to every answer; once is enough."""
    if message["type"] != "http.response.start":
        return message
    own = (b"x-request-id", header(scope, b"x-request-id"))
    headers = [(name, value) for name, value in message["headers"] if (name.lower(), value) != own]
    return {**message, "headers": headers}


async def _chunks(receive: Receive, limit: int) -> AsyncIterator[bytes]:
    """The body, or its first ``limit`` bytes. Raises _Gone."""
    left = limit
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        chunk = message.get("body", b"")[:left]
        left -= len(chunk)
        yield chunk
        if not left or not message.get("more_body", False):
            return


async def _read(receive: Receive, limit: int) -> bytes:
    return b"".join([chunk async for chunk in _chunks(receive, limit)])


async def _unless_gone(receive: Receive, relaying: Awaitable[None]) -> None:
    """Relay until it is done or the client has left. Raises what relaying raises, and _Gone."""

    async def leaving() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(relaying)
    gone = asyncio.ensure_future(leaving())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return
        gone.result()
        raise _Gone
    finally:
        for one in (gone, task):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _send_page(send: Send, page: Page) -> None:
    length = (b"content-length", str(len(page.body)).encode())
    headers = [(name, value) for name, value in page.headers if name.lower() != b"content-length"]
    await send({"type": "http.response.start", "status": page.status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": page.body, "more_body": False})


async def _send_error(send: Send, error: ApiError) -> None:
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    body = json.dumps(error.body(), ensure_ascii=False, separators=(",", ":")).encode()
    await _send_page(send, Page(error.status, [(b"content-type", b"application/json"), *headers], body))


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
