"""Weights that are read from the disk because requests wait for them. Step-loop thread only; needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, Final, Protocol

from manylora.adapters.lease import Lease
from manylora.adapters.versions import AdapterRef

MAX_READS: Final = 4
"""Versions read at a time, including those that were read and wait for a slot: their weights are in host memory beyond
its limits, if need be."""

KEPT_FOR_S: Final = 5.0
"""Seconds for which weights are kept after their request was last seen to wait for them."""


class HostCopies(Protocol):
    """What is asked of ``adapters.host_tier.HostTier``. The weights in a lease have a ``lora``, which is uploaded."""

    def __contains__(self, version: object, /) -> bool: ...
    def take(self, ref: AdapterRef, /) -> Lease | None: ...
    def read(self, ref: AdapterRef, /) -> Future[Lease]: ...
    def prefetch(self, ref: AdapterRef, /) -> None: ...
    def count_lookup(self, *, hit: bool) -> None: ...


@dataclass(eq=False)
class _Read:
    future: Future[Lease]
    kept_until: float
    lease: Lease | None = None
    """Once it was read: keeps the weights in memory for whoever waits."""


class AwaitedReads:
    """Reads by version, each until its weights are handed out, it fails, or nobody asks for it any more."""

    def __init__(self, host: HostCopies, on_ready: Callable[[], None], clock: Callable[[], float]) -> None:
        self._host = host
        self._on_ready = on_ready
        self._clock = clock
        self._reads: dict[str, _Read] = {}
        self._turn: tuple[str, float] | None = None
        """Who was turned away first, and when it last asked: the next place is its, or those behind it in the queue,
        who ask again after somebody has left, could take it for ever."""

    def __contains__(self, version: str) -> bool:
        return version in self._reads

    def begin(self, ref: AdapterRef) -> None:
        """Read it, if there are not too many already."""
        version, now = ref.version, self._clock()
        if version in self._reads:
            return
        if self._turn is not None and now > self._turn[1] + KEPT_FOR_S:  # it does not wait any more
            self._turn = None
        is_next = self._turn is None or self._turn[0] == version
        if len(self._reads) + (not is_next) >= MAX_READS:
            if is_next:
                self._turn = version, now
            return
        if is_next:
            self._turn = None
        read = _Read(self._host.read(ref), now + KEPT_FOR_S)
        self._reads[version] = read
        read.future.add_done_callback(lambda _ended: self._on_ready())

    def lease(self, version: str) -> Lease | None:
        """The weights, if they were read. They stay ours until ``hand_out``; asking keeps them for a while longer."""
        read = self._reads.get(version)
        if read is None:
            return None
        read.kept_until = self._clock() + KEPT_FOR_S
        return read.lease

    def hand_out(self, version: str) -> None:
        """The lease is the caller's now."""
        del self._reads[version]

    def awaits(self, version: str) -> bool:
        """Whether it is the disk that the version waits for: its own read, or its turn to be read."""
        read = self._reads.get(version)
        return version not in self._host if read is None else read.lease is None

    def settle(self) -> list[tuple[str, BaseException]]:
        """Take note of the reads that have ended, and let go of what nobody asks for; the versions that failed."""
        failed = []
        for version, read in tuple(self._reads.items()):
            if read.lease is None and read.future.done():
                if (cause := error_of(read.future)) is not None:
                    failed.append((version, cause))
                    del self._reads[version]
                    continue
                read.lease = read.future.result()
                read.kept_until = self._clock() + KEPT_FOR_S
            if read.lease is not None and read.kept_until < self._clock():
                self.abandon(version)
        return failed

    def abandon(self, version: str) -> None:
        """Let go of the weights, now or when they have been read; nothing happens if they are not awaited."""
        read = self._reads.pop(version, None)
        if read is not None:
            read.future.add_done_callback(_release)  # called at once if it has ended

    def abandon_all(self) -> None:
        for version in tuple(self._reads):
            self.abandon(version)


def _release(ended: Future[Lease]) -> None:
    if error_of(ended) is None:
        ended.result().release()


def error_of(ended: Future[Any]) -> BaseException | None:
    """What a future that is done ended in; a cancelled one in CancelledError."""
    try:
        return ended.exception()
    except CancelledError as cancelled:
        return cancelled
