"""Requests with several adapters in the engine with the real registry, slots and host tier.

The runner's model reads what all of a row's slots hold, so one wrong slot would change the text.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest

from manylora.adapters.errors import AdapterNotFound
from manylora.adapters.registry import AdapterRegistry
from manylora.server.engine.engine import AdaptersNeverFit
from manylora.server.engine.request import AdapterUse
from tests.engine.harness import Gate, Setup, finish_of, go, running
from tests.engine.test_engine_adapters import output_of, serving
from tests.fakes import FakeSlots, adapter, request


def test_many_compositions_of_more_adapters_than_slots() -> None:
    async def main() -> None:
        async with serving(max_slots=3, max_rows=8, max_copies=4) as server:
            for i in range(12):
                server.registry.load(f"n{i}", f"source-{i}")
            server.registry.load("alias", "source-3")
            rng = random.Random(1)
            names = [*(f"n{i}" for i in range(12)), "alias"]
            ends = await asyncio.gather(
                *(
                    server.generate(f"r{i}", tuple(rng.sample(names, rng.choice([0, 1, 2, 2, 3]))), 1 + i % 9)
                    for i in range(120)
                )
            )
            assert {finish.reason for _text, finish in ends} == {"length"}
            metrics = server.engine.metrics
            assert metrics.adapter_tokens("n3")[0] > 0
            assert metrics.adapter_tokens("alias")[0] > 0

    go(main())


def test_what_could_never_be_on_the_device_together_is_refused() -> None:
    async def main() -> None:
        async with serving(max_slots=2, max_rows=4) as server:
            refs = []
            for name in ("a", "b", "c"):
                server.registry.load(name, name)
                refs.append(server.registry.acquire(name))
            with pytest.raises(AdaptersNeverFit, match=r"3 adapters .* holds 2 .* \(--max-device-adapters\)"):
                server.engine.submit(request("r0", adapters=tuple(map(AdapterUse, refs))))
            for ref in refs:
                server.registry.release(ref)

    go(main())


def test_replacing_and_unloading_while_a_composition_runs() -> None:
    """It goes on with the versions that it began with, and they are freed when it ends."""

    async def main() -> None:
        async with serving(max_slots=3, max_rows=4) as server:
            server.registry.load("a", "one")
            server.registry.load("b", "two")
            server.runner.before_step = gate = Gate()
            old = asyncio.create_task(server.generate("r0", ("a", "b"), 90))
            await gate.wait()  # it has its slots
            server.registry.load("a", "three", replace=True)
            server.registry.unload("b")
            with pytest.raises(AdapterNotFound):
                await server.generate("r1", ("b", "a"), 5)
            new = asyncio.create_task(server.generate("r2", ("a",), 5))
            gate.open()
            assert (await new)[0] == output_of("three", 5)
            text, finish = await old
            assert (text, finish.reason) == (output_of("one+two", 90), "length")
            await server.engine.drain(timeout=30)
            await asyncio.wrap_future(server.engine.call(lambda: None))
            assert set(server.pool.content.values()) == {"three"}

    go(main())


def test_compositions_while_names_are_replaced_and_unloaded() -> None:
    stop = threading.Event()

    def change(registry: AdapterRegistry) -> None:
        rng = random.Random(0)
        generation = 0
        while not stop.is_set():
            generation += 1
            name = f"n{rng.randrange(6)}"
            registry.load(name, f"{name}-{generation % 7}", replace=True)
            time.sleep(0.0005)

    async def main() -> None:
        async with serving(max_slots=3, max_rows=6) as server:
            for i in range(6):
                server.registry.load(f"n{i}", f"n{i}-first")

            async def client(i: int) -> None:
                rng = random.Random(i)
                for j in range(10):
                    names = rng.sample([f"n{k}" for k in range(6)], rng.choice([0, 1, 2, 3]))
                    await server.generate(f"r{i}-{j}", tuple(names), rng.randint(1, 10))

            changing = asyncio.create_task(asyncio.to_thread(change, server.registry))
            await asyncio.gather(*(client(i) for i in range(8)))
            stop.set()
            await changing
            for i in range(6):
                server.registry.unload(f"n{i}")
            await asyncio.wrap_future(server.engine.call(lambda: None))
            assert server.registry.counts().nbytes == 0
        server.slots.check_integrity(idle=True)
        assert server.pool.content == {}

    go(main())


def test_all_adapters_that_requests_wait_for_are_named() -> None:
    async def main() -> None:
        async with running(Setup(slots=FakeSlots(2, latency=10**9))) as setup:
            uses = (AdapterUse(adapter("b")), AdapterUse(adapter("a"), 0.5))
            stream = setup.submit(request("r0", adapters=uses))
            while not (names := setup.engine.stats().waiting_adapters):
                await asyncio.wrap_future(setup.engine.call(lambda: None))
            assert names == ("a", "b")
            stream.abort()
            assert (await finish_of(stream)).reason == "abort"

    go(main())


def test_a_composition_larger_than_host_memory_gets_onto_the_device() -> None:
    """All device slots at once, of adapters that are read one after the other, while others ask for slots too."""

    async def main() -> None:
        async with serving(max_slots=6, max_rows=4, max_copies=1) as server:
            for i in range(10):
                server.registry.load(f"n{i}", f"source-{i}")
            ends = await asyncio.gather(
                *(server.generate(f"all-{j}", tuple(f"n{(i + 3 * j) % 10}" for i in range(6)), 4) for j in range(5)),
                *(server.generate(f"one-{i}", f"n{i % 10}", 3) for i in range(30)),
            )
            assert {finish.reason for _text, finish in ends} == {"length"}

    go(main())
