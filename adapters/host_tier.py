"""Adapter weights in host memory, between the disk and the device: as many versions as fit, least recently used out.

A *copy* is the weights of one version. Whoever needs it *takes* it and gets a ``Lease``: until that is released, the
copy stays. What is not there is *read* again from where its names came from, and what was read is only accepted if it
is, byte for byte, the version that was asked for; else the error says so, and nobody else notices. Reads run on threads
of their own, several askers share one, and nothing here ever blocks its caller but ``fetch``.

What could go wrong between threads, and why it does not:

- *Eviction while an upload reads a copy.* The upload has a lease, taken under ``_lock`` by the same step that found the
  copy, and what is leased is not evicted. So leases, copies being read and what must be kept (``Versions.must_keep``)
  may together exceed the limits for a while; they are met again when a lease ends.
- *A version is freed while it is being read, prefetched or uploaded.* ``drop`` may come before the read puts its copy
  in. So whatever puts one in asks afterwards whether the version is still live (the registry says no before it calls
  ``drop``), and drops it if not. A copy that is leased is let go with its last lease.
- *A version is loaded again before ``drop`` for its former life arrives.* Then the new copy is dropped: one read too
  many, and never other weights, since a copy is found by its content's hash alone.
- *A name is replaced while its old version is being read.* Nothing happens to the read: it is for a version, not for a
  name. If its files have been replaced too, it ends in the error that says so.

``_lock`` is held for a few dictionary operations; within it the registry's ``_lock`` is taken, never the other way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from manylora.adapters.errors import AdapterError, AdapterSourceChanged
from manylora.adapters.lease import Lease
from manylora.adapters.versions import AdapterRef, Loaded

_log = logging.getLogger(__name__)

MAX_PREFETCHES: Final = 64
"""Versions that may wait to be prefetched; more are not remembered, and read when their turn comes."""

AWAITED_FOR_S: Final = 30.0
"""Seconds during which a prefetched copy that nobody took yet does not make way for another prefetched one."""


class Versions(Protocol):
    """What is asked of ``adapters.registry.AdapterRegistry``."""

    def is_live(self, version: str, /) -> bool: ...
    def must_keep(self, version: str, /) -> bool: ...
    def sources(self, version: str, /) -> Sequence[str]: ...


@dataclass
class HostCounters:
    """Totals since the start. ``hits`` and ``misses``: weights that were needed and were here, or had to be waited for.
    ``reads`` of the disk took ``read_seconds`` in all; ``prefetches`` of them were begun before anybody needed them."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    reads: int = 0
    prefetches: int = 0
    failures: int = 0
    read_seconds: float = 0.0


@dataclass(frozen=True)
class HostStats:
    """A moment's view: bytes and number of the copies, and the totals."""

    nbytes: int = 0
    copies: int = 0
    counters: HostCounters = field(default_factory=HostCounters)


@dataclass(eq=False)
class _Copy:
    version: str
    weights: Any
    nbytes: int
    leases: int = 0
    doomed: bool = False
    """Its version was freed: to be let go with the last lease."""
    awaited_until: float = 0.0


@dataclass(eq=False)
class _Read:
    ref: AdapterRef
    waiters: list[Future[Lease]]
    is_prefetch: bool


class HostTier:
    """See the module's text. Every method may be called on any thread.

    Args:
        read: reads a source into memory, as the registry's ``load`` does. May raise anything.
        executor: runs reads; two threads or more, so that one slow disk does not stop the others.
        max_bytes, max_copies: limits; ``None`` for none.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        read: Callable[[str], Loaded],
        *,
        executor: Executor,
        max_bytes: int | None = None,
        max_copies: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_source = read
        self._executor = executor
        self._max_bytes = max_bytes
        self._max_copies = max_copies
        self._clock = clock
        self._versions: Versions | None = None
        self._lock = threading.Lock()
        self._copies: OrderedDict[str, _Copy] = OrderedDict()  # least recently used first
        self._nbytes = 0
        self._reads: dict[str, _Read] = {}
        self._queue: OrderedDict[str, AdapterRef] = OrderedDict()
        self._is_prefetching = False
        self._is_closed = False
        self._counters = HostCounters()

    def bind(self, versions: Versions) -> None:
        """Give the registry, which in turn is given this tier. Until then no version counts as freed or pinned."""
        self._versions = versions

    # --- what the registry does ----------------------------------------------------------------------------------

    def put(self, version: str, weights: Any, nbytes: int) -> None:
        """Keep what was loaded just now. The caller sees to it that the version becomes live, or is dropped."""
        with self._lock:
            self._insert(version, weights, nbytes)
            gone = self._evict()
        del gone  # outside the lock: giving back hundreds of megabytes takes a while

    def drop(self, version: str) -> None:
        """The version was freed: let its copy go, now or with its last lease."""
        with self._lock:
            self._queue.pop(version, None)
            copy = self._copies.get(version)
            if copy is not None:
                copy.doomed = True
                if copy.leases == 0:
                    self._remove(copy)
        del copy

    # --- what uploads and others do ------------------------------------------------------------------------------

    def take(self, ref: AdapterRef) -> Lease | None:
        """The copy, if it is in memory."""
        with self._lock:
            copy = self._copies.get(ref.version)
            return None if copy is None else self._lease(copy)

    def read(self, ref: AdapterRef) -> Future[Lease]:
        """The copy, from memory or, soon, from the disk. The lease that the future brings must be released.

        The future may end in AdapterSourceChanged, whatever reading raised, or CancelledError after ``close``.
        """
        waiter: Future[Lease] = Future()
        begun: _Read | None = None
        with self._lock:
            self._queue.pop(ref.version, None)
            copy = self._copies.get(ref.version)
            reading = self._reads.get(ref.version)
            if copy is not None:
                waiter.set_result(self._lease(copy))
            elif reading is not None:
                reading.waiters.append(waiter)
            elif self._is_closed:
                waiter.set_exception(CancelledError())
            else:
                begun = self._reads[ref.version] = _Read(ref, [waiter], is_prefetch=False)
        if begun is not None:
            self._begin(begun)
        return waiter

    def fetch(self, ref: AdapterRef) -> Any:
        """The weights; waits for the disk if it must, so not for the step loop's or the event loop's thread.

        The caller keeps them alive by itself afterwards. Raises as ``read`` does.
        """
        lease = self.take(ref)
        self.count_lookup(hit=lease is not None)
        if lease is None:
            lease = self.read(ref).result()
        with lease as weights:
            return weights

    def prefetch(self, ref: AdapterRef) -> None:
        """A request for the version waits, so begin to read it if there is room beside what others wait for. One at a
        time, and never instead of something that is needed at once; nothing is promised."""
        with self._lock:
            copy = self._copies.get(ref.version)
            if copy is not None:
                self._copies.move_to_end(ref.version)
                copy.awaited_until = self._clock() + AWAITED_FOR_S
                return
            if self._is_closed or ref.version in self._reads or len(self._queue) >= MAX_PREFETCHES:
                return
            self._queue.setdefault(ref.version, ref)
        self._next_prefetch()

    def count_lookup(self, *, hit: bool) -> None:
        """Whoever uses ``take`` and ``read`` says once, for each need, whether the copy was there."""
        with self._lock:
            self._counters.hits += hit
            self._counters.misses += not hit

    # --- looking -------------------------------------------------------------------------------------------------

    def __contains__(self, version: object) -> bool:
        with self._lock:
            return version in self._copies

    def stats(self) -> HostStats:
        with self._lock:
            return HostStats(self._nbytes, len(self._copies), replace(self._counters))

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise RuntimeError, with the numbers, if bytes were lost; ``idle``: or if anything is leased or being read,
        or is kept for a version that was freed."""
        with self._lock:
            copies, reads = list(self._copies.values()), list(self._reads)
            total = sum(copy.nbytes for copy in copies)
            if total != self._nbytes:
                raise RuntimeError(f"host tier: {len(copies)} copies have {total} bytes, {self._nbytes} are counted")
            for copy in copies:
                if copy.leases < 0 or (copy.doomed and copy.leases == 0):
                    raise RuntimeError(
                        f"host tier: version {copy.version[:12]} has {copy.leases} leases, and {copy.doomed=}"
                    )
            leased = {copy.version[:12]: copy.leases for copy in copies if copy.leases}
        if idle and (leased or reads):
            raise RuntimeError(f"host tier: leased while idle: {leased}; being read: {reads}")
        if idle and (dead := [copy.version[:12] for copy in copies if not self._is_live(copy.version)]):
            raise RuntimeError(f"host tier: copies of versions that were freed: {dead}")

    def close(self) -> None:
        """Begin no more reads, and let nobody wait for those that were begun. The executor is the caller's to end,
        afterwards."""
        with self._lock:
            self._is_closed = True
            self._queue.clear()
            waiters = [waiter for reading in self._reads.values() for waiter in reading.waiters]
            self._reads.clear()
        for waiter in waiters:
            waiter.set_exception(CancelledError())

    # --- reading -------------------------------------------------------------------------------------------------

    def _begin(self, reading: _Read) -> None:
        try:
            future = self._executor.submit(self._read_verified, reading.ref)
        except RuntimeError:  # the executor was shut down: as if it had been cancelled
            future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
        # Outside the lock: it is called at once if the read has ended already.
        future.add_done_callback(lambda ended: self._ended(reading, ended))

    def _read_verified(self, ref: AdapterRef) -> tuple[Loaded, float]:
        """On the executor's thread: the version from the first of its sources that still holds it, and the seconds."""
        start = time.perf_counter()
        sources = self._versions.sources(ref.version) if self._versions is not None else ()
        problem: AdapterError | OSError | None = None
        for source in sources or (ref.source,):
            try:
                loaded = self._read_source(source)
            except (AdapterError, OSError) as error:
                problem = problem or error
                continue
            if loaded.version == ref.version:
                return loaded, time.perf_counter() - start
            # Told rather than what another source said: it is the one that needs somebody to act.
            problem = AdapterSourceChanged(ref.name, source, ref.version, loaded.version)
        assert problem is not None
        raise problem

    def _ended(self, reading: _Read, ended: Future[tuple[Loaded, float]]) -> None:
        version = reading.ref.version
        error = CancelledError() if ended.cancelled() else ended.exception()
        leases: list[Lease] = []
        with self._lock:
            if reading.is_prefetch:
                self._is_prefetching = False
            if self._reads.get(version) is not reading:  # closed meanwhile
                return
            del self._reads[version]
            waiters = reading.waiters
            gone: list[_Copy] = []
            if error is None:
                loaded, seconds = ended.result()
                self._counters.reads += 1
                self._counters.read_seconds += seconds
                copy = self._insert(version, loaded.weights, loaded.nbytes)
                if not waiters:
                    copy.awaited_until = self._clock() + AWAITED_FOR_S
                leases = [self._lease(copy) for _ in waiters]
                gone = self._evict()
            else:
                self._counters.failures += 1
        del gone
        if error is None and not self._is_live(version):  # freed while it was read: see the module's text
            self.drop(version)
        if error is not None and not waiters:
            # Whoever needs it reads it again, and is told then.
            _log.info("adapter %s could not be prefetched: %s", reading.ref.name, error)
        for i, waiter in enumerate(waiters):
            if error is None:
                waiter.set_result(leases[i])
            else:
                waiter.set_exception(error)
        self._next_prefetch()

    def _next_prefetch(self) -> None:
        """Begin the next prefetch, if none is under way."""
        with self._lock:
            begun: _Read | None = None
            gone: list[_Copy] = []
            while begun is None and self._queue and not self._is_prefetching:
                version, ref = self._queue.popitem(last=False)
                if version in self._copies or version in self._reads:
                    continue
                if (made := self._make_room(ref.nbytes)) is not None:
                    gone += made
                    begun = self._reads[version] = _Read(ref, [], is_prefetch=True)
                    self._is_prefetching = True
                    self._counters.prefetches += 1
        del gone
        if begun is not None:
            self._begin(begun)

    def _is_live(self, version: str) -> bool:
        return self._versions is None or self._versions.is_live(version)

    # --- copies; the caller holds the lock -------------------------------------------------------------------------

    def _insert(self, version: str, weights: Any, nbytes: int) -> _Copy:
        """The version's copy, most recently used now; that which is there already, if there is one."""
        copy = self._copies.get(version)
        if copy is None:
            copy = self._copies[version] = _Copy(version, weights, nbytes)
            self._nbytes += nbytes
        copy.doomed = False
        self._copies.move_to_end(version)
        return copy

    def _lease(self, copy: _Copy) -> Lease:
        copy.leases += 1
        copy.doomed = False  # freed, and loaded anew with equal content: it is this one
        copy.awaited_until = 0.0
        self._copies.move_to_end(copy.version)
        return Lease(copy.weights, lambda: self._released(copy))

    def _released(self, copy: _Copy) -> None:
        with self._lock:
            copy.leases -= 1
            gone = []
            if copy.leases == 0:
                if copy.doomed:
                    self._remove(copy)
                gone = self._evict()
        del gone

    def _remove(self, copy: _Copy) -> None:
        del self._copies[copy.version]
        self._nbytes -= copy.nbytes

    def _is_over(self, nbytes: int, count: int) -> bool:
        """Whether so many bytes more in so many copies more (or less) would exceed a limit."""
        return (self._max_bytes is not None and self._nbytes + nbytes > self._max_bytes) or (
            self._max_copies is not None and len(self._copies) + count > self._max_copies
        )

    def _may_go(self, copy: _Copy) -> bool:
        return copy.leases == 0 and not (self._versions is not None and self._versions.must_keep(copy.version))

    def _evict(self) -> list[_Copy]:
        """Evict until the limits are met, as far as they can be; the caller lets go of what is returned."""
        return self._evict_all(self._victims(0, 0, lambda _copy: True)[0])

    def _make_room(self, nbytes: int) -> list[_Copy] | None:
        """Evict until a prefetched copy would fit too, sparing those that are awaited; or else nothing, and None."""
        now = self._clock()
        victims, is_enough = self._victims(nbytes, 1, lambda copy: now >= copy.awaited_until)
        return self._evict_all(victims) if is_enough else None

    def _victims(self, nbytes: int, count: int, may_go: Callable[[_Copy], bool]) -> tuple[list[_Copy], bool]:
        """Whom to evict so that ``nbytes`` in ``count`` copies fit besides, least recently used first; is it enough?"""
        victims: list[_Copy] = []
        for copy in self._copies.values():
            if not self._is_over(nbytes, count):
                break
            if may_go(copy) and self._may_go(copy):
                victims.append(copy)
                nbytes -= copy.nbytes
                count -= 1
        return victims, not self._is_over(nbytes, count)

    def _evict_all(self, victims: list[_Copy]) -> list[_Copy]:
        for copy in victims:
            self._remove(copy)
        self._counters.evictions += len(victims)
        return victims
