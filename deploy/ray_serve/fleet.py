"""Who orders the changes to a fleet's adapters: one at a time, on every replica or on none, and remembered.

There is one ``Fleet`` for all replicas (an actor of Ray's; here it is plain asyncio). Replicas come to it, it goes to
nobody: each asks again and again (``poll``) what it is to do, says what it has, and is given a *lease*, for the seconds
of which it may answer requests. A change goes so:

1. One replica, the *canary*, gets the client's request as it is. Its answer will be the client's: the checks, the
   refusals and their words are the server's own. If what it has afterwards is what it had before, that was all.
2. What it has now is written to disk, and becomes what all are to have, under the next number.
3. The others come to have it: each name the same *version*, by its content, or that name not at all (``member``).
4. The client is answered when every lease is gone that was given for an older number.

So once a change has returned, nobody answers by what a name meant before it, whatever becomes of a replica meanwhile:
who was killed answers nobody, who hangs or is cut off has no lease, and who starts gets one only when it has what is
written. The price is that a change waits for a replica that died without a word until its lease has run out.

What a change that *fails* leaves behind: nothing. A refusal changes nothing on the canary; a canary that dies takes
its change with it; if the disk takes no record, all are told to have what they had.

A replica's lease is counted from when it *sent* its poll, here from when the poll came, so the replica's ends first.
After this process itself was lost, the next one does not know whom it gave leases, and waits once for as long as they
can last.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from manylora.adapters.errors import RegistryStateError
from manylora.deploy.ray_serve.fleet_state import FleetFiles, FleetState
from manylora.deploy.ray_serve.routes import Body, Message, Scope

_log = logging.getLogger(__name__)

MARGIN_S: Final = 0.5
"""More than two machines' clocks run apart within a lease."""


@dataclass(frozen=True)
class Task:
    """What one replica is to do for all: a client's change, or to load what the flags name."""

    id: int
    kind: Literal["change", "seed", "restore"]
    """``restore``: the first of a fleet, which also brings back ``state``, whatever its sources contain by now."""
    state: FleetState
    scope: Scope | None = None
    body: Body = field(default_factory=Body)


@dataclass(frozen=True)
class Outcome:
    """What came of a task. ``state``: what the replica has afterwards; None if it could not do it, because of
    ``error``."""

    task: int
    state: FleetState | None
    answer: tuple[Message, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Report:
    """What a replica says when it asks."""

    seed: str
    """Stands for the flags that name adapters; replicas of one configuration have the same."""
    fleet: str = ""
    """The ``Orders.fleet`` that ``applied`` is of."""
    applied: int = -1
    """The number of the state that it has."""
    missing: tuple[str, ...] = ()
    """Names that it could not come to have."""
    is_busy: bool = False
    """Whether it is at something, and will ask again when that is done."""
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Orders:
    """What a replica is told."""

    fleet: str
    """Who says so: another one after this process was lost."""
    number: int
    state: FleetState | None
    """What it is to have; None if it has."""
    task: Task | None
    lease_s: float
    """Seconds from its poll on for which it may answer; 0: no longer than it was told before."""


@dataclass(frozen=True)
class Changed:
    """A change has been made or refused, by the canary's answer, and is now so everywhere."""

    answer: tuple[Message, ...]
    replicas: int
    """That have it."""
    missing: int
    """Of them, that could not load all of what they are to have, and send requests for it elsewhere."""


class NotChanged(Exception):
    """A change was not made. ``status``: 503 if it may be tried again, else 500."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Status:
    serving: int
    """Replicas that hold a lease."""
    number: int


@dataclass
class _Member:
    seed: str = ""
    applied: int = -1
    missing: tuple[str, ...] = ()
    seen: float = 0.0
    lease_until: float = 0.0
    task: Task | None = None
    done: asyncio.Future[Outcome] | None = None
    bell: asyncio.Event = field(default_factory=asyncio.Event)


class Fleet:
    """See the top of this module. All methods are called on one event loop.

    Args:
        files: where the state is kept. Raises RegistryStateError here if that cannot be read.
        session: what does not outlive the machines it ran on (a Ray cluster's session). A fleet's first seed in a
            session is a restart: what is remembered is loaded as it is now.
        lease_s: how long a replica may answer without hearing from here.
        wait_s: how long a poll is held if there is nothing to say.
        apply_s: how long a replica may take to come to have a change before it loses its lease.
    """

    def __init__(
        self,
        files: FleetFiles,
        session: str,
        *,
        lease_s: float = 10.0,
        wait_s: float = 2.0,
        apply_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files, self._clock = files, clock
        self._lease_s, self._wait_s, self._apply_s = lease_s, wait_s, apply_s
        self._id = uuid.uuid4().hex
        self._state, seeds = files.read()
        self._seeds = [seed for seed in seeds if seed.startswith(f"{session}/")]
        self._session = session
        self._number = 0
        # Somebody like this one was here before, in this session: it gave leases that nobody remembers.
        self._unknown_until = clock() + lease_s + MARGIN_S if self._seeds else 0.0
        self._members: dict[str, _Member] = {}
        self._changing = asyncio.Lock()
        self._is_extending = False
        """Whether leases of an older number are renewed: while a change is awaited, which waits for them."""
        self._progress = asyncio.Event()
        self._task_ids = itertools.count(1)
        self._background: set[asyncio.Task[None]] = set()
        self._seeding: set[str] = set()
        self._strangers = _names_in(files.uploads) - {os.path.basename(source) for source in self._state.sources}

    # --- replicas ------------------------------------------------------------------------------------------------

    async def poll(self, replica: str, report: Report) -> Orders:
        """What ``replica`` is to do; after ``wait_s`` at the latest."""
        member = self._members.setdefault(replica, _Member())
        member.seed, member.missing = report.seed, report.missing
        member.applied = report.applied if report.fleet == self._id else -1
        arrived = member.seen = self._clock()
        if report.fleet == self._id:
            self._take_outcome(member, report.outcome)
        self._progress.set()
        self._progress = asyncio.Event()
        self._see_to_seed(replica, member)
        until = self._clock() + self._wait_s
        while (left := until - self._clock()) > 0 and not self._has_news(member, report):
            member.bell.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(member.bell.wait(), left)
        if self._members.get(replica) is not member:  # it has left meanwhile
            return Orders(self._id, self._number, None, None, 0.0)
        task = None if report.is_busy or self._is_done(member) else member.task
        lease_s = self._lease_for(member)
        if lease_s:
            # The replica counts from before it asked.
            member.lease_until = max(member.lease_until, arrived + lease_s + MARGIN_S)
        is_due = self._has_begun and member.applied != self._number
        state = self._state if is_due else None
        return Orders(self._id, self._number, state, task, lease_s)

    async def leave(self, replica: str) -> None:
        """``replica`` has ended, and answers nobody any more."""
        member = self._members.pop(replica, None)
        if member is not None:
            member.bell.set()
            self._progress.set()
            self._progress = asyncio.Event()

    def status(self) -> Status:
        now = self._clock()
        return Status(sum(member.lease_until > now for member in self._members.values()), self._number)

    # --- changes -------------------------------------------------------------------------------------------------

    async def change(self, scope: Scope, body: Body) -> Changed:
        """Have a client's request change what all replicas have. Raises NotChanged."""
        # A task of its own: a client that leaves half way leaves no half of a change.
        return await asyncio.shield(asyncio.ensure_future(self._change(scope, body)))

    async def _change(self, scope: Scope, body: Body) -> Changed:
        async with self._changing:
            replica = await self._canary()
            before = self._state
            outcome = await self._do(replica, "change", scope, body)
            if outcome.state is None:
                raise NotChanged(500, f"The change was not made: {outcome.error}")
            if outcome.state != before:
                try:
                    self._commit(outcome.state)
                finally:
                    await self._everywhere()
            self._sweep()
            now = self._clock()
            having = [member for member in self._members.values() if member.lease_until > now]
            return Changed(outcome.answer, len(having), sum(bool(member.missing) for member in having))

    async def _canary(self) -> str:
        """A replica that has what all are to have, and may answer. Raises NotChanged if there is none for a while."""
        until = self._clock() + self._lease_s + 2 * self._wait_s
        while True:
            now = self._clock()
            fit = [
                replica
                for replica, member in self._members.items()
                if member.lease_until > now and member.applied == self._number
            ]
            if fit:
                # One that has everything, if there is one: what it misses it would take for gone.
                return min(fit, key=lambda replica: len(self._members[replica].missing))
            if now >= until:
                raise NotChanged(503, "No replica is there to make the change; nothing was changed.")
            await self._something(until - now)

    async def _do(
        self, replica: str, kind: Literal["change", "seed", "restore"], scope: Scope | None, body: Body
    ) -> Outcome:
        """Have ``replica`` do a task. Raises NotChanged if it is gone before it has."""
        member = self._members[replica]
        member.task = Task(next(self._task_ids), kind, self._state, scope, body)
        member.done = asyncio.get_running_loop().create_future()
        member.bell.set()
        self._is_extending = True
        try:
            while not member.done.done():
                silent = self._clock() - member.seen
                if self._members.get(replica) is not member or silent > self._lease_s + MARGIN_S:
                    # Until it is heard from again it may not answer, and then it is told what to have.
                    raise NotChanged(503, "The replica that was to make the change was lost; nothing was changed.")
                await self._something(self._lease_s + 2 * MARGIN_S - silent, member.done)
            return member.done.result()
        finally:
            self._is_extending = False
            member.task = member.done = None
            member.bell.set()

    def _commit(self, state: FleetState, seed: str | None = None) -> None:
        """From now on ``state`` is what all are to have. Raises NotChanged if it could not be written."""
        seeds = self._seeds if seed is None else [*self._seeds, seed]
        try:
            self._files.write(state, seeds)
        except RegistryStateError as error:
            # The canary has what is not to be; having done a task it says that it has nothing, and so is told what is.
            raise NotChanged(500, f"{error} Every replica goes back to what it had.") from error
        self._state, self._seeds = state, seeds
        self._number += 1
        self._ring()

    async def _everywhere(self) -> None:
        """Wait until nobody may answer who has not what all are to have."""
        give_up = self._clock() + self._apply_s
        self._is_extending = True
        try:
            while True:
                now = self._clock()
                behind = [member for member in self._members.values() if self._is_behind(member, now)]
                if not behind and now >= self._unknown_until:
                    break
                if now >= give_up:
                    self._is_extending = False  # then their leases run out
                until = min([member.lease_until for member in behind] or [self._unknown_until])
                await self._something(max(until - now, 0.01))
        finally:
            self._is_extending = False
        self._members = {
            replica: member
            for replica, member in self._members.items()
            if self._clock() - member.seen <= 2 * self._lease_s + self._wait_s
        }

    def _is_behind(self, member: _Member, now: float) -> bool:
        return member.lease_until > now and member.applied != self._number

    # --- what the flags name -------------------------------------------------------------------------------------

    def _see_to_seed(self, replica: str, member: _Member) -> None:
        """Have the first replica of a configuration load what its flags name, for all."""
        seed = f"{self._session}/{member.seed}"
        if seed in self._seeds or seed in self._seeding:
            return
        self._seeding.add(seed)
        task = asyncio.ensure_future(self._seed(replica, seed))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _seed(self, replica: str, seed: str) -> None:
        try:
            async with self._changing:
                while (member := self._members.get(replica)) and self._has_begun and member.applied != self._number:
                    if self._clock() - member.seen > self._lease_s + MARGIN_S:
                        return
                    await self._something(self._wait_s)  # it is to add to what all have, so it has that first
                if member is None:
                    return
                outcome = await self._do(replica, "seed" if self._has_begun else "restore", None, Body())
                if outcome.state is None:
                    _log.error("a replica could not load what the flags name: %s", outcome.error)
                    return
                self._commit(outcome.state, seed)
        except NotChanged as error:
            _log.error("what the flags name was not loaded, and will be by the next replica that asks: %s", error)
        finally:
            self._seeding.discard(seed)

    # --- inside --------------------------------------------------------------------------------------------------

    def _take_outcome(self, member: _Member, outcome: Outcome | None) -> None:
        if outcome is None or member.task is None or member.done is None or outcome.task != member.task.id:
            return
        if not member.done.done():
            member.done.set_result(outcome)

    def _has_news(self, member: _Member, report: Report) -> bool:
        if report.is_busy:
            return False
        if member.task is not None and not self._is_done(member):
            return True
        return self._has_begun and member.applied != self._number

    @property
    def _has_begun(self) -> bool:
        """Whether what is remembered has been brought back in this session."""
        return bool(self._seeds)

    def _is_done(self, member: _Member) -> bool:
        return member.done is not None and member.done.done()

    def _lease_for(self, member: _Member) -> float:
        if f"{self._session}/{member.seed}" not in self._seeds:
            return 0.0  # its flags name what is not loaded yet
        if member.applied == self._number or (self._is_extending and member.lease_until > self._clock()):
            return self._lease_s
        return 0.0

    def _ring(self) -> None:
        for member in self._members.values():
            member.bell.set()

    async def _something(self, seconds: float, done: asyncio.Future[Outcome] | None = None) -> None:
        """Until somebody has polled or left, or ``done``, or for so long."""
        progress = asyncio.ensure_future(self._progress.wait())
        awaited: set[asyncio.Future[Any]] = {progress} if done is None else {progress, done}
        try:
            await asyncio.wait(awaited, timeout=max(seconds, 0.0), return_when=asyncio.FIRST_COMPLETED)
        finally:
            progress.cancel()

    def _sweep(self) -> None:
        """Delete the uploads that no name has any more, after everybody was told. Requests that still run on them have
        them in memory: such versions are kept there (``registry.must_keep``). What was in the directory before, and
        never had a name since, is somebody's else, or of a list that was moved aside."""
        needed = {os.path.basename(source) for source in self._state.sources}
        self._strangers -= needed
        for name in _names_in(self._files.uploads) - needed - self._strangers:
            shutil.rmtree(self._files.uploads / name, ignore_errors=True)


def _names_in(directory: os.PathLike[str]) -> set[str]:
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        return set()
