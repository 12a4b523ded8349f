"""Whether the generator itself kept up: its share of a core, how late its event loop woke, how late requests were sent.

Answers are timed by the process that asks. Where that process has no time left, its figures are about itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import gevent

_BEAT_S = 0.02
CPU_LIMIT = 0.8
"""Share of one core. It is one thread; above this, answers wait to be read."""
LAG_LIMIT_MS = 25.0
"""p99 of how late the loop woke: a token that came meanwhile is timed so much too late."""
SEND_LIMIT_MS = 50.0
"""p95 of how late requests were sent."""


@dataclass
class GeneratorHealth:
    """Samples while a run lasts. ``lags_s``: lateness of each beat. ``cpu``: (time, share of a core) about every
    second, of this process, all of its threads."""

    clock: Callable[[], float]
    lags_s: list[float] = field(default_factory=list)
    cpu: list[tuple[float, float]] = field(default_factory=list)
    reached_max_open: int = 0
    """Times that an open loop had to wait since ``max_open`` requests were open."""

    def watch(self) -> None:
        """Beats until it is killed."""
        last_s, last_cpu = self.clock(), time.process_time()
        while True:
            due = self.clock() + _BEAT_S
            gevent.sleep(_BEAT_S)
            now = self.clock()
            self.lags_s.append(max(now - due, 0.0))
            if now - last_s >= 1.0:
                used = time.process_time()
                self.cpu.append((now, (used - last_cpu) / (now - last_s)))
                last_s, last_cpu = now, used


def machine_load() -> float | None:
    """Processes that want a core, over the last minute, for each core there is; None where the system does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return None


def bottlenecks(
    *, cpu_share: float | None, lag_p99_ms: float | None, send_p95_ms: float | None, reached_max_open: int
) -> list[str]:
    """Why the figures may be the generator's own; empty if nothing speaks for it."""
    reasons = []
    if cpu_share is not None and cpu_share > CPU_LIMIT:
        reasons.append(f"the generator used {cpu_share:.0%} of a core (limit {CPU_LIMIT:.0%})")
    if lag_p99_ms is not None and lag_p99_ms > LAG_LIMIT_MS:
        reasons.append(f"its event loop woke up to {lag_p99_ms:.0f} ms late (p99; limit {LAG_LIMIT_MS:.0f} ms)")
    if send_p95_ms is not None and send_p95_ms > SEND_LIMIT_MS:
        reasons.append(
            f"requests were sent {send_p95_ms:.0f} ms after they were due (p95; limit {SEND_LIMIT_MS:.0f} ms)"
        )
    if reached_max_open:
        reasons.append(f"{reached_max_open} requests waited in the generator, as --max-open requests were open already")
    return reasons
