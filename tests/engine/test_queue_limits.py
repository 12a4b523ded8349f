"""How many requests each tenant may have in the engine."""

from __future__ import annotations

import asyncio

import pytest

from manylora.server.engine.errors import QueueFull
from manylora.server.engine.scheduling.queue_limits import QueueLimits
from manylora.server.engine.tenant import Tenant
from tests.engine.harness import Gate, Setup, events_of, go, running
from tests.fakes import request

FLOOD, B = Tenant("flood"), Tenant("b")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_flood_fills_its_own_queue_only() -> None:
    clock = Clock()
    limits = QueueLimits(max_rows=2, max_waiting=3, clock=clock)
    small = Tenant("small", max_waiting=1)
    for _ in range(5):
        limits.enter(FLOOD)
    with pytest.raises(QueueFull, match=r"The queue of flood is full: 3 requests wait, 3 may. Try again in 1 s"):
        limits.enter(FLOOD)
    for _ in range(3):
        limits.enter(small)
    with pytest.raises(QueueFull, match="1 requests wait, 1 may") as refused:
        limits.enter(small)
    assert (refused.value.waiting, refused.value.limit) == (1, 1)
    limits.leave("flood")
    limits.enter(FLOOD)


def test_when_to_try_again_is_told_by_the_tenants_own_rate() -> None:
    clock = Clock()
    limits = QueueLimits(max_rows=1, max_waiting=20, clock=clock)
    for tenant, seconds in ((FLOOD, 2.0), (B, 0.1)):
        clock.now = 100.0
        for _ in range(21):
            limits.enter(tenant)
        for _ in range(5):
            clock.now += seconds
            limits.leave(tenant.name)
            limits.enter(tenant)
        with pytest.raises(QueueFull) as refused:
            limits.enter(tenant)
        # Five ended in four of those pauses, and 20 wait.
        assert refused.value.retry_after == round(20 / (5 / (4 * seconds)))


def test_tenants_that_are_gone_are_forgotten() -> None:
    clock = Clock()
    limits = QueueLimits(max_rows=1, max_waiting=1, clock=clock)
    for i in range(100):
        clock.now += 10
        limits.enter(Tenant(f"t{i}"))
        limits.leave(f"t{i}")
    assert len(limits._queues) <= 4


def test_the_engine_refuses_the_flood_and_takes_the_others() -> None:
    gate = Gate()

    async def main() -> None:
        async with running(Setup(before_step=gate, max_rows=2, max_waiting=3)) as setup:
            streams = [setup.submit(request(f"f{i}", tenant=FLOOD)) for i in range(5)]
            with pytest.raises(QueueFull, match="The queue of flood is full: 3 requests wait, 3 may"):
                setup.engine.submit(request("more", tenant=FLOOD))
            streams += [setup.submit(request(f"b{i}", tenant=B)) for i in range(5)]
            gate.open()
            await asyncio.gather(*map(events_of, streams))
            await events_of(setup.submit(request("more", tenant=FLOOD)))

    go(main())
