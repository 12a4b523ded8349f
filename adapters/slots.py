"""Which adapter versions are on the device, in which slot, and which one makes way. Needs no torch.

Everything here runs on the step-loop thread except ``pool.write``, which runs on the executor so that copying an
adapter never holds up a step, and the host tier's reads. Rules that keep that free of races:

- Slots and pages are accounted here, before an upload starts. Asking the pool whether it has room and letting the
  upload take the pages later would let two uploads both be told that there is room for one.
- A slot is published (``acquire`` returns it) only by the loop's thread, after it has seen the upload finish; no step
  can be planned on a half-written slot.
- A slot belongs to a version, that is to a content, whatever names it has. When a name retires (``drop``), the slot is
  only given up if the version is no longer live: another name may share it.
- A slot is taken when the weights are in host memory, not before: while the disk is slow for one adapter, the others
  use the slots. An upload holds a lease on its host copy until it has ended, whatever happens to the version meanwhile;
  a version that is freed while it is uploaded leaves its slot as soon as the upload is through.

The pool must therefore guard its own tables against ``write`` on several threads and ``clear`` of *another* slot on the
loop's, and nothing more. It must be empty at first, and nobody else may write to it.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Final, Protocol

from manylora.adapters.awaited_reads import AwaitedReads, HostCopies, error_of
from manylora.adapters.errors import AdapterError, AdapterRefused, SlotUploadFailed, without_frames
from manylora.adapters.lease import Lease
from manylora.adapters.versions import AdapterRef

_log = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 10.0
"""After a failed upload, seconds during which the version is refused at once instead of being tried again."""

FRESH_FOR_S: Final = 5.0
"""Seconds during which a slot that was just filled is kept for the request that waited for it."""


class Pool(Protocol):
    """What is asked of ``kernels.lora_pool.LoraPool``."""

    @property
    def max_slots(self) -> int: ...
    def free_pages(self) -> Mapping[str, int]: ...
    def write(self, slot: int, weights: Any, /) -> None: ...
    def clear(self, slot: int, /) -> None: ...


@dataclass
class SlotCounters:
    """Totals since the start, for the metrics.

    A miss is an upload started; a hit is an ``acquire`` that was answered with a slot, other than the first after the
    upload that brought the version in. Polling for an upload counts as neither.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failures: int = 0
    upload_seconds: float = 0.0


@dataclass(eq=False)
class _Slot:
    index: int
    version: str
    names: dict[str, AdapterRef]
    """Under which it was asked for, as long as the version has them."""
    pages: Mapping[str, int]
    upload: Future[float] | None
    references: int = 0
    doomed: bool = False
    """Its version was freed: to be cleared as soon as it is neither uploading nor referenced."""
    fresh: bool = True
    """Not acquired since its upload."""
    fresh_until: float = 0.0


@dataclass(frozen=True)
class _Failure:
    cause: BaseException
    retry_at: float
    was_read: bool
    """It was the read that failed: with the weights in memory there is nothing to wait for."""


def _never(_version: str) -> bool:
    return False


class SlotManager:
    """Device slots for adapter versions, least recently used first out.

    Args:
        pool: the device storage; slots are numbered 0 .. ``pool.max_slots - 1``.
        host: where the weights come from.
        executor: runs uploads.
        on_ready: called on another thread when an upload or a read has ended, well or badly; wakes the loop.
        pinned: versions to evict only when no unpinned one is left to.
        live: versions that still have a name or a reference (the registry's ``is_live``).
        clock: monotonic seconds.
    """

    def __init__(
        self,
        pool: Pool,
        host: HostCopies,
        *,
        executor: Executor,
        on_ready: Callable[[], None],
        pinned: Callable[[str], bool] = _never,
        live: Callable[[str], bool] = _never,
        retry_after_s: float = RETRY_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._host = host
        self._executor = executor
        self._on_ready = on_ready
        self._pinned = pinned
        self._live = live
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._slots: OrderedDict[str, _Slot] = OrderedDict()  # by version, least recently used first
        self._free = list(range(pool.max_slots - 1, -1, -1))
        self._free_pages = dict(pool.free_pages())
        self._capacity = dict(self._free_pages)
        self._uploading: list[_Slot] = []
        self._reads = AwaitedReads(host, on_ready, clock)
        self._failures: dict[str, _Failure] = {}
        self.counters = SlotCounters()

    def acquire(self, ref: AdapterRef) -> int | None:
        """The slot of ``ref`` with one reference taken, if it is resident; else ``None``, and it is on its way from the
        disk or to the device, or will be once there is room: ask again after ``on_ready`` or after a ``release``.

        Raises:
            AdapterRefused: the version could never fit, even in an empty pool.
            SlotUploadFailed: its upload, or the read before it, failed less than ``retry_after_s`` ago.
        """
        self._settle()
        slot = self._slots.get(ref.version)
        if slot is not None:
            # A freed version that is asked for again was loaded again, with equal content: it is this one.
            slot.names[ref.name], slot.doomed = ref, False
            if slot.upload is not None:
                return None
            self._slots.move_to_end(ref.version)
            slot.references += 1
            self.counters.hits += not slot.fresh
            slot.fresh = False
            return slot.index
        self._raise_if_failed(ref)
        for kind, count in ref.footprint.items():
            if count > self._capacity.get(kind, 0):
                reason = f"it needs {count} of `{kind}`, the device has {self._capacity.get(kind, 0)}"
                raise AdapterRefused(f"`{ref.name}` (version {ref.version[:12]})", [reason])
        self._bring_in(ref)
        return None

    def awaits_read(self, ref: AdapterRef) -> bool:
        """After ``acquire`` returned None: whether it is the disk that is waited for. Then the version holds no slot
        and wants none yet, and whoever comes next may have it."""
        return ref.version not in self._slots and self._reads.awaits(ref.version)

    def prefetch(self, ref: AdapterRef) -> None:
        """A request for ``ref`` was queued: unless it is on the device, let its weights come into host memory."""
        if ref.version not in self._slots and ref.version not in self._reads:
            self._host.prefetch(ref)

    def release(self, ref: AdapterRef) -> None:
        """Give back one reference taken by ``acquire``."""
        slot = self._slots.get(ref.version)
        if slot is None or slot.references == 0:
            raise RuntimeError(f"the slot of adapter {ref.name} version {ref.version[:12]} was released, not acquired")
        slot.references -= 1
        self._slots.move_to_end(ref.version)
        self._clear_if_doomed(slot)

    def drop(self, ref: AdapterRef) -> None:
        """The name retired: if its version is not live by another, clear the slot now, or as soon as it is neither
        uploading nor referenced."""
        self._settle()
        slot = self._slots.get(ref.version)
        if self._live(ref.version):
            if slot is not None:
                slot.names.pop(ref.name, None)
            return
        self._failures.pop(ref.version, None)
        self._reads.abandon(ref.version)
        if slot is not None:
            slot.doomed = True
            self._clear_if_doomed(slot)

    def resident(self) -> list[AdapterRef]:
        """Versions whose slot can be acquired at once, least recently used first, by every name they were asked for
        under."""
        self._settle()
        return [ref for slot in self._slots.values() if slot.upload is None for ref in slot.names.values()]

    def resident_versions(self) -> set[str]:
        """Versions whose slot can be acquired at once."""
        self._settle()
        return {slot.version for slot in self._slots.values() if slot.upload is None}

    def never_together(self, refs: Collection[AdapterRef]) -> str | None:
        """Why these could not all have a slot at once, even if nobody else had one; None if they can. Any thread.

        The reason is a sentence for the client that asked for them together.
        """
        pages = {ref.version: ref.footprint for ref in refs}
        if len(pages) > self._pool.max_slots:
            return (
                f"{len(pages)} adapters are asked for together, but this server holds {self._pool.max_slots} on the "
                "device (--max-device-adapters)."
            )
        for kind, capacity in self._capacity.items():
            needed = sum(footprint.get(kind, 0) for footprint in pages.values())
            if needed > capacity:
                return (
                    f"The adapters that are asked for do not fit on the device together: of `{kind}` they need "
                    f"{needed}, this server has {capacity} (--max-device-adapters)."
                )
        return None

    def references(self) -> int:
        """References held, over all slots; 0 when idle."""
        return sum(slot.references for slot in self._slots.values())

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise RuntimeError, with the numbers, if slots were lost or are counted twice; ``idle``: or are in use.

        With nothing in use, nobody is left to wait for what was read: it is let go.
        """
        self._settle()
        if idle:
            self._reads.abandon_all()
        used = sorted(slot.index for slot in self._slots.values())
        if sorted(used + self._free) != list(range(self._pool.max_slots)):
            raise RuntimeError(
                f"slots: used {used} + free {sorted(self._free)} are not the {self._pool.max_slots} slots"
            )
        uploading = [slot.index for slot in self._slots.values() if slot.upload is not None]
        if sorted(uploading) != sorted(slot.index for slot in self._uploading):
            raise RuntimeError(f"slots: uploading {uploading}, but the uploads under way are {self._uploading}")
        if not uploading and self._free_pages != (of_pool := dict(self._pool.free_pages())):
            raise RuntimeError(f"slots: {self._free_pages} pages should be free, the pool has {of_pool}")
        for slot in self._slots.values():
            if slot.references < 0 or (slot.references and slot.upload is not None):
                raise RuntimeError(f"slots: slot {slot.index} has {slot.references} references, {slot}")
            if slot.doomed and slot.references == 0 and slot.upload is None:
                raise RuntimeError(f"slots: slot {slot.index} should have been cleared, {slot}")
        if idle and self.references():
            held = {"/".join(slot.names): slot.references for slot in self._slots.values() if slot.references}
            raise RuntimeError(f"slots: {self.references()} references are held while idle: {held}")

    # --- inside --------------------------------------------------------------------------------------------------

    def _bring_in(self, ref: AdapterRef) -> None:
        """Start the upload if the weights are in host memory and there is room, or the read if they are not."""
        was_read = ref.version in self._reads
        lease = self._reads.lease(ref.version) if was_read else self._host.take(ref)
        if lease is None:
            self._reads.begin(ref)
            return
        is_started = False
        try:
            if self._make_room(ref.footprint):
                self._start_upload(ref, lease)
                is_started = True
        finally:
            if not is_started and not was_read:
                lease.release()
        if is_started:
            self._host.count_lookup(hit=not was_read)
            if was_read:
                self._reads.hand_out(ref.version)

    def _make_room(self, pages: Mapping[str, int]) -> bool:
        """Evict until there is a slot and ``pages``. If too much is in use for now, evict nothing and return false."""
        victims: list[_Slot] = []
        for slot in self._evictable():
            if self._is_room(pages, victims):
                break
            victims.append(slot)
        if not self._is_room(pages, victims):
            return False
        # Some of them may hold nothing of what is scarce: spare those, the most recently used first.
        for slot in reversed(tuple(victims)):
            others = [victim for victim in victims if victim is not slot]
            if self._is_room(pages, others):
                victims = others
        for slot in victims:
            self._clear(slot)
            self.counters.evictions += 1
        return True

    def _is_room(self, pages: Mapping[str, int], victims: Collection[_Slot]) -> bool:
        """Whether there would be a slot and ``pages`` if ``victims`` were evicted."""
        if not self._free and not victims:
            return False
        return all(
            self._free_pages[kind] + sum(victim.pages.get(kind, 0) for victim in victims) >= count
            for kind, count in pages.items()
        )

    def _evictable(self) -> list[_Slot]:
        """What may make way, in the order in which it should."""
        slots = self._slots.values()
        idle = [slot for slot in slots if slot.references == 0 and slot.upload is None]
        # A slot that was just filled has no reference yet: were it fair game, whoever asks first could throw out what
        # another request waited for, and be thrown out in turn. But if nothing is in use or on its way, nobody may be
        # left who waited for it (aborted), and nothing would wake the loop for the one that asks now.
        if len(idle) < len(slots):
            now = self._clock()
            idle = [slot for slot in idle if not slot.fresh or now >= slot.fresh_until]
        # Stable: least recently used first among the unpinned, then among the pinned.
        return sorted(idle, key=lambda slot: self._pinned(slot.version))

    def _start_upload(self, ref: AdapterRef, lease: Lease) -> None:
        index = self._free[-1]
        upload = self._executor.submit(self._write, index, lease)  # first, as it raises if the executor is shut down
        self._free.pop()
        for kind, count in ref.footprint.items():
            self._free_pages[kind] -= count
        slot = _Slot(index, ref.version, {ref.name: ref}, ref.footprint, upload)
        self._slots[ref.version] = slot
        self._uploading.append(slot)
        self.counters.misses += 1

        def ended(_future: Future[float]) -> None:
            lease.release()  # here, as an upload that is cancelled never comes to ``_write``
            self._on_ready()

        upload.add_done_callback(ended)

    def _write(self, index: int, lease: Lease) -> float:
        """On the executor's thread: the upload itself; returns its seconds."""
        start = time.perf_counter()
        self._pool.write(index, lease.weights.lora)
        return time.perf_counter() - start

    def _settle(self) -> None:
        """Take note of the reads and uploads that have ended."""
        for version, cause in self._reads.settle():
            self._fail(version, cause, was_read=True)
        for slot in tuple(self._uploading):
            if slot.upload is not None and slot.upload.done():
                self._uploading.remove(slot)
                self._finish_upload(slot, slot.upload)

    def _finish_upload(self, slot: _Slot, upload: Future[float]) -> None:
        slot.upload = None
        cause = error_of(upload)
        if cause is None:
            self.counters.upload_seconds += upload.result()
            self._slots.move_to_end(slot.version)
            slot.fresh_until = self._clock() + FRESH_FOR_S
            self._clear_if_doomed(slot)
            return
        self._fail(slot.version, cause, was_read=False)
        if slot.doomed:
            del self._failures[slot.version]
        self._clear(slot)  # gives back the pages that a write that failed half-way had taken

    def _fail(self, version: str, cause: BaseException, *, was_read: bool) -> None:
        self.counters.failures += 1
        if not isinstance(cause, AdapterError):  # those say all there is to say to whoever asked
            _log.error("adapter version %s could not be brought to the device", version[:12], exc_info=cause)
        self._failures[version] = _Failure(without_frames(cause), self._clock() + self._retry_after_s, was_read)

    def _raise_if_failed(self, ref: AdapterRef) -> None:
        failure = self._failures.get(ref.version)
        if failure is None:
            return
        if self._clock() < failure.retry_at and not (failure.was_read and ref.version in self._host):
            raise SlotUploadFailed(ref.name, ref.version, failure.cause) from failure.cause
        del self._failures[ref.version]

    def _clear_if_doomed(self, slot: _Slot) -> None:
        if slot.doomed and slot.references == 0 and slot.upload is None:
            self._clear(slot)

    def _clear(self, slot: _Slot) -> None:
        self._pool.clear(slot.index)
        del self._slots[slot.version]
        self._free.append(slot.index)
        for kind, count in slot.pages.items():
            self._free_pages[kind] += count
