"""A step in the making: its rows, and how many tokens each tenant may still have in it."""

from __future__ import annotations

from collections import Counter

from manylora.server.engine.request import Request, ScheduledRow
from manylora.server.engine.scheduling.accounts import Account, Shares
from manylora.server.engine.scheduling.queue_entry import Entry
from manylora.server.engine.scheduling.scheduler_config import SchedulerConfig


class StepDraft:
    """``express``: the tenant whose light requests the step is for (rule 7 in scheduler.py), if it is."""

    def __init__(self, config: SchedulerConfig, shares: Shares) -> None:
        self.budget = config.max_batch_tokens
        self.shares = shares
        self.express: Account | None = None
        self.rows: dict[Request, ScheduledRow] = {}
        self._tokens_of: Counter[str] = Counter()
        self._size = config.max_batch_tokens
        self._guarded = config.tokens_if_guarded

    def add(self, entry: Entry, count: int) -> None:
        self.rows[entry.request] = ScheduledRow(entry.request, entry.request.num_computed, count)
        self.budget -= count
        self._tokens_of[entry.account.name] += count

    def drop(self, entry: Entry) -> None:
        row = self.rows.pop(entry.request, None)
        if row is not None:
            self.budget += row.count
            self._tokens_of[entry.account.name] -= row.count

    def turn_of(self, account: Account) -> tuple[float, int]:
        """``Account.turn`` as it will be after this step."""
        return account.clock + self._tokens_of[account.name] / account.share, account.last_start

    def allowed(self, entry: Entry) -> int:
        """Tokens that a running request may have."""
        account, express = entry.account, self.express
        if entry.num_left > 1:
            return self.allowed_to_prompts(account)
        if express is None or account is express or entry is account.running[0]:
            return self.budget
        return 0

    def allowed_to_prompts(self, account: Account) -> int:
        """Tokens that the tenant's prompts may have."""
        if self.express is not None:
            return self.budget if account is self.express else 0
        if not self.shares.is_guarded:
            return self.budget
        unused = self._guarded - (self._size - self.budget)
        own = self.shares.of(account, self._guarded) - self._tokens_of[account.name]
        return min(self.budget, max(unused, own, 0))
