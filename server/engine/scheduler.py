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
4. **Fairness** (start-time fair queueing, Goyal et al. 1996, with every request at unit cost). Each adapter, and the
   base, is a flow; at submission a request gets the tag ``max(V, flow's last tag) + 1``, where V is the largest tag
   admitted so far. So flows take turns, one request each: the k-th request that a flow has waiting is overtaken by at
   most k requests of each other flow, and a flood fills only its own queue.
5. **Slots.** A request whose adapter gets no slot now (its upload runs, or running requests pin all of them) is
   skipped, and those behind it are tried; the base never needs one. But once one was skipped, those behind it may only
   use adapters that are on the device already: were they to upload theirs, they could take the very slot that was
   just made ready for it, and it theirs, for ever. And they may overtake it only by ``max_overtake`` rounds: a request
   whose tag exceeds by more than that the smallest tag skipped for want of a slot is skipped too, if it needs a slot
   itself. So adapters that hold slots stop being fed after that many more requests each, their running ones end, and
   the slot goes to the one that waits longest.
"""

from __future__ import annotations

import sys
from bisect import insort
from dataclasses import dataclass, field
from typing import Protocol

from manylora.adapters.errors import AdapterError
from manylora.adapters.versions import AdapterRef
from manylora.server.engine.block_pool import BlockPool
from manylora.server.engine.request import Request, RequestState, ScheduledRow, StepPlan


class Slots(Protocol):
    """What the scheduler needs of ``adapters.slots.SlotManager``."""

    def acquire(self, ref: AdapterRef) -> int | None:
        """The slot, with a reference to it, or ``None`` for now. AdapterError ends the request."""

    def release(self, ref: AdapterRef) -> None: ...
    def drop(self, ref: AdapterRef) -> None: ...
    def resident(self) -> list[AdapterRef]: ...
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


@dataclass(frozen=True, order=True)
class _Rank:
    """A request's place in the queue; the smallest goes first."""

    priority: int
    is_new: bool
    """False for a preempted request: those come first."""
    tag: int
    number: int
    """Order of submission; unique."""


class _Entry:
    """A request and what only the scheduler knows about it."""

    __slots__ = ("missed_slot", "rank", "request")

    def __init__(self, request: Request, rank: _Rank) -> None:
        self.request = request
        self.rank = rank
        self.missed_slot = False

    def __lt__(self, other: _Entry) -> bool:
        return self.rank < other.rank

    @property
    def importance(self) -> tuple[int, int]:
        """Sort key among running requests: the largest is preempted first."""
        return self.rank.priority, self.rank.number


@dataclass
class SchedulerCounts:
    """Running totals. ``slot_hits`` and ``slot_misses``: admissions of adapter requests whose adapter had a slot when
    they were first tried, or had not."""

    preemptions: int = 0
    slot_hits: int = 0
    slot_misses: int = 0


@dataclass
class _Step:
    """The rows of a step in the making, and the tokens it may still take."""

    budget: int
    rows: dict[Request, ScheduledRow] = field(default_factory=dict)

    def add(self, request: Request, count: int) -> None:
        self.rows[request] = ScheduledRow(request, request.num_computed, count)
        self.budget -= count

    def drop(self, request: Request) -> None:
        row = self.rows.pop(request, None)
        self.budget += row.count if row else 0


class Scheduler:
    """Owned by the step-loop thread; other threads may read the counts and call ``waiting`` and ``running``."""

    def __init__(self, config: SchedulerConfig, slots: Slots | None = None) -> None:
        self.config = config
        self.pool = BlockPool(config.num_pages, config.page_size)
        self.counts = SchedulerCounts()
        self._slots = slots
        self._entries: dict[str, _Entry] = {}
        self._waiting: list[_Entry] = []  # sorted by rank
        self._running: list[_Entry] = []  # sorted by importance
        self._failed: list[tuple[Request, str]] = []
        self._num_added = 0
        self._virtual_time = 0
        self._last_tags: dict[AdapterRef | None, int] = {}  # of the flows whose last tag is past the virtual time

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_slots(self) -> bool:
        """Whether requests may name an adapter at all."""
        return self._slots is not None

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
        if request.adapter is not None and self._slots is None:
            raise ValueError(f"adapter {request.adapter.name} was asked for, but there are no adapter slots")
        if request.request_id in self._entries:
            raise ValueError(f"a request with id {request.request_id} is already here")
        tag = max(self._virtual_time, self._last_tags.get(request.adapter, 0)) + 1
        self._last_tags[request.adapter] = tag
        entry = _Entry(request, _Rank(request.priority, True, tag, self._num_added))
        self._num_added += 1
        self._entries[request.request_id] = entry
        request.state = RequestState.WAITING
        insort(self._waiting, entry)

    def schedule(self) -> StepPlan:
        """The next step, its pages and slots assigned; empty if nothing can run now."""
        step = _Step(self.config.max_batch_tokens)
        preempted = self.counts.preemptions
        self._continue_running(step)
        if self.counts.preemptions == preempted:
            self._admit(step)
        # ``sorted`` is stable: within a slot, decoding rows stay before prefilling ones.
        rows = sorted(step.rows.values(), key=lambda row: -1 if row.request.slot is None else row.request.slot)
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
        """A version was freed: its slot is cleared once nobody holds it."""
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
            if entry.request.pages or entry.request.slot is not None:
                raise RuntimeError(
                    f"request {entry.request.request_id} waits, but holds {len(entry.request.pages)} pages and slot "
                    f"{entry.request.slot}"
                )
        if self._slots is not None:
            self._slots.check_integrity(idle=not self._running)

    # --- running requests (rules 1 and 2) ------------------------------------------------------------------------

    def _continue_running(self, step: _Step) -> None:
        # A stable sort: first those with a single token to compute, each group in order of importance.
        for entry in sorted(self._running, key=lambda e: e.request.num_tokens - e.request.num_computed > 1):
            request = entry.request
            if request.state is not RequestState.RUNNING:  # preempted for one that came before it in this loop
                continue
            count = min(step.budget, request.num_tokens - request.num_computed)
            if count > 0 and self._make_room(entry, request.num_computed + count, step):
                step.add(request, count)

    def _make_room(self, entry: _Entry, num_tokens: int, step: _Step) -> bool:
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

    def _preempt(self, entry: _Entry) -> None:
        request = entry.request
        self._running.remove(entry)
        self._free(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self.counts.preemptions += 1
        # Its old tag may lie far back by now, and rule 5 would stop every other adapter at once: it counts from here.
        entry.rank = _Rank(entry.rank.priority, False, self._virtual_time, entry.rank.number)
        insort(self._waiting, entry)

    # --- admission (rules 3 to 5) --------------------------------------------------------------------------------

    def _admit(self, step: _Step) -> None:
        left: set[_Entry] = set()
        resident: set[AdapterRef] | None = None  # asked for when the first request gets no slot
        highest_tag = sys.maxsize
        for entry in self._waiting:
            if len(self._running) >= self.config.max_rows or step.budget < 1:
                break
            request = entry.request
            is_late = entry.rank.tag > highest_tag
            if request.adapter is not None and resident is not None and (request.adapter not in resident or is_late):
                continue
            # With a page to spare for each running request, or admitting this one would soon preempt another. None of
            # them waits for pages of its prompt: one that is still prefilling would have used up the budget.
            if self.pool.pages_for(request.num_tokens) + len(self._running) > self.pool.num_free:
                break
            if self._take_slot(entry):
                self._start(entry, step)
            if request.state is RequestState.WAITING:
                if resident is None:
                    resident = set(self.resident_adapters())
                resident.discard(request.adapter)
                highest_tag = min(highest_tag, entry.rank.tag + self.config.max_overtake)
            else:
                left.add(entry)
        if left:
            self._waiting = [entry for entry in self._waiting if entry not in left]
            for entry in left:
                self._forget_tag(entry)

    def _take_slot(self, entry: _Entry) -> bool:
        """Whether the request may start: it has its adapter's slot, or needs none."""
        request = entry.request
        if request.adapter is None or self._slots is None:
            return True
        try:
            request.slot = self._slots.acquire(request.adapter)
        except AdapterError as error:
            del self._entries[request.request_id]
            request.state = RequestState.FINISHED
            self._failed.append((request, str(error)))
            return False
        if request.slot is None:
            entry.missed_slot = True
            return False
        self.counts.slot_misses += entry.missed_slot
        self.counts.slot_hits += not entry.missed_slot
        return True

    def _start(self, entry: _Entry, step: _Step) -> None:
        request = entry.request
        request.state = RequestState.RUNNING
        insort(self._running, entry, key=lambda e: e.importance)
        self._virtual_time = max(self._virtual_time, entry.rank.tag)
        count = min(step.budget, request.num_tokens)
        self._take_pages(request, self.pool.pages_for(count))
        step.add(request, count)

    def _forget_tag(self, entry: _Entry) -> None:
        """Let go of its flow's last tag if the request that left had it: the table must not grow with adapters."""
        flow = entry.request.adapter
        last = self._last_tags.get(flow, 0)
        if last > self._virtual_time and last == entry.rank.tag:  # it left before its turn
            last = max((e.rank.tag for e in self._waiting if e.request.adapter == flow), default=0)
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
        """Give back the pages and the slot of a request that ran."""
        self.pool.free(request.pages)
        request.pages = []
        if request.slot is not None and request.adapter is not None and self._slots is not None:
            self._slots.release(request.adapter)
        request.slot = None
