"""One simulated server: a queue, rows, slots and host memory, and steps that take as long as ``Costs`` says.

What is modelled is the server's own way (server/engine/scheduling/scheduler.py, rules 1 and 3 to 5, for one tenant;
adapters/slots.py): decoding rows first, then prompts in chunks up to a step's tokens; adapters take turns in the queue;
a request whose adapter has no slot starts its upload and is passed by those whose adapters have one, by a few rounds at
most; one whose adapter is on the disk is passed by until it was read. Reads begin when a request arrives. A slot whose
adapter has running requests is never evicted.

Time goes on in *spans*: a step with prompts, or as many decode steps as all have the same length, up to the next
answer's end. An arrival, a read or an upload that ends shortens a span to the end of the step that runs. What a step
takes is settled at its beginning.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

from scaling.costs import Costs
from scaling.tiers import Lookups, Tiers
from scaling.traffic import BASE, Traffic

READS_AT_ONCE = 3
MAX_OVERTAKE = 4
"""The server's own (server/serving.py, SchedulerConfig)."""

STEP, READ, UPLOAD = range(3)
"""What a scheduled event is the end of."""
Schedule = Callable[[float, int, int, int], None]
"""At this time, tell this replica, that this kind of thing has ended, of this adapter or span."""


@dataclass(frozen=True)
class Sizes:
    """Of one replica: device slots, adapters in host memory, rows and tokens of a step (the server's defaults on a
    CPU)."""

    slots: int = 32
    host: int = 128
    rows: int = 32
    step_tokens: int = 256

    def __post_init__(self) -> None:
        if min(self.slots, self.host, self.rows) < 1 or self.step_tokens < self.rows:
            raise ValueError(f"sizes: expected at least 1, and a token for each row in a step, got {self}")


class Answers:
    """What became of each request, by its number. Times in seconds; NaN until it happens."""

    def __init__(self, count: int) -> None:
        self.replica = [-1] * count
        self.first_token_s = [math.nan] * count
        self.end_s = [math.nan] * count
        self.missed = bytearray(count)
        """1: its adapter had no slot when it was first tried."""
        self.starts = bytearray(count)
        """How often it was started: once."""


class Replica:
    """``loads[index]`` is kept at the number of its requests, waiting and running."""

    def __init__(
        self,
        index: int,
        traffic: Traffic,
        answers: Answers,
        costs: Costs,
        sizes: Sizes,
        loads: list[int],
        schedule: Schedule,
    ) -> None:
        self.index = index
        self.tiers = Tiers(sizes.slots, sizes.host)
        self.counts = Lookups()
        self.busy_s = 0.0
        self._adapter, self._prompt, self._output = traffic.adapter, traffic.prompt, traffic.output
        self._answers = answers
        self._costs, self._sizes = costs, sizes
        self._base_s = costs.base_table(sizes.rows)
        self._loads = loads
        self._schedule = schedule
        # The queue: by tag and number, and by adapter. A request that was started out of turn is still in the first.
        self._order: list[tuple[int, int]] = []
        self._waiting: dict[int, deque[tuple[int, int]]] = {}
        self._tags: dict[int, int] = {}
        self._admitted_tag = 0
        # Reads: who waits for which, and which wait for a thread.
        self._parked: dict[int, list[tuple[int, int]]] = {}
        self._reading: set[int] = set()
        self._to_read: dict[int, None] = {}
        # What runs: prompts (number, tokens left), decoding rows by the step after which they end.
        self._prefilling: list[list[int]] = []
        self._decoding: list[tuple[int, int]] = []
        self._rows_of: dict[int, int] = {}
        self._steps = 0
        # The span: its number, start, the seconds and count of its steps.
        self._span = 0
        self._is_idle = True
        self._began = self._step_s = 0.0
        self._span_steps = 0

    def holds(self, adapter: int) -> bool:
        """On the device, or on its way there."""
        return self.tiers.holds(adapter)

    def held(self) -> set[int]:
        """All of those."""
        return self.tiers.slots.keys() | self.tiers.uploading

    def arrive(self, number: int, now: float) -> None:
        self._answers.replica[number] = self.index
        self._loads[self.index] += 1
        adapter = self._adapter[number]
        tag = max(self._admitted_tag, self._tags.get(adapter, 0)) + 1
        self._tags[adapter] = tag
        entry = tag, number
        heappush(self._order, entry)
        self._waiting.setdefault(adapter, deque()).append(entry)
        if adapter != BASE and not self.tiers.holds(adapter) and adapter not in self.tiers.host:
            self._read(adapter, now)
        self._wake(now)

    def ended(self, kind: int, what: int, now: float) -> None:
        """An event that was scheduled has come."""
        if kind == STEP:
            if what == self._span:
                self._end_span(now)
        elif kind == UPLOAD:
            self.tiers.uploaded(what)
            self._wake(now)
        else:
            self._reading.remove(what)
            waiters = self._parked.pop(what, None)
            self.tiers.arrived_in_host(what, leased=what in self._waiting)
            for entry in waiters or ():
                heappush(self._order, entry)
            self._read_next(now)
            self._wake(now)

    # --- adapters ------------------------------------------------------------------------------------------------

    def _read(self, adapter: int, now: float) -> None:
        if adapter not in self._reading and adapter not in self._to_read:
            self._to_read[adapter] = None
            self._read_next(now)

    def _read_next(self, now: float) -> None:
        while self._to_read and len(self._reading) < READS_AT_ONCE:
            adapter = next(iter(self._to_read))
            del self._to_read[adapter]
            self._reading.add(adapter)
            self.counts.reads += 1
            self._schedule(now + self._costs.read_s, self.index, READ, adapter)

    def _upload(self, adapter: int, now: float) -> None:
        if self.tiers.reserve(adapter):
            self.counts.uploads += 1
            self._schedule(now + self._costs.upload_s, self.index, UPLOAD, adapter)

    # --- time ----------------------------------------------------------------------------------------------------

    def _wake(self, now: float) -> None:
        """Something may start that could not before."""
        if self._is_idle:
            self._begin_span(now)
        elif self._span_steps > 1 and len(self._decoding) < self._sizes.rows:
            steps = max(1, math.ceil((now - self._began) / self._step_s))
            if steps < self._span_steps:
                self._span_steps = steps
                self._span += 1
                self._schedule(self._began + steps * self._step_s, self.index, STEP, self._span)

    def _begin_span(self, now: float) -> None:
        decoding = len(self._decoding)
        budget = left = self._sizes.step_tokens - decoding
        for row in self._prefilling:
            row[2] = min(row[1], left)
            left -= row[2]
        if self._order and left > 0 and decoding + len(self._prefilling) < self._sizes.rows:
            left = self._admit(now, left)
        self._is_idle = not decoding and not self._prefilling
        if self._is_idle:
            return
        step_s = self._base_s[decoding] + len(self._rows_of) * self._costs.adapter_s
        step_s += (budget - left) * self._costs.prompt_token_s
        step_s *= 1 + self._costs.drag * (len(self._reading) + len(self.tiers.uploading))
        self._began, self._step_s = now, step_s
        self._span_steps = 1 if self._prefilling else self._decoding[0][0] - self._steps
        self._span += 1
        self._schedule(now + self._span_steps * step_s, self.index, STEP, self._span)

    def _end_span(self, now: float) -> None:
        self.busy_s += self._span_steps * self._step_s
        self._steps += self._span_steps
        while self._decoding and self._decoding[0][0] <= self._steps:
            self._finish(heappop(self._decoding)[1], now)
        if self._prefilling:
            still = []
            for row in self._prefilling:
                row[1] -= row[2]
                if row[1]:
                    still.append(row)
                    continue
                number = row[0]
                self._answers.first_token_s[number] = now
                if self._output[number] == 1:
                    self._finish(number, now)
                else:
                    heappush(self._decoding, (self._steps + self._output[number] - 1, number))
            self._prefilling = still
        self._begin_span(now)

    def _finish(self, number: int, now: float) -> None:
        self._answers.end_s[number] = now
        self._loads[self.index] -= 1
        adapter = self._adapter[number]
        if adapter != BASE:
            self.tiers.release(adapter)
            if self._rows_of[adapter] == 1:
                del self._rows_of[adapter]
            else:
                self._rows_of[adapter] -= 1

    # --- admission -----------------------------------------------------------------------------------------------

    def _admit(self, now: float, left: int) -> int:
        """Start what can be started with ``left`` tokens of the step; returns how many are left then."""
        order, tiers, adapters = self._order, self.tiers, self._adapter
        free_rows = self._sizes.rows - len(self._decoding) - len(self._prefilling)
        while order and free_rows and left:
            tag, number = order[0]
            if self._answers.starts[number]:
                heappop(order)
                continue
            adapter = adapters[number]
            if adapter == BASE or adapter in tiers.slots:
                heappop(order)
                left = self._start(tag, number, left)
                free_rows -= 1
                continue
            self._answers.missed[number] = 1
            if adapter in tiers.uploading or adapter in tiers.host:
                if adapter not in tiers.uploading:
                    self._upload(adapter, now)
                return self._overtake(tag + MAX_OVERTAKE, free_rows, left)
            heappop(order)
            self._parked.setdefault(adapter, []).append((tag, number))
            self._read(adapter, now)
        return left

    def _overtake(self, highest_tag: int, free_rows: int, left: int) -> int:
        """Behind a request that waits for a slot: those whose adapters have one, by so many rounds at most, and the
        base's."""
        heads = []
        resident = self._waiting.keys() & self.tiers.slots.keys()
        for adapter in (*resident, BASE):
            if entries := self._waiting.get(adapter):
                heads.append((entries[0], adapter))
        heads.sort(reverse=True)
        while heads and free_rows and left:
            (tag, number), adapter = heads.pop()
            if tag > highest_tag and adapter != BASE:
                continue
            left = self._start(tag, number, left)
            free_rows -= 1
            if entries := self._waiting.get(adapter):
                heads.append((entries[0], adapter))
                heads.sort(reverse=True)
        return left

    def _start(self, tag: int, number: int, left: int) -> int:
        adapter = self._adapter[number]
        entries = self._waiting[adapter]
        first = entries.popleft()
        assert first == (tag, number), f"{first} waits before {(tag, number)}"
        if not entries:
            del self._waiting[adapter]
        self._answers.starts[number] += 1
        self._admitted_tag = max(self._admitted_tag, tag)
        if adapter != BASE:
            if self._answers.missed[number]:
                self.counts.slot_misses += 1
            else:
                self.counts.slot_hits += 1
            self.tiers.use(adapter)
            self._rows_of[adapter] = self._rows_of.get(adapter, 0) + 1
        tokens = min(self._prompt[number], left)
        self._prefilling.append([number, self._prompt[number], tokens])
        return left - tokens
