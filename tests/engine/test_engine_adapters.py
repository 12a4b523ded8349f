"""The engine with the real registry and the real slots: adapters come, change and go while requests run on them.

The runner's model reads *what the slot holds*, so a row that computed with another version than its own would show.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from manylora.adapters.host_tier import HostTier
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.slots import SlotManager
from manylora.adapters.versions import LoadedAdapter
from manylora.server.engine.engine import Engine
from manylora.server.engine.metrics import Metrics
from manylora.server.engine.request import AdapterUse, FinishEvent, Request, SampledToken
from manylora.server.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from tests.engine.harness import go
from tests.fakes import FakeRunner, FakeTokenizer, request


@dataclass(frozen=True)
class _Weights:
    version: str
    lora: Any


changed: dict[str, str] = {}
blocked: dict[str, threading.Event] = {}


def load(source: str) -> LoadedAdapter:
    """The content of a source is its own name, unless it is in ``changed``; its version is its content."""
    if source in blocked:
        assert blocked[source].wait(30)
    content = changed.get(source, source)
    return LoadedAdapter(content, 1, None, _Weights(content, {("content", 0): content}), footprint={"q": 1})


class _Pool:
    """One page a slot; slow to write, so that other things happen meanwhile."""

    def __init__(self, max_slots: int) -> None:
        self.max_slots = max_slots
        self.content: dict[int, str] = {}

    def free_pages(self) -> Mapping[str, int]:
        return {"q": self.max_slots - len(self.content)}

    def write(self, slot: int, lora: Any) -> None:
        time.sleep(0.001)
        if lora["content", 0] == "unwritable":
            raise MemoryError("no room on the device")
        assert slot not in self.content
        self.content[slot] = lora["content", 0]

    def clear(self, slot: int) -> None:
        self.content.pop(slot, None)


def output_of(version: str, n_tokens: int) -> str:
    return "".join(chr(ord("a") + zlib.crc32(f"{version} {i}".encode()) % 26) for i in range(n_tokens))


class _Server:
    def __init__(self, *, max_slots: int, max_rows: int, max_copies: int | None = None) -> None:
        self.pool = _Pool(max_slots)
        self.executor = ThreadPoolExecutor(2)
        self.host = HostTier(load, executor=self.executor, max_copies=max_copies)
        self.slots = SlotManager(
            self.pool,
            self.host,
            executor=self.executor,
            on_ready=lambda: self.engine.wake(),
            live=lambda version: self.registry.is_live(version),
        )
        config = SchedulerConfig(max_rows=max_rows, max_batch_tokens=16, num_pages=60, page_size=4, max_context=100)
        self.scheduler = Scheduler(config, self.slots)
        self.registry = AdapterRegistry(load, host=self.host, on_retired=lambda ref: self.engine.drop_adapter(ref))
        self.host.bind(self.registry)
        self.runner = FakeRunner(self.model)
        self.engine = Engine(
            self.runner,
            self.scheduler,
            vocabulary=FakeTokenizer(),
            metrics=Metrics("base"),
            registry=self.registry,
            max_slots=max_slots,
            host_stats=self.host.stats,
            strict=True,
        )

    def model(self, made: Request, tokens: Sequence[int]) -> SampledToken:
        content = "+".join(self.pool.content[slot] for slot in made.slots) or "base"
        position = len(tokens) - len(made.prompt_token_ids)
        return SampledToken(ord(output_of(content, position + 1)[-1]))

    async def generate(
        self, request_id: str, name: str | tuple[str, ...] | None, n_tokens: int
    ) -> tuple[str, FinishEvent]:
        """Text, which is checked to be that of the versions the request resolved to, and the end."""
        names = (name,) if isinstance(name, str) else name or ()
        refs = [self.registry.acquire(one) for one in names]
        made = request(request_id, [1, 2, 3], adapters=tuple(map(AdapterUse, refs)), max_tokens=n_tokens)
        tokens, finish = await self.engine.submit(made).result()
        if finish.reason == "length":
            assert tokens.text == output_of("+".join(ref.version for ref in refs) or "base", n_tokens)
        return tokens.text, finish


@asynccontextmanager
async def serving(**limits: Any) -> AsyncIterator[_Server]:
    server = _Server(**limits)
    server.engine.start()
    try:
        yield server
    finally:
        await server.engine.close()
        server.executor.shutdown()
    assert server.slots.references() == 0
    assert server.registry.counts().requests_in_flight == 0
    server.host.check_integrity(idle=True)


def test_many_more_adapters_than_slots() -> None:
    async def main() -> None:
        async with serving(max_slots=3, max_rows=8) as server:
            for i in range(20):
                server.registry.load(f"n{i}", f"source-{i}")
            ends = await asyncio.gather(
                *(server.generate(f"r{i}", None if i % 5 == 0 else f"n{i % 20}", 1 + i % 12) for i in range(100))
            )
            assert {finish.reason for _text, finish in ends} == {"length"}

    go(main())


def test_a_thousand_registered_few_in_memory_fewer_on_the_device() -> None:
    """1,000 registered, 64 in host memory, 8 slots: all are reachable, and most of them from the disk."""

    async def main() -> None:
        async with serving(max_slots=8, max_rows=8, max_copies=64) as server:
            for i in range(1000):
                server.registry.load(f"n{i}", f"source-{i}")
            assert server.host.stats().copies == 64
            ends: list[tuple[str, FinishEvent]] = []
            for first in range(0, 1000, 50):  # the engine's queue holds 58
                ends += await asyncio.gather(*(server.generate(f"r{i}", f"n{i}", 3) for i in range(first, first + 50)))
            assert {finish.reason for _text, finish in ends} == {"length"}
            server.slots.check_integrity()
            stats = server.engine.stats()
            assert stats.host.copies <= 64
            assert stats.host.counters.hits + stats.host.counters.misses == 1000
            assert stats.host.counters.reads >= 1000 - 64
            assert len(stats.resident_versions) == 8

    go(main())


def test_names_of_one_content_share_a_slot_and_part_without_harm() -> None:
    async def main() -> None:
        async with serving(max_slots=1, max_rows=4) as server:
            server.registry.load("a", "one")
            server.registry.load("b", "one")
            server.registry.alias("c", "a")
            ends = await asyncio.gather(*(server.generate(f"r{i}", "abc"[i % 3], 8) for i in range(6)))
            assert {finish.reason for _text, finish in ends} == {"length"}
            assert server.slots.counters.misses == 1, "one upload for all three"
            server.registry.load("a", "two", replace=True)
            server.registry.unload("b")
            await asyncio.wrap_future(server.engine.call(lambda: None))
            assert list(server.pool.content.values()) == ["one"], "c still has it"
            text, _finish = await server.generate("r7", "c", 8)
            assert text == output_of("one", 8)
            assert server.slots.counters.misses == 1
            server.registry.unload("c")
            await asyncio.wrap_future(server.engine.call(lambda: None))
            assert server.pool.content == {}

    go(main())


def test_a_source_that_changed_ends_its_requests_with_an_error_and_nothing_else() -> None:
    async def main() -> None:
        async with serving(max_slots=1, max_rows=4, max_copies=1) as server:
            server.registry.load("a", "one")
            server.registry.load("b", "two")  # and ``one`` leaves host memory
            changed["one"] = "other"
            try:
                ends = await asyncio.gather(*(server.generate(f"r{i}", "ab"[i % 2], 4) for i in range(4)))
            finally:
                changed.clear()
            assert [finish.reason for _text, finish in ends] == ["error", "length", "error", "length"]
            message = ends[0][1].error or ""
            assert "`a`" in message
            assert "one held version one when it was loaded, and holds version other now" in message
            assert server.registry.info("a").version == "one", "the registry keeps the entry"

    go(main())


@pytest.mark.timeout(60)
def test_a_slow_disk_holds_up_its_own_adapters_only() -> None:
    async def main() -> None:
        async with serving(max_slots=1, max_rows=4, max_copies=2) as server:
            for name in ("slow", "x", "y"):
                server.registry.load(name, name)  # ``slow`` leaves host memory
            blocked["slow"] = gate = threading.Event()
            try:
                waiting = asyncio.create_task(server.generate("r0", "slow", 2))
                for i in range(6):
                    await server.generate(f"q{i}", "xy"[i % 2], 4)
                assert not waiting.done()
                gate.set()
                assert (await waiting)[1].reason == "length"
            finally:
                gate.set()
                blocked.clear()

    go(main())


def test_a_failed_upload_ends_its_requests_and_nothing_else() -> None:
    async def main() -> None:
        async with serving(max_slots=2, max_rows=4) as server:
            server.registry.load("good", "good")
            server.registry.load("bad", "unwritable")
            names = ["bad", "good", None, "bad", "good"]
            ends = await asyncio.gather(*(server.generate(f"r{i}", name, 5) for i, name in enumerate(names)))
            assert [finish.reason for _text, finish in ends] == ["error", "length", "length", "error", "length"]
            assert "no room on the device" in (ends[0][1].error or "")
            assert ends[0][1].is_unavailable  # 503: it may be had later

    go(main())


def test_unloading_frees_the_slot_after_the_last_request() -> None:
    async def main() -> None:
        async with serving(max_slots=2, max_rows=4) as server:
            server.registry.load("a", "one")
            running = asyncio.create_task(server.generate("r0", "a", 60))
            await asyncio.sleep(0)  # it has its reference
            server.registry.unload("a")
            assert (await running)[1].reason == "length"
            await server.engine.drain(timeout=30)
            for _ in range(2):  # the names are brought up to date between the two
                await asyncio.wrap_future(server.engine.call(lambda: None))
            assert server.pool.content == {}
            assert server.engine.stats().resident_adapters == ()
            assert b'adapter="a"' not in server.engine.metrics.render()

    go(main())


@pytest.mark.parametrize("max_copies", [None, 2])
def test_adapters_are_replaced_and_unloaded_under_load(max_copies: int | None) -> None:
    """While requests run, names are given new content and taken away. Each request answers with the version that its
    name meant when it was admitted: ``generate`` checks it."""
    stop = threading.Event()

    def change(registry: AdapterRegistry) -> None:
        rng = random.Random(0)
        generation = 0
        while not stop.is_set():
            generation += 1
            name = f"n{rng.randrange(6)}"
            registry.load(name, f"{name}-{generation % 7}", replace=True)
            if rng.random() < 0.2:
                registry.unload("spare")
                registry.load("spare", f"spare-{generation}")
            time.sleep(0.0005)

    async def client(server: _Server, i: int) -> None:
        rng = random.Random(i)
        for j in range(12):
            await server.generate(f"r{i}-{j}", rng.choice([None, *(f"n{k}" for k in range(6))]), rng.randint(1, 10))

    async def main() -> None:
        async with serving(max_slots=3, max_rows=6, max_copies=max_copies) as server:
            server.registry.load("spare", "spare")
            for i in range(6):
                server.registry.load(f"n{i}", f"n{i}-first")
            changing = asyncio.create_task(asyncio.to_thread(change, server.registry))
            await asyncio.gather(*(client(server, i) for i in range(10)))
            stop.set()
            await changing
            for i in range(6):
                server.registry.unload(f"n{i}")
            server.registry.unload("spare")
            await asyncio.wrap_future(server.engine.call(lambda: None))
            assert server.registry.counts().nbytes == 0
            assert server.host.stats().nbytes == 0
        server.slots.check_integrity(idle=True)
        assert server.pool.content == {}

    go(main())
