"""One request, answered by whichever replica can: tried again elsewhere if its replica dies before the client has seen
anything, and ended with an error event if it dies after.

What is tried again is only what answers (``routes.Kind.ANSWER``): it changes nothing, so a second computation is as
good as the first, and of the first nobody has seen a byte. Streams are passed on as they come. Everything else is
passed on when it is whole, so that a JSON body is never cut in two.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

from manylora.deploy.ray_serve.routes import Body, Message, Route, Scope, header

_log = logging.getLogger(__name__)

Send = Callable[[Message], Awaitable[None]]

REPLICA_HEADER: Final = b"x-manylora-replica"
_REQUEST_ID: Final = b"x-request-id"
_STREAM: Final = b"text/event-stream"
_PAUSE_S: Final = 0.2
"""Between two rounds through replicas that all sent the request away."""


class ReplicaLost(Exception):
    """The replica is gone, or cannot be reached, and what it was doing with it."""


class BrokenOff(Exception):
    """The replica is there, and failed at this request: a bug, which would come again elsewhere."""


class Overcrowded(Exception):
    """So many requests wait for a replica already that this one may not."""


@dataclass(frozen=True)
class Taken:
    """First of what a replica says: that the answer which follows is its own."""

    replica: str


@dataclass(frozen=True)
class Elsewhere:
    """All that a replica says: it does not answer this request, another one may."""

    replica: str
    reason: str
    is_passing: bool = True
    """Whether the same replica may answer it a moment later."""


Part = Taken | Elsewhere | list[Message]


class Replicas(Protocol):
    def ask(self, route: Route, scope: Scope, body: Body) -> AsyncGenerator[Part, None]:
        """What one replica, chosen by ``route``, says to a request: Taken and then messages of ASGI, or Elsewhere.

        Raises ReplicaLost, BrokenOff or Overcrowded. Closing the generator tells the replica that nobody listens.
        """
        ...


@dataclass(frozen=True)
class Patience:
    """How long to look for a replica."""

    lost: int = 5
    """Replicas that may die under one request, before it is given up: it may be the request that kills them."""
    wait_s: float = 30.0
    """For a replica that does not send the request away."""
    begin_s: float | None = None
    """For the beginning of an answer, wherever the request waits for it; None: any."""


class TooLate(Exception):
    """The answer had not begun in time; nothing was sent."""


class Unanswered(Exception):
    """No replica answered, and nothing was sent. ``retry_after`` seconds may help."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


async def relay(
    replicas: Replicas,
    adapters: tuple[str, ...],
    scope: Scope,
    body: Body,
    send: Send,
    patience: Patience,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Send the answer of one replica to ``send``. Raises Unanswered, TooLate, BrokenOff or
    Overcrowded, with nothing sent."""
    deadline = clock() + patience.wait_s
    begin_by = None if patience.begin_s is None else asyncio.get_running_loop().time() + patience.begin_s
    avoid: frozenset[str] = frozenset()
    n_lost = 0
    while True:
        answer = _Answer(send, header(scope, _REQUEST_ID))
        try:
            sent_away = await _one_try(replicas.ask(Route(adapters, avoid), scope, body), answer, begin_by)
        except ReplicaLost as error:
            if answer.has_begun:
                await answer.end_with_error()
                return
            n_lost += 1
            if n_lost >= patience.lost:
                raise Unanswered(f"{n_lost} replicas were lost while they worked on this request.", 5) from error
            continue  # the router knows by now that it is gone
        except BrokenOff:
            if not answer.has_begun:
                raise
            _log.exception("replica %s broke off an answer", answer.replica)
            await answer.end_with_error()
            return
        if sent_away is None:
            return
        was_everybody = sent_away.replica in avoid
        if clock() >= deadline or (was_everybody and not sent_away.is_passing):
            raise Unanswered(f"No replica can answer this request now: {sent_away.reason}", 5)
        if was_everybody:
            avoid = frozenset()
            await asyncio.sleep(_PAUSE_S)
        else:
            avoid |= {sent_away.replica}


async def _one_try(parts: AsyncGenerator[Part, None], answer: _Answer, begin_by: float | None) -> Elsewhere | None:
    async with contextlib.aclosing(parts):
        while (part := await _next(parts, None if answer.has_begun else begin_by)) is not None:
            match part:
                case Elsewhere():
                    return part
                case Taken(replica):
                    answer.replica = replica
                case messages:
                    for message in messages:
                        await answer.pass_on(message)
    if not answer.is_over:
        raise BrokenOff("the answer has no end")
    return None


async def _next(parts: AsyncGenerator[Part, None], by: float | None) -> Part | None:
    """The next part, None after the last. Raises TooLate at the event loop's time ``by``."""
    try:
        async with asyncio.timeout_at(by) as limit:
            return await anext(parts, None)
    except TimeoutError:
        if limit.expired():
            raise TooLate from None
        raise


class _Answer:
    """The messages of one answer on their way to the client."""

    def __init__(self, send: Send, request_id: bytes | None) -> None:
        self.replica = ""
        self.has_begun = False
        """Whether the client has seen any of it."""
        self.is_over = False
        self._send = send
        self._request_id = request_id
        self._held: list[Message] = []
        """What is kept back until the answer is whole."""
        self._is_stream = False
        self._is_between_events = True

    async def pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_stream = (header(message, b"content-type") or b"").startswith(_STREAM)
            message = self._addressed(message)
        elif message["type"] == "http.response.body":
            self.is_over = not message.get("more_body", False)
        self._held.append(message)
        if self._is_stream or self.is_over:
            held, self._held = self._held, []
            for one in held:
                self.has_begun = True
                if one.get("body"):
                    self._is_between_events = one["body"].endswith(b"\n\n")
                await self._send(one)

    async def end_with_error(self) -> None:
        """What ``server.api.streaming`` does when a request fails after its stream has begun: one last event."""
        error = {
            "message": "The replica that computed this answer was lost. What came before is all there is of it.",
            "type": "ServiceUnavailableError",
            "param": None,
            "code": 503,
        }
        event = ("" if self._is_between_events else "\n\n") + f"data: {json.dumps({'error': error})}\n\n"
        await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})

    def _addressed(self, start: Message) -> Message:
        """With the replica's id, and without the request's: Ray's proxy adds that of the request, which it is."""
        headers = [
            (name, value)
            for name, value in start["headers"]
            if not (name.lower() == _REQUEST_ID and value == self._request_id)
        ]
        return {**start, "headers": [*headers, (REPLICA_HEADER, self.replica.encode())]}
