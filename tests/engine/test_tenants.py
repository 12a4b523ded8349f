"""Tenants in the scheduler: no flood of one delays another, and nobody starves. Rules 6 to 8, by example and at random.

The comparison with the slow scheduler is in test_scheduler_reference.py.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import count
from typing import Any

import pytest

from manylora.adapters.versions import AdapterRef
from manylora.server.engine.request import AdapterUse, Request, RequestState
from manylora.server.engine.scheduling.accounts import Account
from manylora.server.engine.scheduling.block_pool import BlockPool
from manylora.server.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from manylora.server.engine.tenant import Tenant
from tests.engine.test_scheduler import add, complete, names, step
from tests.fakes import FakeSlots, adapter, request

FLOOD, B, C = Tenant("flood"), Tenant("b"), Tenant("c")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def scheduler(slots: FakeSlots | None = None, clock: Clock | None = None, **limits: int) -> Scheduler:
    """The sizes of the server on a CPU, unless given."""
    config = SchedulerConfig(**{"max_rows": 32, "max_batch_tokens": 256, "num_pages": 2000, **limits})
    return Scheduler(config, slots, clock=clock or Clock())


class Stream:
    """Requests of a tenant without end, all alike."""

    def __init__(self, tenant: Tenant, prompt: int, max_tokens: int, **fields: object) -> None:
        self._tenant = tenant
        self._made = (
            request(f"{tenant.name}{i}", range(prompt), max_tokens=max_tokens, tenant=tenant, **fields) for i in count()
        )

    def add(self, it: Scheduler) -> None:
        it.add(next(self._made))

    def flood(self, it: Scheduler, waiting: int = 200) -> None:
        """Have this many of them waiting."""
        for _ in range(waiting - sum(one.tenant is self._tenant for one in it.waiting())):
            self.add(it)


def run(it: Scheduler, steps: int) -> Counter[str]:
    """Tokens computed for each tenant."""
    tokens: Counter[str] = Counter()
    for _ in range(steps):
        plan = it.schedule()
        tokens.update({row.request.tenant.name: 0 for row in plan.rows})
        for row in plan.rows:
            tokens[row.request.tenant.name] += row.count
        complete(it, plan)
    return tokens


def rows_of(it: Scheduler, tenant: Tenant) -> list[Request]:
    return [one for one in it.running() if one.tenant is tenant]


# --- a flood of others does not delay a light request --------------------------------------------------------------


@pytest.mark.parametrize("prompt", [3, 40, 250, 700])
@pytest.mark.parametrize("pages", [2000, 120], ids=["much memory", "little memory"])
def test_a_flood_cannot_delay_a_light_request_by_a_step(prompt: int, pages: int) -> None:
    """The very next step has all of its prompt that fits into one, and of the flood a single row."""
    rng = random.Random(prompt + pages)
    it = scheduler(num_pages=pages)
    source = Stream(FLOOD, prompt, 40)
    source.flood(it)
    for i in range(25):
        for _ in range(rng.randint(30, 60)):
            run(it, 1)
            source.flood(it)
        n_prompt = rng.randint(1, 120)
        light = request(f"light{i}", range(n_prompt), max_tokens=rng.randint(1, 20), tenant=B)
        it.add(light)
        plan = it.schedule()
        assert {row.request.request_id: row.count for row in plan.rows}[light.request_id] == n_prompt
        assert sum(row.request.tenant is FLOOD for row in plan.rows) <= 1
        assert plan.num_tokens <= n_prompt + 1 + len(rows_of(it, B))
        complete(it, plan)
        it.check_integrity()


def test_the_first_light_request_of_all_waits_no_longer() -> None:
    """The flood has every row and nobody else was ever there."""
    it = scheduler()
    Stream(FLOOD, 8, 500).flood(it)
    run(it, 50)
    assert it.num_running == 32
    add(it, request("light", range(64), tenant=B))
    plan = it.schedule()
    assert sorted(row.count for row in plan.rows) == [1, 64]
    assert it.counts.preemptions == 1


def test_a_step_that_a_light_request_finds_is_short_while_its_tenant_is_here_or_was_lately() -> None:
    clock = Clock()
    it = scheduler(clock=clock)
    source = Stream(FLOOD, 500, 2)
    source.flood(it, 20)
    assert run(it, 1)["flood"] == 256
    add(it, request("first", range(5), max_tokens=1, tenant=B))
    run(it, 1)
    for clock.now in range(0, 60, 6):
        assert run(it, 1)["flood"] == 32  # nobody else is here, but B was
        source.flood(it, 20)
    clock.now = 61
    assert run(it, 1)["flood"] == 256


def test_several_light_requests_start_together_while_they_fit_into_a_step() -> None:
    it = scheduler()
    Stream(FLOOD, 8, 500).flood(it)
    run(it, 50)
    add(it, *(request(f"light{i}", range(100), tenant=B) for i in range(4)))
    plan = it.schedule()
    assert sorted(row.count for row in plan.rows) == [1, 100, 100]
    assert it.counts.preemptions == 2


def test_lights_of_two_tenants_wait_for_each_other_and_one_ordinary_step() -> None:
    it = scheduler()
    Stream(FLOOD, 8, 500).flood(it)
    run(it, 50)
    add(it, request("b", range(50), tenant=B), request("c", range(50), tenant=C))
    assert ("b", 0, 50) in step(it)
    assert len(step(it)) == 32
    assert ("c", 0, 50) in step(it)


def test_a_flood_is_not_light_but_for_its_first() -> None:
    it = scheduler()
    Stream(FLOOD, 8, 500).flood(it)
    run(it, 50)
    add(it, *(request(f"b{i}", range(60), max_tokens=500, tenant=B) for i in range(100)))
    plan = it.schedule()
    assert sum(row.request.tenant is B for row in plan.rows) == 4
    complete(it, plan)
    preempted = it.counts.preemptions
    run(it, 100)
    assert it.counts.preemptions == preempted


class Served:
    """A server in which a step takes ``fixed + each * tokens`` seconds: one light request a second, for two minutes."""

    def __init__(self, fixed: float, each: float, prompt: int, *, flooded: bool) -> None:
        clock = Clock()
        it = scheduler(clock=clock)
        source = Stream(FLOOD, 64, 64)
        rng = random.Random(1)
        coming = [(5 + i + rng.random(), request(f"r{i}", range(prompt), tenant=B)) for i in range(120)]
        arrived: dict[Request, float] = {}
        self.first: list[float] = []
        """Seconds to the first token of each."""
        self.flooded = 0
        """Tokens of the flood in the second minute."""
        while coming or it.num_running:
            while coming and coming[0][0] <= clock.now:
                when, one = coming.pop(0)
                it.add(one)
                arrived[one] = when
            if flooded and coming:
                source.flood(it, 170)
            plan = it.schedule()
            clock.now = clock.now + fixed + each * plan.num_tokens if plan.rows else coming[0][0]
            complete(it, plan)
            if clock.now > 65:
                self.flooded += sum(row.count for row in plan.rows if row.request.tenant is FLOOD)
            self.first += [clock.now - arrived.pop(r) for r in list(arrived) if r.output_token_ids]
        self.first.sort()
        self.p95 = self.first[int(len(self.first) * 0.95)]


@pytest.mark.parametrize("each", [0.002, 0.0045], ids=["fast", "slow"])
@pytest.mark.parametrize("prompt", [32, 64])
def test_the_first_token_beside_a_flood_comes_an_ordinary_step_later(each: float, prompt: int) -> None:
    """Two, if the request before has just been served. In a server as fast as two cores with the demo base, and as that
    was on a slower day."""
    idle, beside = (Served(0.014, each, prompt, flooded=flooded) for flooded in (False, True))
    ordinary = 0.014 + each * 32
    assert beside.first[60] < idle.first[60] + ordinary
    assert beside.p95 < idle.p95 + 2 * ordinary
    assert beside.p95 < 2 * idle.p95 + 2 * each  # its own step has a row of the flood's, too
    assert beside.flooded > 60 * 80


def test_who_wants_more_than_its_half_waits_and_the_flood_has_the_other() -> None:
    """200 tokens a second can be computed, and 144 are asked for; the flood's half is not given away."""
    beside = Served(0.014, 0.0045, 128, flooded=True)
    assert beside.flooded > 60 * 80
    assert beside.first[60] > 5


# --- and the flood goes on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_rows", "tokens", "fixed", "each", "least"),
    [(32, 256, 0.014, 0.002, 0.8), (128, 2048, 0.02, 0.00005, 0.85)],
    ids=["cpu", "gpu"],
)
def test_a_trickle_of_another_leaves_the_flood_its_speed(
    max_rows: int, tokens: int, fixed: float, each: float, least: float
) -> None:
    """Short steps cost what is fixed in a step more often."""
    speeds = []
    for trickles in (False, True):
        clock = Clock()
        it = scheduler(clock=clock, max_rows=max_rows, max_batch_tokens=tokens, num_pages=10**5)
        source, tiny = Stream(FLOOD, 64, 64), Stream(B, 2, 1)
        output = 0
        next_tiny = 1.0
        while clock.now < 60:
            source.flood(it)
            if trickles and clock.now > next_tiny:
                tiny.add(it)
                next_tiny += 5
            plan = it.schedule()
            output += sum(row.sample for row in plan.rows)
            clock.now += fixed + each * plan.num_tokens
            complete(it, plan)
        speeds.append(output)
    assert speeds[1] > least * speeds[0]


def test_decoding_rows_and_prompts_have_half_of_a_guarded_step_each() -> None:
    it = scheduler()
    add(it, request("b", [1], max_tokens=1, tenant=B))
    run(it, 1)
    add(it, *(request(f"f{i}", [1, 2], max_tokens=900, tenant=FLOOD) for i in range(30)))
    run(it, 3)
    assert it.num_running == 30
    add(it, request("long", range(900), tenant=FLOOD))
    plan = step(it)
    assert ("long", 0, 16) in plan
    assert len(plan) == 17
    step(it)
    decoding = Counter(name for _ in range(15) for name, _start, count in step(it) if count == 1)
    assert set(decoding.values()) == {8}, "30 take turns for 16 places"


def test_prompts_that_wait_for_a_slot_keep_nothing_from_decoding_rows() -> None:
    it = scheduler(FakeSlots(1, latency=10**6))
    add(it, request("b", [1], max_tokens=1, tenant=B))
    run(it, 1)
    add(it, *(request(f"f{i}", [1], max_tokens=900, tenant=FLOOD) for i in range(30)))
    while it.num_running < 30:
        run(it, 1)
    add(it, request("away", range(64), tenant=FLOOD, adapters=(AdapterUse(adapter("a")),)))
    run(it, 1)
    assert len(step(it)) == 30


def test_turns_of_decoding_rows_go_by_share_and_priority() -> None:
    it = scheduler(max_rows=40, guarded_tokens=12)
    for tenant in (Tenant("one"), Tenant("three", share=3.0)):
        for i in range(15):
            add(it, request(f"{tenant.name}{i}", [1], max_tokens=900, tenant=tenant, priority=int(i >= 12)))
    while it.num_running < 30:
        run(it, 1)
    decoding = Counter(name for _ in range(40) for name, *_ in step(it))
    assert {decoding[f"one{i}"] for i in range(12)} == {10}  # 3 of 12 places
    assert {decoding[f"three{i}"] for i in range(12)} == {30}
    assert sum(decoding.values()) == 480, "those of priority 1 rest"


def test_rows_are_taken_from_the_youngest_of_who_has_most_for_its_share_and_never_below_it() -> None:
    it = scheduler(guarded_tokens=256, reserved_rows=0)
    twice = Tenant("twice", share=2.0)
    Stream(twice, 8, 5000).flood(it)
    run(it, 40)
    light = Stream(C, 8, 5000)
    for expected in range(31, 20, -1):
        youngest = max(rows_of(it, twice), key=lambda one: int(one.request_id[len("twice") :]))
        light.add(it)
        run(it, 6)
        assert len(rows_of(it, twice)) == max(expected, 22)
        if expected >= 22:
            assert youngest.state is RequestState.WAITING
    assert len(rows_of(it, C)) == 10  # a third of 32
    assert all(one.num_preemptions <= 1 for one in it.waiting())


def test_pages_are_taken_from_who_is_over_its_share_of_them() -> None:
    it = scheduler(num_pages=100, page_size=16)
    Stream(FLOOD, 100, 200).flood(it, 10)
    run(it, 60)
    assert it.pool.num_free < 30
    large = request("large", range(30 * 16), max_tokens=16, tenant=B)
    it.add(large)
    oldest = it.running()[0]
    run(it, 1)
    assert large.state is RequestState.RUNNING
    assert oldest.state is RequestState.RUNNING
    # More than half of the memory is not taken from others: it waits its turn.
    huge = request("huge", range(60 * 16), max_tokens=16, tenant=C)
    preempted = it.counts.preemptions
    it.add(huge)
    run(it, 1)
    assert huge.state is RequestState.WAITING
    assert it.counts.preemptions == preempted
    run(it, 1500)
    assert huge.state is RequestState.FINISHED


def test_light_requests_without_end_leave_the_flood_its_half() -> None:
    it = scheduler()
    source, lights = Stream(FLOOD, 50, 50), Stream(B, 100, 1)
    source.flood(it)
    run(it, 50)
    tokens: Counter[str] = Counter()
    for _ in range(3000):
        if not any(one.tenant is B for one in [*it.waiting(), *it.running()]):
            lights.add(it)
        tokens += run(it, 1)
        source.flood(it)
    assert 0.9 < tokens["b"] / tokens["flood"] < 1.1


@pytest.mark.parametrize(("first", "second"), [(1.0, 1.0), (3.0, 1.0), (0.1, 0.4)])
def test_two_floods_share_by_weight(first: float, second: float) -> None:
    it = scheduler()
    parties = [Tenant("x", first), Tenant("y", second)]
    sources = [Stream(parties[0], 30, 100), Stream(parties[1], 200, 10)]
    sources[0].flood(it)
    run(it, 100)
    tokens: Counter[str] = Counter()
    for i in range(2500):
        for source in sources:
            source.flood(it, 20)
        done = run(it, 1)
        if i >= 500:
            tokens += done
    assert tokens["x"] / tokens["y"] == pytest.approx(first / second, rel=0.1)


def test_what_was_had_while_nobody_else_wanted_any_is_not_held_against_it() -> None:
    """The first request beside a flood that has just begun is express, however much its tenant had before."""
    it = scheduler()
    light = Stream(B, 64, 16)
    for _ in range(100):
        light.add(it)
        while it.num_running or it.num_waiting:
            run(it, 1)
    Stream(FLOOD, 64, 64).flood(it)
    run(it, 10)
    light.add(it)
    assert sorted(row.count for row in it.schedule().rows)[-2:] == [1, 64]


def test_nothing_is_saved_up_while_away() -> None:
    it = scheduler()
    source, other = Stream(FLOOD, 20, 20), Stream(B, 20, 20)
    other.add(it)
    for _ in range(2000):
        source.flood(it, 50)
        run(it, 1)
    tokens: Counter[str] = Counter()
    for _ in range(200):
        source.flood(it, 50)
        other.flood(it, 50)
        tokens += run(it, 1)
    assert tokens["b"] < 1.5 * tokens["flood"]


def test_nothing_is_saved_up_while_waiting_for_an_adapter() -> None:
    """B waits for an upload that never ends, and its base requests get their half meanwhile, no more."""
    it = scheduler(FakeSlots(1, latency=10**6))
    source, other = Stream(FLOOD, 20, 20), Stream(B, 20, 20)
    add(it, request("stuck", adapter=adapter("stuck"), tenant=B))
    for _ in range(2000):
        source.flood(it, 50)
        run(it, 1)
    tokens: Counter[str] = Counter()
    for _ in range(400):
        source.flood(it, 50)
        other.flood(it, 50)
        tokens += run(it, 1)
    assert tokens["b"] < 1.5 * tokens["flood"]


def test_no_decoding_row_rests_for_long() -> None:
    """A step has places for 4 of at most 8 rows of up to 6 tenants."""
    rng = random.Random(5)
    it = scheduler(max_rows=8, max_batch_tokens=64, num_pages=100, guarded_tokens=8)
    sources = [
        Stream(Tenant(f"t{i}", rng.choice([0.2, 1.0, 5.0])), rng.randint(1, 90), rng.randint(1, 30)) for i in range(6)
    ]
    rested: Counter[Request] = Counter()
    longest = 0
    for _ in range(1500):
        for source in sources:
            if rng.random() < 0.1:
                source.add(it)
        plan = it.schedule()
        rows = {row.request for row in plan.rows}
        for one in it.running():
            decodes = one.num_tokens - one.num_computed == 1
            rested[one] = 0 if one in rows or not decodes else rested[one] + 1
            longest = max(longest, rested[one])
        complete(it, plan)
    assert 2 <= longest <= 8
    while it.num_running or it.num_waiting:
        step(it)
    it.check_integrity()
    assert it.pool.num_used == 0


@pytest.mark.parametrize("n_tenants", [2, 5])
def test_nobody_starves(n_tenants: int) -> None:
    """Floods and light ones, large and small, with more adapters than slots, and little memory; those that were there
    first end although others never stop coming."""
    rng = random.Random(n_tenants)
    slots = FakeSlots(2, latency=2)
    it = scheduler(slots, max_rows=6, max_batch_tokens=32, num_pages=60, page_size=4, guarded_tokens=8, max_overtake=1)
    tenants = [Tenant(f"t{i}", rng.choice([0.2, 1.0, 5.0])) for i in range(n_tenants)]
    refs = [None, None, *(adapter(f"a{i}") for i in range(5))]

    def made(name: str) -> Request:
        return request(
            name, range(rng.choice([3, 20, 120])), max_tokens=rng.choice([1, 30]), tenant=rng.choice(tenants),
            adapter=rng.choice(refs),
        )  # fmt: skip

    early = [made(f"early{i}") for i in range(30)]
    add(it, *early)
    for i in range(60_000):
        if it.num_waiting < 30:
            it.add(made(f"late{i}"))
        step(it)
        if all(one.state is RequestState.FINISHED for one in early):
            break
    assert all(one.state is RequestState.FINISHED for one in early), f"{i} steps"
    it.check_integrity()


def test_slots_go_round_the_tenants() -> None:
    """A flood of many adapters, none of which is there, and another tenant that wants one."""
    it = scheduler(FakeSlots(2, latency=4), max_rows=4)
    add(it, *(request(f"f{i}", max_tokens=3, adapter=adapter(f"a{i}"), tenant=FLOOD) for i in range(200)))
    run(it, 100)
    wanted = request("wanted", max_tokens=1, adapter=adapter("wanted"), tenant=B)
    it.add(wanted)
    run(it, 40)
    assert wanted.state is RequestState.FINISHED
    run(it, 6000)
    assert not it.num_waiting


def test_who_has_the_claim_may_use_it_whatever_its_tenant_has_had() -> None:
    """Its decoding rows are more than its share, and another, whose turn it is, has prompts without end."""
    it = scheduler(FakeSlots(1, latency=2))
    add(it, *(request(f"f{i}", max_tokens=900, tenant=FLOOD) for i in range(24)))
    run(it, 60)
    wanted = request("wanted", range(100), max_tokens=1, adapter=adapter("wanted"), tenant=FLOOD)
    it.add(wanted)
    run(it, 1)
    source = Stream(B, 250, 1)
    source.flood(it, 50)
    clocks = {account.name: account for account in it._accounts}
    clocks["flood"].clock = clocks["b"].clock + 900  # it has had much more
    for _ in range(8):
        run(it, 1)
        assert clocks["flood"].turn > clocks["b"].turn
    assert wanted.state is RequestState.RUNNING


@pytest.mark.parametrize("express", [False, True])
def test_a_scored_prompt_is_computed_in_small_chunks_beside_others(express: bool) -> None:
    it = scheduler()
    alone = request("alone", range(200), max_tokens=1, prompt_logprobs=0, tenant=FLOOD)
    it.add(alone)
    assert step(it) == [("alone", 0, 200)]
    add(it, request("beside", max_tokens=50, tenant=FLOOD))
    step(it)
    add(it, request("scored", range(200), max_tokens=1, prompt_logprobs=0, tenant=B if express else FLOOD))
    assert step(it) == [("beside", 3, 1), ("scored", 0, 64)]
    if not express:
        assert step(it) == [("beside", 4, 1), ("scored", 64, 64)]
    while it.num_running > 1:
        step(it)


class Reading(FakeSlots):
    """All weights are still on the disk."""

    def acquire(self, ref: AdapterRef) -> int | None:
        return None

    def awaits_read(self, ref: AdapterRef) -> bool:
        return True


@pytest.mark.parametrize("tenants", [1, 2, 50])
def test_the_work_of_a_step_grows_with_the_requests_and_not_with_their_square(
    tenants: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running, waiting for reads, and tenants: each is looked at a few times."""
    it = scheduler(Reading(1), max_rows=140, max_batch_tokens=2048, num_pages=10**5)
    who = [Tenant(f"t{i}") for i in range(tenants)]
    add(it, *(request(f"r{i}", max_tokens=900, tenant=who[i % tenants]) for i in range(128)))
    run(it, 80)
    assert it.num_running >= 100
    waiting = [request(f"w{i}", adapter=adapter(f"a{i}"), tenant=who[i % tenants]) for i in range(1000)]
    add(it, *waiting)
    looks: Counter[str] = Counter()
    for owner, name in ((BlockPool, "pages_for"), (Account, "wants_more"), (Account, "turn")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name), looks, name))
    run(it, 4)
    assert looks["pages_for"] < 4 * 3 * (1000 + 2 * 128)
    assert looks["wants_more"] <= 4 * tenants
    assert looks["turn"] < 4 * (3 * tenants + 128 + 50)


def counted(original: Any, looks: Counter[str], name: str) -> Any:
    function = original.fget if isinstance(original, property) else original

    def look(*args: Any) -> Any:
        looks[name] += 1
        return function(*args)

    return property(look) if isinstance(original, property) else look


def test_a_tenants_resident_adapters_do_not_keep_anothers_away() -> None:
    """The one slot holds the flood's adapter, which its requests ask for without end."""
    it = scheduler(FakeSlots(1), max_rows=4, max_overtake=3)
    source = Stream(FLOOD, 3, 9, adapter=adapter("a"))
    source.flood(it)
    run(it, 30)
    wanted = request("wanted", max_tokens=1, adapter=adapter("wanted"), tenant=B)
    it.add(wanted)
    started = len(rows_of(it, FLOOD))
    for _ in range(60):
        source.flood(it)
        plan = it.schedule()
        started += sum(row.start == 0 for row in plan.rows)
        complete(it, plan)
        if wanted.state is not RequestState.WAITING:
            break
    assert wanted.state is not RequestState.WAITING
    assert started <= 4 + 4 + 3 + 1


# --- between tenants, priority means nothing -----------------------------------------------------------------------


def test_priority_orders_a_tenants_own_requests_only() -> None:
    it = scheduler(max_rows=1, max_batch_tokens=8)
    add(it, *(request(f"urgent{i}", max_tokens=4, priority=-100, tenant=FLOOD) for i in range(20)))
    add(it, request("late", max_tokens=4, priority=1, tenant=B), request("soon", max_tokens=4, tenant=B))
    started = [name for _ in range(40) for name, start, _ in step(it) if start == 0]
    assert started.index("soon") <= 1
    assert started.index("late") <= 4


def test_memory_is_taken_from_who_has_most_of_it() -> None:
    it = scheduler(num_pages=40, page_size=4, max_rows=8, max_batch_tokens=64, guarded_tokens=64)
    add(it, *(request(f"f{i}", range(20), max_tokens=60, priority=-5, tenant=FLOOD) for i in range(5)))
    run(it, 1)
    small = request("small", range(8), max_tokens=30, priority=5, tenant=B)
    it.add(small)
    while not it.counts.preemptions:
        run(it, 1)
    run(it, 30)
    assert small.state is RequestState.FINISHED
    assert small.num_preemptions == 0


def test_one_tenant_alone_is_served_as_if_there_were_none() -> None:
    plans = []
    for tenant in (Tenant(""), Tenant("alone", share=0.01)):
        it = scheduler(max_rows=4, max_batch_tokens=16, num_pages=20, page_size=4)
        add(it, *(request(f"r{i}", range(1 + i * 7 % 30), max_tokens=9, tenant=tenant) for i in range(40)))
        plans.append([step(it) for _ in range(300)])
    assert plans[0] == plans[1]
    assert names(it.waiting()) == []


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, -1.0, float("inf"), float("nan")])
def test_a_share_is_a_positive_number(share: float) -> None:
    with pytest.raises(ValueError, match="share must be a positive number"):
        Tenant("x", share)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"guarded_tokens": 0}, r"guarded_tokens must be from 1 to max_batch_tokens \(256\), got 0"),
        ({"guarded_tokens": 257}, "got 257"),
        ({"reserved_rows": 32}, "reserved_rows must be from 0 to 31, so that a row is left, got 32"),
        ({"reserved_rows": -1}, "got -1"),
    ],
)
def test_bad_limits_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduler(**limits)
