"""Whom to preempt, for memory (rules 2 and 6 in scheduler.py) and for a light request (rule 7).

Between tenants it is those who hold the most for their share who lose, and within one the least important request. The
*youngest* one is the least important, not the one that has been computed the least: a tenant's stream of long prompts,
each soon ahead of an older request, could keep that one from ever finishing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import copy

from manylora.server.engine.scheduling.accounts import Account, Shares, num_pages
from manylora.server.engine.scheduling.kv_pages import KvPages
from manylora.server.engine.scheduling.queue_entry import Entry
from manylora.server.engine.scheduling.scheduler_config import SchedulerConfig


class Room:
    """Rows and pages for one more request, as long as it is told who starts (and nobody else comes or goes)."""

    def __init__(self, pages: KvPages, running: Sequence[Entry], shares: Shares) -> None:
        self._pages = pages
        self._pool = pages.pool
        self.num_rows = len(running)
        self.several = [account for account in shares.active if len(account.running) > 1]
        """Tenants with more than one running request."""
        self._leaving: Counter[int] = Counter()
        """By page, how many of its users have been preempted."""
        self._freed = 0
        self._owed = sum(self._due(entry) for entry in running)

    def has_pages(self, entry: Entry) -> bool:
        """Whether there are pages for all known tokens of a waiting request beside the running ones: after those that
        they still need for theirs, and with a page to spare for each, or admitting it would soon preempt another.

        What it shares with running requests takes no free page; a cached page that nobody uses is a free one, so that
        it makes no difference whether the request takes that or another."""
        wanted = self._pages.num_to_take(entry, self._leaving)
        return wanted + self._owed + self.num_rows <= self._pool.num_free + self._freed

    def start(self, entry: Entry) -> None:
        """A request has started, and has the pages that it takes in this step."""
        self.num_rows += 1
        self._owed += self._due(entry)

    def without(self, victim: Entry) -> Room:
        """What there will be when it is preempted."""
        room = copy(self)
        room.num_rows -= 1
        room._owed -= self._due(victim)
        room._leaving = self._leaving.copy()
        for page in victim.request.pages:
            room._leaving[page] += 1
            room._freed += room._leaving[page] == self._pool.users(page)
        return room

    def _due(self, entry: Entry) -> int:
        return self._pool.pages_for(entry.request.num_tokens) - len(entry.request.pages)


def least_important(running: Sequence[Entry], shares: Shares) -> Entry:
    """The running request that memory is taken from; ``running`` is sorted by importance.

    Of several tenants', never the one that was submitted first among the most important ones, or two of them might take
    each other's pages for ever.
    """
    accounts = [account for account in shares.active if account.running]
    if len(accounts) == 1:
        return running[-1]
    kept = min((account.running[0] for account in accounts), key=lambda entry: entry.rank.number)
    accounts = [account for account in accounts if account.running[-1] is not kept]
    return max(accounts, key=lambda account: (account.num_pages / account.share, account.name)).running[-1]


def in_the_way(entry: Entry, room: Room, shares: Shares, pages: KvPages, config: SchedulerConfig) -> list[Entry] | None:
    """Whom to preempt so that a light request can start: nobody, if there is room; None if it would not help.

    The least important requests of other tenants, each the tenant's that is most over its share of what lacks (rows,
    then pages) when it is taken, and never a tenant's last one. Pages are taken only for a tenant that will then be
    within its share of them.
    """
    victims: list[Entry] = []
    if room.num_rows < config.max_rows and room.has_pages(entry):
        return victims
    left = {account: account.running.copy() for account in room.several if account is not entry.account}
    then_held = entry.account.num_pages + pages.num_to_take(entry, Counter())
    may_take_pages = then_held <= shares.of(entry.account, config.num_pages)
    while (rows_lack := room.num_rows >= config.max_rows) or not room.has_pages(entry):
        over: list[tuple[float, str, Account]] = []
        if rows_lack or may_take_pages:
            for account, entries in left.items():
                held = len(entries) if rows_lack else num_pages(entries)
                if len(entries) > 1 and held > shares.of(account, config.max_rows if rows_lack else config.num_pages):
                    over.append((held / account.share, account.name, account))
        if not over:
            return None
        victims.append(left[max(over, key=lambda one: one[:2])[2]].pop())
        room = room.without(victims[-1])
    return victims
