"""The fleet and its members together, without Ray: what holds whoever dies, hangs or comes when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from manylora.deploy.ray_serve.fleet import NotChanged
from manylora.deploy.ray_serve.fleet_state import FleetFiles, FleetState, Merge
from tests.deploy.members import LEASE_S, FakeServer, Replica, entry, fleet_of, new_fleet, put

pytestmark = pytest.mark.timeout(60)


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to be"
        await asyncio.sleep(0.01)


def test_a_change_is_on_every_replica_when_it_returns(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 4) as (fleet, replicas):
            changed = await put(fleet, "a", "v1")
            assert [replica.version("a") for replica in replicas] == ["v1"] * 4
            assert (changed.replicas, changed.missing) == (4, 0)
            assert changed.answer[0]["status"] == 200
            assert sum(len(replica.server.performed) for replica in replicas) == 1
            await put(fleet, "a", "v2")
            assert [replica.version("a") for replica in replicas] == ["v2"] * 4
            await put(fleet, "a", None)
            assert [replica.version("a") for replica in replicas] == [None] * 4

    asyncio.run(main())


def test_what_the_first_replica_refuses_reaches_no_other(tmp_path: Path) -> None:
    def hostile() -> FakeServer:
        server = FakeServer()
        server.cannot["bad"] = "rank 999 is over the limit"
        return server

    async def main() -> None:
        async with fleet_of(tmp_path, 3, hostile) as (fleet, replicas):
            before = fleet.status().number
            changed = await put(fleet, "a", "bad")
            assert changed.answer[0]["status"] == 400
            assert changed.answer[1]["body"] == b"rank 999 is over the limit"
            assert fleet.status().number == before
            assert FleetFiles(tmp_path).read()[0] == FleetState()
            # And the fleet goes on, the one that was asked included.
            await put(fleet, "a", "v1")
            assert [replica.version("a") for replica in replicas] == ["v1"] * 3

    asyncio.run(main())


def test_a_replica_that_cannot_load_a_version_answers_by_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 3) as (fleet, replicas):
            await put(fleet, "a", "v1")
            await put(fleet, "b", "v1")
            canary = next(replica for replica in replicas if replica.server.performed)
            others = [replica for replica in replicas if replica is not canary]
            for replica in others:
                replica.server.cannot["v2"] = "its files are gone"
            changed = await put(fleet, "a", "v2")
            assert changed.answer[0]["status"] == 200
            assert (changed.replicas, changed.missing) == (3, 2)
            assert canary.version("a") == "v2"
            assert [replica.version("a") for replica in others] == [None, None]
            assert others[0].member.lacks(["b", "a"]) == "adapter a: its files are gone"
            assert [replica.version("b") for replica in replicas] == ["v1"] * 3
            # The next change is made by one that has everything, so that it is not taken for gone.
            n = len(canary.server.performed)
            await put(fleet, "b", "v3")
            assert len(canary.server.performed) == n + 1
            assert {one.name for one in FleetFiles(tmp_path).read()[0].adapters} == {"a", "b"}
            # A version that all can load ends it.
            await put(fleet, "a", "v4")
            assert [replica.version("a") for replica in replicas] == ["v4"] * 3

    asyncio.run(main())


def test_a_replica_that_starts_later_serves_only_with_everything(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 1) as (fleet, _):
            await put(fleet, "a", "v1")
            await put(fleet, "b", "v7")
            late = FakeServer()
            late.gate.clear()
            replica = Replica(fleet, "late", late)
            await asyncio.sleep(3 * LEASE_S)
            assert not replica.member.may_answer
            late.gate.set()
            await replica.serving()
            assert (replica.version("a"), replica.version("b")) == ("v1", "v7")
            await replica.end()

    asyncio.run(main())


def test_a_replica_that_starts_during_a_change_has_it_when_it_serves(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 1) as (fleet, replicas):
            await put(fleet, "a", "v1")
            replicas[0].server.hold = hold = asyncio.Event()
            change = asyncio.ensure_future(put(fleet, "a", "v2"))
            await eventually(lambda: len(replicas[0].server.performed) == 2)
            late = await Replica(fleet, "late", FakeServer()).serving()
            assert late.version("a") == "v1"  # the change has not returned
            hold.set()
            changed = await change
            assert changed.replicas == 2
            assert late.version("a") == replicas[0].version("a") == "v2"
            await late.end()

    asyncio.run(main())


def test_a_change_waits_for_a_replica_that_is_cut_off_until_it_cannot_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 3) as (fleet, replicas):
            await put(fleet, "a", "v1")
            fit = [replica for replica in replicas if not replica.server.performed]
            lost = fit[0]
            lost.die()
            assert lost.version("a") == "v1"  # it does not know yet
            began = time.monotonic()
            changed = await put(fleet, "a", "v2")
            assert lost.version("a") is None, "it would answer by the version before"
            assert time.monotonic() - began < 5 * LEASE_S + 2
            assert changed.replicas == 2
            assert [replica.version("a") for replica in replicas if replica is not lost] == ["v2"] * 2
            # Cut off is not dead: when it is back it has what all have, before it answers.
            lost.line.is_cut = False
            await eventually(lambda: lost.member.may_answer)
            assert lost.version("a") == "v2"

    asyncio.run(main())


def test_a_replica_that_hangs_in_a_change_ends_its_own_service_not_the_change(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 2, apply_s=0.3) as (fleet, replicas):
            await put(fleet, "a", "v1")
            hanging = next(replica for replica in replicas if not replica.server.performed)
            hanging.server.gate.clear()
            await put(fleet, "a", "v2")
            assert hanging.version("a") is None
            hanging.server.gate.set()
            await eventually(lambda: hanging.version("a") == "v2")

    asyncio.run(main())


def test_while_a_change_is_awaited_the_slow_go_on_answering(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 2) as (fleet, replicas):
            await put(fleet, "a", "v1")
            slow = next(replica for replica in replicas if not replica.server.performed)
            slow.server.gate.clear()
            change = asyncio.ensure_future(put(fleet, "a", "v2"))
            until = time.monotonic() + 3 * LEASE_S
            while time.monotonic() < until:
                assert slow.version("a") == "v1"
                assert not change.done()
                await asyncio.sleep(0.02)
            slow.server.gate.set()
            await change
            assert slow.version("a") == "v2"

    asyncio.run(main())


def test_a_canary_that_dies_takes_its_change_with_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 2) as (fleet, replicas):
            await put(fleet, "a", "v1")
            for replica in replicas:
                replica.server.hold = asyncio.Event()
                replica.server.performed.clear()
            change = asyncio.ensure_future(put(fleet, "a", "v2"))
            await eventually(lambda: any(replica.server.performed for replica in replicas))
            canary = next(replica for replica in replicas if replica.server.performed)
            other = next(replica for replica in replicas if replica is not canary)
            canary.die()
            with pytest.raises(NotChanged, match="lost; nothing was changed") as refused:
                await change
            assert refused.value.status == 503
            assert canary.version("a") is None
            assert other.version("a") == "v1"
            # It was only cut off: then it goes back to what all have before it answers.
            assert canary.server.hold is not None
            canary.server.hold.set()
            canary.line.is_cut = False
            await eventually(lambda: canary.version("a") == "v1")
            other.server.hold = None
            await put(fleet, "a", "v3")
            assert {replica.version("a") for replica in replicas} == {"v3"}

    asyncio.run(main())


def test_what_cannot_be_written_is_not_changed_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path / "state", 2) as (fleet, replicas):
            await put(fleet, "a", "v1")

            def full(*_: object) -> None:
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr("os.fsync", full)
                with pytest.raises(NotChanged, match=r"No space left on device.*goes back") as refused:
                    await put(fleet, "a", "v2")
            assert refused.value.status == 500
            assert [replica.version("a") for replica in replicas] == ["v1", "v1"]
            assert [one.version for one in FleetFiles(tmp_path / "state").read()[0].adapters] == ["v1"]

    asyncio.run(main())


def test_changes_come_one_after_the_other_everywhere_in_one_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 3) as (fleet, replicas):
            await asyncio.gather(*(put(fleet, f"n{i % 3}", f"v{i}") for i in range(12)))
            states = {replica.server.state() for replica in replicas}
            assert len(states) == 1
            assert states.pop() == FleetFiles(tmp_path).read()[0]

    asyncio.run(main())


def test_a_client_that_leaves_half_way_leaves_no_half_of_a_change(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 2) as (fleet, replicas):
            for replica in replicas:
                replica.server.hold = asyncio.Event()
            change = asyncio.ensure_future(put(fleet, "a", "v1"))
            await eventually(lambda: any(replica.server.performed for replica in replicas))
            change.cancel()
            for replica in replicas:
                assert replica.server.hold is not None
                replica.server.hold.set()
            await eventually(lambda: [replica.version("a") for replica in replicas] == ["v1", "v1"])

    asyncio.run(main())


def test_the_fleet_s_own_process_is_lost_and_replicas_answer_until_their_leases_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 2) as (fleet, replicas):
            await put(fleet, "a", "v1")
            for replica in replicas:
                replica.line.is_cut = True
            assert [replica.version("a") for replica in replicas] == ["v1"] * 2
            await asyncio.sleep(LEASE_S + 0.1)
            assert [replica.version("a") for replica in replicas] == [None] * 2
            again = new_fleet(tmp_path)
            for replica in replicas:
                replica.line.fleet = again
                replica.line.is_cut = False
            await eventually(lambda: [replica.version("a") for replica in replicas] == ["v1"] * 2)
            assert [replica.server.restored for replica in replicas].count([]) == 1, "it was no restart"
            assert all(len(replica.server.followed) >= 1 for replica in replicas)
            await put(again, "a", "v2")
            assert [replica.version("a") for replica in replicas] == ["v2"] * 2

    asyncio.run(main())


def test_after_the_process_was_lost_a_change_waits_for_leases_that_nobody_remembers(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 2) as (_, replicas):
            again = new_fleet(tmp_path)
            one, forgotten = replicas
            one.line.fleet = again  # the other one has not noticed, and has a lease
            await eventually(lambda: again.status().serving == 1)
            await put(again, "a", "v2")
            assert forgotten.line.fleet is not again
            forgotten.die()

    async def leases_end() -> None:
        fleet = new_fleet(tmp_path)
        began = time.monotonic()
        replica = await Replica(fleet, "r", FakeServer()).serving()
        await put(fleet, "a", f"v{began}")
        assert time.monotonic() - began > LEASE_S
        await replica.end()

    asyncio.run(main())
    asyncio.run(leases_end())


def test_a_restart_brings_back_what_is_remembered_and_then_the_flags(tmp_path: Path) -> None:
    FleetFiles(tmp_path).write(FleetState.of([entry("old", "v1"), entry("flagged", "v1")]), ["another-session/flags"])

    async def main() -> None:
        async with fleet_of(tmp_path, 3, lambda: FakeServer({"flagged": "v2"})) as (_, replicas):
            assert {(replica.version("old"), replica.version("flagged")) for replica in replicas} == {("v1", "v2")}
            assert sorted(replica.server.restored for replica in replicas) == [[], [], [True]]
        remembered, seeds = FleetFiles(tmp_path).read()
        assert [one.name for one in remembered.adapters] == ["flagged", "old"]
        assert seeds == ("session-1/flags",)

    asyncio.run(main())


def test_other_flags_are_followed_by_the_first_that_has_them_and_nothing_else_is_loaded_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 2) as (fleet, replicas):
            await put(fleet, "a", "v1")
            newer = [Replica(fleet, f"n{i}", FakeServer({"new": "v5"}), seed="other flags") for i in range(2)]
            for replica in newer:
                await replica.serving()
            await eventually(lambda: all(replica.version("new") == "v5" for replica in [*replicas, *newer]))
            assert all(replica.version("a") == "v1" for replica in [*replicas, *newer])
            assert sorted(replica.server.restored for replica in newer) == [[], [False]]
            for replica in newer:
                await replica.end()

    asyncio.run(main())


def test_flags_that_cannot_be_served_end_the_replica_and_not_the_fleet(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 1) as (fleet, replicas):
            server = FakeServer({"new": "v5"})
            server.cannot["v5"] = "no adapter_config.json"
            wrong = Replica(fleet, "wrong", server, seed="other flags")
            with pytest.raises(RuntimeError, match=r"no adapter_config\.json"):
                await wrong.serving()
            await wrong.end()
            await put(fleet, "a", "v1")
            assert replicas[0].version("a") == "v1"

    asyncio.run(main())


def test_nobody_there_to_make_a_change_is_said(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(NotChanged, match="No replica is there"):
            await put(new_fleet(tmp_path), "a", "v1")

    asyncio.run(main())


def test_a_replica_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, 2, lease_s=20.0) as (fleet, replicas):
            await put(fleet, "a", "v1")
            await replicas[1].end()
            assert replicas[1].version("a") is None
            began = time.monotonic()
            changed = await put(fleet, "a", "v2")
            assert changed.replicas == 1
            assert time.monotonic() - began < 5

    asyncio.run(main())


def test_uploads_go_when_no_name_has_them_and_what_is_somebody_else_s_stays(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    for name in ("mine", "strange"):
        (uploads / name).mkdir(parents=True)
    FleetFiles(tmp_path).write(FleetState.of([_uploaded(uploads, "a", "mine")]), [])

    class Uploading(FakeServer):
        async def perform(self, scope, body):  # type: ignore[no-untyped-def]
            answer = await super().perform(scope, body)
            wish = self.performed[-1]
            if wish["version"] is not None:
                (uploads / wish["version"]).mkdir(exist_ok=True)
                self.has[wish["name"]] = _uploaded(uploads, wish["name"], wish["version"])
            return answer

    async def main() -> None:
        async with fleet_of(tmp_path, 2, Uploading) as (fleet, _):
            await put(fleet, "b", "second")
            assert sorted(path.name for path in uploads.iterdir()) == ["mine", "second", "strange"]
            await put(fleet, "b", "third")
            await put(fleet, "a", None)
            assert sorted(path.name for path in uploads.iterdir()) == ["strange", "third"]

    asyncio.run(main())


def _uploaded(uploads: Path, name: str, version: str):  # type: ignore[no-untyped-def]
    made = entry(name, version)
    return type(made)(made.name, str(uploads / version), made.pinned, made.version)


def test_the_files_say_what_they_were_told(tmp_path: Path) -> None:
    files = FleetFiles(tmp_path)
    assert files.read() == (FleetState(), ())
    state = FleetState.of([entry("b", "v1", pinned=True), entry("a", "v2")], Merge("a", "v2", "exact"))
    files.write(state, ["x", "y", "x"])
    assert files.read() == (state, ("x", "y"))
    assert [one.name for one in state.adapters] == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"format": 2, "merge": null, "seeds": []}', '{"format": 1, "merge": {"name": "a"}, "seeds": []}',
     '{"format": 1, "merge": null, "seeds": [1]}', '{"format": 1, "merge": 5, "seeds": []}', '{"format": 1}'],
)  # fmt: skip
def test_files_that_are_not_understood_are_refused_and_left(tmp_path: Path, text: str) -> None:
    from manylora.adapters.errors import RegistryStateError

    (tmp_path / "fleet.json").write_text(text)
    with pytest.raises(RegistryStateError, match=r"fleet\.json is unusable"):
        FleetFiles(tmp_path).read()
    assert (tmp_path / "fleet.json").read_text() == text
