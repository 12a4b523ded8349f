"""What must hold in every simulated cluster, whatever the policy."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "loadtest"))

from loadgen.profiles import PROFILES, requests_of
from loadgen.traces import TracedRequest
from scaling.cells import POLICIES, VARIANTS, Cell
from scaling.costs import Costs
from scaling.replica import Sizes
from scaling.routing import BOUND, Fleet, MakePolicy
from scaling.simulation import Cluster
from scaling.theory import lru_hit_rate, zipf_shares
from scaling.tiers import Lookups, Tiers
from scaling.traffic import BASE, Traffic, zipf

COSTS = Costs(((1, 0.005), (8, 0.011), (32, 0.025)), 0.0005, 0.0007, 0.016, 0.1, 2e7)
EVERY = POLICIES | VARIANTS


def cluster_of(
    policy: str, replicas: int, *, load: float = 0.8, count: int = 3000, sizes: Sizes | None = None
) -> Cluster:
    sizes = sizes or Sizes(slots=8, host=24, rows=16)
    traffic = zipf(200, 1.0, count)
    # One request in eight is the base's.
    traffic = dataclasses.replace(traffic, adapter=[BASE if i % 8 == 3 else a for i, a in enumerate(traffic.adapter)])
    capacity = COSTS.capacity(rows=sizes.rows, slots=sizes.slots, prompt_tokens=64, output_tokens=32)
    cluster = Cluster(traffic.first(count, rate=load * replicas * capacity), EVERY[policy], COSTS, sizes, replicas)
    cluster.fill(zipf_shares(200, 1.0))
    return cluster


@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize("load", [0.5, 1.3])
def test_each_request_is_served_once_and_everything_adds_up(policy: str, load: float) -> None:
    cluster = cluster_of(policy, 3, load=load)
    cluster.run()
    answers, traffic = cluster.answers, cluster.traffic
    assert list(answers.starts) == [1] * len(traffic)
    for i, at_s in enumerate(traffic.at_s):
        first, end = answers.first_token_s[i], answers.end_s[i]
        assert at_s < first <= end, "NaN compares as false, too"
        assert (first == end) == (traffic.output[i] == 1)
    assert cluster.loads == [0, 0, 0]
    for number, replica in enumerate(cluster.replicas):
        own = [i for i in range(len(traffic)) if answers.replica[i] == number and traffic.adapter[i] != BASE]
        counts, tiers = replica.counts, replica.tiers
        assert counts.slot_hits + counts.slot_misses == len(own)
        assert counts.slot_misses == sum(answers.missed[i] for i in own)
        assert counts.reads <= counts.uploads <= counts.slot_misses, "several may wait for one upload"
        assert not any(tiers.slots.values()), "a slot is in use while nobody runs"
        assert not tiers.uploading
        assert not tiers.leased
        assert len(tiers.slots) <= tiers.slot_capacity
        assert len(tiers.host) <= tiers.host_capacity
        assert 0 < replica.busy_s <= max(answers.end_s)


@pytest.mark.parametrize("policy", EVERY)
def test_the_same_seed_gives_the_same_run(policy: str) -> None:
    runs = []
    for _ in range(2):
        cluster = cluster_of(policy, 3, count=1500)
        cluster.run()
        runs.append((cluster.answers.first_token_s, cluster.answers.replica, cluster.outcome()))
    assert runs[0] == runs[1]


def test_another_seed_gives_another_run() -> None:
    cell = Cell(100, 2, "random", requests=1000)
    assert cell.run(COSTS) != dataclasses.replace(cell, seed=1).run(COSTS)


def test_with_one_replica_all_policies_are_the_same() -> None:
    ends = []
    for policy in EVERY:
        cluster = cluster_of(policy, 1, count=1500)
        cluster.run()
        ends.append(cluster.answers.end_s)
    assert all(one == ends[0] for one in ends)


@pytest.mark.parametrize(("rows", "slots"), [(1, 1), (4, 1), (16, 2), (2, 40)])
def test_few_rows_or_few_slots_end_too(rows: int, slots: int) -> None:
    cluster = cluster_of("random", 2, count=800, sizes=Sizes(slots=slots, host=max(4, slots), rows=rows))
    cluster.run()
    assert list(cluster.answers.starts) == [1] * 800
    assert all(end > 0 for end in cluster.answers.end_s)


def test_affinity_hits_more_than_chance_and_no_more_than_theory() -> None:
    def rate(policy: str) -> float:
        return Cell(1000, 4, policy, load=0.5, requests=12_000).run(COSTS).slot_hit_rate

    shares = zipf_shares(1000, 1.0)
    together = lru_hit_rate(shares, 4 * Sizes().slots)
    assert rate("random") == pytest.approx(lru_hit_rate(shares, Sizes().slots), abs=0.02)
    assert together - 0.03 < rate("affinity") < together + 0.02


def test_outcome_counts_what_is_behind_the_warm_up() -> None:
    """Ten requests for one adapter, which is on the device; then ten that need another each."""
    traffic = Traffic([float(i) for i in range(20)], [0] * 10 + list(range(1, 11)), [1] * 20, [2] * 20, 11)
    cluster = Cluster(traffic, EVERY["random"], COSTS, Sizes(slots=4, host=11), 1)
    cluster.hold_in_host(range(11))
    cluster.run()
    found = cluster.outcome()
    assert found.requests == 16
    assert found.slot_hit_rate == pytest.approx(6 / 16)
    assert found.uploads_per_request == pytest.approx(10 / 16)
    assert found.reads_per_request == 0
    assert found.swap_mb_per_s == pytest.approx(10 * 20 / 15)
    assert found.imbalance == 1
    assert found.backlog == 1, "the last one has just arrived"
    assert found.ttft_ms["p50"] >= 16, "more than half waited for an upload of 16 ms"


def test_swap_traffic_and_imbalance_are_of_a_replica() -> None:
    """Ten requests, each for another adapter, in turn to two replicas; those to the first answer ten times as much."""
    traffic = Traffic([float(i) for i in range(10)], list(range(10)), [1] * 10, [50, 5] * 5, 10)
    cluster = Cluster(traffic, EVERY["round robin"], COSTS, Sizes(slots=4, host=10), 2)
    cluster.hold_in_host(range(10))
    cluster.run()
    found = cluster.outcome()
    # Behind the first two: eight uploads in seven seconds, the last begun as the last request came.
    assert found.swap_mb_per_s == pytest.approx(8 * 20 / 7 / 2)
    assert 1.5 < found.imbalance < 2


def test_tiers_are_filled_as_after_a_long_life() -> None:
    for host, everywhere in ((50, False), (100, True)):
        cluster = Cluster(zipf(100, 1.0, 10), EVERY["affinity"], COSTS, Sizes(slots=4, host=host), 4)
        cluster.fill(zipf_shares(100, 1.0))
        held = [set(replica.tiers.host) for replica in cluster.replicas]
        assert set.union(*held) == set(range(100)), "each was asked for once"
        assert all(len(one) == 100 for one in held) == everywhere
        assert [len(replica.tiers.slots) for replica in cluster.replicas] == [4] * 4
        assert cluster.loads == [0] * 4


# --- tiers -----------------------------------------------------------------------------------------------------------


def test_what_is_in_use_keeps_its_slot() -> None:
    tiers = Tiers(2, 8)
    for adapter in (0, 1):
        tiers.touch(adapter, Lookups())
    tiers.use(0)
    tiers.use(1)
    tiers.arrived_in_host(2, leased=True)
    assert not tiers.reserve(2)
    tiers.release(1)
    assert tiers.reserve(2)
    assert (tiers.holds(0), tiers.holds(1), tiers.holds(2)) == (True, False, True)
    assert 2 not in tiers.slots, "it cannot be used before it was uploaded"
    tiers.uploaded(2)
    assert list(tiers.slots) == [0, 2]


def test_the_least_recently_used_goes() -> None:
    tiers, counts = Tiers(2, 2), Lookups()
    for adapter in (0, 1, 0, 2):
        tiers.touch(adapter, counts)
    assert list(tiers.slots) == [0, 2]
    assert list(tiers.host) == [1, 2]
    assert counts == Lookups(slot_hits=1, slot_misses=3, uploads=3, reads=3)


def test_a_slot_is_used_when_a_request_begins_and_when_it_ends() -> None:
    tiers = Tiers(2, 2)
    for adapter in (0, 1):
        tiers.touch(adapter, Lookups())
    tiers.use(0)
    assert list(tiers.slots) == [1, 0]
    tiers.use(1)
    assert list(tiers.slots) == [0, 1]
    tiers.release(0)
    assert list(tiers.slots) == [1, 0]


def test_an_upload_is_a_use_of_the_host_copy_and_a_slot_hit_is_not() -> None:
    tiers = Tiers(1, 2)
    for adapter in (0, 1, 0):
        tiers.touch(adapter, Lookups())
    assert list(tiers.host) == [1, 0]
    tiers.touch(0, Lookups())
    tiers.arrived_in_host(2, leased=False)
    assert list(tiers.host) == [0, 2]


def test_what_somebody_waits_for_stays_in_host_memory() -> None:
    tiers = Tiers(1, 2)
    tiers.arrived_in_host(0, leased=True)
    for adapter in (1, 2, 3):
        tiers.arrived_in_host(adapter, leased=False)
    assert list(tiers.host) == [0, 3]


# --- policies --------------------------------------------------------------------------------------------------------


class Empty:
    """A replica that holds nothing."""

    def holds(self, adapter: int) -> bool:
        return False

    def held(self) -> set[int]:
        return set()


def asked(make: MakePolicy, loads: list[int], adapters: list[int], *, grow: bool = False) -> list[int]:
    choose: Callable[[int], int] = make(Fleet([Empty() for _ in loads], loads, 32, 8, random.Random(0), is_live=True))
    found = []
    for adapter in adapters:
        found.append(choose(adapter))
        loads[found[-1]] += grow
    return found


def test_round_robin_takes_turns() -> None:
    assert asked(POLICIES["round robin"], [9, 0, 0], [5] * 7) == [0, 1, 2, 0, 1, 2, 0]


def test_random_asks_all_alike() -> None:
    found = asked(POLICIES["random"], [0] * 4, [1] * 4000)
    assert [found.count(i) for i in range(4)] == [pytest.approx(1000, abs=120)] * 4


def test_least_loaded_is_never_more_than_one_apart() -> None:
    loads = [0] * 5
    found = asked(POLICIES["least loaded"], loads, [3] * 103, grow=True)
    assert max(loads) - min(loads) == 1
    assert found[:5] != [0, 1, 2, 3, 4], "ties are broken at random"


def test_bounded_hashing_keeps_an_adapter_at_home_within_the_bound() -> None:
    homes = [asked(POLICIES["bounded hashing"], [0] * 10, [adapter] * 3) for adapter in range(50)]
    assert all(len(set(home)) == 1 for home in homes)
    assert len({home[0] for home in homes}) >= 8
    loads = [0] * 10
    asked(POLICIES["bounded hashing"], loads, [7] * 1000, grow=True)
    assert max(loads) <= BOUND * sum(loads) / 10 + 1
    assert sum(loads) == 1000


def test_affinity_remembers_where_it_sent_an_adapter_before_it_is_reported() -> None:
    loads = [0, 0, 0]
    fleet = Fleet([Empty() for _ in loads], loads, 32, 8, random.Random(0), is_live=True)
    choose = POLICIES["affinity"](fleet)
    first = choose(4)
    loads[first] = 15  # too much for a home that holds nothing, not for a holder that has rows left
    assert choose(4) == first
    fleet.now = 60.0  # and nothing was reported since
    assert choose(4) != first


# --- traffic ---------------------------------------------------------------------------------------------------------


def test_traffic_is_what_the_load_test_sends_at_that_rate() -> None:
    stretched = zipf(50, 0.9, 300).first(200, rate=3.5)
    profile = PROFILES["zipf"]
    profile = dataclasses.replace(
        profile,
        rate=3.5,
        popularity=dataclasses.replace(profile.popularity, zipf_exponent=0.9),
        seconds=1000.0,
        max_requests=200,
    )
    names = [f"a{i}" for i in range(50)]
    sent = list(requests_of(profile, names, None))
    assert stretched.at_s == pytest.approx([request.at_s for request in sent], abs=1e-3)
    assert [names[i] for i in stretched.adapter] == [request.model for request in sent]
    assert stretched.prompt == [request.prompt_tokens for request in sent]
    assert stretched.output == [request.max_tokens for request in sent]


def test_traffic_of_a_trace() -> None:
    trace = [
        TracedRequest(0.0, "b", 8, prompt_tokens=5),
        TracedRequest(1.0, "base", 9, prompt=(1, 2, 3)),
        TracedRequest(2.0, "new", 10, prompt="eight ch"),
        TracedRequest(3.0, "a", 11, prompt="x"),
    ]
    traffic = Traffic.of_requests(trace, ["a", "b"], "base")
    assert traffic == Traffic([0.0, 1.0, 2.0, 3.0], [1, BASE, 2, 0], [5, 3, 2, 1], [8, 9, 10, 11], 3)


def test_sizes_that_cannot_be() -> None:
    for wrong in ({"slots": 0}, {"host": 0}, {"rows": 0}, {"rows": 300}):
        with pytest.raises(ValueError, match="sizes"):
            Sizes(**wrong)
