"""How many requests each tenant has in the engine, and when there is probably room for another.

A limit is a tenant's own: a flood fills its own queue, and nobody else is refused for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from manylora.server.engine.errors import QueueFull
from manylora.server.engine.tenant import Tenant

_RATE_S: Final = 30.0
"""Over how many seconds the rate at which a tenant's requests end is taken."""
_LONGEST_S: Final = 60
"""The longest time after which to try again that is suggested."""


class _Queue:
    __slots__ = ("ended_at", "size")

    def __init__(self) -> None:
        self.size = 0
        self.ended_at: deque[float] = deque(maxlen=256)


class QueueLimits:
    """Not thread-safe: the engine calls it under its lock. ``max_waiting`` holds for tenants without one of their own;
    ``clock``: monotonic seconds."""

    def __init__(self, max_rows: int, max_waiting: int, clock: Callable[[], float]) -> None:
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._clock = clock
        self._queues: dict[str, _Queue] = {}

    def enter(self, tenant: Tenant) -> None:
        """Count one more request. Raises QueueFull if the tenant has all that it may have."""
        queue = self._queues.get(tenant.name)
        if queue is None:
            self._forget_idle()
            queue = self._queues[tenant.name] = _Queue()
        limit = self._max_waiting if tenant.max_waiting is None else tenant.max_waiting
        waiting = queue.size - self._max_rows
        if waiting >= limit:
            raise QueueFull(max(waiting, 0), limit, self._retry_after(queue), tenant=tenant.name)
        queue.size += 1

    def leave(self, tenant: str) -> None:
        """One of its requests has ended."""
        queue = self._queues[tenant]
        queue.size -= 1
        queue.ended_at.append(self._clock())

    def _retry_after(self, queue: _Queue) -> int:
        """Seconds until those of the tenant that wait now have probably had their turn, at its rate of late."""
        now = self._clock()
        ended = [at for at in queue.ended_at if at > now - _RATE_S]
        if not ended:
            return 1
        rate = len(ended) / (now - ended[0] + 1e-3)
        return max(1, min(_LONGEST_S, round((queue.size - self._max_rows) / rate)))

    def _forget_idle(self) -> None:
        since = self._clock() - _RATE_S
        for name, queue in list(self._queues.items()):
            if queue.size == 0 and (not queue.ended_at or queue.ended_at[-1] < since):
                del self._queues[name]
