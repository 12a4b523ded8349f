"""The simulator where theory has the answer: hit rates of independent draws, waiting for one server."""

from __future__ import annotations

import random
import sys
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from scaling import routing
from scaling.costs import Costs
from scaling.replica import Sizes
from scaling.simulation import Cluster
from scaling.theory import lru_hit_rate, md1_wait_s, percentiles, residence, slots_for, zipf_shares
from scaling.tiers import Lookups, Tiers
from scaling.traffic import Traffic, zipf


def test_zipf_shares() -> None:
    assert zipf_shares(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert zipf_shares(4, 0.0) == pytest.approx([0.25] * 4)


def test_what_is_kept_adds_up_to_the_capacity() -> None:
    shares = zipf_shares(1000, 0.8)
    for capacity in (1, 10, 500, 999):
        kept = residence(shares, capacity)
        assert kept.sum() == pytest.approx(capacity, rel=1e-6)
        assert (np.diff(kept) <= 0).all(), "the more popular is the likelier to be there"
    assert lru_hit_rate(shares, 1000) == lru_hit_rate(shares, 5000) == pytest.approx(1.0)


def test_equal_shares_are_hit_as_often_as_there_is_room() -> None:
    assert lru_hit_rate(zipf_shares(200, 0.0), 50) == pytest.approx(0.25)


def test_the_least_slots_for_a_hit_rate() -> None:
    shares = zipf_shares(1000, 1.0)
    slots = slots_for(shares, 0.9)
    assert lru_hit_rate(shares, slots) >= 0.9 > lru_hit_rate(shares, slots - 1)
    assert slots_for(shares, 1.0) == 1000


@pytest.mark.parametrize(("adapters", "exponent", "slots"), [(200, 1.0, 16), (1000, 1.0, 64), (1000, 0.7, 200)])
def test_slots_and_host_memory_hit_as_theory_says(adapters: int, exponent: float, slots: int) -> None:
    shares = zipf_shares(adapters, exponent)
    draws = random.Random(1).choices(range(adapters), cum_weights=list(accumulate(shares)), k=60_000)
    tiers = Tiers(slots, adapters)
    for adapter in draws[:10_000]:
        tiers.touch(adapter, Lookups())
    counts = Lookups()
    for adapter in draws[10_000:]:
        tiers.touch(adapter, counts)
    assert counts.slot_hits / 50_000 == pytest.approx(lru_hit_rate(shares, slots), abs=0.01)
    assert counts.slot_hits + counts.slot_misses == 50_000
    assert counts.uploads == counts.slot_misses


def test_a_replica_with_time_hits_as_theory_says() -> None:
    shares = zipf_shares(300, 1.0)
    traffic = zipf(300, 1.0, 20_000, rate=1.0)
    costs = Costs(((1, 0.001), (8, 0.001)), 0.0, 0.0, 0.001, 0.001, 1.0)  # far from busy: no slot is ever in use
    cluster = Cluster(traffic, routing.at_random, costs, Sizes(slots=32, host=64), 1)
    cluster.fill(shares)
    cluster.run()
    assert cluster.outcome().slot_hit_rate == pytest.approx(lru_hit_rate(shares, 32), abs=0.01)


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_one_row_of_one_step_waits_as_one_server_with_constant_service(load: float) -> None:
    """M/D/1: one row, one token in and one out, so a request is one step."""
    service_s, count = 0.1, 40_000
    rng = random.Random(2)
    times = list(accumulate(rng.expovariate(load / service_s) for _ in range(count)))
    traffic = Traffic(times, [0] * count, [1] * count, [1] * count, 1)
    costs = Costs(((1, service_s), (2, service_s)), 0.0, 0.0, 0.0, 0.0, 1.0)
    cluster = Cluster(traffic, routing.at_random, costs, Sizes(slots=1, host=1, rows=1), 1)
    cluster.run()
    waits = [first - at - service_s for first, at in zip(cluster.answers.first_token_s, times, strict=True)]
    assert sum(waits) / count == pytest.approx(md1_wait_s(load / service_s, service_s), rel=0.06)
    assert min(waits) > -1e-9


def test_md1_says_when_there_is_no_answer() -> None:
    assert md1_wait_s(5, 0.1) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="1"):
        md1_wait_s(10, 0.1)


def test_percentiles() -> None:
    assert percentiles([4.0, 1.0, 3.0, 2.0], (50, 100)) == [2.5, 4.0]
    assert np.isnan(percentiles([], (50,))[0])
