"""Which replica a request goes to: pure functions of what is known of the replicas. Nothing of Ray, nothing of torch.

The rule (``AffinityPolicy``): a replica that has the request's adapters on its device and is not overloaded; else the
least loaded one, which will load them; else whoever is left, the least loaded first. Every replica can answer every
request, so an order is all that a policy gives: whoever comes first and still has room takes it.

Two refinements keep the rule from working against itself:

- *Overloaded* means that all rows are taken **and** that another replica has ``margin`` rows' worth fewer requests. A
  fleet that is full everywhere does not start to shuffle its adapters about, which would make it slower still.
- Among replicas whose load differs by no more than ``slack`` (a row more or less costs a batch little) a rendezvous
  hash of (adapter, replica) decides, not the load. So an adapter that has lost its slot comes back to where it was, all
  routers agree without talking to each other, and a replica that comes or goes moves only its own share of them
  (Thaler and Ravishankar, 1998).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Replica:
    """What a router knows of one replica at the moment it routes."""

    id: str
    load: int
    """Requests that were sent to it and have not ended."""
    rows: int
    """Requests that it computes together in one step, 1 or more."""
    held: Container[str] = frozenset()
    """Names of the adapters that have a slot on its device."""

    @property
    def pressure(self) -> float:
        """Load in batches: 1.0 when every row is taken."""
        return self.load / self.rows


class Policy(Protocol):
    def order(self, adapters: Sequence[str], replicas: Sequence[Replica]) -> list[Replica]:
        """All ``replicas``, who is to be asked first at the front. ``adapters``: what is named; none for the base."""
        ...


@dataclass(frozen=True)
class AffinityPolicy:
    """See the top of this module.

    Args:
        full: pressure from which a replica may be overloaded; 1.0 is a batch with every row taken.
        margin: how much more pressure than the least pressed replica an overloaded one has.
        slack: difference in pressure that is not worth looking at when nobody holds the adapter.
    """

    full: float = 1.0
    margin: float = 0.5
    slack: float = 0.25

    def __post_init__(self) -> None:
        for name in ("full", "margin", "slack"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)!r}")

    def order(self, adapters: Sequence[str], replicas: Sequence[Replica]) -> list[Replica]:
        if not replicas:
            return []
        least = min(replica.pressure for replica in replicas)
        holders: list[Replica] = []
        others: list[Replica] = []
        overloaded: list[Replica] = []
        for replica in replicas:
            if replica.pressure >= self.full and replica.pressure - least >= self.margin:
                overloaded.append(replica)
            elif all(name in replica.held for name in adapters):
                holders.append(replica)
            else:
                others.append(replica)
        key = "\n".join(sorted(adapters))
        near = [replica for replica in others if replica.pressure - least <= self.slack]
        far = [replica for replica in others if replica.pressure - least > self.slack]
        return [
            *sorted(holders, key=lambda replica: (replica.pressure, -rendezvous(key, replica.id))),
            *sorted(near, key=lambda replica: -rendezvous(key, replica.id)),
            *sorted(far, key=lambda replica: (replica.pressure, -rendezvous(key, replica.id))),
            *sorted(overloaded, key=lambda replica: (replica.pressure, -rendezvous(key, replica.id))),
        ]


class RandomPolicy:
    """Any order, whatever the replicas hold and have to do: what affinity is measured against."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def order(self, adapters: Sequence[str], replicas: Sequence[Replica]) -> list[Replica]:
        return self._random.sample(replicas, len(replicas))


POLICIES: dict[str, Callable[[], Policy]] = {"affinity": AffinityPolicy, "random": RandomPolicy}
"""By the name that ``--routing`` takes."""


@lru_cache(maxsize=1 << 16)
def rendezvous(key: str, replica: str) -> int:
    """How much ``key`` is at home at ``replica``: 64 bits, the same in every process."""
    return int.from_bytes(blake2b(f"{key}\0{replica}".encode(), digest_size=8).digest(), "big")


class Placements:
    """Where this router sent which adapters lately, until the replicas' own reports speak of it.

    A report is a second old, or more; without this, ten requests for an adapter that come in that second would be ten
    misses on ten replicas. A replica is remembered to hold no more than it has slots, the latest ones, and each for
    ``ttl_s`` seconds: then its reports have had time to say so themselves.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._sent: dict[str, OrderedDict[str, float]] = {}

    def sent(self, replica: str, adapters: Iterable[str], slots: int) -> None:
        """Requests for ``adapters`` went to ``replica``, which has so many slots."""
        sent = self._sent.setdefault(replica, OrderedDict())
        until = self._clock() + self._ttl_s
        for name in adapters:
            sent[name] = until
            sent.move_to_end(name)
        while len(sent) > slots:
            sent.popitem(last=False)

    def held(self, replica: str, reported: Collection[str]) -> Container[str]:
        """What ``replica`` holds: what it reported, and what was sent to it since."""
        sent = self._sent.get(replica)
        if not sent:
            return reported
        now = self._clock()
        while sent and next(iter(sent.values())) <= now:
            sent.popitem(last=False)
        return _Either(reported, sent)

    def forget(self, replicas: Container[str]) -> None:
        """Keep only what is known of ``replicas``."""
        for gone in [replica for replica in self._sent if replica not in replicas]:
            del self._sent[gone]


@dataclass(frozen=True, slots=True)
class _Either:
    """In one or in the other; nothing is copied for each request."""

    first: Container[str]
    second: Container[str]

    def __contains__(self, name: object) -> bool:
        return name in self.first or name in self.second
