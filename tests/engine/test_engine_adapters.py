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

from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.slots import SlotManager
from manylora.adapters.versions import LoadedAdapter
from manylora.server.engine.engine import Engine
from manylora.server.engine.metrics import Metrics
from manylora.server.engine.request import FinishEvent, Request, SampledToken
from manylora.server.engine.scheduler import Scheduler, SchedulerConfig
from tests.engine.harness import go
from tests.fakes import FakeRunner, FakeTokenizer, request


@dataclass(frozen=True)
class _Weights:
    version: str
    lora: Any


def load(source: str) -> LoadedAdapter:
    """The content of a source is its own name, and so is its version."""
    return LoadedAdapter(source, 1, None, _Weights(source, {("content", 0): source}))


class _Pool:
    """One page a slot; slow to write, so that other things happen meanwhile."""

    def __init__(self, max_slots: int) -> None:
        self.max_slots = max_slots
        self.content: dict[int, str] = {}

    def fits(self, lora: Any) -> str | None:
        return None

    def pages_needed(self, lora: Any) -> Mapping[str, int]:
        return {"q": 1}

    def free_pages(self) -> Mapping[str, int]:
        return {"q": self.max_slots - len(self.content)}

    def has_room(self, lora: Any) -> bool:
        return len(self.content) < self.max_slots

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
    def __init__(self, *, max_slots: int, max_rows: int) -> None:
        self.pool = _Pool(max_slots)
        self.executor = ThreadPoolExecutor(1)
        self.slots = SlotManager(self.pool, executor=self.executor, on_ready=lambda: self.engine.wake())
        config = SchedulerConfig(max_rows=max_rows, max_batch_tokens=16, num_pages=60, page_size=4, max_context=100)
        self.scheduler = Scheduler(config, self.slots)
        self.registry = AdapterRegistry(load, on_freed=lambda ref: self.engine.drop_adapter(ref))
        self.engine = Engine(
            FakeRunner(self.model),
            self.scheduler,
            vocabulary=FakeTokenizer(),
            metrics=Metrics("base"),
            registry=self.registry,
            max_slots=max_slots,
            strict=True,
        )

    def model(self, made: Request, tokens: Sequence[int]) -> SampledToken:
        content = "base" if made.slot is None else self.pool.content[made.slot]
        position = len(tokens) - len(made.prompt_token_ids)
        return SampledToken(ord(output_of(content, position + 1)[-1]))

    async def generate(self, request_id: str, name: str | None, n_tokens: int) -> tuple[str, FinishEvent]:
        """Text, which is checked to be that of the version the request resolved to, and the end."""
        ref = self.registry.acquire(name) if name is not None else None
        made = request(request_id, [1, 2, 3], adapter=ref, max_tokens=n_tokens)
        tokens, finish = await self.engine.submit(made).result()
        if finish.reason == "length":
            assert tokens.text == output_of(ref.version if ref is not None else "base", n_tokens)
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


def test_a_failed_upload_ends_its_requests_and_nothing_else() -> None:
    async def main() -> None:
        async with serving(max_slots=2, max_rows=4) as server:
            server.registry.load("good", "good")
            server.registry.load("bad", "unwritable")
            names = ["bad", "good", None, "bad", "good"]
            ends = await asyncio.gather(*(server.generate(f"r{i}", name, 5) for i, name in enumerate(names)))
            assert [finish.reason for _text, finish in ends] == ["error", "length", "length", "error", "length"]
            assert "no room on the device" in (ends[0][1].error or "")

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
            await asyncio.wrap_future(server.engine.call(lambda: None))
            assert server.pool.content == {}
            assert server.engine.stats().resident_adapters == ()
            assert b'adapter="a"' not in server.engine.metrics.render()

    go(main())


def test_adapters_are_replaced_and_unloaded_under_load() -> None:
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
        async with serving(max_slots=3, max_rows=6) as server:
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
        server.slots.check_integrity(idle=True)
        assert server.pool.content == {}

    go(main())
