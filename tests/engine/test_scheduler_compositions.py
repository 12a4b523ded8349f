"""Requests with several adapters in the scheduler: all of their slots or none, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from manylora.adapters.versions import AdapterRef
from manylora.server.engine.request import AdapterUse, Request, RequestState
from manylora.server.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from tests.engine.test_scheduler import add, names, scheduler, step
from tests.fakes import FakeSlots, adapter, request

A, B, C, D = (adapter(name) for name in "abcd")


def composed(request_id: str, *refs: AdapterRef, scales: Sequence[float] = (), **fields: object) -> Request:
    uses = [AdapterUse(ref, scale) for ref, scale in zip(refs, scales or [0.5] * len(refs), strict=True)]
    return request(request_id, adapters=tuple(uses), **fields)


def test_all_slots_or_none() -> None:
    """Adapter a is there and b is not: nothing is held while b is on its way, and both when it has come."""
    slots = FakeSlots(3, latency=4)
    it = scheduler(slots)
    add(it, request("first", adapter=A, max_tokens=1))
    while not slots.resident() or it.num_waiting or it.num_running:
        step(it)
    both = composed("both", A, B)
    add(it, both)
    step(it)
    assert both.state is RequestState.WAITING
    assert slots.references.total() == 0
    assert both.slots == ()
    it.check_integrity()
    while both.state is RequestState.WAITING:
        step(it)
    assert [slots.references[ref.version] for ref in (A, B)] == [1, 1]
    assert len(set(both.slots)) == 2
    assert (it.counts.slot_hits, it.counts.slot_misses) == (0, 2)
    it.finish(both)
    assert slots.references.total() == 0


def test_two_that_each_want_what_the_other_has() -> None:
    """With room for two adapters only; taking them one by one would be a deadlock."""
    slots = FakeSlots(2, latency=2)
    it = scheduler(slots, max_rows=4)
    pairs = [(A, B), (B, C), (C, A), (C, D), (B, A), (D, A)]
    everything = [composed(f"{i}-{j}", *pair, max_tokens=3) for j in range(3) for i, pair in enumerate(pairs)]
    add(it, *everything)
    for _ in range(400):
        step(it)
    assert all(one.state is RequestState.FINISHED for one in everything)
    assert slots.references.total() == 0


def test_a_composition_is_not_starved_by_traffic_for_each_of_its_parts_and_others() -> None:
    slots = FakeSlots(2, latency=3)
    it = scheduler(slots, max_rows=3, max_overtake=2)
    add(it, *(request(f"{ref.name}{i}", adapter=ref, max_tokens=3) for i in range(5) for ref in (A, C, D)))
    for _ in range(3):
        step(it)
    wanted = composed("wanted", A, B, max_tokens=2)
    add(it, wanted)
    for i in range(200):
        add(it, *(request(f"more-{ref.name}{i}", adapter=ref, max_tokens=3) for ref in (A, C, D)))
        step(it)
        if wanted.state is not RequestState.WAITING:
            break
    # Before it: five rounds of three flows at three steps each, three rows at a time, and three uploads a round.
    assert i < 5 * 3 * (3 + 3)


def test_its_own_uploads_evict_none_of_its_own() -> None:
    """Adapter a is the least recently used of what may make way, and is asked for after b, which is not there."""
    slots = FakeSlots(2)
    it = scheduler(slots)
    for ref in (A, C):
        add(it, request(ref.name, adapter=ref, max_tokens=1))
        for _ in range(3):
            step(it)
    assert [ref.name for ref in slots.resident()] == ["a", "c"]
    add(it, composed("both", B, A, max_tokens=1))
    for _ in range(4):
        step(it)
    assert slots.evictions == 1
    assert {ref.name for ref in slots.resident()} == {"a", "b"}


def test_an_upload_that_fails_gives_back_what_was_taken() -> None:
    slots = FakeSlots(2, refused=["b"])
    it = scheduler(slots)
    add(it, request("a", adapter=A, max_tokens=20))
    for _ in range(3):
        step(it)
    refused = composed("refused", A, B)
    add(it, refused)
    step(it)
    assert it.take_failed() == [(refused, "b cannot be uploaded")]
    assert refused.state is RequestState.FINISHED
    assert slots.references == {A.version: 1}
    it.check_integrity()


def test_preemption_gives_all_slots_back() -> None:
    slots = FakeSlots(3)
    it = scheduler(slots, num_pages=16, max_rows=2)
    old, young = request("old", range(30), max_tokens=30), composed("young", A, B, max_tokens=20)
    add(it, old, young)
    while young.num_preemptions == 0:
        step(it)
        assert old.state is not RequestState.FINISHED, "nothing was preempted"
    assert young.state is RequestState.WAITING
    assert young.slots == ()
    assert slots.references.total() == 0
    while young.state is not RequestState.FINISHED:
        step(it)
    assert len(young.output_token_ids) == 20


def test_more_adapters_than_slots_are_refused_at_once() -> None:
    it = scheduler(FakeSlots(2))
    too_many = composed("r0", A, B, C)
    assert it.never_fits(too_many) == "3 adapters have no room in 2 slots"
    with pytest.raises(ValueError, match="3 adapters have no room in 2 slots"):
        it.add(too_many)
    # Two names of one version share a slot; merged weights need none.
    assert it.never_fits(composed("r1", A, B, adapter("alias", A.version))) is None
    too_many.merged = object()
    assert it.never_fits(too_many) is None
    assert Scheduler(SchedulerConfig()).never_fits(composed("r2", A)) == "This server runs without adapters."


def test_merged_rows_take_no_slot_and_come_last() -> None:
    slots = FakeSlots(1)
    it = scheduler(slots, max_rows=8)
    add(
        it,
        composed("merged", A, scales=[1.0], merged=object()),
        request("other", adapter=B),
        request("base"),
        composed("merged too", A, scales=[1.0], merged=object()),
    )
    assert [row[0] for row in step(it)] == ["base", "merged", "merged too"]  # and an upload
    assert [row[0] for row in step(it)] == ["base", "other", "merged", "merged too"]
    assert slots.references == {B.version: 1}
    it.check_integrity()


def test_a_composition_is_a_flow_whatever_its_scales_and_order() -> None:
    it = scheduler(FakeSlots(4), max_rows=1)
    add(it, *(composed(f"x{i}", A, B, scales=[0.1 * i, 1.0]) for i in range(2)))
    add(it, *(composed(f"y{i}", B, A, scales=[1.0, 0.3 * i]) for i in range(2)))
    add(it, *(request(f"a{i}", adapter=A) for i in range(2)), request("base"))
    assert names(it.waiting()) == ["x0", "a0", "base", "x1", "a1", "y0", "y1"]
