"""Which tokens the next step computes: continuous batching with chunked prefill, adapter slots and fairness.

Torch-free. Rules 1 to 5 are for the requests of one tenant; on a server with one tenant there are no others.

1. **Running requests first**, most important first (lower ``priority``, then earlier submission): those that decode,
   one token each, then those still prefilling, as many tokens as the budget leaves.
2. **Memory.** A running request that needs a page and finds none preempts the least important running one (perhaps
   itself), which gives up pages and slot and waits at the front of its priority. It will be computed again, prompt and
   output alike, but for what is still cached then (rule 11). The most important one is never preempted and each fits
   alone (checked at submission), so there is always progress. A step that preempted admits nobody.
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

Between tenants (a request's priority means nothing here; clocks and shares are those of accounts.py):

6. **Turns.** Prefill and admission go tenant by tenant, the one with the smallest clock first, and admission chooses
   again after each request that starts. For memory (rule 2), the tenant with the most pages for its share loses its
   least important request; never preempted is the one that was submitted first among the tenants' most important ones.
   In rule 5, slots go from tenant to tenant as slot_turns.py says.
7. **Light requests.** A request is light if its tenant's unfinished prompts, its own included, fit into one step, or if
   there is no other; of a flood only the first are. If a tenant with light requests to start or to prefill is within
   its share of the rows, and no more than a step's tokens ahead of anybody who wants more, the next step is *express*:
   its light requests start and its prompts have the whole budget; of every other tenant only the most important request
   runs, if it decodes. If rows or pages lack, requests are preempted for it: the least important ones of the tenants
   most over their share of them, while they are over it, and never a tenant's last one. What was preempted is light no
   more.
8. **Guarded steps.** While other tenants are here, or were in the last ``lately_s`` seconds, steps are kept short, as
   the next light request must wait for the one it finds: they compute ``guarded_tokens``, of which prompts may have
   half. If there are more decoding rows than are left, they take turns: each tenant has one, then as many as its share
   allows, and within a priority those go that have waited longest. (Were prompts to have only what all decoding rows
   leave, rows would stay free.) Prompts get what those do leave in turn, and after that each tenant at least its share
   of ``guarded_tokens`` less what it has in the step. Prompts being computed have only their tenant's share while
   another tenant, whose turn is before theirs, has requests to start and there is a row for them. And
   ``reserved_rows`` are left free for light requests, so that these rarely need to preempt.
9. **Dear prompts.** A prompt whose tokens are scored (``prompt_logprobs``) is computed in chunks of 64 tokens at most
   (step_draft.py) while others run.
10. **Drafts** (drafts.py). A decoding row whose request speculates computes guesses at its next tokens, too, with what
    nobody else wants of the step: not in an express step, nor while a decoding row rests or a prompt is not finished
    with the step; up to ``drafts_up_to`` tokens in all, to ``guarded_tokens`` in a guarded step; in pages that hold
    nothing. They are never the reason for a preemption: after the step, pages that hold no accepted token are given
    back, so that a request then has those that it would have without drafts.

And with a prefix cache (``prefix_cache``; what may be shared, and why it is never the wrong page, is in
prefix_cache.py):

11. **Cached prefixes.** A page that a committed step has filled is cached, prompt and output alike, and stays so when
    its last user lets it go, until its place is needed: pages that hold nothing are taken first, then the least
    recently used of those that nobody uses, whoever filled them. So a cached page without a user counts as free in rule
    2 and in every count of free pages, and one with a user is never taken. A request that starts, for the first time or
    after a preemption, begins behind the longest cached beginning of its known tokens, but for the last of these, which
    is computed: the others cost no budget, and nothing on its tenant's clock (rule 6). Where a waiting request's size
    matters (rules 7 and 8) it is what there was to compute for it when it was queued. A page that several requests of a
    tenant use counts once for it. Prompts that are scored (rule 9) are computed in full, and cached.

Nobody starves. (a) An express step is followed by one that is not. So at least every second step is an ordinary one, in
which rules 1 to 6 hold for all and every decoding row advances or takes its turn to (rule 8); it waits for less
important ones in none, and for its tenant's more important ones until they end. (b) A light request preempts others at
most once in its life, and only tenants who hold more rows or pages than their share: as many of a tenant's most
important requests as its share allows are never preempted for it, nor is the most important one whatever it holds. So
those end, others become the most important, and so on to the last. Two cannot preempt each other in turn, as what was
preempted is light no more. (c) A tenant that waits gets no tokens, so its clock stands, while that of whoever is served
goes on; tenants are finitely many, and none comes back with a clock behind all of those who wait (accounts.py). With
equal clocks, which putting them forward may cause again and again, the one goes first that started something longest
ago. So every tenant's turn to be tried first comes, and rule 3 does not pass by the request it then tries. (d) In a
guarded step the first in turn of those who have prompts has tokens for them, unless ``guarded_tokens`` is 1; any other
has some if it has no decoding rows, and those it has end.

How long a light request waits, then: for the step that runs, an ordinary one if that was express, and its own. Several
tenants' take turns. A flood of another tenant, however large, adds one row to its step. An ordinary step beside a flood
has about ``guarded_tokens`` (fewer than twice as many). This does not hold for a light request whose adapter is not on
the device: nothing is preempted for a slot. If running requests of others pin all of them, it waits for a claim
(slot_turns.py) and until the requests that hold its slot have ended, however long their outputs are; and for the read
from the disk, if there is one.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count

from manylora.adapters.errors import AdapterError
from manylora.adapters.versions import AdapterRef
from manylora.server.engine.request import Request, RequestState, StepPlan
from manylora.server.engine.scheduling.accounts import Accounts
from manylora.server.engine.scheduling.drafts import add_drafts, settle_drafts
from manylora.server.engine.scheduling.kv_pages import KvPages
from manylora.server.engine.scheduling.preemption import Room, in_the_way, least_important
from manylora.server.engine.scheduling.queue_entry import Entry, Rank, needed_adapters
from manylora.server.engine.scheduling.scheduler_config import SchedulerConfig
from manylora.server.engine.scheduling.slot_turns import Slots, SlotTurns
from manylora.server.engine.scheduling.step_draft import StepDraft

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerCounts", "Slots"]


@dataclass
class SchedulerCounts:
    """Running totals. ``slot_hits`` and ``slot_misses``: admissions of adapter requests whose adapter had a slot when
    they were first tried, or had not."""

    preemptions: int = 0
    slot_hits: int = 0
    slot_misses: int = 0


class Scheduler:
    """Owned by the step-loop thread; other threads may read the counts and call ``waiting`` and ``running``.

    ``clock``: monotonic seconds; it decides nothing but who was here lately.
    """

    def __init__(
        self, config: SchedulerConfig, slots: Slots | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.kv = KvPages(config)
        self.pool = self.kv.pool
        self.counts = SchedulerCounts()
        self._slots = slots
        self._slot_turns = SlotTurns(slots, config.max_overtake)
        self._accounts = Accounts(config, clock)
        self._entries: dict[str, Entry] = {}
        self._running: list[Entry] = []  # sorted by importance
        self._failed: list[tuple[Request, str]] = []
        self._num_added = 0
        self._num_started = 0
        self._decode_turns = count(1)
        self._was_express = False

    @property
    def num_waiting(self) -> int:
        return len(self._entries) - len(self._running)

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
        """The waiting requests: tenant by tenant, each one's in the order in which they will be tried."""
        accounts = sorted(self._accounts, key=lambda account: account.turn)
        return [entry.request for account in accounts for entry in account.waiting.copy()]

    def running(self) -> list[Request]:
        """The running requests, most important first."""
        return [entry.request for entry in self._running.copy()]

    def add(self, request: Request) -> None:
        """Queue a request. ValueError if it could never be served, or its id is in use."""
        prompt, output = len(request.prompt_token_ids), request.params.max_tokens
        if prompt < 1 or output < 0:
            raise ValueError(f"a request needs a prompt and a number of output tokens, got {prompt} and {output}")
        if prompt + output > self.config.max_request_tokens:
            raise ValueError(f"{prompt} + {output} tokens do not fit into {self.config.max_request_tokens}")
        if (reason := self.never_fits(request)) is not None:
            raise ValueError(reason)
        if request.request_id in self._entries:
            raise ValueError(f"a request with id {request.request_id} is already here")
        flow = tuple(version for version, _scale in request.composition)
        account = self._accounts.arrive(request.tenant)
        rank = Rank(request.priority, True, account.next_tag(flow), self._num_added)
        entry = Entry(request, rank, flow, account, self.kv.keys_of(request))
        entry.queued_tokens = self.kv.num_to_compute(entry)
        ahead = account.tokens_ahead()
        entry.is_light = not ahead or ahead + entry.queued_tokens <= self.config.max_batch_tokens
        self._num_added += 1
        self._entries[request.request_id] = entry
        request.state = RequestState.WAITING
        if self._slots is not None:
            for ref in entry.needed:
                self._slots.prefetch(ref)
        account.queue(entry)

    def schedule(self) -> StepPlan:
        """The next step, its pages and slots assigned; empty if nothing can run now."""
        step = StepDraft(self.config, self._accounts.shares())
        preempted = self.counts.preemptions
        self._slot_turns.start_step()
        if step.shares.is_contended and not self._was_express:
            self._choose_express(step)
        self._was_express = step.express is not None
        has_row = len(self._running) < self._max_rows(step)
        if step.shares.is_contended and has_row:
            step.expect_starts(self._slot_turns.holder)
        if step.shares.is_guarded and step.express is None:
            step.choose_decoding(self._running, self._decode_turns, has_row=has_row)
        self._continue_running(step)
        if step.express is None and self.counts.preemptions == preempted:
            self._admit(step)
        self._slot_turns.end_step(self._accounts)
        if self.config.drafts_up_to:
            add_drafts(step, self._running, self.pool)
        # ``sorted`` is stable: within a slot, decoding rows stay before prefilling ones.
        rows = sorted(step.rows.values(), key=lambda row: (row.request.merged is not None, row.request.slots))
        return StepPlan(tuple(rows))

    def commit(self, plan: StepPlan, accepted: Mapping[str, int] | None = None) -> None:
        """Record that the step's tokens have been computed; to be called before any of its requests is finished.

        ``accepted``: by request id, how many of a row's drafts were drawn, one after the other from the first; these
        have been appended. ``num_computed`` then counts them and nothing that was guessed wrong: what lies in the pages
        behind it is garbage that the next step overwrites, and may not be shared.
        """
        for row in plan.rows:
            request = row.request
            entry = self._entries[request.request_id]
            num_accepted = (accepted or {}).get(request.request_id, 0)
            num_rejected = len(row.drafts) - num_accepted
            request.num_computed += row.count - num_rejected
            entry.account.charge(entry, num_rejected)
            if row.drafts:
                settle_drafts(row, num_accepted, self.pool)
            self.kv.computed(entry)

    def take_failed(self) -> list[tuple[Request, str]]:
        """Requests whose adapter could not be brought onto the device, and why; they have been finished here."""
        failed, self._failed = self._failed, []
        return failed

    def finish(self, request: Request) -> None:
        """Forget a request, in whatever state it is, and free what it holds. KeyError if it is not here."""
        entry = self._entries.pop(request.request_id)
        if request.state is RequestState.RUNNING:
            self._stop(entry)
        else:
            self._leave_queue(entry)
        self._accounts.seen(entry.account)
        request.state = RequestState.FINISHED

    def drop_adapter(self, ref: AdapterRef) -> None:
        """A name's version retired: its slot is cleared once nobody holds it, unless it is live by another name."""
        if self._slots is not None:
            self._slots.drop(ref)

    def forget_version(self, version: str) -> None:
        """An adapter version is gone for good: what is cached of it will not be asked for again."""
        self.pool.forget(version)

    def resident_adapters(self) -> list[AdapterRef]:
        """Versions on the device."""
        return self._slots.resident() if self._slots is not None else []

    def resident_versions(self) -> set[str]:
        """Versions on the device, whatever names they have."""
        return self._slot_turns.resident_versions()

    def check_integrity(self) -> None:
        """Raise RuntimeError, with the numbers, if pages, slots or queues disagree."""
        self.kv.check_integrity(self._running)
        waiting = [entry for account in self._accounts for entry in account.waiting]
        running = sum(len(account.running) for account in self._accounts)
        if len(waiting) + len(self._running) != len(self._entries) or running != len(self._running):
            raise RuntimeError(
                f"{len(waiting)} waiting + {len(self._running)} running ({running} by tenant) != "
                f"{len(self._entries)} requests"
            )
        for entry in waiting:
            if entry.request.pages or entry.request.slots:
                raise RuntimeError(
                    f"request {entry.request.request_id} waits, but holds {len(entry.request.pages)} pages and slots "
                    f"{entry.request.slots}"
                )
        if self._slots is not None:
            self._slots.check_integrity(idle=not self._running)

    # --- running requests (rules 1, 2, 6 and 8) ------------------------------------------------------------------

    def _continue_running(self, step: StepDraft) -> None:
        # Stable sorts: first those with a single token to compute; each group by tenants' turns, if there are several,
        # and in order of importance.
        running = sorted(self._running, key=lambda e: e.account.turn) if step.shares.is_contended else self._running
        for entry in sorted(running, key=lambda e: e.num_left > 1):
            request = entry.request
            if request.state is not RequestState.RUNNING:  # preempted for one that came before it in this loop
                continue
            tokens = min(step.allowed(entry), entry.num_left)
            if tokens > 0 and self._make_room(entry, request.num_computed + tokens, step):
                step.add(entry, tokens)

    def _make_room(self, entry: Entry, num_tokens: int, step: StepDraft) -> bool:
        """Pages for a running request's first ``num_tokens`` tokens; False if it had to be preempted itself."""
        needed = self.pool.pages_for(num_tokens) - len(entry.request.pages)
        while needed > self.pool.num_free:
            victim = least_important(self._running, step.shares)
            step.drop(victim)
            self._preempt(victim)
            if victim is entry:
                return False
        self.kv.extend(entry.request, num_tokens)
        return True

    def _preempt(self, entry: Entry) -> None:
        request = entry.request
        self._stop(entry)
        request.num_computed = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self.counts.preemptions += 1
        # Its old tag may lie far back by now, and rule 5 would stop every other adapter at once: it counts from here.
        entry.rank = Rank(entry.rank.priority, False, entry.account.virtual_time, entry.rank.number)
        entry.is_light = False
        entry.queued_tokens = self.kv.num_to_compute(entry)
        entry.account.queue(entry)

    # --- light requests (rule 7) ---------------------------------------------------------------------------------

    def _choose_express(self, step: StepDraft) -> None:
        """Make it an express step, and start light requests for it, if some tenant is entitled to it."""
        room: Room | None = None
        for account in step.shares.in_turn():
            if not step.shares.may_go_ahead(account):
                continue
            unfinished = sum(entry.num_left for entry in account.running if entry.is_light and entry.num_left > 1)
            fair_rows = step.shares.of(account, self.config.max_rows)
            if len(account.running) > fair_rows:
                continue
            for entry in account.waiting.copy():
                if not entry.is_light or len(account.running) >= fair_rows or unfinished >= step.budget:
                    break
                if not self._slot_turns.may_try(entry):
                    continue
                if room is None:
                    room = Room(self.kv, self._running, step.shares)
                victims = in_the_way(entry, room, step.shares, self.kv, self.config)
                if victims is None:
                    break
                if self._take_slots(entry):
                    for victim in victims:
                        self._preempt(victim)
                    self._start(entry)
                    room = None
                    unfinished += entry.num_left
            if unfinished:
                step.express = account
                return

    # --- admission (rules 3 to 6 and 8) --------------------------------------------------------------------------

    def _admit(self, step: StepDraft) -> None:
        accounts = [account for account in step.shares.active if account.waiting]
        if not accounts:
            return
        max_rows = self._max_rows(step)
        queues = [iter(account.waiting.copy()) for account in accounts]
        turns = [(step.turn_of(account), i) for i, account in enumerate(accounts)]
        heapify(turns)
        room = Room(self.kv, self._running, step.shares)
        while turns and len(self._running) < max_rows and step.budget > 0:
            turn, i = heappop(turns)
            account, claim = accounts[i], step.claim
            allowed = step.allowed_to_prompts(account)
            entry = None
            if allowed > 0 or account is step.claimant:
                tried = (one for one in queues[i] if allowed > 0 or one is claim)
                entry = next((one for one in tried if self._slot_turns.may_try(one)), None)
            if entry is None:
                continue
            if not room.has_pages(entry):
                return
            if self._take_slots(entry):
                self._start(entry)
                tokens = step.chunk(entry, max(allowed, 1))
                self.kv.extend(entry.request, entry.request.num_computed + tokens)
                step.add(entry, tokens)
                room.start(entry)
                turn = step.turn_of(account)
            heappush(turns, (turn, i))

    def _max_rows(self, step: StepDraft) -> int:
        """Up to which requests are admitted."""
        return self.config.rows_if_guarded if step.shares.is_guarded else self.config.max_rows

    def _take_slots(self, entry: Entry) -> bool:
        """Take all of the request's slots, or none. If it can never have them it is given up."""
        request = entry.request
        try:
            taken = self._slot_turns.take(entry)
        except AdapterError as error:
            del self._entries[request.request_id]
            self._leave_queue(entry)
            request.state = RequestState.FINISHED
            self._failed.append((request, str(error)))
            return False
        if taken is None:
            return False
        request.slots = taken
        if entry.needed:
            self.counts.slot_misses += entry.missed_slot
            self.counts.slot_hits += not entry.missed_slot
        return True

    def _start(self, entry: Entry) -> None:
        entry.request.state = RequestState.RUNNING
        self.kv.start(entry)
        entry.account.start(entry)
        self._slot_turns.wants_no_more(entry)
        insort(self._running, entry, key=lambda e: e.importance)
        self._num_started += 1
        entry.account.last_start = self._num_started

    def _leave_queue(self, entry: Entry) -> None:
        entry.account.leave_queue(entry)
        self._slot_turns.wants_no_more(entry)

    def _stop(self, entry: Entry) -> None:
        """Take back the row, the pages and the slots of a request that ran."""
        request = entry.request
        self._running.remove(entry)
        entry.account.running.remove(entry)
        self.kv.release(entry)
        if request.slots and self._slots is not None:
            for use in request.adapters:
                self._slots.release(use.ref)
        request.slots = ()
