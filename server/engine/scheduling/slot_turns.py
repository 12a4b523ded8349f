"""Who may take adapter slots, and who must wait for another's turn: rule 5 in scheduler.py.

All or none of a request's slots are taken, so nobody holds what another waits for. Within a tenant the order of its
queue decides, as that rule says. Between tenants there is no such order, as their clocks change while they wait; so:

- **The claim.** At most one tenant at a time has it: the one, of those that miss a slot, that had it longest ago. It
  keeps it until the first of its requests that missed a slot has started, or is gone; though another may miss one by
  then, the claim goes on to the next tenant.
- While it stands, requests of *other* tenants may only use adapters that are on the device already, and each other
  tenant may start at most ``max_overtake`` of them.

- In every ordinary step in which its turn comes while there is a row, the holder's request that missed a slot may start
  with one token at least (``StepDraft.claim``), whatever its tenant and the others have had in that step: the others'
  wait for slots does not depend on that.

So a tenant that misses a slot has the claim after at most one turn of each other tenant; and while it has it, the
argument of rule 5 holds: uploads are started for its first requests alone, the others stop feeding what holds the
slots, those that run end, and all of its slots become free.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from manylora.adapters.versions import AdapterRef
from manylora.server.engine.scheduling.accounts import Account
from manylora.server.engine.scheduling.queue_entry import Entry


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


class SlotTurns:
    """``start_step`` before a step's requests are tried, ``may_try`` and ``take`` for each, ``end_step`` after."""

    def __init__(self, slots: Slots | None, max_overtake: int) -> None:
        self._slots = slots
        self._max_overtake = max_overtake
        self._holder: Account | None = None
        self._is_turn_over = False
        self._num_claims = 0
        self._overtaken: Counter[str] = Counter()
        """By tenant: requests that took slots while another had the claim."""
        # Of this step: whether a request got no slot, which versions were missing, and which others are on the device:
        # asked for when that is wanted, and again when one was missing.
        self._has_denied = False
        self._missing: set[str] = set()
        self._resident: set[str] | None = None
        self._highest_tags: dict[Account, int] = {}

    @property
    def holder(self) -> Account | None:
        """Who has the claim."""
        return self._holder

    def start_step(self) -> None:
        self._has_denied = False
        self._missing.clear()
        self._resident = None
        self._highest_tags.clear()

    def end_step(self, accounts: Iterable[Account]) -> None:
        """Give the claim to the next tenant if nobody has it."""
        if self._is_turn_over:
            self._holder = None
        self._is_turn_over = False
        if self._holder is not None:
            return
        wanting = [account for account in accounts if account.wanting is not None]
        if wanting:
            self._holder = min(wanting, key=lambda account: account.last_claim)
            self._num_claims += 1
            self._holder.last_claim = self._num_claims
            self._overtaken.clear()

    def may_try(self, entry: Entry) -> bool:
        """Whether a waiting request may take slots now. If not, it is noted that it wants some."""
        if not entry.needed:
            return True
        account = entry.account
        of_another = self._holder is not None and self._holder is not account
        if not of_another and not self._has_denied:
            return True
        if self._resident is None:
            self._resident = self.resident_versions()
        is_there = self._resident.issuperset(entry.flow)
        if of_another and not is_there:
            self._note(entry)
        is_late = entry.rank.tag > self._highest_tags.get(account, sys.maxsize)
        is_over = of_another and self._overtaken[account.name] >= self._max_overtake
        return is_there and not is_late and not is_over

    def take(self, entry: Entry) -> tuple[int, ...] | None:
        """The slots of all the request's adapters, or None and none is taken. Raises AdapterError if one of them can
        never be brought to the device; none is taken then either."""
        needed, slots = entry.needed, self._slots
        if not needed or slots is None:
            return ()
        taken: dict[int, int] = {}
        missing: list[str] = []
        try:
            # What is there first: the reference keeps it from making way for what is not.
            for i in self._resident_first(needed):
                slot = slots.acquire(needed[i])
                if slot is None:
                    missing.append(needed[i].version)
                else:
                    taken[i] = slot
        finally:
            if len(taken) < len(needed):  # who waits holds nothing: two that wait for each other's would wait for ever
                for i in taken:
                    slots.release(needed[i])
        if not missing:
            if self._holder is not None and self._holder is not entry.account:
                self._overtaken[entry.account.name] += 1
            return tuple(taken[i] for i in range(len(needed)))
        entry.account.miss(entry)
        # What the request misses may be no slot yet. With several adapters it may be both: then it is a slot.
        if len(needed) == 1 and slots.awaits_read(needed[0]):
            self.wants_no_more(entry)
        else:
            self._denied(entry, missing)
        return None

    def wants_no_more(self, entry: Entry) -> None:
        """The request has started, or is gone."""
        account = entry.account
        if account.wanting is entry:
            account.wanting = None
            # From the end of this step: by then another of its requests may be the first to miss a slot.
            self._is_turn_over |= account is self._holder

    def resident_versions(self) -> set[str]:
        """Versions on the device, whatever names they have."""
        return self._slots.resident_versions() if self._slots is not None else set()

    def _denied(self, entry: Entry, missing: Sequence[str]) -> None:
        self._has_denied = True
        self._missing.update(missing)
        self._resident = self.resident_versions() - self._missing
        account = entry.account
        highest = entry.rank.tag + self._max_overtake
        self._highest_tags[account] = min(self._highest_tags.get(account, sys.maxsize), highest)
        self._note(entry)

    def _note(self, entry: Entry) -> None:
        account = entry.account
        if account.wanting is None or entry < account.wanting:
            account.wanting = entry

    def _resident_first(self, needed: Sequence[AdapterRef]) -> Sequence[int]:
        """The order in which to ask for these adapters."""
        if len(needed) == 1:
            return (0,)
        resident = self.resident_versions()
        return sorted(range(len(needed)), key=lambda i: needed[i].version not in resident)
