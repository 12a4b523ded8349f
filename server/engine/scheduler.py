"""Which tokens the next step computes: continuous batching with chunked prefill, adapter slots and fairness.

Torch-free. The rules, in the order they are applied by ``Scheduler.schedule``:

1. **Running requests first**, most important first (lower ``priority``, then earlier submission): those that decode,
   one token each, then those still prefilling, as many tokens as the budget leaves.
2. **Memory.** A running request that needs a page and finds none preempts the least important running one (perhaps
   itself), which gives up pages and slot and waits at the front of its priority. It will be computed again from its
   first token, prompt and output alike. The most important one is never preempted and each fits alone (checked at
   submission), so there is always progress. A step that preempted admits nobody.
3. **Admission**, in the order of *priority, preempted before new, fair tag, submission*. It stops at the first request
   that does not fit into rows, budget or memory, so that a large request is not starved by small ones behind it.
4. **Fairness** (start-time fair queueing, Goyal et al. 1996, with every request at unit cost). Each set of adapters
   that is asked for together is a flow, and so is the base; at submission a request gets the tag
   ``max(V, flow's last tag) + 1``, where V is the largest tag admitted so far. So flows take turns, one request each:
   the k-th request that a flow has waiting is overtaken by at most k requests of each other flow, and a flood fills
   only its own queue.
5. **Slots.** A request takes the slots of all its adapters at once, or none: two that each held what the other waits
   for would wait for ever. One that misses a slot now (an upload runs, or running requests pin all of them) is skipped,
   and those behind it are tried; the base never needs one, nor does what merged weights compute. But once one was
   skipped, those behind it may only use adapters that are on the device already: were they to upload theirs, they could
   take the very slot that was just made ready for it, and it theirs, for ever. And they may overtake it only by
   ``max_overtake`` rounds: a request whose tag exceeds by more than that the smallest tag skipped for want of a slot is
   skipped too, if it needs a slot itself.

   So the first one skipped, S, gets all of its slots in the end. Those with smaller tags are finitely many and end;
   adapters that hold slots stop being fed after ``max_overtake`` more rounds, so at last no running request holds a
   slot, and uploads are started for S alone. It asks for what is on the device first, and keeps those references until
   it has asked for the rest: so its own uploads evict none of its own. All its adapters have room together (checked at
   submission), hence every upload it needs starts, and when the last one is done all of them are there. That some lie
   unreferenced meanwhile does no harm: nobody else may evict, and who may use them takes nothing from S, which needs
   them where they are.

   A request for one adapter whose weights are still being read from the disk wants no slot yet. It is passed by and
   stops nobody: a slow disk holds up its own adapters only. When they are in host memory, which they then do not leave
   until they are uploaded, it waits for its slot as above.
"""

from __future__ import annotations

import sys
from bisect import insort
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from manylora.adapters.errors import AdapterError
from manylora.adapters.versions import AdapterRef
from manylora.server.engine.block_pool import BlockPool
from manylora.server.engine.queue_entry import Entry, Flow, Rank, Step, needed_adapters
from manylora.server.engine.request import Request, RequestState, StepPlan


class Slots(Protocol):
    """What the scheduler needs of ``adapters.slots.SlotManager``."""

    def never_together(self, refs: Collection[AdapterRef], /) -> str | None:
        """Why these adapters could not all have a slot at once, even if nobody else had one; None if they can.

        Any thread."""

    def acquire(self, ref: AdapterRef) -> int | None:
        """The slot, with a reference to it, or ``None`` for now. AdapterError ends the request."""

    def awaits_read(self, ref: AdapterRef) -> bool:
        """After ``acquire`` returned ``None``: whether it is the disk that is waited for, and no slot yet."""

    def prefetch(self, ref: AdapterRef) -> None:
        """A request for it was queued: bring its weights nearer, if there is room."""

    def release(self, ref: AdapterRef) -> None: ...
    def drop(self, ref: AdapterRef) -> None: ...
    def resident(self) -> list[AdapterRef]: ...
    def resident_versions(self) -> set[str]: ...
    def check_integrity(self, *, idle: bool = False) -> None: ...


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and of the queue.

    ``max_rows``: requests in one step. ``max_batch_tokens``: tokens computed in one step, prefill and decode together.
    ``num_pages`` x ``page_size``: tokens that the KV cache holds. ``max_context``: prompt and output of one request.
    ``max_waiting``: requests, besides ``max_rows``, that the engine holds before it refuses new ones.
    ``max_overtake``: see rule 5 in the module's text.
    """

    max_rows: int = 32
    max_batch_tokens: int = 512
    num_pages: int = 2048
    page_size: int = 16
    max_context: int = 8192
    max_waiting: int = 1024
    max_overtake: int = 4

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_batch_tokens", "num_pages", "page_size", "max_context", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_overtake < 0:
            raise ValueError(f"max_overtake must not be negative, got {self.max_overtake}")
        if self.max_batch_tokens < self.max_rows:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_rows ({self.max_rows}), so that "
                "every decoding row fits into every step"
            )

    @property
    def max_request_tokens(self) -> int:
        """Prompt and output tokens of the largest request that can ever be served."""
        return min(self.max_context, self.num_pages * self.page_size)


@dataclass
class SchedulerCounts:
    """Running totals. ``slot_hits`` and ``slot_misses``: admissions of adapter requests whose adapter had a slot when
    they were first tried, or had not."""

    preemptions: int = 0
    slot_hits: int = 0
    slot_misses: int = 0


class Scheduler:
    """Owned by the step-loop thread; other threads may read the counts and call ``waiting`` and ``running``."""

    def __init__(self, config: SchedulerConfig, slots: Slots | None = None) -> None:
        self.config = config
        self.pool = BlockPool(config.num_pages, config.page_size)
        self.counts = SchedulerCounts()
        self._slots = slots
        self._entries: dict[str, Entry] = {}
        self._waiting: list[Entry] = []  # sorted by rank
        self._running: list[Entry] = []  # sorted by importance
        self._failed: list[tuple[Request, str]] = []
        self._num_added = 0
        self._virtual_time = 0
        self._last_tags: dict[Flow, int] = {}  # of the flows whose last tag is past the virtual time

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def never_fits(self, request: Request) -> str | None:
        """Why the request's adapters could never be on the device together, for the client; None if they can. Any
        thread."""
        needed = needed_adapters(request)
        if not needed:
            return None
        return "This server runs without adapters." if self._slots is None else self._slots.never_together(needed)

    def waiting(self) -> list[Request]:
        """The waiting requests, in the order in which they will be tried."""
        return [entry.request for entry in self._waiting.copy()]

    def running(self) -> list[Request]:
        """The running requests, most important first."""
        return [entry.request for entry in self._running.copy()]

    def add(self, request: Request) -> None:
        """Queue a request. ValueError if it could never be served, or its id is in use."""
        prompt, output = len(request.prompt_token_ids), request.params.max_tokens
        if prompt < 1 or output < 1:
            raise ValueError(f"a request needs at least 1 prompt token and 1 output token, got {prompt} and {output}")
        if prompt + output > self.config.max_request_tokens:
            raise ValueError(f"{prompt} + {output} tokens do not fit into {self.config.max_request_tokens}")
        if (reason := self.never_fits(request)) is not None:
            raise ValueError(reason)
        if request.request_id in self._entries:
            raise ValueError(f"a request with id {request.request_id} is already here")
        flow = tuple(version for version, _scale in request.composition)
        tag = self._last_tags[flow] = max(self._virtual_time, self._last_tags.get(flow, 0)) + 1
        entry = Entry(request, Rank(request.priority, True, tag, self._num_added), flow)
        self._num_added += 1
        self._entries[request.request_id] = entry
        request.state = RequestState.WAITING
        if self._slots is not None:
            for ref in entry.needed:
                self._slots.prefetch(ref)
        insort(self._waiting, entry)

    def schedule(self) -> StepPlan:
        """The next step, its pages and slots assigned; empty if nothing can run now."""
        step = Step(self.config.max_batch_tokens)
        preempted = self.counts.preemptions
        self._continue_running(step)
        if self.counts.preemptions == preempted:
            self._admit(step)
        # ``sorted`` is stable: within a slot, decoding rows stay before prefilling ones.
        rows = sorted(step.rows.values(), key=lambda row: (row.request.merged is not None, row.request.slots))
        return StepPlan(tuple(rows))

    def commit(self, plan: StepPlan) -> None:
        """Record that the step's tokens have been computed; to be called before what it sampled is appended."""
        for row in plan.rows:
            row.request.num_computed += row.count

    def take_failed(self) -> list[tuple[Request, str]]:
        """Requests whose adapter could not be brought onto the device, and why; they have been finished here."""
        failed, self._failed = self._failed, []
        return failed

    def finish(self, request: Request) -> None:
        """Forget a request, in whatever state it is, and free what it holds. KeyError if it is not here."""
        entry = self._entries.pop(request.request_id)
        if request.state is RequestState.RUNNING:
            self._running.remove(entry)
            self._free(request)
        else:
            self._waiting.remove(entry)
            self._forget_tag(entry)
        request.state = RequestState.FINISHED

    def drop_adapter(self, ref: AdapterRef) -> None:
        """A name's version retired: its slot is cleared once nobody holds it, unless it is live by another name."""
        if self._slots is not None:
            self._slots.drop(ref)

    def resident_adapters(self) -> list[AdapterRef]:
        """Versions on the device."""
        return self._slots.resident() if self._slots is not None else []

    def check_integrity(self) -> None:
        """Raise RuntimeError, with the numbers, if pages, slots or queues disagree."""
        self.pool.check_integrity(expected_used=sum(len(entry.request.pages) for entry in self._running))
        if len(self._waiting) + len(self._running) != len(self._entries):
            raise RuntimeError(
                f"{len(self._waiting)} waiting + {len(self._running)} running != {len(self._entries)} requests"
            )
        for entry in self._waiting:
            if entry.request.pages or entry.request.slots:
                raise RuntimeError(
                    f"request {entry.request.request_id} waits, but holds {len(entry.request.pages)} pages and slots "
                    f"{entry.request.slots}"
                )
        if self._slots is not None:
            self._slots.check_integrity(idle=not self._running)

    # --- running requests (rules 1 and 2) ------------------------------------------------------------------------

    def _continue_running(self, step: Step) -> None:
        # A stable sort: first those with a single token to compute, each group in order of importance.
        for entry in sorted(self._running, key=lambda e: e.request.num_tokens - e.request.num_computed > 1):
            request = entry.request
            if request.state is not RequestState.RUNNING:  # preempted for one that came before it in this loop
                continue
            count = min(step.budget, request.num_tokens - request.num_computed)
            if count > 0 and self._make_room(entry, request.num_computed + count, step):
                step.add(request, count)

    def _make_room(self, entry: Entry, num_tokens: int, step: Step) -> bool:
        """Pages for a running request's first ``num_tokens`` tokens; False if it had to be preempted itself."""
        needed = self.pool.pages_for(num_tokens) - len(entry.request.pages)
        while needed > self.pool.num_free:
            victim = self._running[-1]
            step.drop(victim.request)
            self._preempt(victim)
            if victim is entry:
                return False
        self._take_pages(entry.request, needed)
        return True

    def _preempt(self, entry: Entry) -> None:
        request = entry.request
        self._running.remove(entry)
        self._free(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self.counts.preemptions += 1
        # Its old tag may lie far back by now, and rule 5 would stop every other adapter at once: it counts from here.
        entry.rank = Rank(entry.rank.priority, False, self._virtual_time, entry.rank.number)
        insort(self._waiting, entry)

    # --- admission (rules 3 to 5) --------------------------------------------------------------------------------

    def _admit(self, step: Step) -> None:
        left: set[Entry] = set()
        resident: set[str] | None = None  # versions; asked for when the first request gets no slot
        highest_tag = sys.maxsize
        for entry in self._waiting:
            if len(self._running) >= self.config.max_rows or step.budget < 1:
                break
            request = entry.request
            is_late = entry.rank.tag > highest_tag
            if entry.needed and resident is not None and (is_late or not resident.issuperset(entry.flow)):
                continue
            # With a page to spare for each running request, or admitting this one would soon preempt another. None of
            # them waits for pages of its prompt: one that is still prefilling would have used up the budget.
            if self.pool.pages_for(request.num_tokens) + len(self._running) > self.pool.num_free:
                break
            missing = self._take_slots(entry)
            if missing is not None and not missing:
                self._start(entry, step)
            if request.state is RequestState.WAITING:
                if self._awaits_read(entry):
                    continue
                if resident is None:
                    resident = self.resident_versions()
                resident.difference_update(missing or ())
                highest_tag = min(highest_tag, entry.rank.tag + self.config.max_overtake)
            else:
                left.add(entry)
        if left:
            self._waiting = [entry for entry in self._waiting if entry not in left]
            for entry in left:
                self._forget_tag(entry)

    def _take_slots(self, entry: Entry) -> list[str] | None:
        """Take all of the request's slots, or none: the versions that miss one for now, which is nothing if it has
        them all. None if it had to be given up."""
        request, needed = entry.request, entry.needed
        if not needed or self._slots is None:
            return []
        taken: dict[int, int] = {}
        missing: list[str] = []
        try:
            # What is there first: the reference keeps it from making way for what is not.
            for i in self._resident_first(needed):
                slot = self._slots.acquire(needed[i])
                if slot is None:
                    missing.append(needed[i].version)
                else:
                    taken[i] = slot
        except AdapterError as error:
            del self._entries[request.request_id]
            request.state = RequestState.FINISHED
            self._failed.append((request, str(error)))
        if len(taken) == len(needed):
            request.slots = tuple(taken[i] for i in range(len(needed)))
            self.counts.slot_misses += entry.missed_slot
            self.counts.slot_hits += not entry.missed_slot
            return missing
        for i in taken:  # who waits holds nothing: two that wait for each other's would wait for ever
            self._slots.release(needed[i])
        entry.missed_slot = True
        return missing if request.state is RequestState.WAITING else None

    def _resident_first(self, needed: Sequence[AdapterRef]) -> Sequence[int]:
        """The order in which to ask for these adapters."""
        if len(needed) == 1:
            return (0,)
        resident = self.resident_versions()
        return sorted(range(len(needed)), key=lambda i: needed[i].version not in resident)

    def resident_versions(self) -> set[str]:
        """Versions on the device, whatever names they have."""
        return self._slots.resident_versions() if self._slots is not None else set()

    def _awaits_read(self, entry: Entry) -> bool:
        """Whether what the request misses is no slot yet. With several adapters it may be both: then it is a slot."""
        return self._slots is not None and len(entry.needed) == 1 and self._slots.awaits_read(entry.needed[0])

    def _start(self, entry: Entry, step: Step) -> None:
        request = entry.request
        request.state = RequestState.RUNNING
        insort(self._running, entry, key=lambda e: e.importance)
        self._virtual_time = max(self._virtual_time, entry.rank.tag)
        count = min(step.budget, request.num_tokens)
        self._take_pages(request, self.pool.pages_for(count))
        step.add(request, count)

    def _forget_tag(self, entry: Entry) -> None:
        """Let go of its flow's last tag if the request that left had it: the table must not grow with adapters."""
        flow = entry.flow
        last = self._last_tags.get(flow, 0)
        if last > self._virtual_time and last == entry.rank.tag:  # it left before its turn
            last = max((e.rank.tag for e in self._waiting if e.flow == flow), default=0)
        if last > self._virtual_time:
            self._last_tags[flow] = last
        else:
            self._last_tags.pop(flow, None)

    # --- pages ---------------------------------------------------------------------------------------------------

    def _take_pages(self, request: Request, count: int) -> None:
        pages = self.pool.allocate(max(count, 0))
        if pages is None:  # both callers have just counted the free ones
            raise RuntimeError(f"{count} KV pages were wanted, {self.pool.num_free} are free")
        request.pages.extend(pages)

    def _free(self, request: Request) -> None:
        """Give back the pages and the slots of a request that ran."""
        self.pool.free(request.pages)
        request.pages = []
        if request.slots and self._slots is not None:
            for use in request.adapters:
                self._slots.release(use.ref)
        request.slots = ()
