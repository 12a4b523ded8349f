"""Which adapter versions are on the device, in which slot, and which one makes way. Needs no torch.

Everything here runs on the step-loop thread except ``pool.write``, which runs on the executor so that copying an
adapter never holds up a step. Two rules keep that free of races:

- At most one upload is under way. ``has_room`` is asked before an upload starts, and from then until its pages are
  taken nothing else takes pages; ``clear``, on the loop's thread, can only give some back. With two uploads, both could
  be told that there is room for one.
- A slot is published (``acquire`` returns it) only by the loop's thread, after it has seen the upload finish; no step
  can be planned on a half-written slot.

The pool must therefore guard its own tables against ``write`` on one thread and ``clear`` of *another* slot on the
loop's, and nothing more.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass
from typing import Any, Final, Protocol

from manylora.adapters.errors import AdapterRefused, SlotUploadFailed
from manylora.adapters.registry import AdapterRef

RETRY_AFTER_S: Final = 10.0
"""After a failed upload, seconds during which the version is refused at once instead of being tried again."""

Pairs = Mapping[tuple[str, int], Any]


class Pool(Protocol):
    """What is asked of ``kernels.lora_pool.LoraPool``."""

    @property
    def max_slots(self) -> int: ...
    def fits(self, pairs: Pairs, /) -> str | None: ...
    def has_room(self, pairs: Pairs, /) -> bool: ...
    def write(self, slot: int, pairs: Pairs, /) -> None: ...
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
    upload: Future[float] | None
    references: int = 0
    doomed: bool = False
    """Its version was freed: to be cleared as soon as it is neither uploading nor referenced."""
    fresh: bool = True
    """Not acquired since its upload."""


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
        self._failures: dict[tuple[str, str], _Failure] = {}
        self._uploading: _Slot | None = None
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
        pairs: Pairs = ref.weights.pairs
        if (reason := self._pool.fits(pairs)) is not None:
            raise AdapterRefused(f"`{ref.name}` (version {ref.version[:12]})", [reason])
        if self._uploading is None and self._make_room(pairs):
            self._start_upload(key, ref, pairs)
        return None

    def release(self, ref: AdapterRef) -> None:
        """Give back one reference taken by ``acquire``."""
        key = _key(ref)
        slot = self._slots.get(key)
        if slot is None or slot.references == 0:
            raise RuntimeError(f"the slot of adapter {ref.name} version {ref.version[:12]} was released, not acquired")
        slot.references -= 1
        self._slots.move_to_end(key)
        self._settle()
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
        if uploading != ([] if self._uploading is None else [self._uploading.index]):
            raise RuntimeError(f"slots: uploading {uploading}, but the upload under way is {self._uploading}")
        for slot in self._slots.values():
            if slot.references < 0 or (slot.references and slot.upload is not None):
                raise RuntimeError(f"slots: slot {slot.index} has {slot.references} references, {slot}")
            if slot.doomed and slot.references == 0 and slot.upload is None:
                raise RuntimeError(f"slots: slot {slot.index} should have been cleared, {slot}")
        if idle and self.references():
            held = {slot.ref.name: slot.references for slot in self._slots.values() if slot.references}
            raise RuntimeError(f"slots: {self.references()} references are held while idle: {held}")

    # --- inside --------------------------------------------------------------------------------------------------

    def _make_room(self, pairs: Pairs) -> bool:
        """Evict until there is a slot and the pages for ``pairs``; false if too much is in use for now.

        What was evicted in vain stays evicted: it is room kept for the request that has waited longest.
        """
        victims = self._victims()
        while not self._free or not self._pool.has_room(pairs):
            victim = next(victims, None)
            if victim is None:
                return False
            self._clear(victim)
            self.counters.evictions += 1
        return True

    def _victims(self) -> Iterator[_Slot]:
        idle = [slot for slot in self._slots.values() if slot.references == 0 and slot.upload is None]
        # Stable: least recently used first among the unpinned, then among the pinned.
        return iter(sorted(idle, key=lambda slot: self._pinned(slot.ref)))

    def _start_upload(self, key: tuple[str, str], ref: AdapterRef, pairs: Pairs) -> None:
        index = self._free[-1]
        upload = self._executor.submit(self._write, index, pairs)  # first, as it raises if the executor is shut down
        self._free.pop()
        slot = _Slot(index, ref, upload)
        self._slots[key] = slot
        self._uploading = slot
        self.counters.misses += 1
        upload.add_done_callback(lambda _future: self._on_ready())

    def _write(self, index: int, pairs: Pairs) -> float:
        """On the executor's thread: the upload itself; returns its seconds."""
        start = time.perf_counter()
        self._pool.write(index, pairs)
        return time.perf_counter() - start

    def _settle(self) -> None:
        """Take note of an upload that has ended."""
        slot = self._uploading
        if slot is None or slot.upload is None or not slot.upload.done():
            return
        self._uploading = None
        try:
            cause = slot.upload.exception()
        except CancelledError as cancelled:
            cause = cancelled
        if cause is None:
            self.counters.upload_seconds += slot.upload.result()
            slot.upload = None
            self._clear_if_doomed(slot)
        else:
            self.counters.failures += 1
            slot.upload = None
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


def _key(ref: AdapterRef) -> tuple[str, str]:
    return ref.name, ref.version
