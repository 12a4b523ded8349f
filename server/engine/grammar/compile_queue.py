"""Whose grammar is compiled next: tenants take turns, so that none waits for all that another has sent."""

from __future__ import annotations

from collections import Counter, OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from manylora.server.engine.constraint import Grammar
from manylora.server.engine.errors import GrammarQueueFull
from manylora.server.engine.grammar.sources import GrammarSpec

_RETRY_AFTER_S: Final = 3
"""By then one of those before it is compiled or refused (``checker.SECONDS``)."""


@dataclass(eq=False)
class Job:
    """A grammar to compile, and the tenant of each who waits for it."""

    spec: GrammarSpec
    waiters: dict[Future[Grammar], str] = field(default_factory=dict)
    turn: str | None = None
    """The tenant whose turn it was begun in; None before."""
    queues: set[str] = field(default_factory=set)
    """The tenants in whose queues it is: what several want begins when the first of them has its turn."""


class CompileQueue:
    """Not thread-safe. Of the ``threads``, a tenant with a name takes one at a time; a server without tenants takes all
    for its only one. ``max_waiting``: grammars of one tenant that wait."""

    def __init__(self, threads: int, max_waiting: int) -> None:
        self._threads = threads
        self._max_waiting = max_waiting
        self._queues: OrderedDict[str, dict[Job, None]] = OrderedDict()  # none empty; the next turn first
        self._running: Counter[str] = Counter()

    def enter(self, job: Job, tenant: str) -> None:
        """Put it into the tenant's queue, unless it is there. Raises GrammarQueueFull."""
        if tenant in job.queues:
            return
        queue = self._queues.get(tenant, {})
        waiting = len(queue) + self._running[tenant] - self._most(tenant)
        if waiting >= self._max_waiting:
            raise GrammarQueueFull(waiting, self._max_waiting, _RETRY_AFTER_S, tenant)
        self._queues.setdefault(tenant, queue)[job] = None
        job.queues.add(tenant)

    def take(self) -> Job | None:
        """What is to be compiled now, until ``end``; None if there is nothing."""
        for tenant, queue in self._queues.items():
            if self._running[tenant] < self._most(tenant):
                job = next(iter(queue))
                self._queues.move_to_end(tenant)
                for name in tuple(job.queues):
                    self.leave(job, name)
                job.turn = tenant
                self._running[tenant] += 1
                return job
        return None

    def end(self, job: Job) -> None:
        """It is compiled, or failed."""
        assert job.turn is not None
        self._running[job.turn] -= 1
        if not self._running[job.turn]:
            del self._running[job.turn]

    def leave(self, job: Job, tenant: str) -> None:
        """Nobody of the tenant waits for its turn any more."""
        if tenant in job.queues:
            job.queues.remove(tenant)
            queue = self._queues[tenant]
            del queue[job]
            if not queue:
                del self._queues[tenant]

    def _most(self, tenant: str) -> int:
        return 1 if tenant else self._threads
