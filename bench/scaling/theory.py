"""What is known without simulating: hit rates of a least-recently-used store, and waiting for one server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Shares = NDArray[np.float64]


def zipf_shares(adapters: int, exponent: float) -> Shares:
    """The k-th in proportion to 1 / k^``exponent``."""
    weights = np.arange(1, adapters + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def residence(shares: Shares, capacity: int) -> Shares:
    """The probability of each to be among the ``capacity`` most recently used, which are kept, requests being
    independent draws: 1 - exp(-share * T), with T such that they add up to ``capacity`` (Che, Tung & Wang 2002)."""
    if capacity >= np.count_nonzero(shares):
        return (shares > 0).astype(np.float64)
    low, high = 0.0, 1.0
    while _kept(shares, high) < capacity:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _kept(shares, middle) < capacity else (low, middle)
    return -np.expm1(-shares * high)


def _kept(shares: Shares, time: float) -> float:
    return float(-np.expm1(-shares * time).sum())


def lru_hit_rate(shares: Shares, capacity: int) -> float:
    """The share of requests that find their adapter."""
    return float(shares @ residence(shares, capacity))


def slots_for(shares: Shares, hit_rate: float) -> int:
    """The least capacity of one store with that hit rate; all adapters if only that gives it."""
    low, high = 0, len(shares)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if lru_hit_rate(shares, middle) >= hit_rate else (middle, high)
    return high


def md1_wait_s(rate: float, service_s: float) -> float:
    """Mean seconds in the queue of one server with Poisson arrivals and a constant time of service
    (Pollaczek-Khinchine). ValueError if it is overloaded."""
    load = rate * service_s
    if not 0 <= load < 1:
        raise ValueError(f"a load of {load:g} has no steady state")
    return load * service_s / (2 * (1 - load))


def percentiles(values: Sequence[float], at: Sequence[float]) -> list[float]:
    """Linear between the two nearest; NaN of nothing."""
    return [float(one) for one in np.percentile(values, at)] if len(values) else [float("nan")] * len(at)
