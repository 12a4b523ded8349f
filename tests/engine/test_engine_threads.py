"""Leaving early, draining and closing, and what the step loop and the asyncio loops do to each other."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from manylora.server.engine.engine import EngineDraining
from manylora.server.engine.request import Request, SampleFailed, StepPlan, TokenEvent
from manylora.server.engine.stream import Mailbox, RequestStream
from tests.engine.harness import A, Gate, Setup, Wakeups, events_of, finish_of, go, output, running
from tests.fakes import FakeSlots, Sampled, adapter, hashing_model, request, scripted

# --- leaving early ----------------------------------------------------------------------------------------------------


def test_abort_of_a_running_and_of_a_waiting_request() -> None:
    gate = Gate()

    async def main() -> None:
        async with running(Setup(before_step=gate, max_rows=1)) as setup:
            first = setup.submit(request("first", max_tokens=300, adapter=A))
            waiting = setup.submit(request("waiting", adapter=A))
            last = setup.submit(request("last", adapter=A))
            await gate.wait()
            first.abort()
            first.abort()
            waiting.abort()
            gate.open()
            ends = await asyncio.gather(*map(finish_of, (first, waiting, last)))
            assert [end.reason for end in ends] == ["abort", "abort", "length"]
            first.abort()  # long over

    go(main())


def test_leaving_the_stream_aborts() -> None:
    async def main() -> None:
        async with running(Setup()) as setup:
            async with setup.submit(request(max_tokens=300)) as stream:
                await anext(stream)
            with pytest.raises(ValueError, match="the consumer"):
                async with setup.submit(request("other", max_tokens=300)):
                    raise ValueError("the consumer")
            await setup.engine.drain(timeout=30)
            assert setup.metrics._finished["abort"] == 2

    go(main())


def test_a_cancelled_consumer_aborts() -> None:
    gate = Gate()

    async def main() -> None:
        async with running(Setup(before_step=gate)) as setup:

            async def consume() -> None:
                async with setup.submit(request(max_tokens=300)) as stream:
                    await stream.result()

            task = asyncio.create_task(consume())
            await gate.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.open()
            await setup.engine.drain(timeout=30)
            assert setup.metrics._finished["abort"] == 1

    go(main())


def test_a_loop_that_is_gone_frees_its_requests() -> None:
    gate = Gate()
    setup = Setup(before_step=gate)

    async def leave() -> None:
        setup.submit(request("left", max_tokens=300, adapter=A))
        await gate.wait()

    async def main() -> None:
        async with running(setup):
            await asyncio.to_thread(asyncio.run, leave())
            gate.open()
            await setup.engine.drain(timeout=30)
            assert setup.metrics._finished["abort"] == 1

    go(main())


# --- drain and close --------------------------------------------------------------------------------------------------


def test_drain_finishes_what_is_there_and_takes_nothing_new() -> None:
    gate = Gate()

    async def main() -> None:
        async with running(Setup(before_step=gate, max_rows=1)) as setup:
            streams = [setup.submit(request(f"r{i}", adapter=A)) for i in range(3)]
            draining = asyncio.create_task(setup.engine.drain(timeout=30))
            await asyncio.sleep(0)
            assert setup.engine.is_draining
            with pytest.raises(EngineDraining):
                setup.engine.submit(request("late"))
            assert not draining.done()
            gate.open()
            await draining
            assert [(await finish_of(stream)).reason for stream in streams] == ["length"] * 3

    go(main())


def test_drain_aborts_what_takes_too_long() -> None:
    gate = Gate()

    async def main() -> None:
        async with running(Setup(before_step=gate)) as setup:
            stream = setup.submit(request(max_tokens=300))
            await gate.wait()
            draining = asyncio.create_task(setup.engine.drain(timeout=0.01))
            await asyncio.sleep(0.05)
            gate.open()
            await draining
            assert (await finish_of(stream)).reason == "abort"

    go(main())


def test_drain_and_close_with_nothing_to_do() -> None:
    async def main() -> None:
        setup = Setup()
        await setup.engine.drain(timeout=1)
        setup.engine.start()
        await setup.engine.drain(timeout=1)
        await setup.engine.close()
        await setup.engine.close()
        await setup.engine.drain(timeout=1)
        assert setup.engine.call(lambda: 1).cancelled()

    go(main())


def test_close_ends_everything() -> None:
    gate = Gate()

    async def main() -> None:
        setup = Setup(before_step=gate, max_rows=1)
        setup.engine.start()
        streams = [setup.submit(request(f"r{i}", max_tokens=300, adapter=A)) for i in range(3)]
        await gate.wait()
        closing = asyncio.create_task(setup.engine.close())
        await asyncio.sleep(0.01)
        gate.open()
        await closing
        assert [(await finish_of(stream)).reason for stream in streams] == ["abort"] * 3
        setup.assert_nothing_is_held()

    go(main())


# --- threads and wakeups ----------------------------------------------------------------------------------------------


def test_a_consumer_that_fell_behind_gets_its_text_in_one_piece() -> None:
    async def main() -> None:
        async with running(Setup(scripted("abcdefgh"))) as setup:
            stream = setup.submit(request(max_tokens=8))
            await setup.engine.drain(timeout=30)
            events = await events_of(stream)
            assert events[0] == TokenEvent("abcdefgh", tuple(map(ord, "abcdefgh")))
            assert len(events) == 2

    go(main())


def test_a_step_wakes_a_loop_once_however_many_streams_it_has() -> None:
    async def main() -> None:
        async with running(Setup(max_rows=16)) as setup:
            wakeups = Wakeups(setup)
            streams = [setup.submit(request(f"r{i}", max_tokens=20)) for i in range(16)]
            await asyncio.gather(*map(events_of, streams))
            assert 0 < wakeups.count <= len(setup.runner.plans)

    go(main())


def test_a_loop_that_is_busy_is_not_woken_again() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        mailbox = Mailbox(loop)
        stream = RequestStream("r0", mailbox, lambda _id: None)
        callbacks: list[Any] = []
        loop.call_soon_threadsafe = lambda callback, *args, **kwargs: callbacks.append(callback)  # type: ignore[assignment]
        for letter in "abc":
            assert mailbox.post([(stream, TokenEvent(letter, (ord(letter),)))])
        assert len(callbacks) == 1
        callbacks[0]()
        assert (await anext(stream)) == TokenEvent("abc", tuple(b"abc"))
        assert mailbox.post([(stream, TokenEvent("d", (ord("d"),)))])
        assert len(callbacks) == 2

    go(main())


def test_result_wakes_its_consumer_only_at_the_end() -> None:
    gate = Gate()

    async def main() -> None:
        async with running(Setup(before_step=gate)) as setup:
            stream = setup.submit(request(max_tokens=30))
            result = asyncio.create_task(stream.result())
            await asyncio.sleep(0)
            waiter = stream._waiter
            assert waiter is not None
            gate.open()
            tokens, finish = await result
            assert len(tokens.token_ids) == finish.completion_tokens == 30
            assert waiter.done(), "another future was made in between"

    go(main())


def test_everything_is_computed_on_the_step_loops_thread() -> None:
    async def main() -> None:
        async with running(Setup()) as setup:
            await events_of(setup.submit(request(max_tokens=3)))
            assert setup.runner.threads == {"manylora-step-loop"}
            name = setup.engine.call(lambda: threading.current_thread().name)
            assert await asyncio.wrap_future(name) == "manylora-step-loop"

    go(main())


def test_an_exception_in_a_call_belongs_to_the_caller() -> None:
    def broken() -> None:
        raise KeyError("mine")

    async def main() -> None:
        async with running(Setup()) as setup:
            with pytest.raises(KeyError, match="mine"):
                await asyncio.wrap_future(setup.engine.call(broken))
            await events_of(setup.submit(request()))

    go(main())


def test_idle_and_waiting_for_an_upload_the_loop_does_not_spin() -> None:
    schedules: list[int] = []

    async def main() -> None:
        async with running(Setup(slots=FakeSlots(1, latency=10**9))) as setup:
            real = setup.scheduler.schedule

            def counted() -> StepPlan:
                schedules.append(1)
                return real()

            setup.scheduler.schedule = counted  # type: ignore[method-assign]
            await asyncio.sleep(0.1)
            assert schedules == []
            stream = setup.submit(request(adapter=A))
            await asyncio.sleep(0.5)
            assert 1 <= len(schedules) <= 15
            setup.slots._ready_at[A.version] = 0
            setup.engine.wake()
            assert (await finish_of(stream)).reason == "length"

    go(main())


def test_many_loops_at_once() -> None:
    """Each thread has its own asyncio loop; each gets its own events."""
    setup = Setup(max_rows=8)
    texts: dict[str, str] = {}

    async def client(name: str) -> None:
        outputs = await asyncio.gather(
            *(output(setup, request(f"{name}-{i}", [ord(name), i], max_tokens=10)) for i in range(5))
        )
        texts.update({f"{name}-{i}": text for i, (text, _finish) in enumerate(outputs)})

    async def main() -> None:
        async with running(setup):
            await asyncio.gather(*(asyncio.to_thread(asyncio.run, client(name)) for name in "abcd"))
        assert len(texts) == 20
        assert len(set(texts.values())) == 20

    go(main())


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_with_aborts_and_failures(seed: int) -> None:
    """Whatever happens, every request ends exactly once and nothing is held at the end."""
    rng = random.Random(seed)
    adapters = [None, None, A, adapter("b"), adapter("c"), adapter("refused")]

    def sometimes_fail(_plan: StepPlan) -> None:
        if rng.random() < 0.02:
            raise RuntimeError("now and then")

    def model(made: Request, tokens: Sequence[int]) -> Sampled:
        return SampleFailed("bad luck") if rng.random() < 0.01 else hashing_model(made, tokens)

    async def client(setup: Setup, i: int) -> str:
        made = request(f"r{i}", range(1 + i % 13), max_tokens=1 + i % 17, adapter=adapters[i % 6], stop=("ab",))
        await asyncio.sleep(0.001 * (i % 20))
        stream = setup.submit(made)
        if i % 7 == 0:
            await asyncio.sleep(0.002)
            stream.abort()
        return (await finish_of(stream)).reason

    async def main() -> None:
        slots = FakeSlots(2, latency=1, refused=["refused"])
        setup = Setup(model, before_step=sometimes_fail, slots=slots, max_rows=5, num_pages=12, max_batch_tokens=9)
        async with running(setup):
            reasons = await asyncio.gather(*(client(setup, i) for i in range(60)))
            assert len(reasons) == 60
            assert {"length", "error"} <= set(reasons)

    go(main())
