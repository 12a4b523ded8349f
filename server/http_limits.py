"""uvicorn's HTTP protocol with limits on what a client may hold without it coming to anything: memory, and a place.

Memory: the parser (llhttp, by way of httptools) collects a header, a URL, a trailer or a chunk's extension of any
length, before any handler, key or limit on bodies is looked at: a hundred megabytes of one header would be a hundred
megabytes of memory, for each connection.

A place: a client that sends a head and never ends it, drips a body, or does not read its answer would keep its
connection, its request and what that was given for ever. Each connection is looked at every ``client_timeout`` seconds
(one timer for its whole life, so neither requests nor tokens cost anything), and what has not got anywhere since the
look before is cut off: after once to twice that time.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from typing import ClassVar, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from manylora.server.body_writer import provide_writer

MAX_HEAD: Final = 1 << 18
"""Bytes; a quarter of a megabyte is some thirty times what proxies let through."""

MIN_RATE: Final = 500
"""Bytes a second, on average between two looks, that a client must send of a body, or take of an answer that waits."""


class _Awaited(Enum):
    """What the client is to send next."""

    HEAD = auto()
    """The rest of a head, or a new connection's first."""
    BODY = auto()
    NOTHING = auto()
    """It waits for its answer, or is idle between two requests (``timeout_keep_alive``)."""


@dataclass(frozen=True)
class _Look:
    """A connection at one moment."""

    n_steps: int = 0
    n_body: int = 0
    n_pauses: int = 0
    to_write: int = 0
    """Bytes that wait to be taken."""
    is_closing: bool = False
    is_held: bool = False
    is_answering: bool = False


class LimitedHttp(HttpToolsProtocol):
    """Answers 431 and closes when more than ``MAX_HEAD`` bytes have come since the last that got anywhere: that ended a
    head, were part of a body, or ended a message. What comes in one read of the socket is not looked into further.

    Answers 408 and closes when a head or a body comes too slowly; drops the connection of a client that does not read.
    """

    client_timeout: ClassVar[float] = 60.0

    _pending = 0
    _awaited = _Awaited.HEAD
    _n_received = 0
    """Bytes on this connection."""
    _n_body = 0
    _body_was_held = False
    """Whether the body was not read because its handler has enough of it for now: not the client's fault."""
    _n_steps = 0
    """How often it changed what is awaited."""
    _n_pauses = 0
    """How often there was more to write than the client takes."""
    _timer: asyncio.TimerHandle | None = None
    _last = _Look()
    _cycles: Sequence[RequestResponseCycle] = ()
    """Requests that are not answered yet; more than one if the client does not wait."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.client_timeout, self._look_around)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._tell_handlers()  # uvicorn only tells the last, which may wait behind the one that is answered
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._n_received += len(data)
        self._pending += len(data)
        super().data_received(data)
        if self._awaited is _Awaited.NOTHING and not self._is_answering():
            # Bytes that begin no request, such as empty lines, have ended the time-out of an idle connection.
            self._await(_Awaited.HEAD)
        if self._pending > MAX_HEAD and not self.transport.is_closing():
            self._refuse(
                431, "BadRequestError", f"The request's head is larger than the {MAX_HEAD} bytes accepted here."
            )

    def on_message_begin(self) -> None:
        self._await(_Awaited.HEAD)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._pending = 0
        super().on_headers_complete()
        self._await(_Awaited.BODY)  # not before: it raises for a path that is none
        self._cycles = [*(cycle for cycle in self._cycles if not cycle.response_complete), self.cycle]
        provide_writer(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        self._n_body += len(body)
        super().on_body(body)
        self._body_was_held |= self.flow.read_paused

    def on_message_complete(self) -> None:
        self._pending = 0
        self._await(_Awaited.NOTHING)
        super().on_message_complete()

    def pause_writing(self) -> None:
        self._n_pauses += 1
        super().pause_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "BadRequestError", msg)

    def _await(self, what: _Awaited) -> None:
        self._awaited = what
        self._n_steps += 1

    def _is_answering(self) -> bool:
        return any(not cycle.response_complete for cycle in self._cycles)

    def _tell_handlers(self) -> None:
        """Their client is gone."""
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def _look_around(self) -> None:
        """Cut off what has got nowhere since the last look."""
        last, now = self._last, self._looked()
        self._last, self._body_was_held = now, self.flow.read_paused
        enough = MIN_RATE * self.client_timeout
        takes_nothing = last.to_write - now.to_write < enough
        if (last.is_closing and takes_nothing) or (
            self.flow.write_paused and last.n_pauses == now.n_pauses and takes_nothing
        ):
            self.transport.abort()
            return
        if not now.is_closing and last.n_steps == now.n_steps:
            # Of who sends two at a time, the second has time from the end of the first's answer on.
            is_idle = not (last.is_answering or now.is_answering)
            if self._awaited is _Awaited.HEAD and is_idle:
                self._time_out("head")
            elif self._awaited is _Awaited.BODY and (
                # A body that was answered already, as it came without a key perhaps, is not wanted any more.
                is_idle or (not now.is_held and now.n_body - last.n_body < enough)
            ):
                self._time_out("body")
        self._timer = self.loop.call_later(self.client_timeout, self._look_around)

    def _looked(self) -> _Look:
        return _Look(
            self._n_steps,
            self._n_body,
            self._n_pauses,
            self.transport.get_write_buffer_size(),
            self.transport.is_closing(),
            self._body_was_held or self.flow.read_paused,
            self._is_answering(),
        )

    def _time_out(self, what: str) -> None:
        if self._n_received == 0:
            self.transport.close()  # opened in advance, as load balancers do, and never used
        else:
            self._refuse(408, "RequestTimeoutError", f"The request's {what} came too slowly.")

    def _refuse(self, status: int, type: str, message: str) -> None:
        """Answer with an error and close; only close if an answer has begun, as another one would become part of it."""
        waiting = [cycle for cycle in self._cycles if not cycle.response_complete]
        has_begun = len(waiting) > 1 or any(cycle.response_started for cycle in waiting)
        # Of a request whose body the client still sends, the answer is out already.
        is_over = self._awaited is _Awaited.BODY and not waiting
        if not has_begun and not is_over:
            self.transport.write(_response(status, type, message))
        self._tell_handlers()  # so that they do not answer as well
        self.transport.close()


def limited_http(client_timeout: float) -> type[LimitedHttp]:
    """The protocol with a ``client_timeout`` of its own, in seconds."""

    class Limited(LimitedHttp):
        pass

    Limited.client_timeout = client_timeout
    return Limited


def _response(status: int, type: str, message: str) -> bytes:
    body = json.dumps({"error": {"message": message, "type": type, "param": None, "code": status}}).encode()
    return (
        b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\nconnection: close\r\nx-request-id: %s\r\n"
        b"content-length: %d\r\n\r\n%s"
        % (status, HTTPStatus(status).phrase.encode(), uuid.uuid4().hex.encode(), len(body), body)
    )
