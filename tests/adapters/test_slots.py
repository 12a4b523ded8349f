"""Slots: least recently used first out, pages counted before they are taken, uploads off the loop. Torch-free."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.adapters.awaited_reads import KEPT_FOR_S, MAX_READS
from manylora.adapters.errors import AdapterRefused, AdapterSourceChanged, SlotUploadFailed
from manylora.adapters.lease import Lease
from manylora.adapters.slots import SlotManager
from manylora.adapters.versions import AdapterRef


def adapter(name: str, version: str | None = None, **pages: int) -> AdapterRef:
    return AdapterRef(name, version or f"{name}-v", footprint=pages or {"q": 1})


class FakeHost:
    """Has every version in memory but those in ``on_disk``, which must be read; counts leases.

    The weights are what the pool is given: the version, and its pages by kind.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.on_disk: set[str] = set()
        self.fail_with: BaseException | None = None
        self.leases: Counter[str] = Counter()
        self.lookups: Counter[bool] = Counter()
        self.prefetched: list[AdapterRef] = []
        self.lock = threading.Lock()

    def __contains__(self, version: object) -> bool:
        return version not in self.on_disk

    def take(self, ref: AdapterRef) -> Lease | None:
        return None if ref.version in self.on_disk else self._lease(ref)

    def read(self, ref: AdapterRef) -> Future[Lease]:
        def read() -> Lease:
            if self.fail_with is not None:
                raise self.fail_with
            self.on_disk.discard(ref.version)
            return self._lease(ref)

        return self.executor.submit(read)

    def prefetch(self, ref: AdapterRef) -> None:
        self.prefetched.append(ref)

    def count_lookup(self, *, hit: bool) -> None:
        self.lookups[hit] += 1

    def _lease(self, ref: AdapterRef) -> Lease:
        def release() -> None:
            with self.lock:
                self.leases[ref.version] -= 1

        with self.lock:
            self.leases[ref.version] += 1
        return Lease(SimpleNamespace(lora=(ref.version, dict(ref.footprint))), release)


class FakePool:
    """Keeps the promises of LoraPool that slots rely on, and complains if slots break theirs."""

    def __init__(self, max_slots: int, **pages: int) -> None:
        self.max_slots = max_slots
        self.total = pages or {"q": 100}
        self.held: dict[int, Mapping[str, int]] = {}
        self.version: dict[int, str] = {}
        self.log: list[tuple[str, int]] = []
        self.fail_with: BaseException | None = None
        self.lock = threading.Lock()

    def free_pages(self) -> Mapping[str, int]:
        with self.lock:
            return {p: n - sum(h.get(p, 0) for h in self.held.values()) for p, n in self.total.items()}

    def write(self, slot: int, weights: tuple[str, Mapping[str, int]]) -> None:
        version, pairs = weights
        free = self.free_pages()
        with self.lock:
            assert slot not in self.held, "written over"
            assert 0 <= slot < self.max_slots
            assert all(free[p] >= n for p, n in pairs.items()), "pages were promised twice"
            self.held[slot], self.version[slot] = dict(pairs), version
            self.log.append(("write", slot))
        if self.fail_with is not None:
            raise self.fail_with

    def clear(self, slot: int) -> None:
        with self.lock:
            self.held.pop(slot, None)
            self.log.append(("clear", slot))


class ManualExecutor(Executor):
    """Runs what was submitted when the test says so."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except (RuntimeError, AdapterSourceChanged) as error:
                future.set_exception(error)

        self.queue.append(run)
        return future

    def run_one(self) -> None:
        self.queue.pop(0)()

    def run_all(self) -> None:
        while self.queue:
            self.run_one()


class Rig:
    def __init__(self, max_slots: int = 2, pinned: Callable[[str], bool] = lambda _: False, **pages: int) -> None:
        self.pool = FakePool(max_slots, **pages)
        self.executor = ManualExecutor()
        self.disk = ManualExecutor()
        self.host = FakeHost(self.disk)
        self.live: set[str] = set()
        self.ready = 0
        self.now = 0.0
        self.slots = SlotManager(
            self.pool,
            self.host,
            executor=self.executor,
            on_ready=self._on_ready,
            pinned=pinned,
            live=self.live.__contains__,
            retry_after_s=10,
            clock=lambda: self.now,
        )

    def _on_ready(self) -> None:
        self.ready += 1

    def bring_in(self, ref: AdapterRef) -> int:
        """Acquire, waiting for the upload if there is one."""
        slot = self.slots.acquire(ref)
        if slot is None:
            self.executor.run_all()
            slot = self.slots.acquire(ref)
        assert slot is not None
        return slot

    def use(self, ref: AdapterRef) -> int:
        slot = self.bring_in(ref)
        self.slots.release(ref)
        return slot

    def names(self) -> list[str]:
        return [ref.name for ref in self.slots.resident()]


def test_upload_runs_on_the_executor_and_wakes_the_loop() -> None:
    rig, a = Rig(), adapter("a")
    assert rig.slots.acquire(a) is None
    assert rig.slots.acquire(a) is None, "asking again starts no second upload"
    assert rig.slots.resident() == []
    assert rig.pool.log == []
    assert len(rig.executor.queue) == 1
    rig.executor.run_all()
    assert rig.ready == 1
    slot = rig.slots.acquire(a)
    assert rig.pool.log == [("write", slot)]
    assert rig.slots.acquire(a) == slot
    assert rig.slots.references() == 2
    counters = rig.slots.counters
    assert (counters.hits, counters.misses, counters.evictions, counters.failures) == (1, 1, 0, 0)
    assert counters.upload_seconds >= 0


def test_least_recently_used_makes_way() -> None:
    rig = Rig(2)
    a, b, c = adapter("a"), adapter("b"), adapter("c")
    rig.use(a)
    rig.use(b)
    rig.use(a)
    rig.use(c)
    assert rig.names() == ["a", "c"]
    assert rig.slots.counters.evictions == 1


def test_use_counts_from_its_end() -> None:
    rig = Rig(2)
    a, b, c = adapter("a"), adapter("b"), adapter("c")
    rig.bring_in(a)
    rig.use(b)
    rig.slots.release(a)  # after b's
    rig.use(c)
    assert rig.names() == ["a", "c"]


def test_referenced_and_uploading_slots_never_make_way() -> None:
    rig = Rig(2)
    a, b, c = adapter("a"), adapter("b"), adapter("c")
    rig.bring_in(a)
    assert rig.slots.acquire(b) is None
    assert rig.slots.acquire(c) is None
    assert len(rig.executor.queue) == 1, "c waits for a slot"
    rig.slots.release(a)
    assert rig.slots.acquire(c) is None
    assert len(rig.executor.queue) == 2, "a made way"
    rig.executor.run_all()
    assert rig.names() == ["b", "c"]
    rig.slots.check_integrity()


def test_what_was_just_brought_in_waits_for_who_asked_for_it() -> None:
    rig = Rig(2)
    a, b, c = adapter("a"), adapter("b"), adapter("c")
    rig.bring_in(a)
    rig.slots.acquire(b)
    rig.executor.run_all()
    assert rig.slots.acquire(c) is None
    assert rig.names() == ["a", "b"], "c asks before b's request does, and must not throw b out"
    assert rig.slots.acquire(b) is not None


@pytest.mark.parametrize("why", ["time has passed", "nothing else would wake the loop"])
def test_what_nobody_came_for_makes_way(why: str) -> None:
    rig = Rig(2)
    a, b, c = adapter("a"), adapter("b"), adapter("c")
    rig.bring_in(a)
    rig.slots.acquire(b)  # and then its request is aborted
    rig.executor.run_all()
    assert rig.slots.acquire(c) is None
    if why == "time has passed":
        rig.now += 5
    else:
        rig.slots.release(a)
    assert rig.slots.acquire(c) is None
    rig.executor.run_all()
    assert "c" in rig.names()


def test_pinned_make_way_last() -> None:
    rig = Rig(2, pinned=lambda version: version == "a-v")
    a, b, c, d = (adapter(name) for name in "abcd")
    rig.use(a)
    rig.use(b)
    rig.use(c)
    assert rig.names() == ["a", "c"]
    rig.bring_in(c)
    rig.use(d)
    assert rig.names() == ["c", "d"], "an idle pinned one does not keep everybody else waiting"


def test_as_many_as_needed_for_pages_and_no_more() -> None:
    rig = Rig(8, q=4, v=4)
    for name in "abc":
        rig.use(adapter(name, q=1))
    rig.use(adapter("v", v=4))
    rig.use(adapter("d", q=1))
    assert rig.names() == ["a", "b", "c", "v", "d"]
    rig.use(adapter("big", q=3))
    assert rig.names() == ["v", "d", "big"], "v holds nothing of what is scarce"


def test_nothing_is_evicted_in_vain() -> None:
    rig = Rig(8, q=4)
    rig.bring_in(adapter("a", q=2))
    rig.use(adapter("b", q=1))
    assert rig.slots.acquire(adapter("big", q=3)) is None
    assert rig.executor.queue == []
    assert rig.names() == ["a", "b"]


def test_pages_of_uploads_under_way_are_taken() -> None:
    rig = Rig(8, q=3)
    a, b = adapter("a", q=2), adapter("b", q=2)
    assert rig.slots.acquire(a) is None
    assert rig.slots.acquire(b) is None
    assert len(rig.executor.queue) == 1


def test_uploads_that_fit_run_side_by_side() -> None:
    rig = Rig(8, q=4)
    for name in "ab":
        assert rig.slots.acquire(adapter(name, q=2)) is None
    assert len(rig.executor.queue) == 2


def test_what_could_never_fit_is_refused() -> None:
    rig = Rig(2, q=4)
    with pytest.raises(AdapterRefused, match="it needs 5 of `q`, the device has 4"):
        rig.slots.acquire(adapter("a", q=5))


def test_failed_upload_surfaces_and_is_not_retried_at_once() -> None:
    rig, a = Rig(), adapter("a")
    rig.pool.fail_with = RuntimeError("out of memory")
    assert rig.slots.acquire(a) is None
    rig.executor.run_all()
    assert rig.ready == 1
    for _ in range(2):
        with pytest.raises(SlotUploadFailed, match=r"`a`.*RuntimeError: out of memory") as caught:
            rig.slots.acquire(a)
        assert isinstance(caught.value.__cause__, RuntimeError)
    assert rig.executor.queue == []
    assert rig.pool.held == {}, "the pages of the failed write were given back"
    rig.slots.check_integrity(idle=True)
    rig.pool.fail_with = None
    rig.now += 10
    rig.use(a)
    assert rig.slots.counters.failures == 1


def test_reload_forgets_a_failure() -> None:
    rig, a = Rig(), adapter("a")
    rig.pool.fail_with = RuntimeError("broken")
    rig.slots.acquire(a)
    rig.executor.run_all()
    rig.slots.drop(a)
    rig.pool.fail_with = None
    rig.use(a)


def test_drop_when_idle_in_use_and_uploading() -> None:
    rig = Rig(4)
    idle, used, coming = adapter("idle"), adapter("used"), adapter("coming")
    rig.use(idle)
    rig.slots.drop(idle)
    assert rig.names() == []

    rig.bring_in(used)
    rig.slots.drop(used)
    assert len(rig.pool.held) == 1
    rig.slots.release(used)
    assert rig.pool.held == {}

    rig.slots.acquire(coming)
    rig.slots.drop(coming)
    rig.executor.run_all()
    assert rig.names() == []
    assert rig.pool.held == {}
    rig.slots.drop(adapter("unknown"))
    rig.slots.check_integrity(idle=True)


def test_dropped_and_loaded_again_before_it_was_cleared() -> None:
    rig, a = Rig(), adapter("a")
    slot = rig.bring_in(a)
    rig.slots.drop(a)
    again = adapter("a")
    assert rig.slots.acquire(again) == slot
    rig.slots.release(a)
    rig.slots.release(again)
    assert rig.slots.resident() == [again]


def test_failed_upload_of_a_dropped_version_leaves_no_trace() -> None:
    rig, a = Rig(), adapter("a")
    rig.pool.fail_with = RuntimeError("broken")
    rig.slots.acquire(a)
    rig.slots.drop(a)
    rig.executor.run_all()
    rig.slots.check_integrity(idle=True)
    assert rig.slots._failures == {}


def test_versions_of_a_name_have_slots_of_their_own() -> None:
    rig = Rig()
    assert rig.bring_in(adapter("a", "v1")) != rig.bring_in(adapter("a", "v2"))


def test_release_without_acquire() -> None:
    rig, a = Rig(), adapter("a")
    with pytest.raises(RuntimeError, match="not acquired"):
        rig.slots.release(a)
    rig.use(a)
    with pytest.raises(RuntimeError, match="not acquired"):
        rig.slots.release(a)


def test_integrity_names_the_numbers() -> None:
    rig, a = Rig(), adapter("a")
    rig.bring_in(a)
    rig.slots.check_integrity()
    with pytest.raises(RuntimeError, match=r"1 references are held while idle: \{'a': 1\}"):
        rig.slots.check_integrity(idle=True)
    rig.pool.clear(0)
    with pytest.raises(RuntimeError, match="pages should be free"):
        rig.slots.check_integrity()


def test_a_shut_down_executor_changes_nothing() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    host = FakeHost(executor)
    slots = SlotManager(FakePool(2), host, executor=executor, on_ready=lambda: None)
    with pytest.raises(RuntimeError):
        slots.acquire(adapter("a"))
    slots.check_integrity(idle=True)
    assert host.leases.total() == 0


# --- host memory under the slots -----------------------------------------------------------------------------------


def test_weights_are_leased_for_the_upload_and_no_longer() -> None:
    rig, a = Rig(1), adapter("a")
    assert rig.slots.acquire(a) is None
    assert rig.host.leases["a-v"] == 1
    rig.executor.run_all()
    assert rig.host.leases["a-v"] == 0, "let go as soon as it is on the device"
    rig.slots.acquire(a)
    assert rig.slots.acquire(adapter("b")) is None
    assert rig.host.leases["b-v"] == 0, "nothing is leased while there is no room"
    assert rig.host.lookups == {True: 1}


def test_a_read_takes_no_slot_and_lets_others_by() -> None:
    rig = Rig(1)
    cold, warm = adapter("cold"), adapter("warm")
    rig.host.on_disk.add(cold.version)
    assert rig.slots.acquire(cold) is None
    assert rig.slots.awaits_read(cold)
    assert rig.slots.acquire(cold) is None, "asking again starts no second read"
    assert len(rig.disk.queue) == 1
    rig.use(warm)
    rig.disk.run_all()
    assert rig.ready == 2, "the read's end wakes the loop as well"
    assert rig.slots.acquire(cold) is None
    assert not rig.slots.awaits_read(cold)
    rig.executor.run_all()
    assert rig.slots.acquire(cold) is not None
    assert rig.host.lookups == {True: 1, False: 1}
    assert rig.host.leases.total() == 0


def test_what_was_read_stays_in_memory_for_who_waits_for_a_slot() -> None:
    rig = Rig(1)
    a, cold = adapter("a"), adapter("cold")
    rig.host.on_disk.add(cold.version)
    rig.bring_in(a)
    rig.slots.acquire(cold)
    rig.disk.run_all()
    for _ in range(4):
        rig.now += KEPT_FOR_S - 1
        assert rig.slots.acquire(cold) is None
        assert rig.host.leases[cold.version] == 1
    rig.slots.release(a)
    rig.use(cold)
    rig.slots.check_integrity(idle=True)
    assert rig.host.leases.total() == 0


@pytest.mark.parametrize("how", ["time", "idle", "drop", "drop while it is read"])
def test_what_was_read_for_nobody_is_let_go(how: str) -> None:
    rig = Rig(1)
    a, cold = adapter("a"), adapter("cold")
    rig.host.on_disk.add(cold.version)
    rig.bring_in(a)
    rig.slots.acquire(cold)
    if how != "drop while it is read":
        rig.disk.run_all()
        rig.slots.resident()
        assert rig.host.leases[cold.version] == 1
    match how:
        case "time":
            rig.now += KEPT_FOR_S + 1
            rig.slots.resident()
        case "idle":
            rig.slots.release(a)
            rig.slots.check_integrity(idle=True)
        case _:
            rig.slots.drop(cold)
            rig.disk.run_all()
    assert rig.host.leases.total() == 0


def test_reads_are_few_and_take_turns() -> None:
    rig = Rig(1)
    rig.bring_in(adapter("a"))
    refs = [adapter(f"cold{i}") for i in range(MAX_READS + 3)]
    rig.host.on_disk.update(ref.version for ref in refs)
    for ref in refs:
        rig.slots.acquire(ref)
        assert rig.slots.awaits_read(ref)
    assert len(rig.disk.queue) == MAX_READS
    rig.disk.run_all()
    rig.slots.drop(refs[0])
    # The place that is free is that of the one that was turned away first, whoever asks before it.
    for late in reversed(refs[MAX_READS:]):
        rig.slots.acquire(late)
    assert len(rig.disk.queue) == 1
    rig.disk.run_all()
    rig.slots.acquire(refs[MAX_READS])
    assert not rig.slots.awaits_read(refs[MAX_READS])
    assert rig.slots.awaits_read(refs[MAX_READS + 1])


def test_a_failed_read_says_why_and_is_forgotten_with_the_weights_in_memory() -> None:
    rig, a = Rig(1), adapter("a")
    rig.host.on_disk.add(a.version)
    rig.host.fail_with = AdapterSourceChanged("a", "/dir", "v" * 64, "w" * 64)
    rig.slots.acquire(a)
    rig.disk.run_all()
    for _ in range(2):
        with pytest.raises(SlotUploadFailed, match=r"`a`.*/dir held version v{12} .* holds version w{12}"):
            rig.slots.acquire(a)
    assert rig.disk.queue == []
    assert rig.slots.counters.failures == 1
    rig.host.on_disk.clear()  # loaded anew, by another name for instance
    rig.use(a)


def test_prefetch_leaves_alone_what_is_on_the_device_or_on_its_way() -> None:
    rig = Rig(2)
    a, cold, other = adapter("a"), adapter("cold"), adapter("other")
    rig.host.on_disk.update((cold.version, other.version))
    rig.use(a)
    rig.slots.acquire(cold)
    for ref in (a, cold, other):
        rig.slots.prefetch(ref)
    assert rig.host.prefetched == [other]


# --- one slot for all names of a content ------------------------------------------------------------------------------


def test_names_of_one_version_share_its_slot() -> None:
    rig = Rig(2)
    a, b = adapter("a", "same"), adapter("b", "same")
    assert rig.bring_in(a) == rig.slots.acquire(b)
    assert rig.slots.references() == 2
    assert rig.names() == ["a", "b"]
    assert rig.slots.resident_versions() == {"same"}
    rig.slots.release(b)
    rig.slots.release(a)
    assert len(rig.pool.held) == 1


def test_a_name_that_retires_leaves_the_slot_to_the_others() -> None:
    rig = Rig(2)
    a, b = adapter("a", "same"), adapter("b", "same")
    rig.live.add("same")
    slot = rig.bring_in(a)
    rig.slots.release(a)
    rig.slots.drop(a)
    assert rig.slots.resident() == []
    assert rig.slots.resident_versions() == {"same"}, "b was not used yet, and still has it"
    assert rig.slots.acquire(b) == slot
    rig.slots.release(b)
    rig.live.clear()
    rig.slots.drop(b)
    assert rig.pool.held == {}


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=60))
def test_against_a_simulator(max_slots: int, uses: list[tuple[str, bool]]) -> None:
    """With instant uploads and a page each, residency is that of a list kept in order of last use."""
    rig = Rig(max_slots)
    simulated: list[str] = []
    held: set[str] = set()
    for name, toggles_hold in uses:
        ref = adapter(name)
        if toggles_hold and name in held:
            rig.slots.release(ref)
            held.remove(name)
            simulated.remove(name)
            simulated.append(name)
        else:
            if name not in simulated:
                victims = [n for n in simulated if n not in held]
                if len(simulated) == max_slots and not victims:
                    assert rig.slots.acquire(ref) is None
                    continue
                if len(simulated) == max_slots:
                    simulated.remove(victims[0])
            else:
                simulated.remove(name)
            simulated.append(name)
            rig.bring_in(ref)
            if toggles_hold:
                held.add(name)
            else:
                rig.slots.release(ref)
        assert rig.names() == simulated
        assert set(rig.pool.held) == {rig.slots._slots[f"{n}-v"].index for n in simulated}
        rig.slots.check_integrity()


@pytest.mark.parametrize("seed", range(3))
def test_random_traffic_with_real_threads(seed: int) -> None:
    """Acquire, release, drop and failing uploads at random; pages and slots always add up, and nothing is left."""
    rng = random.Random(seed)
    pool = FakePool(4, q=6, v=6)
    refs = [adapter(f"n{i}", q=rng.randrange(0, 5), v=rng.randrange(1, 5)) for i in range(10)]
    held: list[AdapterRef] = []
    with ThreadPoolExecutor(3) as executor:
        pause = threading.Event()
        host = FakeHost(executor)
        slots = SlotManager(pool, host, executor=executor, on_ready=lambda: None, retry_after_s=0)
        for _ in range(1500):
            ref = rng.choice(refs)
            if rng.random() < 0.3:
                host.on_disk.add(ref.version)
            pool.fail_with = RuntimeError("broken") if rng.random() < 0.1 else None
            if len(held) < 3 and rng.random() < 0.8:
                slot = slots.acquire(ref)
                if slot is not None:
                    assert pool.version[slot] == ref.version, "a slot that is not this adapter's"
                    held.append(ref)
            elif held and rng.random() < 0.9:
                slots.release(held.pop(rng.randrange(len(held))))
            elif ref not in held:
                slots.drop(ref)
            slots.check_integrity()
            pause.wait(0.0002)  # lets uploads end at odd moments
    for ref in held:
        slots.release(ref)
    slots.check_integrity(idle=True)
    for ref in refs:
        slots.drop(ref)
    assert pool.free_pages() == pool.total
    assert host.leases.total() == 0
    assert slots.counters.hits > 0
    assert slots.counters.failures > 0
