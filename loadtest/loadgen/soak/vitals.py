"""What the server's process holds over time: memory, threads, open files; and whether that grows."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
WINDOW_S = 20.0
"""Samples of so many seconds are one point of the fit: neighbours hang together, and would make the slope look better
known than it is."""
MIN_POINTS = 6
"""Fewer say nothing about noise."""
MIN_SPAN_S = 300.0
"""Samples over less time than this have no slope to speak of: a heap fills up in steps, whatever is done to it."""
_T_95 = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
    2.23,
    2.20,
    2.18,
    2.16,
    2.14,
    2.13,
    2.12,
    2.11,
    2.10,
    2.09,
)
"""Student's t, two-sided 95 %, by degrees of freedom from 1; beyond, 2.05."""


@dataclass(frozen=True)
class Sample:
    """``at_s`` of the run's clock; ``comparable`` unless a merged copy of the weights was, or was becoming, part of
    the memory."""

    at_s: float
    rss: int
    threads: int
    files: int
    comparable: bool = True


@dataclass(frozen=True)
class Slope:
    """Least squares. ``noise`` is half of the 95 % confidence interval; infinite where there is too little to tell."""

    per_hour: float
    noise: float
    points: int
    first: float
    last: float
    """The fitted line's ends."""

    def exceeds(self, limit: float) -> bool:
        """Whether it grows faster than ``limit`` an hour for certain: noise alone would not look so."""
        return self.per_hour - self.noise > limit

    def within(self, limit: float) -> bool:
        """Whether it certainly does not."""
        return self.per_hour + self.noise <= limit


def sample(pid: int, at_s: float, comparable: bool) -> Sample:
    """ProcessLookupError or FileNotFoundError if it is gone."""
    proc = Path(f"/proc/{pid}")
    resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    threads, files = (sum(1 for _ in (proc / folder).iterdir()) for folder in ("task", "fd"))
    return Sample(at_s, resident, threads, files, comparable)


def slope(points: Sequence[tuple[float, float]]) -> Slope | None:
    """Of (seconds, value), by means of ``WINDOW_S`` each; None with fewer than three of those."""
    windows: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        windows.setdefault(int(point[0] // WINDOW_S), []).append(point)
    hours = [statistics.fmean(at for at, _ in window) / 3600 for window in windows.values()]
    values = [statistics.fmean(value for _, value in window) for window in windows.values()]
    n = len(hours)
    if n < 3:
        return None
    mean_x, mean_y = statistics.fmean(hours), statistics.fmean(values)
    spread = sum((x - mean_x) ** 2 for x in hours)
    per_hour = sum((x - mean_x) * (y - mean_y) for x, y in zip(hours, values, strict=True)) / spread
    noise = math.inf
    if n >= MIN_POINTS and max(hours) - min(hours) >= (MIN_SPAN_S - WINDOW_S) / 3600:
        left = sum((y - mean_y - per_hour * (x - mean_x)) ** 2 for x, y in zip(hours, values, strict=True))
        t = _T_95[n - 3] if n - 2 <= len(_T_95) else 2.05
        noise = t * math.sqrt(left / (n - 2) / spread)
    first, last = (mean_y + per_hour * (x - mean_x) for x in (min(hours), max(hours)))
    return Slope(per_hour, noise, n, first, last)


def rise(values: Sequence[int]) -> int:
    """By how much the median of the last third is above that of the first; 0 of fewer than six."""
    third = len(values) // 3
    if third < 2:
        return 0
    return round(statistics.median(values[-third:]) - statistics.median(values[:third]))
