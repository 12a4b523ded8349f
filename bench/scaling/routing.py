"""Who is asked: the policies that are compared. Each sees what a router can see: the requests that each replica has,
waiting and running, and which adapters it holds."""

from __future__ import annotations

import bisect
import hashlib
import math
import random
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from manylora.deploy.ray_serve.affinity import AffinityPolicy, Placements
from manylora.deploy.ray_serve.affinity import Replica as SeenReplica
from scaling.traffic import BASE


class Holder(Protocol):
    """A replica, as far as a router may see it."""

    def holds(self, adapter: int) -> bool:
        """On the device, or on its way there."""

    def held(self) -> Iterable[int]:
        """All of those."""


@dataclass
class Fleet:
    """What a policy is made for. ``loads``: each replica's requests that have not ended; they change, and so do ``now``
    (seconds) and ``is_live``: whether time goes on."""

    replicas: Sequence[Holder]
    loads: list[int]
    rows: int
    slots: int
    rng: random.Random
    now: float = 0.0
    is_live: bool = False


Policy = Callable[[int], int]
"""From an adapter to the number of the replica that is asked."""
MakePolicy = Callable[[Fleet], Policy]


def at_random(fleet: Fleet) -> Policy:
    rng, count = fleet.rng, len(fleet.replicas)
    return lambda _adapter: int(rng.random() * count)


def round_robin(fleet: Fleet) -> Policy:
    last, count = -1, len(fleet.replicas)

    def choose(_adapter: int) -> int:
        nonlocal last
        last = (last + 1) % count
        return last

    return choose


def least_loaded(fleet: Fleet) -> Policy:
    """Of those with the fewest requests one at random."""
    loads, rng = fleet.loads, fleet.rng

    def choose(_adapter: int) -> int:
        least = min(loads)
        if loads.count(least) == 1:
            return loads.index(least)
        return rng.choice([i for i, load in enumerate(loads) if load == least])

    return choose


REPORT_S = 1.0
"""How often a replica tells the routers what it holds, as deploy/ has it."""
REMEMBERED_S = 5.0
"""How long a router remembers where it sent an adapter, as deploy/ has it."""


def affinity(policy: AffinityPolicy | None = None, *, report_s: float = REPORT_S) -> MakePolicy:
    """deploy/'s own policy, over reports that are up to ``report_s`` old (0: over what is true now) and, as there, what
    this router sent since. Loads are exact."""
    rule = AffinityPolicy() if policy is None else policy

    def make(fleet: Fleet) -> Policy:
        ids = [f"replica-{i}" for i in range(len(fleet.replicas))]
        live = [_Live(replica) for replica in fleet.replicas]
        reports: list[Container[str]] = [*live]
        number_of = {name: i for i, name in enumerate(ids)}
        placements = Placements(REMEMBERED_S, lambda: fleet.now)
        reported_at = 0.0

        def choose(adapter: int) -> int:
            nonlocal reported_at
            if fleet.is_live and report_s and fleet.now >= reported_at:
                reports[:] = [frozenset(map(str, replica.held())) for replica in fleet.replicas]
                reported_at = (fleet.now // report_s + 1) * report_s
            names = () if adapter == BASE else (str(adapter),)
            seen = [
                SeenReplica(name, load, fleet.rows, placements.held(name, report) if fleet.is_live else report)
                for name, load, report in zip(ids, fleet.loads, reports, strict=True)
            ]
            chosen = rule.order(names, seen)[0].id
            if fleet.is_live:
                placements.sent(chosen, names, fleet.slots)
            return number_of[chosen]

        return choose

    return make


class _Live:
    """A replica's adapters by name, at any moment."""

    def __init__(self, replica: Holder) -> None:
        self._replica = replica

    def __contains__(self, name: object) -> bool:
        return self._replica.holds(int(str(name)))


VIRTUAL_NODES = 100
BOUND = 1.25
"""Of consistent hashing: places of each replica on the ring, and how many times the mean load one may have."""


def bounded_hashing(fleet: Fleet) -> Policy:
    """Consistent hashing with bounded loads (Mirrokni, Thorup & Zadimoghaddam 2018): the first replica on the ring
    after the adapter's place whose load is not above ``BOUND`` times the mean, this request counted. It knows nothing
    of what a replica holds: a reference for policies that do."""
    loads = fleet.loads
    ring = sorted((_place(f"replica {i} {k}"), i) for i in range(len(loads)) for k in range(VIRTUAL_NODES))
    places = [place for place, _ in ring]
    starts: dict[int, int] = {}

    def choose(adapter: int) -> int:
        if adapter not in starts:
            starts[adapter] = bisect.bisect(places, _place(f"adapter {adapter}"))
        limit = math.ceil(BOUND * (sum(loads) + 1) / len(loads))
        at = starts[adapter]
        while True:
            replica = ring[at % len(ring)][1]
            if loads[replica] + 1 <= limit:
                return replica
            at += 1

    return choose


def _place(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
