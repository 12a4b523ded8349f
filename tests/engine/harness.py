"""What the engine's tests share: an engine with fakes around it, and ways to drive it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from manylora.server.engine.engine import Engine, RequestStream
from manylora.server.engine.metrics import Metrics
from manylora.server.engine.request import Event, FinishEvent, Request, StepPlan
from manylora.server.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from tests.fakes import FakeRegistry, FakeRunner, FakeSlots, FakeTokenizer, Sampled, adapter, hashing_model

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
        for use in request.adapters:
            self.registry.acquire(use.ref)
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
    asyncio.run(asyncio.wait_for(main, timeout=200))


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


class Wakeups:
    """How often the engine's thread wakes the running loop, from now on."""

    def __init__(self, setup: Setup) -> None:
        self.count = 0
        loop = asyncio.get_running_loop()
        real = loop.call_soon_threadsafe

        def counting(callback: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += threading.current_thread() is setup.engine._thread
            return real(callback, *args, **kwargs)

        loop.call_soon_threadsafe = counting  # type: ignore[assignment]
