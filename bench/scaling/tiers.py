"""Which adapters a replica holds: device slots over host memory over disk, least recently used out, without times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Lookups:
    """Totals. Each use of an adapter is a slot hit or a slot miss; each miss is an upload, and perhaps a read."""

    slot_hits: int = 0
    slot_misses: int = 0
    uploads: int = 0
    reads: int = 0


class Tiers:
    """``slots``: adapter -> how many running requests use it; those are never evicted. ``host``: adapters in memory.
    Both least recently used first. As in the server, a slot hit does not make the copy in host memory any younger, and
    what is uploaded stays in host memory."""

    __slots__ = ("fresh", "host", "host_capacity", "leased", "slot_capacity", "slots", "uploading")

    def __init__(self, slot_capacity: int, host_capacity: int) -> None:
        if slot_capacity < 1 or host_capacity < 1:
            raise ValueError(f"a replica needs a slot and a host copy, got {slot_capacity} and {host_capacity}")
        self.slot_capacity = slot_capacity
        self.host_capacity = host_capacity
        self.slots: dict[int, int] = {}
        self.host: dict[int, None] = {}
        self.uploading: set[int] = set()
        """They have a slot, but it cannot be used yet."""
        self.fresh: set[int] = set()
        """Uploaded and not used since: they make way for others only if nothing is in use, or those who waited for them
        could lose them again and again."""
        self.leased: set[int] = set()
        """In host memory for those who wait for a slot: they stay there, beyond the capacity if need be."""

    def holds(self, adapter: int) -> bool:
        """In a slot, or on its way there."""
        return adapter in self.slots or adapter in self.uploading

    def use(self, adapter: int) -> None:
        """A running request more. KeyError if it has no slot."""
        self.slots[adapter] = self.slots.pop(adapter) + 1
        self.fresh.discard(adapter)

    def release(self, adapter: int) -> None:
        self.slots[adapter] = self.slots.pop(adapter) - 1

    def reserve(self, adapter: int) -> bool:
        """A slot to upload a host copy to, if there is one that nobody uses; evicts what was in it."""
        if len(self.slots) + len(self.uploading) >= self.slot_capacity:
            idle = [one for one, users in self.slots.items() if not users]
            spared = self.fresh if self.uploading or len(idle) < len(self.slots) else ()
            victim = next((one for one in idle if one not in spared), None)
            if victim is None:
                return False
            del self.slots[victim]
            self.fresh.discard(victim)
        self.uploading.add(adapter)
        self.leased.discard(adapter)
        del self.host[adapter]
        self.host[adapter] = None
        return True

    def uploaded(self, adapter: int) -> None:
        self.uploading.remove(adapter)
        self.slots[adapter] = 0
        self.fresh.add(adapter)

    def arrived_in_host(self, adapter: int, *, leased: bool) -> None:
        """It was read from the disk; ``leased``: for somebody who waits."""
        self.host.pop(adapter, None)
        self.host[adapter] = None
        if leased:
            self.leased.add(adapter)
        if len(self.host) > self.host_capacity:
            excess = len(self.host) - self.host_capacity
            # Uploads under way hold their copies, too.
            held = (one for one in self.host if one not in self.leased and one not in self.uploading)
            for victim in [one for one, _ in zip(held, range(excess), strict=False)]:
                del self.host[victim]

    def touch(self, adapter: int, counts: Lookups) -> None:
        """A use that begins and ends at once: for filling tiers, and for hit rates without queueing."""
        if adapter in self.slots:
            counts.slot_hits += 1
            self.use(adapter)
            self.release(adapter)
            return
        counts.slot_misses += 1
        counts.uploads += 1
        if adapter not in self.host:
            counts.reads += 1
            self.arrived_in_host(adapter, leased=False)
        self.reserve(adapter)
        self.uploaded(adapter)
        self.fresh.discard(adapter)
