"""The slope, against lines and noise that were made."""

from __future__ import annotations

import math
import os
import random

import numpy as np
import pytest
from loadgen.soak.verdict import verdict
from loadgen.soak.vitals import MIB, Slope, rise, sample, slope


def line(per_hour: float, noise: float = 0.0, *, seconds: int = 900, seed: int = 0) -> list[tuple[float, float]]:
    """Every 2 seconds, MiB."""
    rng = random.Random(seed)
    return [(at, 500 + per_hour * at / 3600 + rng.gauss(0, noise)) for at in range(300, 300 + seconds, 2)]


@pytest.mark.parametrize("per_hour", [-120.0, 0.0, 30.0, 1000.0])
def test_a_line_is_found(per_hour: float) -> None:
    found = slope(line(per_hour))
    assert found is not None
    assert found.per_hour == pytest.approx(per_hour, abs=1e-6)
    assert found.noise == pytest.approx(0, abs=1e-6)
    assert found.points == 45


def test_it_is_least_squares() -> None:
    points = [(60.0 * i, value) for i, value in enumerate([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])]
    found = slope(points)
    expected, covariance = np.polyfit([at / 3600 for at, _ in points], [value for _, value in points], 1, cov=True)
    assert found is not None
    assert found.per_hour == pytest.approx(expected[0])
    assert found.noise == pytest.approx(2.45 * math.sqrt(covariance[0, 0]), rel=1e-3)  # t of 6 degrees of freedom


def test_the_noise_holds_the_truth_19_times_in_20() -> None:
    held = 0
    for seed in range(400):
        found = slope(line(50.0, 20.0, seed=seed))
        assert found is not None
        held += abs(found.per_hour - 50.0) <= found.noise
    assert 0.92 < held / 400 < 0.98


def test_noise_alone_is_no_leak_and_a_leak_in_noise_is_one() -> None:
    limit = 64.0
    assert verdict(slope(line(0.0, 5.0)), limit) == "flat"
    assert verdict(slope(line(400.0, 5.0)), limit) == "grows"
    assert verdict(slope(line(9000.0, 5.0, seconds=250)), limit) == "too short to tell"
    assert verdict(slope(line(0.0, 300.0)), limit) == "not told from noise"
    assert verdict(None, limit) == "too short to tell"
    assert not Slope(1e9, math.inf, 4, 0, 0).exceeds(limit)


def test_rise() -> None:
    assert rise([3] * 30) == 0
    assert rise([*[3] * 10, *[50] * 10, *[7] * 10]) == 4
    assert rise([1, 9, 9]) == 0  # too few to say


def test_a_sample_of_this_process() -> None:
    held = np.ones(64 * MIB // 8)
    found = sample(os.getpid(), 1.5, True)
    with open(__file__):
        more = sample(os.getpid(), 2.0, False)
    assert found.rss > held.nbytes
    assert found.threads >= 1
    assert more.files == found.files + 1
    assert (more.at_s, more.comparable) == (2.0, False)
