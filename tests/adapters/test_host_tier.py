"""Host memory: least recently used out, leases and pins kept, one read for all who ask, never another content."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest

from manylora.adapters.errors import AdapterRefused, AdapterSourceChanged
from manylora.adapters.host_tier import AWAITED_FOR_S, MAX_PREFETCHES, HostTier
from manylora.adapters.versions import AdapterRef, LoadedAdapter


class ManualExecutor(Executor):
    """Runs what was submitted when the test says so."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                result = fn(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - an executor's future takes any
                future.set_exception(error)
            else:
                future.set_result(result)

        self.queue.append(run)
        return future

    def run_all(self) -> None:
        while self.queue:
            self.queue.pop(0)()


class Rig:
    """A disk whose sources hold a version each, and the registry's answers."""

    def __init__(self, **limits: Any) -> None:
        self.disk: dict[str, str] = {}
        self.dead: set[str] = set()
        self.kept: set[str] = set()
        self.other_sources: dict[str, tuple[str, ...]] = {}
        self.reads: list[str] = []
        self.now = 0.0
        self.executor = ManualExecutor()
        self.tier = HostTier(self.read, executor=self.executor, clock=lambda: self.now, **limits)
        self.tier.bind(self)

    def read(self, source: str) -> LoadedAdapter:
        self.reads.append(source)
        if source not in self.disk:
            raise AdapterRefused(source, ["it is gone"])
        version = self.disk[source]
        return LoadedAdapter(version, 10, None, f"weights of {version}")

    def is_live(self, version: str) -> bool:
        return version not in self.dead

    def must_keep(self, version: str) -> bool:
        return version in self.kept

    def sources(self, version: str) -> tuple[str, ...]:
        return self.other_sources.get(version, ())

    def ref(self, name: str) -> AdapterRef:
        """An adapter that is on the disk, under its own name."""
        self.disk.setdefault(name, f"{name}-v")
        return AdapterRef(name, f"{name}-v", name, nbytes=10)

    def bring_in(self, *names: str) -> None:
        for name in names:
            future = self.tier.read(self.ref(name))
            self.executor.run_all()
            future.result(0).release()

    def held(self) -> str:
        return "".join(name for name in "abcdefgh" if f"{name}-v" in self.tier)


def test_put_take_drop() -> None:
    rig = Rig()
    a = rig.ref("a")
    assert rig.tier.take(a) is None
    rig.tier.put("a-v", "weights", 10)
    lease = rig.tier.take(a)
    assert lease is not None
    assert lease.weights == "weights"
    assert (rig.tier.stats().nbytes, rig.tier.stats().copies) == (10, 1)
    rig.tier.drop("a-v")
    assert rig.held() == "a", "it is in use"
    lease.release()
    lease.release()
    assert rig.held() == ""
    assert rig.tier.stats().nbytes == 0
    rig.tier.check_integrity(idle=True)


@pytest.mark.parametrize("limits", [{"max_bytes": 25}, {"max_copies": 2}])
def test_least_recently_used_makes_way(limits: dict[str, int]) -> None:
    rig = Rig(**limits)
    rig.bring_in("a", "b")
    lease = rig.tier.take(rig.ref("a"))
    assert lease is not None
    lease.release()
    rig.bring_in("c")
    assert rig.held() == "ac"
    assert rig.tier.stats().counters.evictions == 1


def test_leased_and_kept_ones_stay_and_the_limit_is_met_again_when_they_may_go() -> None:
    rig = Rig(max_copies=1)
    rig.bring_in("a")
    lease = rig.tier.take(rig.ref("a"))
    rig.kept.add("b-v")
    rig.bring_in("b", "c")
    assert rig.held() == "ab", "c made way itself"
    assert lease is not None
    lease.release()
    assert rig.held() == "b"
    rig.kept.clear()
    rig.bring_in("d")
    assert rig.held() == "d"
    rig.tier.check_integrity(idle=True)


def test_a_copy_is_not_evicted_between_the_read_and_who_waits_for_it() -> None:
    rig = Rig(max_copies=1)
    futures = [rig.tier.read(rig.ref(name)) for name in "abc"]
    rig.executor.run_all()
    assert rig.held() == "abc"
    for future in futures:
        future.result(0).release()
    assert rig.held() == "c"


def test_askers_share_one_read() -> None:
    rig = Rig()
    futures = [rig.tier.read(rig.ref("a")) for _ in range(3)]
    assert len(rig.executor.queue) == 1
    rig.executor.run_all()
    leases = [future.result(0) for future in futures]
    assert rig.reads == ["a"]
    for lease in leases[:2]:
        lease.release()
    rig.tier.drop("a-v")
    assert rig.held() == "a"
    leases[2].release()
    assert rig.held() == ""


def test_other_content_is_never_accepted() -> None:
    rig = Rig()
    a = rig.ref("a")
    rig.disk["a"] = "other"
    future = rig.tier.read(a)
    rig.executor.run_all()
    with pytest.raises(AdapterSourceChanged, match=r"`a`.* a held version a-v when .* holds version other now"):
        future.result(0)
    assert rig.tier.stats().copies == 0
    assert rig.tier.stats().counters.failures == 1
    rig.disk["a"] = "a-v"
    rig.bring_in("a")
    assert rig.held() == "a"


def test_every_source_of_a_version_is_tried() -> None:
    rig = Rig()
    a = rig.ref("a")
    rig.other_sources["a-v"] = ("changed", "gone", "copy")
    rig.disk.update(changed="other", copy="a-v")
    future = rig.tier.read(a)
    rig.executor.run_all()
    assert future.result(0).weights == "weights of a-v"
    assert rig.reads == ["changed", "gone", "copy"]
    rig.other_sources["a-v"] = ("gone", "changed")
    rig.tier.drop("a-v")
    future.result(0).release()
    future = rig.tier.read(a)
    rig.executor.run_all()
    with pytest.raises(AdapterSourceChanged, match="changed held"):
        future.result(0)


def test_freed_while_it_is_read() -> None:
    rig = Rig()
    unread = rig.tier.read(rig.ref("a"))
    rig.dead.add("a-v")
    rig.tier.drop("a-v")
    rig.executor.run_all()
    assert rig.held() == "a", "who waited for it still has it"
    unread.result(0).release()
    assert rig.held() == ""
    rig.tier.check_integrity(idle=True)


def test_freed_while_it_is_prefetched() -> None:
    rig = Rig()
    rig.tier.prefetch(rig.ref("a"))
    rig.dead.add("a-v")
    rig.tier.drop("a-v")
    rig.executor.run_all()
    assert rig.held() == ""
    rig.tier.check_integrity(idle=True)


def test_loaded_again_while_the_former_copy_is_in_use() -> None:
    rig = Rig()
    rig.bring_in("a")
    lease = rig.tier.take(rig.ref("a"))
    rig.tier.drop("a-v")
    rig.tier.put("a-v", "weights of a-v", 10)
    assert lease is not None
    lease.release()
    assert rig.held() == "a"
    assert rig.tier.stats().nbytes == 10


def test_put_during_a_read_keeps_one_copy() -> None:
    rig = Rig()
    future = rig.tier.read(rig.ref("a"))
    rig.tier.put("a-v", "put", 10)
    rig.executor.run_all()
    assert future.result(0).weights == "put"
    assert rig.tier.stats().nbytes == 10


def test_fetch_waits_and_counts() -> None:
    with ThreadPoolExecutor(1) as executor:
        tier = HostTier(lambda source: LoadedAdapter("v", 10, None, source), executor=executor)
        ref = AdapterRef("a", "v", "src")
        assert [tier.fetch(ref), tier.fetch(ref)] == ["src", "src"]
        counters = tier.stats().counters
        assert (counters.hits, counters.misses, counters.reads) == (1, 1, 1)
        assert counters.read_seconds > 0
        tier.check_integrity(idle=True)


def test_prefetch_one_after_the_other_and_never_twice() -> None:
    rig = Rig()
    for name in "abca":
        rig.tier.prefetch(rig.ref(name))
    assert len(rig.executor.queue) == 1
    waited = rig.tier.read(rig.ref("b"))
    assert len(rig.executor.queue) == 2, "what is needed now does not wait behind prefetches"
    rig.executor.run_all()
    assert rig.held() == "abc"
    assert sorted(rig.reads) == ["a", "b", "c"]
    waited.result(0).release()
    assert rig.tier.stats().counters.prefetches == 2
    rig.tier.check_integrity(idle=True)


def test_prefetch_does_not_push_out_what_others_wait_for() -> None:
    rig = Rig(max_copies=2)
    for name in "abc":
        rig.tier.prefetch(rig.ref(name))
    rig.executor.run_all()
    assert rig.held() == "ab"
    rig.now += AWAITED_FOR_S
    rig.tier.prefetch(rig.ref("c"))
    rig.executor.run_all()
    assert rig.held() == "bc", "nobody came for them"
    lease = rig.tier.take(rig.ref("b"))
    assert lease is not None
    rig.tier.prefetch(rig.ref("d"))
    rig.executor.run_all()
    assert rig.held() == "bc", "b is in use and c is awaited"
    lease.release()
    rig.tier.prefetch(rig.ref("d"))
    rig.executor.run_all()
    assert rig.held() == "cd", "b was used"
    assert "a" not in rig.reads[2:]


def test_prefetch_evicts_nothing_in_vain() -> None:
    rig = Rig(max_copies=2)
    rig.bring_in("a", "b")
    rig.kept.update(("a-v", "b-v"))
    rig.tier.prefetch(rig.ref("c"))
    assert rig.executor.queue == []
    assert rig.held() == "ab"


def test_the_queue_of_prefetches_is_bounded() -> None:
    rig = Rig()
    for i in range(MAX_PREFETCHES + 10):
        rig.tier.prefetch(rig.ref(f"n{i}"))
    rig.executor.run_all()
    assert len(rig.reads) == MAX_PREFETCHES + 1


def test_a_failed_prefetch_is_nobodys_error() -> None:
    rig = Rig()
    a = rig.ref("a")
    del rig.disk["a"]
    rig.tier.prefetch(a)
    rig.executor.run_all()
    rig.tier.check_integrity(idle=True)
    rig.disk["a"] = "a-v"
    rig.bring_in("a")


def test_close_keeps_nobody_waiting() -> None:
    rig = Rig()
    waiting = rig.tier.read(rig.ref("a"))
    rig.tier.prefetch(rig.ref("b"))
    rig.tier.close()
    late = rig.tier.read(rig.ref("c"))
    for future in (waiting, late):
        with pytest.raises(CancelledError):
            future.result(0)
    rig.executor.run_all()
    rig.tier.check_integrity(idle=True)


def test_an_executor_that_is_shut_down() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    tier = HostTier(lambda source: LoadedAdapter("v", 10, None, source), executor=executor)
    with pytest.raises(CancelledError):
        tier.read(AdapterRef("a", "v")).result(0)
    tier.prefetch(AdapterRef("a", "v"))
    tier.check_integrity(idle=True)


def test_integrity_names_the_numbers() -> None:
    rig = Rig()
    rig.bring_in("a")
    lease = rig.tier.take(rig.ref("a"))
    with pytest.raises(RuntimeError, match=r"leased while idle: \{'a-v': 1\}"):
        rig.tier.check_integrity(idle=True)
    assert lease is not None
    lease.release()
    rig.dead.add("a-v")
    with pytest.raises(RuntimeError, match=r"versions that were freed: \['a-v'\]"):
        rig.tier.check_integrity(idle=True)
    rig.tier._nbytes += 1
    with pytest.raises(RuntimeError, match="1 copies have 10 bytes, 11 are counted"):
        rig.tier.check_integrity()


def test_a_slow_read_holds_up_nobody_else() -> None:
    go_on = threading.Event()

    def read(source: str) -> LoadedAdapter:
        if source == "slow":
            assert go_on.wait(10)
        return LoadedAdapter(source, 10, None, source)

    with ThreadPoolExecutor(2) as executor:
        tier = HostTier(read, executor=executor)
        slow = tier.read(AdapterRef("slow", "slow", "slow"))
        tier.read(AdapterRef("fast", "fast", "fast")).result(10).release()
        assert not slow.done()
        tier.put("here", "weights", 1)
        lease = tier.take(AdapterRef("here", "here"))
        assert lease is not None
        lease.release()
        go_on.set()
        slow.result(10).release()
