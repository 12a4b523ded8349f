"""Streams of events: what wakes their consumers, and what is done without waking them."""

from __future__ import annotations

import asyncio
import threading

import pytest

from manylora.server.engine.request import FinishEvent, StepPlan, TokenEvent
from manylora.server.engine.stream import Mailbox, RequestStream
from tests.engine.harness import Gate, Setup, Wakeups, go, running
from tests.fakes import request, scripted


def test_nobody_is_woken_for_what_is_wanted_as_a_whole() -> None:
    gate = Gate()

    async def main() -> None:
        async with running(Setup(before_step=gate)) as setup:
            wakeups = Wakeups(setup)
            streams = [setup.submit(request(f"r{i}", max_tokens=20)) for i in range(3)]
            results = asyncio.gather(*(stream.result() for stream in streams))
            await asyncio.sleep(0)
            gate.open()
            ended = await results
            assert [len(tokens.text) for tokens, _ in ended] == [20] * 3
            assert wakeups.count == 1

    go(main())


def test_what_is_on_its_way_does_not_wake_who_wants_the_whole() -> None:
    async def main() -> None:
        stream = RequestStream("r0", Mailbox(asyncio.get_running_loop()), lambda _id: None)
        result = asyncio.ensure_future(stream.result())
        await asyncio.sleep(0)
        waiter = stream._waiter
        assert waiter is not None
        stream.deliver(_told("a"))
        stream.deliver(_told("b"))
        assert not waiter.done()
        finish = FinishEvent("length", None, 1, 2)
        stream.deliver(finish)
        assert waiter.done()
        assert await result == (_told("ab"), finish)

    go(main())


def test_what_came_before_the_whole_was_wanted_is_part_of_it() -> None:
    class Steps:
        """Lets one step through a call."""

        def __init__(self) -> None:
            self.semaphore = threading.Semaphore(0)

        def __call__(self, _plan: StepPlan) -> None:
            assert self.semaphore.acquire(timeout=60)

    steps = Steps()

    async def main() -> None:
        async with running(Setup(scripted("abcdefgh"), before_step=steps)) as setup:
            stream = setup.submit(request(max_tokens=8))
            steps.semaphore.release()
            while not stream._events:  # noqa: ASYNC110 - it has no event for it
                await asyncio.sleep(0.001)
            result = asyncio.create_task(stream.result())
            await asyncio.sleep(0)
            steps.semaphore.release(7)
            tokens, finish = await result
            assert (tokens.text, tokens.token_ids) == ("abcdefgh", tuple(b"abcdefgh"))
            assert finish.completion_tokens == 8

    go(main())


def _told(letter: str) -> TokenEvent:
    return TokenEvent(letter, tuple(letter.encode()))


def test_a_consumer_that_waits_is_offered_its_tokens() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        stream = RequestStream("r0", Mailbox(loop), lambda _id: None)
        taken: list[TokenEvent] = []
        takes = True

        def take(event: TokenEvent) -> bool:
            if takes:
                taken.append(event)
            return takes

        stream.offer_to(take)
        stream.deliver(_told("a"))  # nobody waits yet
        assert await anext(stream) == _told("a")
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        stream.deliver(_told("b"))
        stream.deliver(_told("c"))
        await asyncio.sleep(0)
        assert taken == [_told("b"), _told("c")]
        assert not waiting.done()
        takes = False
        stream.deliver(_told("d"))
        takes = True
        stream.deliver(_told("e"))  # behind one that was not taken
        assert await waiting == _told("de")
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        finish = FinishEvent("length", None, 1, 5)
        stream.deliver(finish)
        assert await waiting == finish
        assert taken == [_told("b"), _told("c")]

    go(main())


def test_a_cancelled_consumer_is_offered_nothing() -> None:
    async def main() -> None:
        stream = RequestStream("r0", Mailbox(asyncio.get_running_loop()), lambda _id: None)
        taken: list[TokenEvent] = []
        stream.offer_to(lambda event: not taken.append(event))  # type: ignore[func-returns-value]
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        waiting.cancel()
        stream.deliver(_told("a"))
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert taken == []

    go(main())


def test_what_a_taker_raises_is_its_consumers_alone() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        mailbox = Mailbox(loop)
        streams = [RequestStream(f"r{i}", mailbox, lambda _id: None) for i in range(2)]
        taken: list[TokenEvent] = []

        def fail(_event: TokenEvent) -> bool:
            raise ZeroDivisionError

        streams[0].offer_to(fail)
        streams[1].offer_to(lambda event: not taken.append(event))  # type: ignore[func-returns-value]
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0)
        mailbox.post([(stream, _told("a")) for stream in streams])
        mailbox.post([(streams[0], FinishEvent("length", None, 1, 1)), (streams[1], _told("b"))])
        with pytest.raises(ZeroDivisionError):
            await waiting[0]
        assert taken == [_told("a"), _told("b")]
        waiting[1].cancel()

    go(main())
