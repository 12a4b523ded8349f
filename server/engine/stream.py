"""The way of events from the step loop's thread to the asyncio loop that asked for them.

The two threads share one interpreter lock, so what counts is how seldom they wake each other: the step loop posts all
events of a step to a loop's ``Mailbox`` at once, the mailbox wakes its loop only if it has not already, and a consumer
that fell behind gets its text in one piece. And how little each token costs there: a consumer that can do with tokens
right away what it would do when it is woken (``offer_to``) is not woken for them.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

from manylora.server.engine.request import Event, FinishEvent, TokenEvent, TokenLogprobs

Delivery = tuple["RequestStream", Event]


class RequestStream:
    """The events of one request: an async iterator that ends after the FinishEvent. For one consumer, on one loop.

    Token events that have piled up come as one. Use it as an async context manager to abort the request if the
    consumer leaves before the end, by an exception or because its client is gone::

        async with engine.submit(request) as stream:
            async for event in stream: ...
    """

    def __init__(self, request_id: str, mailbox: Mailbox, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.mailbox = mailbox
        self._abort = abort
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.wants_whole = False
        """Whether the consumer wants nothing before the end. Then the step loop, which looks without a lock, may keep
        what there is until then: nobody needs to be woken for it."""
        self._taker: Callable[[TokenEvent], bool] | None = None
        self._is_complete = False
        """Whether the FinishEvent has arrived in ``_events``."""
        self._is_over = False
        """Whether it has been given to the consumer."""

    def abort(self) -> None:
        """Ask for the end of the request; any thread, any number of times. Its FinishEvent still comes."""
        if not self._is_complete:
            self._abort(self.request_id)

    def offer_to(self, taker: Callable[[TokenEvent], bool]) -> None:
        """While the consumer waits here for the next event and that is one of tokens, call ``taker`` with it, on the
        consumer's loop. If it returns False the event comes as ever, and so do those after it until the consumer waits
        again; what it raises is raised here, out of the iterator."""
        self._taker = taker

    async def result(self) -> tuple[TokenEvent, FinishEvent]:
        """Everything at once. Cheaper than iterating: the consumer is woken once, at the end."""
        self.wants_whole = True
        text: list[str] = []
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        async for event in self:
            if isinstance(event, FinishEvent):
                return TokenEvent("".join(text), tuple(token_ids), tuple(logprobs), prompt_logprobs), event
            prompt_logprobs = prompt_logprobs or event.prompt_logprobs
            text.append(event.text)
            token_ids.extend(event.token_ids)
            logprobs.extend(event.logprobs)
        raise RuntimeError(f"the events of request {self.request_id} were already taken")

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Event:
        while not self._events or (self.wants_whole and not self._is_complete):
            if self._is_over:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        event = self._events.popleft()
        if isinstance(event, FinishEvent):
            self._is_over = True
            return event
        tokens = [event]
        while self._events and isinstance(self._events[0], TokenEvent):
            tokens.append(self._events[0])
            self._events.popleft()
        return event if len(tokens) == 1 else joined(tokens)

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()

    def deliver(self, event: Event) -> None:
        """Called by the mailbox, on the consumer's loop."""
        waiter = self._waiter if self._waiter is not None and not self._waiter.done() else None
        if isinstance(event, FinishEvent):
            self._is_complete = True
        elif self.wants_whole:
            waiter = None
        elif waiter is not None and self._taker is not None:
            try:
                if self._taker(event):
                    return
            except Exception as error:  # noqa: BLE001 - the consumer's, and not to be in the way of other streams
                waiter.set_exception(error)
                return
        self._events.append(event)
        if waiter is not None:
            waiter.set_result(None)


class Mailbox:
    """Events on their way to one asyncio loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._deliveries: list[Delivery] = []
        self._is_woken = False

    def post(self, deliveries: Sequence[Delivery]) -> bool:
        """Hand over events from any thread; False if the loop is closed and nobody will ever read them."""
        with self._lock:
            self._deliveries.extend(deliveries)
            if self._is_woken:
                return True
            self._is_woken = True
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # "Event loop is closed"
            if not self.loop.is_closed():
                raise
            with self._lock:
                self._is_woken, self._deliveries = False, []
            return False
        return True

    def _deliver(self) -> None:
        with self._lock:
            deliveries, self._deliveries = self._deliveries, []
            self._is_woken = False
        for stream, event in deliveries:
            stream.deliver(event)


def joined(events: Sequence[TokenEvent]) -> TokenEvent:
    """One event instead of several that follow each other."""
    return TokenEvent(
        "".join(event.text for event in events),
        tuple(token for event in events for token in event.token_ids),
        tuple(logprobs for event in events for logprobs in event.logprobs),
        events[0].prompt_logprobs,
    )
