"""The scheduling rules again, slowly: everything is recomputed from plain lists at each step; pages are those of
reference_pages.py.

Written from the text atop server/engine/scheduling/scheduler.py, accounts.py and slot_turns.py, to be compared with
them plan by plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from manylora.adapters.versions import AdapterRef
from manylora.server.engine.scheduling.scheduler import SchedulerConfig, Slots
from manylora.server.engine.tenant import EVERYBODY, Tenant
from tests.engine.reference_pages import Holder, ReferencePages

Row = tuple[str, int, int, tuple[int, ...]]
"""Request id, start, count, slots."""


@dataclass(eq=False)
class Party:
    """A tenant."""

    name: str
    share: Fraction
    clock: Fraction = Fraction(0)
    seen: float = 0.0
    started: int = 0
    claimed: int = 0
    virtual_time: int = 0
    wanting: Job | None = None


@dataclass(eq=False)
class Job:
    name: str
    party: Party
    adapters: list[AdapterRef]
    """Whose slots it takes."""
    flow: set[str]
    priority: int
    number: int
    tag: int
    kv: Holder
    light: bool = False
    queued: int = 0
    """What there was to compute when it was queued."""
    computed: int = 0
    charged: int = 0
    last_turn: int = 0
    running: bool = False
    preempted: bool = False
    denied_before: bool = False
    slots: tuple[int, ...] = ()
    scored: bool = False

    @property
    def tokens(self) -> int:
        return len(self.kv.tokens)

    @property
    def left(self) -> int:
        return self.tokens - self.computed

    def importance(self) -> tuple[int, int]:
        return (self.priority, self.number)

    def turn(self) -> tuple[int, bool, int, int]:
        return (self.priority, not self.preempted, self.tag, self.number)


@dataclass
class Scan:
    """What a step's tries for slots have come to."""

    denied: list[Job] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    resident: set[str] | None = None
    """What was on the device when this was first asked for, or when a request was last denied."""


class ReferenceScheduler:
    def __init__(
        self,
        config: SchedulerConfig,
        slots: Slots,
        now: Callable[[], float] = lambda: 0.0,
        guesses: Callable[[str], int] = lambda _name: 0,
    ) -> None:
        self.config = config
        self.guesses = guesses
        """How many tokens a request that decodes would draft now."""
        self.drafts: dict[str, int] = {}
        """By request, how many it drafts in this step."""
        self.slots = slots
        self.now = now
        self.jobs: list[Job] = []
        self.kv = ReferencePages(config.num_pages, config.page_size, caching=config.prefix_cache)
        self.parties: list[Party] = []
        self.n_added = self.n_started = self.n_claims = self.n_turns = 0
        self.holder: Party | None = None
        self.claimant: Party | None = None
        self.next_to_start: tuple[Fraction, int] | None = None
        self.hungry: list[Party] = []
        self.turn_is_over = False
        self.overtaken: Counter[str] = Counter()
        self.was_express = False
        self.seen: Counter[str] = Counter()
        """How often which rule was applied, for the test that they all are."""

    # --- what is there --------------------------------------------------------------------------------------------

    def waiting(self, party: Party | None = None) -> list[Job]:
        jobs = [job for job in self.jobs if not job.running and party in (None, job.party)]
        return sorted(jobs, key=Job.turn)

    def running(self, party: Party | None = None) -> list[Job]:
        return sorted((job for job in self.jobs if job.running and party in (None, job.party)), key=Job.importance)

    def active(self) -> list[Party]:
        return [party for party in self.parties if any(job.party is party for job in self.jobs)]

    def share(self, party: Party, amount: int) -> int:
        return max(1, int(amount * party.share / sum(other.share for other in self.active())))

    def wants_more(self, party: Party) -> bool:
        idle = [job for job in self.waiting(party) if not job.denied_before]
        running = self.running(party)
        return bool(idle) or len(running) > 1 or any(job.left > 1 for job in running)

    def may_go_ahead(self, party: Party) -> bool:
        hungry = [other.clock for other in self.hungry if other is not party]
        return all(party.clock <= clock + self.config.max_batch_tokens / party.share for clock in hungry)

    def pages_of(self, jobs: Collection[Job]) -> int:
        return self.kv.held_by([job.kv for job in jobs])

    def has_room(self, job: Job, without: Collection[Job] = ()) -> bool:
        others = [other for other in self.running() if other not in without]
        owed = sum(self.kv.pages_for(other.tokens) - other.kv.count for other in others)
        gone = [other.kv for other in without]
        return owed + len(others) + self.kv.to_take(job.kv, gone) <= self.kv.free(gone)

    # --- what comes and goes --------------------------------------------------------------------------------------

    def add(
        self, name: str, adapters: list[AdapterRef], flow: set[str], priority: int, prompt: Sequence[int],
        tenant: Tenant = EVERYBODY, *, scored: bool = False, root: object = None,
    ) -> None:  # fmt: skip
        party = next((one for one in self.parties if one.name == tenant.name), None)
        if party is None:
            party = Party(tenant.name, Fraction(tenant.share))
            self.parties.append(party)
        party.seen = self.now()
        if not self.waiting(party):
            hungry = [other.clock for other in self.parties if other is not party and self.wants_more(other)]
            others = [other.clock for other in self.parties if other is not party]
            if others:
                party.clock = max(party.clock, min(hungry) if hungry else max(others))
        ahead = [job.tag for job in self.waiting(party) if job.flow == flow]
        tag = max([party.virtual_time, *ahead]) + 1
        unfinished = sum(
            job.left if job.running else job.queued
            for job in self.jobs
            if job.party is party and (job.left > 1 or not job.running)
        )
        holder = Holder(root, list(prompt), frozenset(flow), takes=self.config.prefix_cache and not scored)
        job = Job(name, party, adapters, flow, priority, self.n_added, tag, holder, scored=scored)
        self.set_queued(job)
        job.light = unfinished == 0 or unfinished + job.queued <= self.config.max_batch_tokens
        self.jobs.append(job)
        self.kv.holders.append(holder)
        self.n_added += 1

    def set_queued(self, job: Job) -> None:
        job.queued = job.tokens - len(self.kv.there(job.kv)) * self.config.page_size
        self.seen["found when queued"] += job.queued < job.tokens

    def stop(self, job: Job) -> None:
        if job.running:
            for ref in job.adapters:
                self.slots.release(ref)
            self.kv.release(job.kv)
        job.running, job.computed, job.slots = False, 0, ()

    def preempt(self, job: Job) -> None:
        self.stop(job)
        job.preempted, job.light, job.tag = True, False, job.party.virtual_time
        self.set_queued(job)

    def finish(self, name: str) -> None:
        job = next(job for job in self.jobs if job.name == name)
        self.stop(job)
        self.jobs.remove(job)
        self.kv.holders.remove(job.kv)
        job.party.seen = self.now()
        self.wants_no_more(job)

    def start(self, job: Job, slots: tuple[int, ...]) -> None:
        job.running, job.slots = True, slots
        job.computed = self.kv.start(job.kv)
        job.charged = max(job.charged, job.computed)
        self.seen["started behind a prefix"] += job.computed > 0
        self.seen["came back to a prefix"] += job.computed > 0 and job.preempted
        if job.kv.takes and not job.preempted:
            self.kv.n_queries += job.tokens
            self.kv.n_hits += job.computed
        job.party.virtual_time = max(job.party.virtual_time, job.tag)
        self.n_started += 1
        job.party.started = self.n_started
        self.wants_no_more(job)

    def commit(self, rows: list[Row], accepted: Mapping[str, int], token: int) -> None:
        """``accepted``: how many drafts of which row; ``token`` is what was drawn, every time."""
        for name, _start, count, _slots in rows:
            job = next(job for job in self.jobs if job.name == name)
            drafted, right = self.drafts.get(name, 0), accepted.get(name, 0)
            job.computed += count - drafted + right
            job.party.clock += (max(0, job.computed - job.charged) + drafted - right) / job.party.share
            job.charged = max(job.charged, job.computed)
            if job.computed == job.tokens + right:
                job.kv.tokens += [token] * (right + 1)
            if drafted:
                job.kv.own = self.kv.pages_for(job.computed) - len(job.kv.shown)
            self.kv.computed(job.kv, job.computed)

    # --- a step ---------------------------------------------------------------------------------------------------

    def schedule(self) -> list[Row]:
        since = self.now() - self.config.lately_s
        if len(self.parties) > 1:
            self.parties = [party for party in self.parties if party in self.active() or party.seen >= since]
        self.put_clocks_forward()
        self.hungry = [party for party in self.active() if self.wants_more(party)]
        guarded = len(self.parties) > 1
        scan = Scan()
        express = None if self.was_express or len(self.active()) < 2 else self.choose_express(scan)
        self.was_express = express is not None
        counts: dict[Job, int] = {}
        has_row = len(self.running()) < (self.config.rows_if_guarded if guarded else self.config.max_rows)
        self.claimant, self.next_to_start = None, None
        if len(self.active()) > 1 and has_row:
            self.claimant = self.holder
            fresh = {job.party.name: job.party for job in self.waiting() if not job.denied_before}
            self.next_to_start = min(((party.clock, party.started) for party in fresh.values()), default=None)
        any_preempted = self.continue_running(counts, express, guarded, has_row=has_row)
        if express is None and not any_preempted:
            self.admit(counts, guarded, scan)
        self.pass_the_claim_on()
        self.drafts = {} if express is not None else self.draft(counts, guarded)
        self.seen["drafts"] += bool(self.drafts)
        self.seen["drafts in a guarded step"] += bool(self.drafts) and guarded
        self.seen["express"] += express is not None
        self.seen["guarded"] += guarded
        return [
            (job.name, job.computed, count + self.drafts.get(job.name, 0), job.slots) for job, count in counts.items()
        ]

    def draft(self, counts: dict[Job, int], guarded: bool) -> dict[str, int]:
        if any(counts.get(job, 0) < job.left for job in self.running()):
            return {}
        config, used = self.config, sum(counts.values())
        left = min(config.max_batch_tokens, config.drafts_up_to, config.tokens_if_guarded if guarded else used + 10**9)
        left -= used
        if left <= 0:
            return {}
        guessing = [job for job in self.running() if job.left == 1 and self.guesses(job.name) > 0]
        drafts: dict[str, int] = {}
        for i, job in enumerate(guessing):
            most = min(self.guesses(job.name), left // (len(guessing) - i))
            while most > 0 and self.kv.pages_for(job.computed + 1 + most) - job.kv.count > self.kv.empty():
                most -= 1
                self.seen["fewer drafts for want of pages"] += 1
            if most > 0:
                self.kv.grow(job.kv, self.kv.pages_for(job.computed + 1 + most))
                drafts[job.name] = most
                left -= most
        return drafts

    def put_clocks_forward(self) -> None:
        hungry = [party.clock for party in self.active() if self.wants_more(party)]
        if len(self.active()) > 1 and hungry:
            owed = 4 * self.config.max_batch_tokens / min(party.share for party in self.active())
            for party in self.active():
                self.seen["put forward"] += party.clock < max(hungry) - owed
                party.clock = max(party.clock, max(hungry) - owed)

    def for_prompts(
        self, party: Party, counts: dict[Job, int], express: Party | None, guarded: bool, *, runs: bool = False
    ) -> int:
        used = sum(counts.values())
        left = self.config.max_batch_tokens - used
        if express is not None:
            return left if express is party else 0
        if self.claimant is not None and self.claimant.wanting is not None:
            left -= 1
        if not guarded:
            return left
        own = self.share(party, self.config.tokens_if_guarded) - sum(
            count for job, count in counts.items() if job.party is party
        )
        rest = self.config.tokens_if_guarded - used
        if runs and self.next_to_start is not None and self.next_to_start < (party.clock, party.started):
            self.seen["left to who starts"] += 1
            rest = 0
        return min(left, max(0, own, rest))

    def resting(self, decodes: list[Job], has_row: bool) -> list[Job]:
        """Decoding rows that a guarded step leaves out."""
        prompts = sum(job.left for job in self.running() if job.left > 1)
        for party in self.active() if has_row else []:
            waiting = self.waiting(party)
            if any(not job.denied_before for job in waiting):
                prompts += sum(job.queued for job in waiting)
        guarded = self.config.tokens_if_guarded
        places = guarded - min(guarded // 2, prompts)
        if len(decodes) <= places:
            return []
        queues = {
            party: sorted(
                (job for job in decodes if job.party is party),
                key=lambda job: (job.priority, job.last_turn, job.number),
            )
            for party in self.active()
        }
        given: Counter[Party] = Counter()

        def next_of(party: Party) -> tuple[float | Fraction, int, int]:
            first = queues[party][0]
            return ((given[party] + 1) / party.share if given[party] else 0, first.last_turn, first.number)

        while places > 0:
            party = min((party for party, queue in queues.items() if queue), key=next_of)
            given[party] += 1
            self.n_turns += 1
            queues[party].pop(0).last_turn = self.n_turns
            places -= 1
        return [job for queue in queues.values() for job in queue]

    def for_one(self, job: Job, counts: dict[Job, int], guarded: bool) -> int:
        """Tokens for a request that waits."""
        tokens = self.for_prompts(job.party, counts, None, guarded)
        if tokens <= 0 and self.claimant is not None and job is self.claimant.wanting:
            self.seen["a token for the claim"] += 1
            return 1
        return tokens

    def capped(self, job: Job, count: int) -> int:
        if job.scored and count > 64 and self.running() != [job]:
            self.seen["scored slowly"] += 1
            return 64
        return count

    def continue_running(self, counts: dict[Job, int], express: Party | None, guarded: bool, *, has_row: bool) -> bool:
        any_preempted = False
        # The order is that of the tenants' turns at the beginning of the step.
        running = sorted(self.running(), key=lambda job: (job.party.clock, job.party.started, job.importance()))
        decodes = [job for job in running if job.left == 1]
        resting = self.resting(decodes, has_row) if guarded and express is None else []
        self.seen["decoding rows take turns"] += bool(resting)
        for job in decodes + [job for job in running if job not in decodes]:
            if not job.running:
                continue
            count = min(self.config.max_batch_tokens - sum(counts.values()), job.left)
            if job.left > 1:
                count = self.capped(job, min(count, self.for_prompts(job.party, counts, express, guarded, runs=True)))
            elif job in resting or (express not in (None, job.party) and job is not self.running(job.party)[0]):
                count = 0
            if count == 0:
                continue
            needed = self.kv.pages_for(job.computed + count)
            while job.running and needed - job.kv.count > self.kv.free():
                victim = self.memory_victim()
                counts.pop(victim, None)
                self.preempt(victim)
                any_preempted = True
            if job.running:
                self.kv.grow(job.kv, needed)
                counts[job] = count
        return any_preempted

    def memory_victim(self) -> Job:
        first_ones = [self.running(party)[0] for party in self.active() if self.running(party)]
        if len(first_ones) == 1:
            return self.running()[-1]
        kept = min(first_ones, key=lambda job: job.number)
        last_ones = [self.running(party)[-1] for party in self.active() if self.running(party)]
        self.seen["memory of several"] += 1
        return max(
            (job for job in last_ones if job is not kept),
            key=lambda job: (self.pages_of(self.running(job.party)) / job.party.share, job.party.name),
        )

    def choose_express(self, scan: Scan) -> Party | None:
        for party in sorted(self.active(), key=lambda party: (party.clock, party.started)):
            if not self.may_go_ahead(party):
                continue
            fair = self.share(party, self.config.max_rows)
            if len(self.running(party)) > fair:
                continue
            unfinished = [job for job in self.running(party) if job.light and job.left > 1]
            for job in self.waiting(party):
                full = sum(job.left for job in unfinished) >= self.config.max_batch_tokens
                if not job.light or len(self.running(party)) >= fair or full:
                    break
                if not self.may_try(job, scan):
                    continue
                victims = self.in_the_way(job)
                if victims is None:
                    break
                slots = self.take_slots(job, scan)
                if slots is None:
                    continue
                for victim in victims:
                    self.preempt(victim)
                    self.seen["preempted for a light one"] += 1
                self.start(job, slots)
                unfinished.append(job)
            if unfinished:
                return party
        return None

    def in_the_way(self, job: Job) -> list[Job] | None:
        victims: list[Job] = []
        own = self.pages_of(self.running(job.party)) + self.kv.to_take(job.kv)
        while True:
            others = [one for one in self.running() if one not in victims]
            if len(others) >= self.config.max_rows:
                amount = {party: len([one for one in others if one.party is party]) for party in self.active()}
                total = self.config.max_rows
            elif not self.has_room(job, victims):
                amount = {
                    party: self.pages_of([one for one in others if one.party is party]) for party in self.active()
                }
                total = self.config.num_pages
                if own > self.share(job.party, total):
                    return None
            else:
                return victims
            over = [
                party
                for party in self.active()
                if party is not job.party
                and amount[party] > self.share(party, total)
                and sum(one.party is party for one in others) > 1
            ]
            if not over:
                return None
            most = max(over, key=lambda party: (amount[party] / party.share, party.name))
            victims.append(max((one for one in others if one.party is most), key=Job.importance))

    def admit(self, counts: dict[Job, int], guarded: bool, scan: Scan) -> None:
        max_rows = self.config.rows_if_guarded if guarded else self.config.max_rows
        done: list[Job] = []
        while len(self.running()) < max_rows and sum(counts.values()) < self.config.max_batch_tokens:

            def turn(job: Job) -> tuple[Fraction, int, int]:
                party = job.party
                planned = sum(count for other, count in counts.items() if other.party is party)
                return (party.clock + planned / party.share, party.started, self.parties.index(party))

            tried = [job for job in self.waiting() if job not in done and self.for_one(job, counts, guarded) > 0]
            if not tried:
                return
            job = min(tried, key=turn)  # the first of its tenant, as ``tried`` is sorted
            done.append(job)
            if not self.may_try(job, scan):
                continue
            if not self.has_room(job):
                return
            tokens = self.for_one(job, counts, guarded)
            slots = self.take_slots(job, scan)
            if slots is not None:
                self.start(job, slots)
                counts[job] = self.capped(job, min(tokens, job.left))
                self.kv.grow(job.kv, self.kv.pages_for(job.computed + counts[job]))

    # --- slots ----------------------------------------------------------------------------------------------------

    def may_try(self, job: Job, scan: Scan) -> bool:
        if not job.adapters:
            return True
        foreign = self.holder is not None and self.holder is not job.party
        if not foreign and not scan.denied:
            return True
        if scan.resident is None:
            scan.resident = {ref.version for ref in self.slots.resident()}
        is_there = all(ref.version in scan.resident - set(scan.missing) for ref in job.adapters)
        if foreign:
            if not is_there:
                self.want(job)
            if not is_there or self.overtaken[job.party.name] >= self.config.max_overtake:
                self.seen["held for a claim"] += 1
                return False
        late = [other for other in scan.denied if other.party is job.party]
        return is_there and not any(job.tag > other.tag + self.config.max_overtake for other in late)

    def want(self, job: Job) -> None:
        wanting = job.party.wanting
        if wanting is None or job.turn() < wanting.turn():
            job.party.wanting = job

    def take_slots(self, job: Job, scan: Scan) -> tuple[int, ...] | None:
        """Slots of all its adapters, or none and the missing ones noted."""
        resident = {ref.version for ref in self.slots.resident()}
        got: dict[int, int] = {}
        for there_already in (True, False):
            for i, ref in enumerate(job.adapters):
                if (ref.version in resident) == there_already:
                    slot = self.slots.acquire(ref)
                    if slot is None:
                        scan.missing.append(ref.version)
                    else:
                        got[i] = slot
        if len(got) == len(job.adapters):
            if job.adapters and self.holder not in (None, job.party):
                self.overtaken[job.party.name] += 1
            return tuple(got[i] for i in range(len(job.adapters)))
        for i in got:
            self.slots.release(job.adapters[i])
        scan.denied.append(job)
        scan.resident = {ref.version for ref in self.slots.resident()}
        job.denied_before = True
        self.want(job)
        return None

    def wants_no_more(self, job: Job) -> None:
        if job.party.wanting is job:
            job.party.wanting = None
            self.turn_is_over = self.turn_is_over or job.party is self.holder

    def pass_the_claim_on(self) -> None:
        if self.turn_is_over:
            self.holder, self.turn_is_over = None, False
        wanting = [party for party in self.parties if party.wanting is not None]
        if self.holder is None and wanting:
            self.holder = min(wanting, key=lambda party: party.claimed)
            self.n_claims += 1
            self.holder.claimed = self.n_claims
            self.overtaken.clear()
