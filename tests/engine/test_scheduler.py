"""Single rules of the scheduler, by example. The random comparison is in test_scheduler_reference.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from manylora.server.engine.request import Request, RequestState, StepPlan
from manylora.server.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from tests.fakes import FakeSlots, adapter, request

A, B, C = adapter("a"), adapter("b"), adapter("c")


def scheduler(slots: FakeSlots | None = None, **limits: int) -> Scheduler:
    return Scheduler(SchedulerConfig(**{"page_size": 4, "num_pages": 1000, **limits}), slots)


def add(it: Scheduler, *requests: Request) -> None:
    for one in requests:
        it.add(one)


def step(it: Scheduler) -> list[tuple[str, int, int]]:
    """Run a step; a request ends with its max_tokens-th token. Rows as (id, start, count)."""
    plan = it.schedule()
    rows = [(row.request.request_id, row.start, row.count) for row in plan.rows]
    complete(it, plan)
    return rows


def complete(it: Scheduler, plan: StepPlan) -> None:
    sampling = [row.request for row in plan.rows if row.sample]
    it.commit(plan)
    for one in sampling:
        one.output_token_ids.append(9)
        if len(one.output_token_ids) == one.params.max_tokens:
            it.finish(one)


def names(requests: Sequence[Request]) -> list[str]:
    return [one.request_id for one in requests]


def test_a_long_prompt_is_computed_in_chunks_and_decoding_goes_on_beside_it() -> None:
    it = scheduler(max_rows=4, max_batch_tokens=8)
    add(it, request("short", range(3), max_tokens=5))
    assert step(it) == [("short", 0, 3)]
    add(it, request("long", range(20), max_tokens=1))
    assert step(it) == [("short", 3, 1), ("long", 0, 7)]
    assert step(it) == [("short", 4, 1), ("long", 7, 7)]
    assert step(it) == [("short", 5, 1), ("long", 14, 6)]
    assert names(it.running()) == ["short"]


def test_decoding_rows_come_before_older_prefills_in_the_budget() -> None:
    it = scheduler(max_rows=2, max_batch_tokens=4)
    add(it, request("long", range(10), max_tokens=1, priority=-1))
    step(it)
    quick = request("quick", range(1), max_tokens=9)
    quick.output_token_ids = [5]
    add(it, quick)
    it._entries["long"].request.num_computed = 6  # so that the budget leaves room to admit the quick one
    assert step(it) == [("long", 6, 4)]
    assert step(it) == [("quick", 0, 2)]
    assert step(it) == [("quick", 2, 1)]


def test_rows_are_sorted_by_slot_with_the_base_first() -> None:
    it = scheduler(FakeSlots(3), max_rows=8)
    add(it, *(request(f"r{i}", adapter=ref) for i, ref in enumerate([C, None, B, A, B, None])))
    for _ in range(6):  # uploads
        plan = it.schedule()
        complete(it, plan)
    slots = [row.request.slots for row in plan.rows]
    assert slots[:2] == [(), ()]
    assert slots[2:] == sorted(slots[2:])
    assert len(slots) == 6


def test_priority_then_submission() -> None:
    it = scheduler(max_rows=1)
    add(it, request("late", priority=1), request("first"), request("second"), request("urgent", priority=-1))
    assert names(it.waiting()) == ["urgent", "first", "second", "late"]


def test_a_request_that_does_not_fit_into_memory_is_not_overtaken_by_smaller_ones() -> None:
    it = scheduler(max_rows=8, num_pages=10, page_size=4)
    add(it, request("a", range(20), max_tokens=4), request("large", range(30), max_tokens=1), request("small"))
    assert [row[0] for row in step(it)] == ["a"]
    while it.num_running:
        step(it)
    assert step(it)[0][0] == "large"


def test_out_of_pages_the_youngest_least_important_is_preempted_and_comes_back_first() -> None:
    it = scheduler(max_rows=3, num_pages=6, page_size=4)
    old = request("old", range(3), max_tokens=20)
    young = request("young", range(3), max_tokens=20)
    urgent = request("urgent", range(3), max_tokens=20, priority=-1)
    add(it, old, young, urgent)
    while not it.counts.preemptions:
        step(it)
    assert (young.num_preemptions, old.num_preemptions, urgent.num_preemptions) == (1, 0, 0)
    assert (young.state, young.num_computed, young.pages) == (RequestState.WAITING, 0, [])
    add(it, request("newcomer", range(3)))
    assert names(it.waiting()) == ["young", "newcomer"]
    n_output = len(young.output_token_ids)
    assert n_output > 0
    while young.state is RequestState.WAITING:
        rows = step(it)
    # Prompt and output alike are computed again.
    assert ("young", 0, 3 + n_output) in rows


def test_a_flood_from_one_adapter_does_not_delay_another() -> None:
    it = scheduler(FakeSlots(2), max_rows=2)
    add(it, *(request(f"flood{i}", max_tokens=2, adapter=A) for i in range(50)))
    for _ in range(5):
        step(it)
    add(it, request("b", max_tokens=2, adapter=B), request("base", max_tokens=2))
    waiting = names(it.waiting())
    assert waiting.index("b") <= 1
    assert waiting.index("base") <= 2


def test_flows_take_turns() -> None:
    it = scheduler(max_rows=1)
    it2 = scheduler(FakeSlots(2), max_rows=1)
    add(it, *(request(f"base{i}") for i in range(3)))
    assert names(it.waiting()) == ["base0", "base1", "base2"]
    add(it2, *(request(f"a{i}", adapter=A) for i in range(3)), *(request(f"b{i}", adapter=B) for i in range(3)))
    assert names(it2.waiting()) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_a_new_flow_has_no_credit_from_when_it_was_absent() -> None:
    """Else a stream of adapters that are each asked for once would go before a second request of any other."""
    it = scheduler(FakeSlots(20), max_rows=1)
    add(it, *(request(f"a{i}", max_tokens=1, adapter=A) for i in range(4)))
    served: list[str] = []
    for i in range(40):
        add(it, request(f"new{i}", max_tokens=1, adapter=adapter(f"n{i}")))
        served += [row[0] for row in step(it)]
    assert served.index("a3") <= 8


def test_base_traffic_is_not_blocked_by_an_adapter_that_is_not_there() -> None:
    slots = FakeSlots(1, latency=10**9)
    it = scheduler(slots, max_rows=4, max_overtake=0)
    add(it, request("miss", adapter=A), *(request(f"base{i}", max_tokens=1) for i in range(20)))
    served = [row[0] for _ in range(5) for row in step(it)]
    assert sorted(served) == sorted(f"base{i}" for i in range(20))
    assert names(it.waiting()) == ["miss"]


def test_a_miss_lets_resident_adapters_overtake_but_not_for_ever() -> None:
    """Adapter b waits for the one slot, which a pins: a gets max_overtake more requests, then b its turn."""
    slots = FakeSlots(1)
    it = scheduler(slots, max_rows=2, max_overtake=3)
    add(it, *(request(f"a{i}", max_tokens=4, adapter=A) for i in range(2)))
    step(it)
    step(it)
    assert it.num_running == 2
    add(it, request("b", max_tokens=4, adapter=B))
    add(it, *(request(f"more{i}", max_tokens=4 + i % 2, adapter=A) for i in range(30)))
    admitted: list[str] = []
    for _ in range(200):
        admitted += [name for name, start, _count in step(it) if start == 0]
        if "b" in admitted:
            break
    # b's tag is V + 1; those of a that may go before it are V + 1 .. V + 1 + 3.
    assert admitted.index("b") <= 4


def test_more_adapters_than_slots_all_get_served() -> None:
    slots = FakeSlots(2, latency=3)
    it = scheduler(slots, max_rows=8)
    everything = [request(f"{n}-{i}", max_tokens=3, adapter=adapter(f"n{n}")) for n in range(12) for i in range(4)]
    add(it, *everything)
    for _ in range(2000):
        step(it)
    assert all(one.state is RequestState.FINISHED for one in everything)
    assert slots.evictions >= 10
    assert slots.references.total() == 0


def test_an_upload_that_fails_ends_its_request_alone() -> None:
    it = scheduler(FakeSlots(2, refused=["b"]), max_rows=4)
    refused, other = request("refused", adapter=B), request("other")
    add(it, refused, other)
    assert [row[0] for row in step(it)] == ["other"]
    assert it.take_failed() == [(refused, "b cannot be uploaded")]
    assert it.take_failed() == []
    assert refused.state is RequestState.FINISHED
    it.check_integrity()


def test_hits_and_misses_are_counted_per_admission() -> None:
    it = scheduler(FakeSlots(1), max_rows=1)
    add(it, *(request(f"r{i}", max_tokens=1, adapter=A) for i in range(3)))
    for _ in range(6):
        step(it)
    assert (it.counts.slot_misses, it.counts.slot_hits) == (1, 2)


def test_finish_in_any_state_frees_everything() -> None:
    slots = FakeSlots(1)
    it = scheduler(slots, max_rows=1)
    running, waiting = request("running", adapter=A), request("waiting", adapter=A)
    add(it, running, waiting)
    step(it)
    step(it)
    assert slots.references.total() == 1
    it.finish(waiting)
    it.finish(running)
    assert slots.references.total() == 0
    assert it.pool.num_used == 0
    it.check_integrity()
    with pytest.raises(KeyError):
        it.finish(running)


def test_aborting_the_queue_gives_back_the_turns_it_had_reserved() -> None:
    it = scheduler(FakeSlots(1), max_rows=1)
    many = [request(f"a{i}", adapter=A) for i in range(20)]
    add(it, *many)
    for one in many:
        it.finish(one)
    add(it, request("again", adapter=A), request("base"))
    assert names(it.waiting()) == ["again", "base"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (request(prompt=range(60), max_tokens=5), "60 \\+ 5 tokens do not fit into 64"),
        (request(prompt=[]), "needs a prompt"),
        (request(max_tokens=-1), "a prompt and a number of output tokens, got 3 and -1"),
        (request(adapter=A), "runs without adapters"),
    ],
)
def test_what_can_never_be_served_is_refused(made: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduler(num_pages=16).add(made)


def test_the_largest_request_is_served_alone() -> None:
    it = scheduler(num_pages=16, max_batch_tokens=32)
    largest = request(prompt=range(40), max_tokens=24)
    add(it, largest)
    for _ in range(30):
        step(it)
    assert largest.state is RequestState.FINISHED
    assert len(largest.output_token_ids) == 24


def test_integrity_check_sees_a_leak() -> None:
    it = scheduler()
    add(it, request(max_tokens=5))
    step(it)
    it.running()[0].pages.pop()
    with pytest.raises(RuntimeError, match="1 are in use, but requests hold 0"):
        it.check_integrity()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"max_rows": 8, "max_batch_tokens": 4}, r"max_batch_tokens \(4\) must be at least max_rows \(8\)"),
        ({"max_overtake": -1}, "max_overtake must not be negative"),
    ],
)
def test_bad_limits_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(**limits)


def test_importing_the_scheduler_does_not_import_torch() -> None:
    code = "import sys, manylora.server.engine.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
