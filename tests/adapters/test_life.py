"""An adapter's whole life under threads: registry, host tier and slots together, with everything changing at once.

One thread plays the step loop: it resolves names, waits for slots, looks whose weights they hold, and gives them back.
Others load, replace, alias, pin and unload, and change the files under the server's feet. Whatever happens, a slot
holds the version that its request resolved to, and in the end nothing is left.
"""

from __future__ import annotations

import queue
import random
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from manylora.adapters.errors import (
    AdapterError,
    AdapterExists,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterRefused,
)
from manylora.adapters.host_tier import HostTier
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.slots import SlotManager
from manylora.adapters.versions import AdapterRef, LoadedAdapter

NAMES = tuple("abcdefgh")
SLOTS = 3


class Pool:
    """Slots of one page each, which say whose weights they hold."""

    def __init__(self) -> None:
        self.max_slots = SLOTS
        self.version: dict[int, str] = {}

    def free_pages(self) -> Mapping[str, int]:
        return {"q": self.max_slots - len(self.version)}

    def write(self, slot: int, version: str) -> None:
        assert slot not in self.version, "written over"
        time.sleep(0.0003)
        self.version[slot] = version

    def clear(self, slot: int) -> None:
        self.version.pop(slot, None)


@dataclass
class Held:
    """A request: with a slot, or waiting for one."""

    ref: AdapterRef
    slot: int | None = None


class World:
    def __init__(self, seed: int, max_bytes: int | None) -> None:
        self.seed = seed
        self.disk = {f"dir-{name}": f"content-{i % 5}" for i, name in enumerate(NAMES)}
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.pool = Pool()
        self.readers = ThreadPoolExecutor(3)
        self.uploaders = ThreadPoolExecutor(2)
        self.retired: queue.SimpleQueue[AdapterRef] = queue.SimpleQueue()
        self.host = HostTier(self.read, executor=self.readers, max_bytes=max_bytes)
        self.registry = AdapterRegistry(self.read, host=self.host, on_retired=self.retired.put)
        self.host.bind(self.registry)
        self.slots = SlotManager(
            self.pool,
            self.host,
            executor=self.uploaders,
            on_ready=lambda: None,
            pinned=self.registry.is_pinned,
            live=self.registry.is_live,
            retry_after_s=0.001,
        )
        self.served = self.failed = 0

    def read(self, source: str) -> LoadedAdapter:
        time.sleep(0.0005)
        version = self.disk.get(source)
        if version is None:
            raise AdapterRefused(source, ["it is gone"])
        return LoadedAdapter(version, 10, None, SimpleNamespace(lora=version), footprint={"q": 1})

    def change(self, seed: int) -> None:
        """An administrator."""
        rng = random.Random(seed)
        for _ in range(500):
            name, other = rng.choice(NAMES), rng.choice(NAMES)
            try:
                match rng.choice(["load", "load", "replace", "alias", "unload", "pin", "unpin", "edit", "remove"]):
                    case "load":
                        self.registry.load(name, f"dir-{name}", replace=rng.random() < 0.5)
                    case "replace":
                        self.registry.load(name, f"dir-{other}", replace=True)
                    case "alias":
                        self.registry.alias(name, other, replace=True)
                    case "unload":
                        self.registry.unload(name)
                    case "pin":
                        self.registry.pin(name, True)
                    case "unpin":
                        self.registry.pin(name, False)
                    case "edit":
                        # Half of them contents that were there before, and perhaps still are.
                        self.disk[f"dir-{name}"] = rng.choice([f"content-{rng.randrange(8)}", f"new-{rng.random()}"])
                    case "remove" if rng.random() < 0.3:
                        self.disk.pop(f"dir-{name}", None)
            except (AdapterExists, AdapterNameInvalid, AdapterNotFound, AdapterRefused):
                pass
            self.registry.check_integrity()
            self.host.check_integrity()

    def loop(self) -> None:
        """The step loop."""
        rng = random.Random(self.seed)
        requests: list[Held] = []
        while not self.stop.is_set():
            self.take_in_retired()
            if len(requests) < 6:
                try:
                    ref = self.registry.acquire(rng.choice(NAMES))
                except AdapterNotFound:
                    time.sleep(0)
                else:
                    requests.append(Held(ref))
                    self.slots.prefetch(ref)
            for request in list(requests):
                if request.slot is None:
                    try:
                        request.slot = self.slots.acquire(request.ref)
                    except AdapterError:  # its source has changed or is gone
                        self.failed += 1
                        requests.remove(request)
                        self.registry.release(request.ref)
                        continue
                else:
                    assert self.pool.version[request.slot] == request.ref.version, "another adapter's weights"
                    assert self.registry.is_live(request.ref.version), "freed under a request"
                    self.served += 1
                    if rng.random() < 0.3:
                        requests.remove(request)
                        self.slots.release(request.ref)
                        self.registry.release(request.ref)
            self.slots.check_integrity()
        for request in requests:
            if request.slot is not None:
                self.slots.release(request.ref)
            self.registry.release(request.ref)

    def take_in_retired(self) -> None:
        while not self.retired.empty():
            self.slots.drop(self.retired.get())

    def run(self) -> None:
        def guarded(target: object, *arguments: object) -> None:
            assert callable(target)
            try:
                target(*arguments)
            except BaseException as error:
                self.errors.append(error)
                raise

        admins = [threading.Thread(target=guarded, args=(self.change, self.seed * 10 + i)) for i in range(3)]
        loop = threading.Thread(target=guarded, args=(self.loop,))
        switch = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in (*admins, loop):
                thread.start()
            for thread in admins:
                thread.join(60)
            self.stop.set()
            loop.join(60)
        finally:
            sys.setswitchinterval(switch)
        assert not any(thread.is_alive() for thread in (*admins, loop))
        assert not self.errors


@pytest.mark.parametrize("max_bytes", [None, 45], ids=["room for all", "room for four"])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_served_wrong_and_nothing_is_left(seed: int, max_bytes: int | None) -> None:
    world = World(seed, max_bytes)
    world.run()
    assert world.served > 100
    assert (world.host.stats().counters.evictions > 0) == (max_bytes is not None)
    for info in world.registry.list():
        world.registry.unload(info.name)
    for executor in (world.readers, world.uploaders):
        executor.shutdown(wait=True)
    world.take_in_retired()
    world.slots.check_integrity(idle=True)
    world.registry.check_integrity()
    world.host.check_integrity(idle=True)
    assert world.registry.counts().nbytes == 0
    assert world.host.stats().nbytes == 0
    assert world.pool.version == {}
