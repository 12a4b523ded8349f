"""Which adapter versions are on the device, in which slot, and which one makes way. Needs no torch.

Everything here runs on the step-loop thread except ``pool.write``, which runs on the executor so that copying an
adapter never holds up a step. Two rules keep that free of races:

- Slots and pages are accounted here, before an upload starts. Asking the pool whether it has room and letting the
  upload take the pages later would let two uploads both be told that there is room for one.
- A slot is published (``acquire`` returns it) only by the loop's thread, after it has seen the upload finish; no step
  can be planned on a half-written slot.

The pool must therefore guard its own tables against ``write`` on one thread and ``clear`` of *another* slot on the
loop's, and nothing more. It must be empty at first, and nobody else may write to it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass
from typing import Any, Final, Protocol

from manylora.adapters.errors import AdapterRefused, SlotUploadFailed
from manylora.adapters.versions import AdapterRef

RETRY_AFTER_S: Final = 10.0
"""After a failed upload, seconds during which the version is refused at once instead of being tried again."""

FRESH_FOR_S: Final = 5.0
"""Seconds during which a slot that was just filled is kept for the request that waited for it."""


class Pool(Protocol):
    """What is asked of ``kernels.lora_pool.LoraPool``."""

    @property
    def max_slots(self) -> int: ...
    def fits(self, weights: Any, /) -> str | None: ...
    def pages_needed(self, weights: Any, /) -> Mapping[str, int]: ...
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
    ref: AdapterRef
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


def _never(_ref: AdapterRef) -> bool:
    return False


class SlotManager:
    """Device slots for adapter versions, least recently used first out.

    Args:
        pool: the device storage; slots are numbered 0 .. ``pool.max_slots - 1``.
        executor: runs uploads.
        on_ready: called on the executor's thread when an upload has ended, well or badly; wakes the loop.
        pinned: versions to evict only when no unpinned one is left to.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        executor: Executor,
        on_ready: Callable[[], None],
        pinned: Callable[[AdapterRef], bool] = _never,
        retry_after_s: float = RETRY_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._executor = executor
        self._on_ready = on_ready
        self._pinned = pinned
        self._retry_after_s = retry_after_s
        self._clock = clock
        # Least recently used first. Keyed by name and version rather than by ref, because a ref carries the host
        # weights: after an unload and a reload of equal content, an old key would keep the old copy alive.
        self._slots: OrderedDict[tuple[str, str], _Slot] = OrderedDict()
        self._free = list(range(pool.max_slots - 1, -1, -1))
        self._free_pages = dict(pool.free_pages())
        self._uploading: list[_Slot] = []
        self._failures: dict[tuple[str, str], _Failure] = {}
        self.counters = SlotCounters()

    def acquire(self, ref: AdapterRef) -> int | None:
        """The slot of ``ref`` with one reference taken, if it is resident; else ``None``, and an upload is under way
        or will be once there is room: ask again after ``on_ready`` or after a ``release``.

        Raises:
            AdapterRefused: the version could never fit, even in an empty pool.
            SlotUploadFailed: its upload failed less than ``retry_after_s`` ago.
        """
        self._settle()
        key = _key(ref)
        slot = self._slots.get(key)
        if slot is not None:
            # A freed version that is asked for again was loaded again, with equal content: it is this one.
            slot.ref, slot.doomed = ref, False
            if slot.upload is not None:
                return None
            self._slots.move_to_end(key)
            slot.references += 1
            self.counters.hits += not slot.fresh
            slot.fresh = False
            return slot.index
        self._raise_if_failed(key)
        weights: Any = ref.weights.lora
        if (reason := self._pool.fits(weights)) is not None:
            raise AdapterRefused(f"`{ref.name}` (version {ref.version[:12]})", [reason])
        pages = self._pool.pages_needed(weights)
        if self._make_room(pages):
            self._start_upload(key, ref, weights, pages)
        return None

    def release(self, ref: AdapterRef) -> None:
        """Give back one reference taken by ``acquire``."""
        key = _key(ref)
        slot = self._slots.get(key)
        if slot is None or slot.references == 0:
            raise RuntimeError(f"the slot of adapter {ref.name} version {ref.version[:12]} was released, not acquired")
        slot.references -= 1
        self._slots.move_to_end(key)
        self._clear_if_doomed(slot)

    def drop(self, ref: AdapterRef) -> None:
        """The version was freed: clear its slot now, or as soon as it is neither uploading nor referenced."""
        self._settle()
        self._failures.pop(_key(ref), None)
        slot = self._slots.get(_key(ref))
        if slot is not None:
            slot.doomed = True
            self._clear_if_doomed(slot)

    def resident(self) -> list[AdapterRef]:
        """Versions whose slot can be acquired at once, least recently used first."""
        self._settle()
        return [slot.ref for slot in self._slots.values() if slot.upload is None]

    def references(self) -> int:
        """References held, over all slots; 0 when idle."""
        return sum(slot.references for slot in self._slots.values())

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise RuntimeError, with the numbers, if slots were lost or are counted twice; ``idle``: or are in use."""
        self._settle()
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
            held = {slot.ref.name: slot.references for slot in self._slots.values() if slot.references}
            raise RuntimeError(f"slots: {self.references()} references are held while idle: {held}")

    # --- inside --------------------------------------------------------------------------------------------------

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
        return sorted(idle, key=lambda slot: self._pinned(slot.ref))

    def _start_upload(self, key: tuple[str, str], ref: AdapterRef, weights: Any, pages: Mapping[str, int]) -> None:
        index = self._free[-1]
        upload = self._executor.submit(self._write, index, weights)  # first, as it raises if the executor is shut down
        self._free.pop()
        for kind, count in pages.items():
            self._free_pages[kind] -= count
        slot = _Slot(index, ref, pages, upload)
        self._slots[key] = slot
        self._uploading.append(slot)
        self.counters.misses += 1
        upload.add_done_callback(lambda _future: self._on_ready())

    def _write(self, index: int, weights: Any) -> float:
        """On the executor's thread: the upload itself; returns its seconds."""
        start = time.perf_counter()
        self._pool.write(index, weights)
        return time.perf_counter() - start

    def _settle(self) -> None:
        """Take note of the uploads that have ended."""
        for slot in tuple(self._uploading):
            if slot.upload is not None and slot.upload.done():
                self._uploading.remove(slot)
                self._finish_upload(slot, slot.upload)

    def _finish_upload(self, slot: _Slot, upload: Future[float]) -> None:
        slot.upload = None
        try:
            cause = upload.exception()
        except CancelledError as cancelled:
            cause = cancelled
        if cause is None:
            self.counters.upload_seconds += upload.result()
            self._slots.move_to_end(_key(slot.ref))
            slot.fresh_until = self._clock() + FRESH_FOR_S
            self._clear_if_doomed(slot)
            return
        self.counters.failures += 1
        if not slot.doomed:
            self._failures[_key(slot.ref)] = _Failure(cause, self._clock() + self._retry_after_s)
        self._clear(slot)  # gives back the pages that a write that failed half-way had taken

    def _raise_if_failed(self, key: tuple[str, str]) -> None:
        failure = self._failures.get(key)
        if failure is None:
            return
        if self._clock() < failure.retry_at:
            raise SlotUploadFailed(key[0], key[1], failure.cause) from failure.cause
        del self._failures[key]

    def _clear_if_doomed(self, slot: _Slot) -> None:
        if slot.doomed and slot.references == 0 and slot.upload is None:
            self._clear(slot)

    def _clear(self, slot: _Slot) -> None:
        self._pool.clear(slot.index)
        del self._slots[_key(slot.ref)]
        self._free.append(slot.index)
        for kind, count in slot.pages.items():
            self._free_pages[kind] += count


def _key(ref: AdapterRef) -> tuple[str, str]:
    return ref.name, ref.version
