"""A step in the making: its rows, and how many tokens each tenant may still have in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from manylora.server.engine.request import Request, ScheduledRow
from manylora.server.engine.scheduling.accounts import Account, Shares
from manylora.server.engine.scheduling.queue_entry import Entry
from manylora.server.engine.scheduling.scheduler_config import SchedulerConfig

_SCORED_TOKENS: Final = 64
"""The most tokens of a prompt whose tokens are scored in a step with other requests. Each of them is computed through
the output layer too and looked up in the whole vocabulary, as otherwise only the last of a prompt is, so that with a
small model they may take several times as long as others."""


class StepDraft:
    """``express``: the tenant whose light requests the step is for (rule 7 in scheduler.py), if it is.

    ``claimant``: the tenant for whose claim (slot_turns.py) a token is kept, if one is."""

    def __init__(self, config: SchedulerConfig, shares: Shares) -> None:
        self.budget = config.max_batch_tokens
        self.shares = shares
        self.express: Account | None = None
        self.claimant: Account | None = None
        self._next_to_start: tuple[float, int] | None = None
        self.rows: dict[Request, ScheduledRow] = {}
        self._tokens_of: Counter[str] = Counter()
        self._num_tokens = 0
        self._guarded = config.tokens_if_guarded
        self._drafts_up_to = config.drafts_up_to
        self._decoding: set[Entry] | None = None

    def expect_starts(self, claimant: Account | None) -> None:
        """There is a row for another request: leave tokens for whose turn it is, and for the claim."""
        self.claimant = claimant
        turns = (account.turn for account in self.shares.active if account.num_missed < len(account.waiting))
        self._next_to_start = min(turns, default=None)

    def choose_decoding(self, running: Sequence[Entry], turns: Iterator[int], *, has_row: bool) -> None:
        """Which decoding rows a guarded step advances (rule 8 in scheduler.py); all of them, unless this is called.

        ``turns``: the numbers of the next turns to decode. ``has_row``: whether another request could start."""
        decoding = [entry for entry in running if entry.num_left == 1]
        prompts = sum(entry.num_left for entry in running if entry.num_left > 1)
        if has_row:
            prompts += sum(one.waiting_tokens for one in self.shares.active if one.num_missed < len(one.waiting))
        allowed = self._guarded - min(self._guarded // 2, prompts)
        if len(decoding) > allowed:
            decoding.sort(key=lambda entry: (entry.rank.priority, entry.last_turn, entry.rank.number))
            so_far: Counter[str] = Counter()
            keys: dict[Entry, tuple[float, int, int]] = {}
            for entry in decoding:
                account = entry.account
                so_far[account.name] += 1
                level = so_far[account.name] / account.share if so_far[account.name] > 1 else 0.0
                keys[entry] = level, entry.last_turn, entry.rank.number
            chosen = sorted(decoding, key=keys.__getitem__)[:allowed]
            for entry in chosen:
                entry.last_turn = next(turns)
            self._decoding = set(chosen)

    @property
    def claim(self) -> Entry | None:
        """The request that may start with a single token whatever its tenant has had."""
        return self.claimant.wanting if self.claimant is not None else None

    def add(self, entry: Entry, count: int) -> None:
        self.rows[entry.request] = ScheduledRow(entry.request, entry.request.num_computed, count)
        self._count(entry, count)

    def speculate(self, entry: Entry, drafts: Sequence[int]) -> None:
        """Give a decoding row of the step drafts, too."""
        request = entry.request
        self.rows[request] = ScheduledRow(request, request.num_computed, 1 + len(drafts), tuple(drafts))
        self._count(entry, len(drafts))

    @property
    def room_for_drafts(self) -> int:
        """Tokens that nobody else wants: none in an express step, or while anybody rests or has a prompt left."""
        if self.express is not None:
            return 0
        for account in self.shares.active:
            for entry in account.running:
                row = self.rows.get(entry.request)
                if row is None or row.count < entry.num_left:
                    return 0
        allowed = min(self.budget, self._drafts_up_to - self._num_tokens)
        return min(allowed, self._guarded - self._num_tokens) if self.shares.is_guarded else allowed

    def drop(self, entry: Entry) -> None:
        row = self.rows.pop(entry.request, None)
        if row is not None:
            self._count(entry, -row.count)

    def _count(self, entry: Entry, count: int) -> None:
        self.budget -= count
        self._num_tokens += count
        self._tokens_of[entry.account.name] += count

    def turn_of(self, account: Account) -> tuple[float, int]:
        """``Account.turn`` as it will be after this step."""
        return account.clock + self._tokens_of[account.name] / account.share, account.last_start

    def allowed(self, entry: Entry) -> int:
        """Tokens that a running request may have."""
        account, express = entry.account, self.express
        if entry.num_left > 1:
            is_before = self._next_to_start is not None and self._next_to_start < account.turn
            return self.chunk(entry, self.allowed_to_prompts(account, only_own=is_before))
        if express is not None and account is not express and entry is not account.running[0]:
            return 0
        return self.budget if self._decoding is None or entry in self._decoding else 0

    def allowed_to_prompts(self, account: Account, *, only_own: bool = False) -> int:
        """Tokens that the tenant's prompts may have. ``only_own``: in a guarded step, none but those of its share."""
        if self.express is not None:
            return self.budget if account is self.express else 0
        budget = self.budget if self.claim is None else self.budget - 1
        if not self.shares.is_guarded:
            return budget
        unused = 0 if only_own else self._guarded - self._num_tokens
        own = self.shares.of(account, self._guarded) - self._tokens_of[account.name]
        return min(budget, max(unused, own, 0))

    def chunk(self, entry: Entry, allowed: int) -> int:
        """How many tokens of its prompt are computed if it may have so many; it is among the running ones by now."""
        if entry.request.params.prompt_logprobs is not None and not self._is_alone(entry):
            allowed = min(allowed, _SCORED_TOKENS)
        return min(allowed, entry.num_left)

    def _is_alone(self, entry: Entry) -> bool:
        return all(account.running in ([], [entry]) for account in self.shares.active)
