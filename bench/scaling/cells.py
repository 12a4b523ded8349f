"""One cell of a table: so many adapters on so many replicas, asked by one policy, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from manylora.deploy.ray_serve.affinity import AffinityPolicy
from scaling import routing
from scaling.costs import Costs
from scaling.replica import Sizes
from scaling.simulation import Cluster, Outcome
from scaling.theory import zipf_shares
from scaling.traffic import Traffic, zipf

POLICIES: dict[str, routing.MakePolicy] = {
    "random": routing.at_random,
    "round robin": routing.round_robin,
    "least loaded": routing.least_loaded,
    "bounded hashing": routing.bounded_hashing,
    "affinity": routing.affinity(),
}
"""What is compared; ``affinity`` is deploy/'s own with its defaults."""
VARIANTS: dict[str, routing.MakePolicy] = {
    "affinity, always true reports": routing.affinity(report_s=0.0),
    "affinity, reports every 10 s": routing.affinity(report_s=10.0),
    "affinity, full at 0.5": routing.affinity(AffinityPolicy(full=0.5, margin=0.25, slack=0.125)),
    "affinity, full at 0.25": routing.affinity(AffinityPolicy(full=0.25, margin=0.125, slack=0.125)),
    "affinity, slack 0.5": routing.affinity(AffinityPolicy(slack=0.5)),
    "affinity, full at 2": routing.affinity(AffinityPolicy(full=2.0, margin=1.0, slack=0.5)),
}
"""What a change of its settings would do."""


_SIZES = Sizes()


@dataclass(frozen=True)
class Cell:
    """``load``: requests a second as a share of what the replicas could answer at most (``Costs.capacity``)."""

    adapters: int
    replicas: int
    policy: str
    zipf: float = 1.0
    load: float = 0.8
    sizes: Sizes = _SIZES
    requests: int = 20_000
    seed: int = 0

    def rate(self, costs: Costs) -> float:
        """Requests a second, of all replicas."""
        traffic = drawn(self.adapters, self.zipf, self.requests, self.seed)
        return self.load * self.replicas * capacity(traffic, costs, self.sizes)

    def run(self, costs: Costs) -> Outcome:
        traffic = drawn(self.adapters, self.zipf, self.requests, self.seed)
        make_policy = (POLICIES | VARIANTS)[self.policy]
        timed = traffic.first(self.requests, rate=self.rate(costs))
        cluster = Cluster(timed, make_policy, costs, self.sizes, self.replicas, seed=self.seed)
        cluster.fill(zipf_shares(self.adapters, self.zipf), seed=self.seed)
        cluster.run()
        return cluster.outcome()


@lru_cache(maxsize=4)
def drawn(adapters: int, exponent: float, requests: int, seed: int) -> Traffic:
    return zipf(adapters, exponent, requests, seed=seed)


def capacity(traffic: Traffic, costs: Costs, sizes: Sizes) -> float:
    """Of one replica, requests a second."""
    return costs.capacity(
        rows=sizes.rows, slots=sizes.slots, prompt_tokens=traffic.mean_prompt, output_tokens=traffic.mean_output
    )
