"""The engine with a scripted runner: every request ends once, nothing leaks, and no failure spreads."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from manylora.server.engine.engine import (
    Engine,
    EngineDraining,
    EngineRefusal,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    RequestStream,
)
from manylora.server.engine.metrics import Metrics
from manylora.server.engine.request import (
    Event,
    FinishEvent,
    Request,
    SampledToken,
    SampleFailed,
    StepPlan,
    TokenEvent,
    TokenLogprob,
    TokenLogprobs,
)
from manylora.server.engine.scheduler import Scheduler, SchedulerConfig
from tests.fakes import (
    FakeRegistry,
    FakeRunner,
    FakeSlots,
    FakeTokenizer,
    Sampled,
    adapter,
    hashing_model,
    request,
    scripted,
)

A = adapter("a")
EOS = FakeTokenizer.eos_token_id


class Setup:
    """An engine and the fakes around it."""

    def __init__(
        self,
        model: Callable[[Request, Sequence[int]], Sampled] = hashing_model,
        *,
        before_step: Callable[[StepPlan], None] = lambda _plan: None,
        slots: FakeSlots | None = None,
        **limits: int,
    ) -> None:
        config = SchedulerConfig(**{"page_size": 4, "num_pages": 200, "max_context": 400, **limits})
        self.slots = slots or FakeSlots(2)
        self.scheduler = Scheduler(config, self.slots)
        self.runner = FakeRunner(model, page_size=config.page_size, before_step=before_step)
        self.registry = FakeRegistry()
        self.metrics = Metrics("base")
        self.engine = Engine(
            self.runner,
            self.scheduler,
            vocabulary=FakeTokenizer(),
            metrics=self.metrics,
            registry=self.registry,
            eos_token_ids=[EOS],
            max_slots=self.slots.max_slots,
            strict=True,
        )

    def submit(self, request: Request) -> RequestStream:
        if request.adapter is not None:
            self.registry.acquire(request.adapter)
        return self.engine.submit(request)

    def assert_nothing_is_held(self) -> None:
        assert self.scheduler.pool.num_used == 0
        assert self.slots.references.total() == 0
        assert self.registry.references.total() == 0
        assert self.engine.stats().running == 0
        assert self.engine.stats().waiting == 0


@asynccontextmanager
async def running(setup: Setup) -> AsyncIterator[Setup]:
    setup.engine.start()
    try:
        yield setup
    finally:
        await setup.engine.close()
    setup.assert_nothing_is_held()


def go(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, timeout=60))


async def events_of(stream: RequestStream) -> list[Event]:
    events = [event async for event in stream]
    assert [isinstance(event, FinishEvent) for event in events] == [False] * (len(events) - 1) + [True]
    return events


async def finish_of(stream: RequestStream) -> FinishEvent:
    finish = (await events_of(stream))[-1]
    assert isinstance(finish, FinishEvent)
    return finish


async def output(setup: Setup, request: Request) -> tuple[str, FinishEvent]:
    tokens, finish = await setup.submit(request).result()
    assert list(tokens.token_ids) == request.output_token_ids
    return tokens.text, finish


class Gate:
    """Holds up the runner until it is opened; tells when a step has arrived."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self._open = threading.Event()

    def __call__(self, _plan: StepPlan) -> None:
        self.arrived.set()
        assert self._open.wait(30)

    def open(self) -> None:
        self._open.set()

    async def wait(self) -> None:
        await asyncio.to_thread(self.arrived.wait, 30)


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "params", "text", "reason", "stop"),
    [
        (["hello"], {"max_tokens": 5}, "hello", "length", None),
        (["hi", EOS, "more"], {}, "hi", "stop", None),
        (["hi", EOS, "more"], {"ignore_eos": True, "max_tokens": 5}, "himo", "length", None),
        (["hi!x"], {"stop_token_ids": (ord("!"),)}, "hi", "stop", ord("!")),
        (["hi!x"], {"stop_token_ids": (ord("!"),), "include_stop_str_in_output": True}, "hi!", "stop", ord("!")),
        (["hi END x"], {"stop": ("END", "?")}, "hi ", "stop", "END"),
        (["hi END x"], {"stop": ("END",), "include_stop_str_in_output": True}, "hi END", "stop", "END"),
        (["hi EN", EOS], {"stop": ("END",)}, "hi EN", "stop", None),
        (["hi EN"], {"stop": ("END",), "max_tokens": 5}, "hi EN", "length", None),
        (["hiEND"], {"stop": ("END",), "max_tokens": 5}, "hi", "stop", "END"),
        (["a", EOS, "b", EOS], {"min_tokens": 3}, "ab", "stop", None),
        (["aENDbEND"], {"stop": ("END",), "min_tokens": 4}, "aENDb", "stop", "END"),
        (["abEND"], {"stop": ("bEND",), "min_tokens": 2, "max_tokens": 5}, "abEND", "length", None),
        ([EOS], {}, "", "stop", None),
    ],
)
def test_how_a_request_ends(script: Any, params: Any, text: str, reason: str, stop: str | int | None) -> None:
    async def main() -> None:
        async with running(Setup(scripted(*script))) as setup:
            made = request(prompt=[1, 2, 3], **params)
            got, finish = await output(setup, made)
            assert (got, finish.reason, finish.stop_reason) == (text, reason, stop)
            assert (finish.prompt_tokens, finish.completion_tokens) == (3, len(made.output_token_ids))
            assert finish.error is None

    go(main())


def test_events_carry_every_token_and_its_logprobs() -> None:
    logprobs = TokenLogprobs(TokenLogprob(ord("x"), -0.5, 0), ())

    async def main() -> None:
        async with running(Setup(scripted(SampledToken(ord("x"), logprobs), "y"))) as setup:
            events = await events_of(setup.submit(request(max_tokens=2)))
            tokens = [event for event in events if isinstance(event, TokenEvent)]
            assert [i for event in tokens for i in event.token_ids] == [ord("x"), ord("y")]
            assert [one for event in tokens for one in event.logprobs] == [logprobs]

    go(main())


def test_output_does_not_depend_on_neighbours_chunks_or_preemptions() -> None:
    """Each request alone in a large engine, then all at once in a small one that must preempt."""
    rng = random.Random(0)
    adapters = [None, A, adapter("b"), adapter("c")]

    def requests() -> list[Request]:
        rng.seed(0)
        return [
            request(f"r{i}", [rng.randrange(100) for _ in range(rng.randint(1, 20))], max_tokens=rng.randint(1, 20),
                    adapter=rng.choice(adapters), priority=rng.choice([0, 1]))
            for i in range(25)
        ]  # fmt: skip

    async def main() -> None:
        async with running(Setup()) as setup:
            alone = [await output(setup, made) for made in requests()]
        small = Setup(max_rows=6, max_batch_tokens=8, num_pages=16, max_context=40, slots=FakeSlots(2, latency=2))
        async with running(small):
            together = await asyncio.gather(*(output(small, made) for made in requests()))
            assert small.engine.stats().preemptions > 0
        assert together == alone

    go(main())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_refused_request_stays_the_callers() -> None:
    async def refuse(setup: Setup, made: Request, error: type[EngineRefusal], message: str) -> None:
        with pytest.raises(error, match=message):
            setup.engine.submit(made)  # without acquiring: the fake registry would notice a release

    async def main() -> None:
        async with running(Setup(max_context=50)) as setup:
            await refuse(setup, request(prompt=range(45), max_tokens=6, adapter=A), PromptTooLong, "45 tokens.* 51 .*50")
            await refuse(setup, request(prompt=[]), InvalidRequest, "no tokens")
            await refuse(setup, request(max_tokens=0), InvalidRequest, "max_tokens must be at least 1, got 0")
            setup.scheduler._slots = None
            await refuse(setup, request(adapter=A), InvalidRequest, "without adapters")

    go(main())


def test_a_full_queue_refuses_and_then_takes_again() -> None:
    gate = Gate()

    async def main() -> None:
        async with running(Setup(before_step=gate, max_rows=2, max_waiting=3)) as setup:
            streams = [setup.submit(request(f"r{i}")) for i in range(5)]
            with pytest.raises(QueueFull, match="3 requests wait, 3 may") as refused:
                setup.engine.submit(request("more"))
            assert refused.value.retry_after >= 1
            gate.open()
            await asyncio.gather(*map(events_of, streams))
            assert (await finish_of(setup.submit(request("more")))).reason == "length"

    go(main())


def test_an_id_in_use_is_refused() -> None:
    gate = Gate()

    async def main() -> None:
        async with running(Setup(before_step=gate)) as setup:
            stream = setup.submit(request("same"))
            with pytest.raises(InvalidRequest, match="same is already running"):
                setup.engine.submit(request("same"))
            gate.open()
            await events_of(stream)
            await events_of(setup.submit(request("same")))

    go(main())


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failing_step_ends_its_own_requests_and_the_loop_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail(plan: StepPlan) -> None:
        if any(row.request.request_id == "bad" for row in plan.rows):
            raise RuntimeError("the device is on fire")

    async def main() -> None:
        async with running(Setup(before_step=fail, max_rows=1)) as setup:
            bad = setup.submit(request("bad", adapter=A))
            waiting = setup.submit(request("waiting"))
            finish = await finish_of(bad)
            assert (finish.reason, finish.completion_tokens) == ("error", 0)
            assert finish.error is not None
            assert "fire" not in finish.error, "a client must not see internals"
            assert (await finish_of(waiting)).reason == "length"

    go(main())
    assert "the device is on fire" in caplog.text


@pytest.mark.parametrize("bad", [SampleFailed("not finite"), None])
def test_a_row_that_cannot_be_sampled_ends_alone(bad: Sampled | None) -> None:
    def model(made: Request, tokens: Sequence[int]) -> Sampled:
        if made.request_id == "bad" and len(made.output_token_ids) == 2:
            return bad  # type: ignore[return-value]
        return SampledToken(ord("x"))

    async def main() -> None:
        async with running(Setup(model)) as setup:
            streams = [setup.submit(request(name, max_tokens=8)) for name in ("good", "bad")]
            good, broken = await asyncio.gather(*map(finish_of, streams))
            assert (good.reason, good.completion_tokens) == ("length", 8)
            assert (broken.reason, broken.completion_tokens) == ("error", 2)
            assert broken.error == ("not finite" if bad else broken.error)

    go(main())


def test_an_adapter_that_cannot_be_uploaded_ends_its_request_alone() -> None:
    async def main() -> None:
        async with running(Setup(slots=FakeSlots(2, refused=["a"]))) as setup:
            refused, other = await asyncio.gather(
                finish_of(setup.submit(request("r0", adapter=A))), finish_of(setup.submit(request("r1")))
            )
            assert (refused.reason, refused.error) == ("error", "a cannot be uploaded")
            assert other.reason == "length"

    go(main())


def test_a_failing_scheduler_ends_what_lives_and_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running(Setup()) as setup:
            real, calls = setup.scheduler.schedule, []

            def broken() -> StepPlan:
                calls.append(1)
                if len(calls) == 2:
                    raise RuntimeError("a bug")
                return real()

            monkeypatch.setattr(setup.scheduler, "schedule", broken)
            assert (await finish_of(setup.submit(request("r0")))).reason == "error"
            assert (await finish_of(setup.submit(request("r1")))).reason == "length"

    go(main())


def test_if_the_bookkeeping_fails_everything_ends_and_nothing_new_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    """Going on with pages that nobody can account for might mean wrong answers."""
    gate = Gate()

    async def main() -> None:
        setup = Setup(before_step=gate, max_rows=1)
        setup.engine.start()
        streams = [setup.submit(request(f"r{i}", adapter=A, max_tokens=1)) for i in range(3)]
        setup.slots.release = None  # type: ignore[assignment,method-assign]
        gate.open()
        ends = await asyncio.gather(*map(finish_of, streams))
        assert [end.reason for end in ends] == ["length", "error", "error"]
        await asyncio.to_thread(setup.engine._thread.join, 30)
        assert not setup.engine.is_healthy
        with pytest.raises(EngineDraining):
            setup.engine.submit(request())
        assert setup.registry.references.total() == 0

    go(main())
    assert "the step loop has stopped" in caplog.text


def test_a_leak_is_noticed_when_idle(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        setup = Setup()
        setup.engine.start()
        await events_of(setup.submit(request()))
        setup.scheduler.pool.allocate(1)
        await events_of(setup.submit(request()))
        with pytest.raises(RuntimeError, match="1 are in use, but requests hold 0"):
            await setup.engine.close()

    go(main())
    assert "integrity check failed" in caplog.text


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
            while not stream._is_complete:
                await asyncio.sleep(0.001)
            events = await events_of(stream)
            assert events[0] == TokenEvent("abcdefgh", tuple(map(ord, "abcdefgh")))
            assert len(events) == 2

    go(main())


def test_a_step_wakes_a_loop_once_however_many_streams_it_has() -> None:
    async def main() -> None:
        async with running(Setup(max_rows=16)) as setup:
            loop = asyncio.get_running_loop()
            wakeups = 0
            real = loop.call_soon_threadsafe

            def counting(callback: Any, *args: Any, **kwargs: Any) -> Any:
                nonlocal wakeups
                wakeups += threading.current_thread() is setup.engine._thread
                return real(callback, *args, **kwargs)

            loop.call_soon_threadsafe = counting  # type: ignore[method-assign]
            streams = [setup.submit(request(f"r{i}", max_tokens=20)) for i in range(16)]
            await asyncio.gather(*map(events_of, streams))
            assert 0 < wakeups <= len(setup.runner.plans)

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
            setup.slots._ready_at[A] = 0
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
