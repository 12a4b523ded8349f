"""The scheduling rules again, slowly: everything is recomputed from plain lists at each step, pages are only counted.

Written from the text atop server/engine/scheduler.py, to be compared with it plan by plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from manylora.adapters.versions import AdapterRef
from manylora.server.engine.scheduler import SchedulerConfig, Slots

Row = tuple[str, int, int, tuple[int, ...]]
"""Request id, start, count, slots."""


@dataclass(eq=False)
class Job:
    name: str
    adapters: list[AdapterRef]
    """Whose slots it takes."""
    flow: set[str]
    priority: int
    number: int
    tag: int
    tokens: int
    computed: int = 0
    pages: int = 0
    running: bool = False
    preempted: bool = False
    slots: tuple[int, ...] = ()

    def importance(self) -> tuple[int, int]:
        return (self.priority, self.number)

    def turn(self) -> tuple[int, bool, int, int]:
        return (self.priority, not self.preempted, self.tag, self.number)


class ReferenceScheduler:
    def __init__(self, config: SchedulerConfig, slots: Slots) -> None:
        self.config = config
        self.slots = slots
        self.jobs: list[Job] = []
        self.n_added = 0
        self.virtual_time = 0

    def add(self, name: str, adapters: list[AdapterRef], flow: set[str], priority: int, n_prompt: int) -> None:
        ahead = [job.tag for job in self.waiting() if job.flow == flow]
        tag = max([self.virtual_time, *ahead]) + 1
        self.jobs.append(Job(name, adapters, flow, priority, self.n_added, tag, n_prompt))
        self.n_added += 1

    def waiting(self) -> list[Job]:
        return sorted((job for job in self.jobs if not job.running), key=Job.turn)

    def running(self) -> list[Job]:
        return sorted((job for job in self.jobs if job.running), key=Job.importance)

    def pages_for(self, tokens: int) -> int:
        return (tokens + self.config.page_size - 1) // self.config.page_size

    def free_pages(self) -> int:
        return self.config.num_pages - sum(job.pages for job in self.jobs)

    def stop(self, job: Job) -> None:
        if job.running:
            for ref in job.adapters:
                self.slots.release(ref)
        job.running, job.pages, job.computed, job.slots = False, 0, 0, ()

    def finish(self, name: str) -> None:
        job = next(job for job in self.jobs if job.name == name)
        self.stop(job)
        self.jobs.remove(job)

    def schedule(self) -> list[Row]:
        counts: dict[Job, int] = {}
        any_preempted = False
        running = self.running()
        decodes = [job for job in running if job.tokens - job.computed == 1]
        for job in decodes + [job for job in running if job not in decodes]:
            count = min(self.config.max_batch_tokens - sum(counts.values()), job.tokens - job.computed)
            if not job.running or count == 0:
                continue
            needed = self.pages_for(job.computed + count)
            while job.running and needed - job.pages > self.free_pages():
                victim = self.running()[-1]
                counts.pop(victim, None)
                self.stop(victim)
                victim.preempted, victim.tag, any_preempted = True, self.virtual_time, True
            if job.running:
                job.pages = max(job.pages, needed)
                counts[job] = count
        if not any_preempted:
            self.admit(counts)
        rows = [(job.name, job.computed, count, job.slots) for job, count in counts.items()]
        return rows

    def admit(self, counts: dict[Job, int]) -> None:
        denied: list[Job] = []
        missing: list[str] = []
        for job in self.waiting():
            budget = self.config.max_batch_tokens - sum(counts.values())
            if budget == 0 or len(self.running()) == self.config.max_rows:
                return
            if job.adapters and denied:
                if any(job.tag > other.tag + self.config.max_overtake for other in denied):
                    continue
                resident = {ref.version for ref in self.slots.resident()} - set(missing)
                if any(ref.version not in resident for ref in job.adapters):
                    continue
            owed = sum(self.pages_for(other.tokens) - other.pages for other in self.running())
            if owed + len(self.running()) + self.pages_for(job.tokens) > self.free_pages():
                return
            slots = self.take_slots(job, missing)
            if slots is None:
                denied.append(job)
                continue
            job.slots = slots
            job.running = True
            self.virtual_time = max(self.virtual_time, job.tag)
            counts[job] = min(budget, job.tokens)
            job.pages = self.pages_for(counts[job])

    def take_slots(self, job: Job, missing: list[str]) -> tuple[int, ...] | None:
        """Slots of all its adapters, or none and the ``missing`` ones noted."""
        resident = {ref.version for ref in self.slots.resident()}
        got: dict[int, int] = {}
        for there_already in (True, False):
            for i, ref in enumerate(job.adapters):
                if (ref.version in resident) == there_already:
                    slot = self.slots.acquire(ref)
                    if slot is None:
                        missing.append(ref.version)
                    else:
                        got[i] = slot
        if len(got) == len(job.adapters):
            return tuple(got[i] for i in range(len(job.adapters)))
        for i in got:
            self.slots.release(job.adapters[i])
        return None

    def commit(self, rows: list[Row]) -> None:
        for name, _start, count, _slots in rows:
            job = next(job for job in self.jobs if job.name == name)
            job.computed += count
            job.tokens += job.computed == job.tokens
