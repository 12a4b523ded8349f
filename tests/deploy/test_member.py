"""What a member does with what it is told, poll by poll."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from manylora.deploy.ray_serve import member as member_module
from manylora.deploy.ray_serve.fleet import Orders, Report, Task
from manylora.deploy.ray_serve.fleet_state import FleetState
from manylora.deploy.ray_serve.member import FleetLost, Member
from manylora.deploy.ray_serve.routes import Body, Scope
from tests.deploy.members import FakeServer, entry

STATE = FleetState.of([entry("a", "v1")])
SCOPE: Scope = {"type": "http"}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Scripted:
    """A fleet that answers each poll by a function of its report; the last one again and again."""

    def __init__(self, *answers: Callable[[Report], Orders]) -> None:
        self.answers = list(answers)
        self.reports: list[Report] = []
        self.left: list[str] = []
        self.done = asyncio.Event()

    async def poll(self, replica: str, report: Report) -> Orders:
        await asyncio.sleep(0)
        self.reports.append(report)
        if not self.answers:
            if not report.is_busy:  # else it asks again when it is done
                self.done.set()
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        return answer(report)

    async def leave(self, replica: str) -> None:
        self.left.append(replica)


def orders(
    lease_s: float = 0.0, *, number: int = 1, state: FleetState | None = None, task: Task | None = None, id: str = "f"
) -> Callable[[Report], Orders]:
    return lambda _report: Orders(id, number, state, task, lease_s)


def run(
    fleet: Scripted, server: FakeServer, clock: Clock, then: Callable[[Member], Awaitable[None] | None] | None = None
) -> Member:
    async def main() -> Member:
        member = Member("r", "flags", server, fleet, clock)
        running = asyncio.ensure_future(member.run())
        await asyncio.wait({running, asyncio.ensure_future(fleet.done.wait())}, return_when=asyncio.FIRST_COMPLETED)
        if then is not None:
            then(member)
        running.cancel()
        await asyncio.wait({running})
        return member

    return asyncio.run(main())


def test_it_says_what_it_has_and_answers_only_with_a_lease() -> None:
    clock, server = Clock(), FakeServer()
    fleet = Scripted(orders(state=STATE), orders(), orders(10.0))

    def check(member: Member) -> None:
        assert member.may_answer
        clock.now += 9.9
        assert member.may_answer
        clock.now += 0.2
        assert not member.may_answer
        assert member.lacks(["a"]) == "the replica has not heard from the fleet lately."

    member = run(fleet, server, clock, check)
    assert server.has == {"a": entry("a", "v1")}
    assert fleet.reports[0].applied == -1
    assert (fleet.reports[-1].fleet, fleet.reports[-1].applied) == ("f", 1)
    assert not member.may_answer, "it has left"
    assert fleet.left == ["r"]


def test_a_lease_counts_from_when_it_asked() -> None:
    clock = Clock()

    def late(_report: Report) -> Orders:
        clock.now += 8.0
        return Orders("f", 1, None, None, 10.0)

    def check(member: Member) -> None:
        assert member.may_answer
        clock.now += 2.1
        assert not member.may_answer

    run(Scripted(late), FakeServer(), clock, check)


def test_another_term_begins_after_every_time_without_a_lease() -> None:
    clock = Clock()
    terms: list[int] = []

    async def main() -> None:
        fleet = Scripted()
        member = Member("r", "flags", FakeServer(), fleet, clock)
        for pause, lease_s in ((0.0, 10.0), (5.0, 10.0), (9.0, 10.0), (10.1, 10.0), (1.0, 10.0)):
            clock.now += pause
            terms.append(member.term)
            member._obey(Orders("f", 1, None, None, lease_s), clock.now)
            terms.append(member.term)

    asyncio.run(main())
    assert terms == [-1, 1, 1, 1, 1, 1, -1, 2, 2, 2]


def test_it_is_asked_again_for_what_another_fleet_is_to_have() -> None:
    fleet = Scripted(orders(state=STATE), orders(), orders(id="another"), orders(id="another"))
    run(fleet, FakeServer(), Clock())
    assert fleet.reports[2].applied == 1
    assert [(one.fleet, one.applied) for one in fleet.reports[-2:]] == [("another", -1)] * 2


def test_what_one_fleet_wanted_is_not_told_another() -> None:
    server = FakeServer()
    server.gate.clear()

    def meanwhile(report: Report) -> Orders:
        assert report.is_busy
        server.gate.set()
        return Orders("another", 1, None, None, 0.0)

    fleet = Scripted(orders(state=STATE), meanwhile, orders(id="another"), orders(id="another"))
    run(fleet, server, Clock())
    assert server.followed == [STATE]
    assert (fleet.reports[-1].fleet, fleet.reports[-1].applied) == ("another", -1)


def test_a_task_is_done_once_and_its_outcome_told_until_it_was_taken() -> None:
    server = FakeServer()
    task = Task(7, "change", STATE, SCOPE, Body(b'{"name": "b", "version": "v2"}'))
    again = orders(task=task)
    fleet = Scripted(again, again, again, orders(), orders())
    run(fleet, server, Clock())
    assert len(server.performed) == 1
    outcomes = [one.outcome for one in fleet.reports]
    told = [one for one in outcomes if one is not None]
    assert {one.task for one in told} == {7}
    assert told[0].state == FleetState.of([entry("b", "v2")])
    assert outcomes[-1] is None
    assert fleet.reports[-1].applied == -1, "it has what nobody has confirmed"


def test_what_is_missing_is_tried_again_after_a_while() -> None:
    clock, server = Clock(), FakeServer()
    server.cannot["v1"] = "its files are gone"

    def later(_report: Report) -> Orders:
        clock.now += member_module._RETRY_S
        server.cannot.clear()
        return Orders("f", 1, None, None, 1000.0)

    fleet = Scripted(orders(state=STATE), orders(1000.0), orders(1000.0), later, orders(1000.0), orders(1000.0))
    member = run(fleet, server, clock)
    assert ("a",) in [one.missing for one in fleet.reports]
    assert len(server.followed) == 2
    assert member.missing == {}


def test_a_fleet_that_cannot_be_reached_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_module, "_PAUSE_S", 0.0)

    def lost(_report: Report) -> Orders:
        raise FleetLost("gone")

    fleet = Scripted(lost, lost, orders(10.0))
    run(fleet, FakeServer(), Clock())
    assert len(fleet.reports) == 4
