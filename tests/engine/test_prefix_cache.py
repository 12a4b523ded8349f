"""What the prefix cache shares and with whom, what it never hands out, and what it costs and tells.

Which plans it leads to is in test_scheduler_reference.py, what the engine makes of it in test_prefix_cache_engine.py,
that the model's bits stay the same in test_prefix_cache_bits.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from manylora.server.engine.request import AdapterUse, Request, StepPlan
from manylora.server.engine.scheduling.block_pool import BlockPool
from manylora.server.engine.scheduling.prefix_cache import PageKeys
from manylora.server.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from manylora.server.engine.tenant import Tenant
from tests.fakes import FakeMerge, FakeSlots, adapter, request

A, B = adapter("a"), adapter("b")
PAGE = 4


def scheduler(**limits: Any) -> Scheduler:
    config = SchedulerConfig(
        **{"page_size": PAGE, "num_pages": 100, "max_context": 200, "prefix_cache": True, **limits}
    )
    return Scheduler(config, FakeSlots(4))


def complete(it: Scheduler, plan: StepPlan, token: int = 9) -> None:
    """Record the step as computed, and end what has all its tokens."""
    it.commit(plan)
    for row in plan.rows:
        if row.sample:
            row.request.output_token_ids.append(token)
            if len(row.request.output_token_ids) >= row.request.params.max_tokens:
                it.finish(row.request)


def run(it: Scheduler, *requests: Request) -> dict[str, int]:
    """To their ends; where each was first computed from."""
    for one in requests:
        it.add(one)
    starts: dict[str, int] = {}
    while it.num_running or it.num_waiting:
        plan = it.schedule()
        for row in plan.rows:
            starts.setdefault(row.request.request_id, row.start)
        complete(it, plan)
        it.check_integrity()
    return starts


def start_of(it: Scheduler, one: Request) -> int:
    return run(it, one)[one.request_id]


# --- keys ----------------------------------------------------------------------------------------------------------


def composed(*uses: tuple[Any, float], **more: Any) -> Request:
    return request("r", range(12), adapters=tuple(AdapterUse(*use) for use in uses), **more)


DIFFERENT = {
    "the base": composed(),
    "an adapter": composed((A, 1.0)),
    "another adapter": composed((B, 1.0)),
    "another version of its name": composed((adapter("a", "1" * 64), 1.0)),
    "another scale": composed((A, 0.5)),
    "scale 0, which is not the base's": composed((A, 0.0)),
    "two adapters": composed((A, 1.0), (B, 1.0)),
    "two adapters, scales swapped": composed((A, 0.5), (B, 1.0)),
    "and swapped": composed((A, 1.0), (B, 0.5)),
    "merged": composed((A, 1.0), merged=FakeMerge("first")),
    "merged again": composed((A, 1.0), merged=FakeMerge("second")),
    "a tenant": composed(tenant=Tenant("acme")),
    "another tenant": composed(tenant=Tenant("umbrella")),
    "a salt": composed(cache_salt="acme"),
    "another salt": composed(cache_salt="salt"),
    "a salt that says None": composed(cache_salt="None"),
    "both": composed(tenant=Tenant("acme"), cache_salt="salt"),
}


def test_what_changes_keys_and_values_changes_every_key() -> None:
    keys = [key for one in DIFFERENT.values() for key in PageKeys(one, PAGE).first(3)]
    assert len(set(keys)) == 3 * len(DIFFERENT)


@pytest.mark.parametrize("name", DIFFERENT)
def test_nobody_else_starts_behind_its_pages(name: str) -> None:
    it = scheduler()
    assert start_of(it, DIFFERENT[name]) == 0
    others = [one for other, one in DIFFERENT.items() if other != name]
    for one in others:
        fresh = request(one.request_id, one.prompt_token_ids, adapters=one.adapters, merged=one.merged,
                        tenant=one.tenant, cache_salt=one.cache_salt)  # fmt: skip
        assert start_of(it, fresh) == 0
    one = DIFFERENT[name]
    again = request("again", range(12), adapters=one.adapters, merged=one.merged, tenant=one.tenant,
                    cache_salt=one.cache_salt)  # fmt: skip
    assert start_of(it, again) == 8
    for used in DIFFERENT.values():
        used.output_token_ids.clear()
        used.num_computed = 0


def test_one_composition_by_other_names_in_another_order_is_the_same() -> None:
    alias = adapter("alias-of-a", A.version)
    one = composed((A, 0.5), (B, 0.25))
    for other in (
        composed((B, 0.25), (A, 0.5)),
        composed((B, 0.25), (alias, 0.5)),
        composed((A, 0.25), (B, 0.25), (alias, 0.25)),
    ):
        assert PageKeys(other, PAGE).first(3) == PageKeys(one, PAGE).first(3)


def test_a_key_is_of_all_tokens_up_to_the_pages_end() -> None:
    keys = PageKeys(request("r", range(12)), PAGE).first(3)
    for changed in range(12):
        tokens = list(range(12))
        tokens[changed] = 99
        others = PageKeys(request("r", tokens), PAGE).first(3)
        assert [a == b for a, b in zip(keys, others, strict=True)] == [i < changed // PAGE for i in range(3)]
    outgrown = request("r", range(6))
    outgrown.output_token_ids = list(range(6, 12))
    assert PageKeys(outgrown, PAGE).first(3) == keys
    with pytest.raises(ValueError, match="page 2 has 3 known tokens of 4"):
        PageKeys(request("r", range(11)), PAGE).first(3)


# --- what is found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "start"), [(8, 4), (9, 8), (11, 8), (12, 8), (13, 12), (16, 12), (17, 16), (40, 16)]
)
def test_full_pages_are_found_and_one_token_at_least_is_computed(length: int, start: int) -> None:
    it = scheduler()
    run(it, request("first", range(19), max_tokens=1))
    assert start_of(it, request("second", range(length), max_tokens=1)) == start


def test_a_next_turn_finds_the_output_too_but_not_its_last_token() -> None:
    """What was sampled last was never computed."""
    it = scheduler()
    run(it, request("first", range(5), max_tokens=8))
    assert start_of(it, request("next", [*range(5), *[9] * 7, 1, 2], max_tokens=1)) == 12
    it = scheduler()
    run(it, request("first", range(5), max_tokens=7))
    assert start_of(it, request("next", [*range(5), *[9] * 7, 1, 2], max_tokens=1)) == 8


def test_pages_are_shared_with_a_running_request_as_soon_as_they_are_computed() -> None:
    it = scheduler(max_batch_tokens=32)
    first, second = request("first", range(20), max_tokens=50), request("second", [*range(10), 50], max_tokens=50)
    it.add(first)
    complete(it, it.schedule())
    it.add(second)
    plan = it.schedule()
    assert [(row.request.request_id, row.start, row.count) for row in plan.rows] == [("first", 20, 1), ("second", 8, 3)]
    assert second.pages[:2] == first.pages[:2]
    assert it.pool.num_used == 6 + 1
    complete(it, plan)
    it.finish(first)
    it.check_integrity()
    assert it.pool.num_used == 3
    it.finish(second)
    assert it.pool.num_used == 0


def test_what_is_being_computed_is_not_there_yet() -> None:
    it = scheduler(max_batch_tokens=40)
    it.add(request("first", range(16), max_tokens=9))
    it.add(request("second", range(16), max_tokens=9))
    plan = it.schedule()
    assert [row.start for row in plan.rows] == [0, 0]
    complete(it, plan)
    it.check_integrity()
    first, second = it.running()
    assert not set(first.pages) & set(second.pages)
    assert len(it.pool.cache) == 4, "of two pages with the same key the first one is kept"
    for _ in range(7):
        complete(it, it.schedule())
        it.check_integrity()
    it.finish(second)
    it.check_integrity()
    it.finish(first)
    assert start_of(it, request("third", [*range(16), *[9] * 4, 0], max_tokens=1)) == 20


def test_a_preempted_request_comes_back_to_what_is_still_there() -> None:
    it = scheduler(num_pages=6, max_rows=2, max_batch_tokens=32)
    important, other = request("important", range(8), max_tokens=12), request("other", range(20, 24), max_tokens=8)
    it.add(important)
    it.add(other)
    starts: dict[str, list[int]] = {}
    while it.num_running or it.num_waiting:
        plan = it.schedule()
        for row in plan.rows:
            if row.count > 1 or not row.start:
                starts.setdefault(row.request.request_id, []).append(row.start)
        complete(it, plan)
        it.check_integrity()
    assert other.num_preemptions == 1
    assert starts == {"important": [0], "other": [0, 4]}
    assert other.num_cached == 0, "it was not there when the request first came"


def test_a_scored_prompt_is_computed_in_full_and_then_cached() -> None:
    it = scheduler()
    run(it, request("first", range(12), max_tokens=1))
    assert start_of(it, request("scored", range(20), max_tokens=1, prompt_logprobs=0)) == 0
    assert start_of(it, request("other", range(30, 50), max_tokens=1, prompt_logprobs=0)) == 0
    assert start_of(it, request("third", range(30, 55), max_tokens=1)) == 20
    assert it.kv.num_queries == 12 + 25, "nothing is looked up for those that are scored"


def test_off_means_off() -> None:
    it = scheduler(prefix_cache=False)
    assert run(it, request("first", range(12)), request("second", range(12))) == {"first": 0, "second": 0}
    assert start_of(it, request("third", range(12))) == 0
    assert (len(it.pool.cache), it.kv.num_queries) == (0, 0)


# --- memory --------------------------------------------------------------------------------------------------------


def filled(count: int, keys: Sequence[bytes]) -> tuple[BlockPool, list[int]]:
    """A pool of ``count`` pages and a chain that was computed and let go of."""
    pool = BlockPool(count, PAGE)
    pages = pool.allocate(len(keys))
    assert pages is not None
    for i, key in enumerate(keys):
        assert pool.cache.enter(pages[i], key, pages[i - 1] if i else None, ("v",))
    pool.free(pages)
    return pool, pages


KEYS = PageKeys(request("r", range(16)), PAGE).first(4)


def test_pages_that_hold_nothing_go_first_and_then_the_ends_of_chains() -> None:
    pool, chain = filled(6, KEYS)
    assert (pool.num_free, pool.num_used, len(pool.cache)) == (6, 0, 4)
    taken = pool.allocate(3)
    assert taken is not None
    assert taken[2] == chain[3]
    assert not set(taken[:2]) & set(chain)
    assert pool.cache.find(KEYS, 4) == 3
    assert pool.take(KEYS[:2]) == chain[:2]
    assert pool.allocate(2) is None, "two of the three pages that are left are in use"
    assert pool.allocate(1) == [chain[2]]
    assert pool.allocate(1) is None
    pool.check_integrity([taken, chain[:2], [chain[2]]])


def test_the_least_recently_used_chain_goes_first() -> None:
    it = scheduler(num_pages=10, max_context=40, max_batch_tokens=64)
    for first in (0, 100, 200):
        run(it, request(f"r{first}", range(first, first + 15), max_tokens=1))
    run(it, request("again", range(13), max_tokens=1))
    run(it, request("new", range(300, 311), max_tokens=1))
    starts = {
        first: start_of(it, request(f"then {first}", range(first, first + 9), max_tokens=1)) for first in (0, 200)
    }
    assert starts == {0: 8, 200: 8}
    assert start_of(it, request("then 100", range(100, 109), max_tokens=1)) < 8


def test_a_full_cache_keeps_nobody_waiting() -> None:
    it = scheduler(num_pages=10, max_context=40, max_batch_tokens=40)
    run(it, request("fills", range(39), max_tokens=1))
    assert len(it.pool.cache) == 9
    it.add(request("as large", range(100, 139), max_tokens=1))
    assert [(row.start, row.count) for row in it.schedule().rows] == [(0, 39)]
    assert it.pool.num_evicted == 9


def test_a_flood_never_takes_what_another_tenant_uses() -> None:
    it = scheduler(num_pages=24, max_rows=4, max_batch_tokens=64)
    quiet = request("quiet", range(16), max_tokens=60, tenant=Tenant("quiet"))
    it.add(quiet)
    complete(it, it.schedule())
    before = quiet.pages.copy()
    for i in range(40):
        it.add(request(f"f{i}", range(100 * i, 100 * i + 12), max_tokens=1, tenant=Tenant("flood")))
    for _ in range(30):
        complete(it, it.schedule())
        it.check_integrity()
    assert it.pool.num_evicted > 40
    assert quiet.pages[: len(before)] == before
    assert quiet.num_preemptions == 0


def test_pages_of_a_version_that_is_gone_hold_nothing_any_more() -> None:
    it = scheduler()
    both = tuple(AdapterUse(ref) for ref in (A, B))
    run(it, request("a", range(12), adapter=A), request("b", range(12), adapter=B), request("base", range(12)))
    run(it, request("both", range(12), adapters=both))
    run(it, request("merged", range(12), adapter=A, merged=FakeMerge("m")))
    used = request("used", range(12), adapter=A, max_tokens=50)
    it.add(used)
    complete(it, it.schedule())
    pages = len(it.pool.cache)
    it.forget_version(A.version)
    it.check_integrity()
    # Of each, the 6 full pages of 12 + 15 tokens; of a's, the 2 that are in use stay.
    assert len(it.pool.cache) == pages - 6 - 6 - (6 - 2)
    it.finish(used)
    it.forget_version(A.version)
    assert len(it.pool.cache) == 2 * 6
    assert it.pool.num_used == 0
    assert start_of(it, request("again", range(12), adapter=A)) == 0
    assert start_of(it, request("b again", range(12), adapter=B)) == 8


def _lost(pool: BlockPool, chain: list[int]) -> None:
    pool._idle.popitem()


def _used_without_its_parent(pool: BlockPool, chain: list[int]) -> None:
    pool._users[chain[2]] = 1
    del pool._idle[chain[2]]


def _parent_first(pool: BlockPool, chain: list[int]) -> None:
    pool._idle.move_to_end(chain[0], last=False)


def _without_parent(pool: BlockPool, chain: list[int]) -> None:
    del pool._idle[chain[0]]
    pool.cache.remove(chain[0])
    pool._free.append(chain[0])


def _idle_without_key(pool: BlockPool, chain: list[int]) -> None:
    pool.cache.remove(chain[3])


def _free_with_key(pool: BlockPool, chain: list[int]) -> None:
    del pool._idle[chain[3]]
    pool._free.append(chain[3])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_lost, "2 free . 3 cached . 0 used != 6"),
        (_used_without_its_parent, r"page 2 has 1 users, but what comes before it, page 1, is used by 0"),
        (_parent_first, "page 0 would be evicted before page 1"),
        (_without_parent, "page 1 has 0 users, but what comes before it, page 0, is not cached"),
        (_idle_without_key, "some have a key or lack one"),
        (_free_with_key, "some have a key or lack one"),
    ],
)
def test_integrity_check(fault: Callable[[BlockPool, list[int]], None], message: str) -> None:
    pool, chain = filled(6, KEYS)
    pool.check_integrity([])
    fault(pool, chain)
    with pytest.raises(RuntimeError, match=message):
        pool.check_integrity()


def test_references_are_recounted() -> None:
    pool, chain = filled(6, KEYS)
    for _ in range(2):
        pool.take(KEYS[:2])
    pool.check_integrity([chain[:2], chain[:2]])
    with pytest.raises(RuntimeError, match=r"page 0 has 2 users, and 1 requests hold it"):
        pool.check_integrity([chain[:2]])
    with pytest.raises(RuntimeError, match="cannot be cached behind"):
        pool.cache.enter(5, b"key", 4, ())


# --- tenants -------------------------------------------------------------------------------------------------------


def test_cached_tokens_cost_nothing_on_the_clock() -> None:
    it = scheduler(max_batch_tokens=256)
    run(it, request("fills", range(100), max_tokens=1))
    (account,) = it._accounts
    assert account.clock == 100
    run(it, request("hits", range(100), max_tokens=3))
    assert account.clock == 100 + 4 + 2


def test_what_is_mostly_cached_is_light() -> None:
    one, other = Tenant("one"), Tenant("other")
    for cached in (True, False):
        it = scheduler(max_batch_tokens=32, num_pages=200, prefix_cache=cached)
        run(it, request("fills", range(100), max_tokens=1, tenant=one))
        it.add(request("busy", range(500, 520), max_tokens=50, tenant=one))
        complete(it, it.schedule())
        for i in range(30):
            it.add(request(f"f{i}", range(1000 + 100 * i, 1100 + 100 * i), max_tokens=50, tenant=other))
        it.add(request("ahead", range(600, 620), max_tokens=50, tenant=one))
        it.add(request("hits", range(104), max_tokens=1, tenant=one))
        assert it._entries["hits"].is_light == cached
        assert it._entries["hits"].account.waiting_tokens == 20 + (4 if cached else 104)
