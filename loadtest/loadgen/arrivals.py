"""When requests arrive: a level over time (steady, burst, ramp), and the times that follow from it.

The level is relative: 1 is the profile's rate (open loop) or number of clients (closed loop). Open-loop times come by
time change: events of rate 1 on an axis of *work* are carried to seconds by the inverse of the level's integral,
which is exact for a Poisson process of changing rate (the time-scale transformation in Lewis & Shedler 1979), and
spaces a fixed rate evenly in work."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from loadgen.errors import ProfileError

Shape = Literal["steady", "burst", "ramp"]
Spacing = Literal["poisson", "fixed"]


@dataclass(frozen=True)
class Arrival:
    """``steady``: level 1. ``burst``: 1, but ``burst_factor`` in the last ``burst_s`` of each ``burst_every_s`` s.
    ``ramp``: from ``ramp_from`` at the start straight up to 1 at the end of the run."""

    shape: Shape = "steady"
    spacing: Spacing = "poisson"
    burst_factor: float = 4.0
    burst_every_s: float = 10.0
    burst_s: float = 2.0
    ramp_from: float = 0.1

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ProfileError(f"arrival: expected one of {', '.join(get_args(Shape))}, got {self.shape!r}")
        if self.spacing not in get_args(Spacing):
            raise ProfileError(f"spacing: expected one of {', '.join(get_args(Spacing))}, got {self.spacing!r}")
        if not 1 <= self.burst_factor <= 1000:
            raise ProfileError(f"burst factor: expected 1 to 1000, got {self.burst_factor:g}")
        if not 0 < self.burst_s <= self.burst_every_s:
            raise ProfileError(
                f"burst: expected 0 < length <= period, got {self.burst_s:g} of {self.burst_every_s:g} s"
            )
        if not 0 < self.ramp_from <= 1:
            raise ProfileError(f"ramp from: expected > 0 and <= 1, got {self.ramp_from:g}")

    @property
    def peak(self) -> float:
        return self.burst_factor if self.shape == "burst" else 1.0

    def level(self, at_s: float, run_s: float) -> float:
        """The level ``at_s`` seconds into a run of ``run_s``."""
        if self.shape == "burst":
            return self.burst_factor if at_s % self.burst_every_s >= self.burst_every_s - self.burst_s else 1.0
        if self.shape == "ramp":
            return self.ramp_from + (1 - self.ramp_from) * min(at_s / run_s, 1.0)
        return 1.0

    def time_of(self, work: float, run_s: float) -> float:
        """Seconds at which the level's integral reaches ``work``. Past the end of a ramp its slope goes on, which no
        caller sees: arrivals end with the run."""
        if self.shape == "burst":
            calm = self.burst_every_s - self.burst_s
            periods, rest = divmod(work, calm + self.burst_factor * self.burst_s)
            within = rest if rest <= calm else calm + (rest - calm) / self.burst_factor
            return periods * self.burst_every_s + within
        if self.shape == "ramp" and self.ramp_from < 1:
            # The root of ramp_from * t + slope * t^2 / 2 = work.
            slope = (1 - self.ramp_from) / run_s
            return (math.sqrt(self.ramp_from**2 + 2 * slope * work) - self.ramp_from) / slope
        return work

    def times(self, rate: float, run_s: float, rng: random.Random) -> Iterator[float]:
        """Seconds from the start, rising, below ``run_s``; ``rate`` is of level 1, in requests a second. With fixed
        spacing the first is at 0."""
        work = rng.expovariate(rate) if self.spacing == "poisson" else 0.0
        while (at_s := self.time_of(work, run_s)) < run_s:
            yield at_s
            work += rng.expovariate(rate) if self.spacing == "poisson" else 1 / rate
