"""Who has had how much: a clock for each tenant, and its requests.

A tenant's clock shows the tokens that were computed for it, divided by its share (virtual token counters, Sheng et al.
2024, with start-time fair queueing's rule for those who were away). A token counts once, however often a preemption has
it computed (that is not its tenant's doing), and not at all if it was found in the prefix cache. To speculate is its
tenant's doing: a draft counts whether it is accepted or not, and who guesses badly pays for it. The clocks never go
back, and they are put forward in two cases, so that nobody saves up for later:

- *On arrival*: to a tenant of which nothing waits, the time that it did not use is lost. Its clock becomes that of the
  least served of those who do want more, if it was behind; if nobody does, that of the most served one: what somebody
  had while nobody else wanted it took nothing from anyone, and need not be made good.
- *The most that is owed* to anybody is four steps: of ``max_batch_tokens``, for the tenant with the smallest share. A
  tenant whose requests wait for an adapter does not press the others for all that time afterwards.

A tenant without requests is remembered for ``lately_s``, with its clock: it does not get rid of what it has had by
going away for a moment.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from heapq import nsmallest
from typing import Final

from manylora.server.engine.scheduling.queue_entry import Entry, Flow
from manylora.server.engine.scheduling.scheduler_config import SchedulerConfig
from manylora.server.engine.tenant import Tenant

_STEPS_OWED: Final = 4
"""More than the one step that a tenant may go ahead with light requests (``Shares.may_go_ahead``) and what that may be
exceeded by, or going ahead would be forgiven and need never be made good."""


class Account:
    """A tenant's requests, its clock, and the turns of its flows (rule 4 in scheduler.py)."""

    __slots__ = (
        "clock", "last_claim", "last_seen", "last_start", "last_tags", "name", "num_missed", "running", "share",
        "virtual_time", "waiting", "waiting_tokens", "wanting",
    )  # fmt: skip

    def __init__(self, tenant: Tenant) -> None:
        self.name = tenant.name
        self.share = tenant.share
        self.clock = 0.0
        self.waiting: list[Entry] = []  # sorted by rank
        self.waiting_tokens = 0
        self.num_missed = 0  # of those that wait, how many have missed a slot
        self.running: list[Entry] = []  # sorted by importance
        self.last_seen = 0.0
        self.last_start = 0  # the scheduler's count of starts when a request of this tenant last started
        self.last_claim = 0  # likewise its count of claims (rule 5)
        self.wanting: Entry | None = None  # the first of its requests that misses a slot
        self.virtual_time = 0
        self.last_tags: dict[Flow, int] = {}  # of the flows whose last tag is past the virtual time

    @property
    def turn(self) -> tuple[float, int]:
        """Sort key among tenants: the least served one goes first, and of equals the one that started longest ago."""
        return self.clock, self.last_start

    @property
    def num_pages(self) -> int:
        return num_pages(self.running)

    @property
    def wants_more(self) -> bool:
        """Whether it would lose something by a step in which it computes one decoding row only. What waits for an
        adapter would not."""
        running = self.running
        if len(running) > 1 or (running and running[0].num_left > 1):
            return True
        return self.num_missed < len(self.waiting)

    def charge(self, entry: Entry, num_rejected: int = 0) -> None:
        """Count those of its tokens that have been computed for the first time, and drafts that were wrong."""
        new = max(entry.request.num_computed - entry.charged, 0)
        entry.charged += new
        self.clock += (new + num_rejected) / self.share

    def tokens_ahead(self) -> int:
        """Tokens of prompts that wait or are being computed."""
        return self.waiting_tokens + sum(entry.num_left for entry in self.running if entry.num_left > 1)

    # --- its queue -----------------------------------------------------------------------------------------------

    def next_tag(self, flow: Flow) -> int:
        tag = self.last_tags[flow] = max(self.virtual_time, self.last_tags.get(flow, 0)) + 1
        return tag

    def queue(self, entry: Entry) -> None:
        insort(self.waiting, entry)
        self.waiting_tokens += entry.queued_tokens
        self.num_missed += entry.missed_slot

    def miss(self, entry: Entry) -> None:
        """A waiting request has missed a slot."""
        self.num_missed += not entry.missed_slot
        entry.missed_slot = True

    def start(self, entry: Entry) -> None:
        self.virtual_time = max(self.virtual_time, entry.rank.tag)
        insort(self.running, entry, key=lambda e: e.importance)
        self.leave_queue(entry)

    def leave_queue(self, entry: Entry) -> None:
        self.waiting.remove(entry)
        self.waiting_tokens -= entry.queued_tokens
        self.num_missed -= entry.missed_slot
        self._forget_tag(entry)

    def _forget_tag(self, entry: Entry) -> None:
        """Let go of its flow's last tag if the request that left had it: the table must not grow with adapters."""
        flow = entry.flow
        last = self.last_tags.get(flow, 0)
        if last > self.virtual_time and last == entry.rank.tag:  # it left before its turn
            last = max((e.rank.tag for e in self.waiting if e.flow == flow), default=0)
        if last > self.virtual_time:
            self.last_tags[flow] = last
        else:
            self.last_tags.pop(flow, None)


def num_pages(entries: Sequence[Entry]) -> int:
    """KV pages that these running requests hold; one that they share counts once."""
    if len(entries) == 1:
        return len(entries[0].request.pages)
    return len({page for entry in entries for page in entry.request.pages})


class Shares:
    """How one step is divided among the tenants who have requests (``active``), of whom some want more (``hungry``)."""

    def __init__(
        self, active: Sequence[Account], hungry: Sequence[Account], max_batch_tokens: int, *, is_guarded: bool
    ) -> None:
        self.active = active
        self._least_served = nsmallest(2, hungry, key=lambda account: account.clock)
        self._ahead = max_batch_tokens
        self.is_guarded = is_guarded
        """Whether other tenants are here or were lately (rule 8 in scheduler.py)."""
        self._total = sum(account.share for account in active)

    @property
    def is_contended(self) -> bool:
        return len(self.active) > 1

    def of(self, account: Account, amount: int) -> int:
        """Its part of ``amount`` rows, pages or tokens; at least 1."""
        return max(1, int(amount * account.share / self._total))

    def in_turn(self) -> list[Account]:
        return sorted(self.active, key=lambda account: account.turn)

    def may_go_ahead(self, account: Account) -> bool:
        """Whether it has had less than everybody who wanted more when the step began, or not more than a step's tokens
        above: requests that come now and then come close together by chance."""
        clock = account.clock - self._ahead / account.share
        return all(clock <= other.clock for other in self._least_served if other is not account)


class Accounts:
    """The tenants that are here or were lately. ``clock``: monotonic seconds."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._by_name: dict[str, Account] = {}

    def __iter__(self) -> Iterator[Account]:
        return iter(list(self._by_name.values()))  # other threads may look while a tenant comes

    def arrive(self, tenant: Tenant) -> Account:
        """The account of a tenant of which a request arrives."""
        account = self._by_name.get(tenant.name)
        if account is None:
            account = self._by_name[tenant.name] = Account(tenant)
        account.share = tenant.share  # a file of keys that was read again may have changed it
        self.seen(account)
        if not account.waiting and len(self._by_name) > 1:
            others = [other for other in self._by_name.values() if other is not account]
            hungry = [other.clock for other in others if other.wants_more]
            account.clock = max(account.clock, min(hungry) if hungry else max(other.clock for other in others))
        return account

    def seen(self, account: Account) -> None:
        account.last_seen = self._clock()

    def shares(self) -> Shares:
        """For the next step: who has requests, the clocks put forward where too much is owed."""
        accounts = self._by_name
        if len(accounts) > 1:
            since = self._clock() - self._config.lately_s
            for account in self:
                if not account.waiting and not account.running and account.last_seen < since:
                    del accounts[account.name]
        active = [account for account in accounts.values() if account.waiting or account.running]
        hungry: list[Account] = []
        if len(active) > 1:
            owed = _STEPS_OWED * self._config.max_batch_tokens / min(account.share for account in active)
            hungry = [account for account in active if account.wants_more]
            most = max((account.clock for account in hungry), default=0.0)
            for account in active:
                account.clock = max(account.clock, most - owed)
        return Shares(active, hungry, self._config.max_batch_tokens, is_guarded=len(accounts) > 1)
