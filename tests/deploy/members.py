"""A fleet in one process: the real Fleet and Members, over servers that are no more than a dictionary."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from manylora.adapters.registry_state import StateEntry
from manylora.deploy.ray_serve.fleet import Changed, Fleet, Orders, Report
from manylora.deploy.ray_serve.fleet_state import FleetFiles, FleetState
from manylora.deploy.ray_serve.member import FleetLost, Member
from manylora.deploy.ray_serve.routes import Body, Message, Scope

SESSION = "session-1"
LEASE_S, WAIT_S = 0.6, 0.1


def entry(name: str, version: str, *, pinned: bool = False) -> StateEntry:
    return StateEntry(name, f"/adapters/{version}", pinned, version)


class FakeServer:
    """Has what it was told to have. A change's body is ``{"name", "version"}``, version null to unload."""

    def __init__(self, flags: Mapping[str, str] | None = None) -> None:
        self.has: dict[str, StateEntry] = {}
        self.flags = flags or {}
        self.cannot: dict[str, str] = {}
        """Versions that it cannot load, with the reason."""
        self.followed: list[FleetState] = []
        self.restored: list[bool] = []
        self.performed: list[dict[str, Any]] = []
        self.gate = threading.Event()
        """Must be set for ``follow`` to go on."""
        self.gate.set()
        self.hold: asyncio.Event | None = None
        """Must be set, if there is one, for a change to go on after it was made."""

    def state(self) -> FleetState:
        return FleetState.of(self.has.values())

    def follow(self, state: FleetState) -> Mapping[str, str]:
        self.gate.wait(30)
        missing = {one.name: self.cannot[one.version] for one in state.adapters if one.version in self.cannot}
        self.has = {one.name: one for one in state.adapters}
        self.followed.append(state)
        return missing

    def seed(self, state: FleetState, *, restore: bool) -> FleetState:
        self.restored.append(restore)
        if restore:
            self.has = {one.name: one for one in state.adapters}
        for name, version in self.flags.items():
            if version in self.cannot:
                raise RuntimeError(self.cannot[version])
            self.has[name] = entry(name, version)
        return self.state()

    async def perform(self, scope: Scope, body: Body) -> Sequence[Message]:
        wish = json.loads(body.data)
        self.performed.append(wish)
        if wish["version"] in self.cannot:
            return answer(400, self.cannot[wish["version"]])
        if wish["version"] is None:
            if self.has.pop(wish["name"], None) is None:
                return answer(404, "no such adapter")
        else:
            self.has[wish["name"]] = entry(wish["name"], wish["version"])
        if self.hold is not None:
            await self.hold.wait()
        return answer(200, "done")


def answer(status: int, text: str) -> list[Message]:
    return [
        {"type": "http.response.start", "status": status, "headers": []},
        {"type": "http.response.body", "body": text.encode(), "more_body": False},
    ]


class Line:
    """What a member reaches the fleet by; a test may cut it, or put another fleet at its end."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.is_cut = False

    async def poll(self, replica: str, report: Report) -> Orders:
        self._check()
        orders = await self.fleet.poll(replica, report)
        self._check()  # what was answered meanwhile is lost, too
        return orders

    async def leave(self, replica: str) -> None:
        self._check()
        await self.fleet.leave(replica)

    def _check(self) -> None:
        if self.is_cut:
            raise FleetLost("cut")


class Replica:
    """A member that runs, with its server and its line."""

    def __init__(self, fleet: Fleet, name: str, server: FakeServer, seed: str = "flags") -> None:
        self.server, self.line = server, Line(fleet)
        self.member = Member(name, seed, server, self.line)
        self.running = asyncio.ensure_future(self.member.run())

    def version(self, name: str) -> str | None:
        """What it answers a request for ``name`` by; None if it sends it elsewhere, or does not know it."""
        if self.member.lacks([name]) is not None:
            return None
        found = self.server.has.get(name)
        return None if found is None else found.version

    async def serving(self) -> Replica:
        await asyncio.wait_for(self.member.wait_until_serving(), 20)
        return self

    async def end(self) -> None:
        self.running.cancel()
        await asyncio.wait([self.running])

    def die(self) -> None:
        """As a process that is killed: without a word, and never again."""
        self.line.is_cut = True


def new_fleet(directory: Path, **settings: Any) -> Fleet:
    return Fleet(FleetFiles(directory), SESSION, **{"lease_s": LEASE_S, "wait_s": WAIT_S, **settings})


@contextlib.asynccontextmanager
async def fleet_of(
    directory: Path, n: int, make: Callable[[], FakeServer] = FakeServer, **settings: Any
) -> AsyncIterator[tuple[Fleet, list[Replica]]]:
    """A fleet of ``n`` replicas that serve; they end with the block."""
    fleet = new_fleet(directory, **settings)
    replicas = [Replica(fleet, f"r{i}", make()) for i in range(n)]
    try:
        for replica in replicas:
            await replica.serving()
        yield fleet, replicas
    finally:
        for replica in replicas:
            await replica.end()


async def put(fleet: Fleet, name: str, version: str | None) -> Changed:
    scope: Scope = {"type": "http", "method": "PUT", "path": f"/v1/adapters/{name}", "headers": []}
    return await fleet.change(scope, Body(json.dumps({"name": name, "version": version}).encode()))
