"""A cluster under a trace: arrivals are routed, replicas work, and what came of it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Any

import numpy as np

from scaling.costs import Costs
from scaling.replica import Answers, Replica, Sizes
from scaling.routing import Fleet, MakePolicy, Policy
from scaling.theory import Shares, percentiles
from scaling.tiers import Lookups
from scaling.traffic import BASE, Traffic

WARMUP = 0.2
"""Of a trace's requests: they are served, but not counted."""


@dataclass(frozen=True)
class Outcome:
    """What one run gave. Rates and shares are of the requests behind the warm-up, but for those of the tiers (uploads,
    reads), which are of the time from the first of these to the last arrival."""

    requests: int
    slot_hit_rate: float
    """Of the requests that need an adapter, those that found it in a slot when they were first tried."""
    uploads_per_request: float
    reads_per_request: float
    swap_mb_per_s: float
    """Uploaded by one replica, mean."""
    ttft_ms: dict[str, float]
    request_ms: dict[str, float]
    busy: float
    """Share of the time in which a replica computes, mean of the replicas."""
    imbalance: float
    """The busiest replica's time over the mean."""
    backlog: float
    """Requests of a replica, mean, that were not answered when the last came: if there are more than rows, the cluster
    does not keep up, and all times depend on how long it was watched."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Cluster:
    """Replicas of one size, and the policy in front of them."""

    def __init__(
        self, traffic: Traffic, make_policy: MakePolicy, costs: Costs, sizes: Sizes, replicas: int, *, seed: int = 0
    ) -> None:
        self.traffic, self.costs = traffic, costs
        self.answers = Answers(len(traffic))
        self.loads = [0] * replicas
        self._events: list[tuple[float, int, int, int, int]] = []
        self._serial = count()
        self.replicas = [
            Replica(i, traffic, self.answers, costs, sizes, self.loads, self._schedule) for i in range(replicas)
        ]
        self._fleet = Fleet(self.replicas, self.loads, sizes.rows, sizes.slots, random.Random(f"{seed} policy"))
        self._policy: Policy = make_policy(self._fleet)
        self._sizes = sizes

    def fill(self, shares: Shares, *, seed: int = 0) -> None:
        """Let replicas hold what they would after a long life: each adapter was asked for once, the least popular
        first, and then as many draws as host memories have room for. Where every adapter has room in each, each
        is there. Nothing takes time, so policies see idle replicas."""
        rng = np.random.default_rng(seed)
        if len(shares) <= self._sizes.host:
            self.hold_in_host(range(len(shares)))
        draws = len(self.replicas) * min(self._sizes.host, len(shares))
        for adapter in (*range(len(shares) - 1, -1, -1), *rng.choice(len(shares), size=draws, p=shares).tolist()):
            replica = self.replicas[self._policy(adapter)]
            replica.tiers.touch(adapter, Lookups())

    def hold_in_host(self, adapters: Iterable[int]) -> None:
        """Let each replica have read these, in this order, and nothing else: what a server does that is given them."""
        for adapter in adapters:
            for replica in self.replicas:
                replica.tiers.arrived_in_host(adapter, leased=False)

    def run(self) -> None:
        """All requests, to the last answer."""
        events, replicas, policy, fleet = self._events, self.replicas, self._policy, self._fleet
        fleet.is_live = True
        number, total = 0, len(self.traffic)
        times, adapters = self.traffic.at_s, self.traffic.adapter
        first_counted = int(WARMUP * total)
        while number < total or events:
            if number < total and (not events or times[number] <= events[0][0]):
                if number == first_counted:
                    self._at_warm = self._counted()
                fleet.now = times[number]
                replicas[policy(adapters[number])].arrive(number, times[number])
                number += 1
                if number == total:
                    self._at_last = self._counted()
            else:
                now, _, replica, kind, what = heappop(events)
                replicas[replica].ended(kind, what, now)

    def outcome(self) -> Outcome:
        """After ``run``."""
        first = int(WARMUP * len(self.traffic))
        counted = range(first, len(self.traffic))
        times, answers = self.traffic.at_s, self.answers
        elapsed = times[-1] - times[first]
        (uploads, reads, busy), (uploads_before, reads_before, busy_before) = self._at_last, self._at_warm
        with_adapter = [i for i in counted if self.traffic.adapter[i] != BASE]
        hits = sum(1 for i in with_adapter if not answers.missed[i])
        worked = [after - before for after, before in zip(busy, busy_before, strict=True)]
        mean_busy = sum(worked) / len(worked)
        n, replicas = max(len(with_adapter), 1), len(self.replicas)
        return Outcome(
            requests=len(counted),
            slot_hit_rate=hits / n,
            uploads_per_request=(uploads - uploads_before) / n,
            reads_per_request=(reads - reads_before) / n,
            swap_mb_per_s=(uploads - uploads_before) * self.costs.adapter_bytes / 1e6 / elapsed / replicas,
            ttft_ms=_milliseconds([answers.first_token_s[i] - times[i] for i in counted]),
            request_ms=_milliseconds([answers.end_s[i] - times[i] for i in counted]),
            busy=mean_busy / elapsed,
            imbalance=max(worked) / mean_busy,
            backlog=sum(1 for end in answers.end_s if end > times[-1]) / replicas,
        )

    def _counted(self) -> tuple[int, int, list[float]]:
        counts = [replica.counts for replica in self.replicas]
        return (
            sum(one.uploads for one in counts),
            sum(one.reads for one in counts),
            [replica.busy_s for replica in self.replicas],
        )

    def _schedule(self, at: float, replica: int, kind: int, what: int) -> None:
        heappush(self._events, (at, next(self._serial), replica, kind, what))


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    return {
        name: value * 1e3 for name, value in zip(("p50", "p95", "p99"), percentiles(seconds, (50, 95, 99)), strict=True)
    }
