"""A replica's side of ``fleet``: do as it is told, and know until when it may answer.

``Local.follow`` makes a replica have a state: every name the version that the state says, by content. A name that it
cannot come to have so (its files are gone, or are others by now, or there is no memory) it rather does not have at all,
and sends requests for it elsewhere: to answer them by what the name meant before, or by whatever its source holds now,
would be a guess. It tries again every ``_RETRY_S`` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from manylora.deploy.ray_serve.fleet import Orders, Outcome, Report, Task
from manylora.deploy.ray_serve.fleet_state import FleetState
from manylora.deploy.ray_serve.routes import Body, Message, Scope

_log = logging.getLogger(__name__)

_RETRY_S: Final = 30.0
_PAUSE_S: Final = 0.5
"""Before the fleet is asked again after it could not be reached."""


class FleetLost(Exception):
    """The fleet's process cannot be reached; another one will take its place."""


class FleetLike(Protocol):
    """``fleet.Fleet``, wherever it is. Methods may raise FleetLost."""

    async def poll(self, replica: str, report: Report) -> Orders: ...
    async def leave(self, replica: str) -> None: ...


class Local(Protocol):
    """The server in this process. Only ``perform`` is called on the event loop; the others may take minutes."""

    def state(self) -> FleetState:
        """What it has."""
        ...

    def follow(self, state: FleetState) -> Mapping[str, str]:
        """Have ``state``; returns the names that it does not come to have, each with the reason."""
        ...

    def seed(self, state: FleetState, *, restore: bool) -> FleetState:
        """Load what the flags name, and, to ``restore``, before that what ``state`` remembers as its sources are now.
        Returns what all are to have. Raises AdapterError for what the flags name."""
        ...

    async def perform(self, scope: Scope, body: Body) -> Sequence[Message]:
        """The application's answer to a request."""
        ...


class Member:
    """See the top of this module. All methods are called on one event loop; ``run`` is a task of its own."""

    def __init__(
        self,
        replica: str,
        seed: str,
        local: Local,
        fleet: FleetLike,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replica = replica
        self.missing: Mapping[str, str] = {}
        """Names that are to be here and are not, each with the reason."""
        self._seed, self._local, self._fleet, self._clock = seed, local, fleet, clock
        self._fleet_id = ""
        self._applied = -1
        self._state = FleetState()
        """What it was last told to have."""
        self._lease_until = 0.0
        self._term = 0
        self._retry_at = 0.0
        self._work: asyncio.Task[None] | None = None
        self._outcome: Outcome | None = None
        self._serving = asyncio.Event()
        self._failure: str | None = None

    @property
    def may_answer(self) -> bool:
        return self._clock() < self._lease_until

    @property
    def term(self) -> int:
        """Another one after every time in which it might not answer. What was begun in one term and is not answered in
        it may be by names that have come to mean something else."""
        return self._term if self.may_answer else -1

    def lacks(self, names: Sequence[str]) -> str | None:
        """Why requests for ``names`` are not for this replica; None if they are."""
        if not self.may_answer:
            return "the replica has not heard from the fleet lately."
        return next((f"adapter {name}: {self.missing[name]}" for name in names if name in self.missing), None)

    async def wait_until_serving(self) -> None:
        """Until it may answer for the first time. Raises RuntimeError if what the flags name cannot be served."""
        await self._serving.wait()
        if self._failure is not None:
            raise RuntimeError(self._failure)

    async def run(self) -> None:
        """Ask and do until cancelled; then leave the fleet."""
        try:
            while self._failure is None:
                try:
                    await self._round()
                except FleetLost as error:
                    _log.warning("%s", error)
                    await asyncio.sleep(_PAUSE_S)
        finally:
            self._lease_until = 0.0
            if self._work is not None:
                self._work.cancel()
            with contextlib.suppress(FleetLost):
                await self._fleet.leave(self.replica)

    async def _round(self) -> None:
        is_busy = self._work is not None
        report = Report(self._seed, self._fleet_id, self._applied, tuple(self.missing), is_busy, self._outcome)
        sent = self._clock()
        asking = asyncio.ensure_future(self._fleet.poll(self.replica, report))
        try:
            await asyncio.wait({asking, *([self._work] if self._work else [])}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            asking.cancel()
            raise
        if self._work is not None and self._work.done():
            work, self._work = self._work, None
            work.result()
            # What is answered to the report that is out is out of date; whatever it orders comes again.
            asking.add_done_callback(_forgotten)
            return
        self._obey(asking.result(), sent)

    def _obey(self, orders: Orders, sent: float) -> None:
        if orders.fleet != self._fleet_id:
            self._fleet_id, self._applied, self._outcome = orders.fleet, -1, None
        if orders.lease_s:
            self._term += not self.may_answer
            self._lease_until = max(self._lease_until, sent + orders.lease_s)
            self._serving.set()
        if self._outcome is not None and (orders.task is None or orders.task.id != self._outcome.task):
            self._outcome = None  # it was taken
        if self._work is not None:
            return
        if orders.task is not None and self._outcome is None:
            self._work = asyncio.ensure_future(self._do(orders.task))
        elif orders.state is not None:
            self._work = asyncio.ensure_future(self._come_to_have(orders.state, orders.number))
        elif self.missing and self._clock() >= self._retry_at:
            self._work = asyncio.ensure_future(self._come_to_have(self._state, orders.number))

    async def _come_to_have(self, state: FleetState, number: int) -> None:
        fleet = self._fleet_id
        self.missing = await asyncio.to_thread(self._local.follow, state)
        self._state, self._retry_at = state, self._clock() + _RETRY_S
        for name, why in self.missing.items():
            _log.error("adapter %s is not here: %s", name, why)
        if fleet == self._fleet_id:
            self._applied = number

    async def _do(self, task: Task) -> None:
        answer: Sequence[Message] = ()
        state, error = None, ""
        self._applied = -1  # whatever comes of it: until the fleet has said what is to be
        try:
            if task.kind == "change":
                assert task.scope is not None
                answer = await self._local.perform(task.scope, task.body)
                state = await asyncio.to_thread(self._local.state)
            else:
                state = await asyncio.to_thread(self._seeded, task)
        except Exception as caught:  # noqa: BLE001 - whatever it was, the fleet must hear of it
            _log.exception("the fleet's task %d (%s) failed", task.id, task.kind)
            error = str(caught) or repr(caught)
            if task.kind != "change":
                self._failure = error
                self._serving.set()
        self._outcome = Outcome(task.id, state, tuple(answer), error)

    def _seeded(self, task: Task) -> FleetState:
        return self._local.seed(task.state, restore=task.kind == "restore")


def _forgotten(asking: asyncio.Future[Orders]) -> None:
    """What became of a poll whose answer is not waited for does not matter."""
    if not asking.cancelled():
        asking.exception()
