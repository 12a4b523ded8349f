"""The scheduler against a slow, obviously right one, on random workloads, and what must hold whatever it decides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from manylora.adapters.versions import AdapterRef
from manylora.server.engine.request import AdapterUse, Request, StepPlan
from manylora.server.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from manylora.server.engine.tenant import EVERYBODY, Tenant
from tests.engine.reference_scheduler import ReferenceScheduler, Row
from tests.fakes import FakeMerge, FakeSlots, adapter, request

DRAWN = 1
"""The token that every row samples; prompts are mostly of it, so that outputs are found again as prompts."""


@dataclass
class Workload:
    config: SchedulerConfig
    max_slots: int
    latency: int
    arrivals: dict[int, list[Request]]
    """By step."""
    aborts: dict[int, list[str]]
    retired: dict[int, str]
    """By step: adapter versions that are gone, should nobody use them then."""

    @property
    def requests(self) -> list[Request]:
        return [request for requests in self.arrivals.values() for request in requests]


class Guesser:
    """Drafts as many tokens as chance will have it, for a request that speculates."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.judged: list[tuple[int, int]] = []

    def number(self, n_output: int) -> int:
        return max(random.Random(f"{self.name} {n_output}").randint(-2, 7), 0)

    def propose(self, prompt: Sequence[int], output: Sequence[int], limit: int) -> list[int]:
        assert limit > 0
        return [9] * min(self.number(len(output)), limit)

    def judge(self, drafted: int, accepted: int) -> None:
        self.judged.append((drafted, accepted))


def speculating(workload: Workload, seed: int) -> Workload:
    """Some of its requests speculate, in most of the workloads."""
    rng = random.Random(f"drafts {seed}")
    config = workload.config
    workload.config = replace(config, drafts_up_to=rng.choice([0, 2, config.max_rows + 3, 100]))
    for one in workload.requests:
        if rng.random() < 0.7:
            one.drafter = Guesser(one.request_id)
    return workload


def random_workload(seed: int, *, tenants: bool = False, cached: bool = False) -> Workload:
    """Small limits, so that every one of them is hit: rows, budget, pages, slots. With ``tenants``, several, whose
    shares are powers of two: sums and quotients by them are exact. With ``cached``, there is a prefix cache, and
    prompts begin alike."""
    rng = random.Random(seed)
    page_size = rng.randint(1, 4)
    max_rows = rng.randint(1, 5)
    largest = rng.randint(4, 24)
    max_batch_tokens = max_rows + rng.choice([0, 2, 30])
    config = SchedulerConfig(
        max_rows=max_rows,
        max_batch_tokens=max_batch_tokens,
        num_pages=-(-largest // page_size) + rng.choice([0, 1, 4, 30]),
        page_size=page_size,
        max_context=largest,
        max_overtake=rng.choice([0, 1, 4]),
        prefix_cache=cached,
    )
    who = [EVERYBODY]
    scored = [None]
    if cached:
        scored = [None, None, None, None, 0]
    if tenants and rng.random() < 0.15:  # prompts so long that it matters whether they are scored
        scored, largest = [None, 0], 150
        max_batch_tokens = max_rows + 150
        config = replace(config, max_batch_tokens=max_batch_tokens, num_pages=300, max_context=largest)
    if tenants:
        config = replace(
            config,
            guarded_tokens=rng.choice([1, max_rows, max_batch_tokens]),
            reserved_rows=rng.choice([0, 0, max_rows - 1]),
            lately_s=rng.choice([0.0, 5.0, 1e9]),
        )
        who = [Tenant(f"t{i}", rng.choice([0.5, 1.0, 1.0, 4.0])) for i in range(rng.randint(2, 5))]
    busy = [rng.random() ** 3 for _ in who]
    first_floods = tenants and rng.random() < 0.6
    if first_floods:
        busy = [1.0, *(0.2 for _ in who[1:])]
    n_adapters = rng.choice([0, 1, 3, 6])
    adapters = [adapter(f"a{i}") for i in range(n_adapters)]
    adapters += [adapter(f"alias-of-{ref.name}", ref.version) for ref in adapters[:2]]
    compositions: list[list[AdapterRef]] = [[], *([ref] for ref in adapters)]
    if adapters:
        compositions += [rng.choices(adapters, k=rng.randint(2, 4)) for _ in range(rng.choice([0, 2, 6]))]
    weights = [rng.random() for _ in compositions]
    arrivals: dict[int, list[Request]] = {}
    aborts: dict[int, list[str]] = {}
    retired: dict[int, str] = {}
    stems = [[rng.randrange(2) for _ in range(largest)] for _ in range(2)] if cached else []
    merges = [FakeMerge("first"), FakeMerge("second")]
    for i in range(rng.randint(1, 30)):
        n_prompt = rng.randint(1, largest - 1)
        made = request(
            f"r{i}",
            range(n_prompt),
            max_tokens=rng.randint(1, largest - n_prompt),
            adapters=tuple(AdapterUse(ref, rng.choice([1.0, 0.5])) for ref in rng.choices(compositions, weights)[0]),
            merged=object() if rng.random() < 0.1 else None,
            priority=rng.choice([0, 0, 0, 1, -1]),
            prompt_logprobs=scored[i % len(scored)],
        )
        if cached:
            stem = rng.choice(stems)[: rng.randint(0, largest)]
            made.prompt_token_ids = (stem + [DRAWN if rng.random() < 0.8 else 3 for _ in range(n_prompt)])[:n_prompt]
            made.cache_salt = rng.choice([None, None, None, "salt"])
            made.merged = rng.choice(merges) if made.merged is not None else None
            if rng.random() < 0.2 and adapters:
                retired[rng.randint(0, 40)] = rng.choice(adapters).version
        if tenants:
            made.tenant = rng.choices(who, busy)[0]
        step = rng.choice([0, rng.randint(0, 40)])
        if first_floods:
            step = 0 if made.tenant is who[0] else rng.randint(3, 40)
        arrivals.setdefault(step, []).append(made)
        if rng.random() < 0.1:
            aborts.setdefault(step + rng.randint(0, 20), []).append(made.request_id)
    return Workload(config, rng.randint(1, 3), rng.choice([0, 0, 3]), arrivals, aborts, retired)


class Run:
    """Drives both schedulers through a workload, step by step, and checks the invariants at each."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.slots = FakeSlots(workload.max_slots, latency=workload.latency)
        self.now = 0
        self.scheduler = Scheduler(workload.config, self.slots, clock=lambda: self.now)
        self.reference = ReferenceScheduler(
            workload.config, FakeSlots(workload.max_slots, latency=workload.latency), lambda: self.now, self.guesses
        )
        self.live: dict[str, Request] = {}
        self.ended: list[str] = []
        self.refused: list[str] = []

    def guesses(self, request_id: str) -> int:
        """So many that none of them is beyond the last token."""
        one = self.live[request_id]
        if not isinstance(one.drafter, Guesser):
            return 0
        n_output = len(one.output_token_ids)
        return min(one.drafter.number(n_output), one.params.max_tokens - n_output - 1)

    def to_the_end(self) -> None:
        # Alone, one after the other, they would take this many steps; each may also wait for a few uploads.
        limit = 100 + sum(r.num_tokens + r.params.max_tokens + 10 for r in self.workload.requests) * 3
        last_arrival = max(self.workload.arrivals)
        for step in range(limit):
            self.now = step
            self.arrive(step)
            self.one_step()
            if step >= last_arrival and not self.live:
                return
        raise AssertionError(f"still alive after {limit} steps: {sorted(self.live)}")

    def arrive(self, step: int) -> None:
        for new in self.workload.arrivals.get(step, []):
            if self.scheduler.never_fits(new) is not None:
                self.refused.append(new.request_id)
                continue
            self.live[new.request_id] = new
            self.scheduler.add(new)
            refs = [use.ref for use in new.adapters]
            flow = {ref.version for ref in refs}
            needed = refs if new.merged is None else []
            self.reference.add(
                new.request_id,
                needed,
                flow,
                new.priority,
                new.prompt_token_ids,
                new.tenant,
                scored=new.params.prompt_logprobs is not None,
                root=root_of(new),
            )
        for request_id in self.workload.aborts.get(step, []):
            if request_id in self.live:
                self.end(request_id)
        if step in self.workload.retired:
            self.scheduler.forget_version(self.workload.retired[step])
            self.reference.kv.forget(self.workload.retired[step])

    def end(self, request_id: str) -> None:
        self.scheduler.finish(self.live.pop(request_id))
        self.reference.finish(request_id)
        self.ended.append(request_id)

    def one_step(self) -> None:
        plan = self.scheduler.schedule()
        rows: list[Row] = [(row.request.request_id, row.start, row.count, row.request.slots) for row in plan.rows]
        assert sorted(rows) == sorted(self.reference.schedule())
        self.check(plan)
        sampling = [row for row in plan.rows if row.sample]
        drawn: dict[str, int] = {}
        for row in plan.rows:
            rng = random.Random(f"{row.request.request_id} {row.start}")
            if row.drafts:
                drawn[row.request.request_id] = rng.randint(0, len(row.drafts))
        ended: list[str] = []
        for row in sampling:
            one = row.request
            accepted = drawn.get(one.request_id, 0)
            ends = accepted > 0 and random.Random(f"end {one.request_id} {row.start}").random() < 0.05
            one.output_token_ids += [DRAWN] * (accepted + (not ends))  # a stop may be in the last accepted draft
            if ends or len(one.output_token_ids) == one.params.max_tokens:
                ended.append(one.request_id)
        self.scheduler.commit(plan, drawn)
        self.reference.commit(rows, drawn, DRAWN)
        for row in plan.rows:
            if row.drafts:
                assert isinstance(row.request.drafter, Guesser)
                assert row.request.drafter.judged.pop() == (len(row.drafts), drawn[row.request.request_id])
        for one in self.scheduler.running():
            assert len(one.pages) <= self.scheduler.pool.pages_for(max(one.num_computed, 1)), "a page of drafts is kept"
        for request_id in ended:
            self.end(request_id)

    def check(self, plan: StepPlan) -> None:
        config = self.workload.config
        self.scheduler.check_integrity()
        assert plan.num_tokens <= config.max_batch_tokens
        assert self.scheduler.num_running <= config.max_rows
        assert len({row.request for row in plan.rows}) == len(plan.rows)
        order = [(row.request.merged is not None, row.request.slots) for row in plan.rows]
        assert order == sorted(order)
        pool, expected = self.scheduler.pool, self.reference.kv
        assert (pool.num_free, len(pool.cache)) == (expected.free(), len(expected.cached))
        pages = [page for running in self.scheduler.running() for page in running.pages]
        if not config.prefix_cache:
            assert len(set(pages)) == len(pages), "a page belongs to two requests"
        version_in: dict[int, str] = {}
        for row in plan.rows:
            one = row.request
            assert row.count >= 1
            assert row.start == one.num_computed
            assert row.start + row.count - len(row.drafts) <= one.num_tokens
            assert row.start + row.count <= len(one.pages) * config.page_size
            for page in one.pages[row.start // config.page_size :]:
                assert pool.users(page) == 1, "a page is written to that others read"
                assert page not in pool.cache, "a page is written to that others may come to read"
            if row.drafts:
                assert row.sample
                assert plan.num_tokens <= config.drafts_up_to
                assert len(one.output_token_ids) + len(row.drafts) < one.params.max_tokens
            needed = needed_by(one)
            for slot, version in zip(one.slots, needed, strict=True):
                assert version_in.setdefault(slot, version) == version, "two adapters on one slot"
        # All of a request's slots while it runs, none while it waits.
        held = Counter(version for one in self.scheduler.running() for version in needed_by(one))
        assert +self.slots.references == held


def root_of(one: Request) -> object:
    """What computes its keys and values, and who may know of them, whatever order it is asked for in."""
    scales: Counter[str] = Counter()
    for use in one.adapters:
        scales[use.ref.version] += use.scale  # type: ignore[assignment]  # exact: halves
    return one.tenant.name, one.cache_salt, id(one.merged), frozenset(scales.items())


def needed_by(one: Request) -> list[str]:
    return [use.ref.version for use in one.adapters] if one.merged is None else []


def run_to_the_end(workload: Workload) -> Run:
    run = Run(workload)
    run.to_the_end()
    assert sorted(run.ended + run.refused) == sorted(r.request_id for r in workload.requests)
    assert run.scheduler.pool.num_used == 0
    assert run.slots.references.total() == 0
    assert not any(account.last_tags for account in run.scheduler._accounts), "flows are remembered for ever"
    return run


@pytest.mark.parametrize("block", range(8))
def test_random_workloads(block: int) -> None:
    for seed in range(block * 50, block * 50 + 50):
        run_to_the_end(random_workload(seed))


def test_random_workloads_with_drafts() -> None:
    seen: Counter[str] = Counter()
    for seed in range(200):
        seen += run_to_the_end(speculating(random_workload(seed), seed)).reference.seen
    assert seen["drafts"] >= 500, seen
    assert seen["fewer drafts for want of pages"] >= 10, seen


def test_drafts_of_several_tenants() -> None:
    seen: Counter[str] = Counter()
    for seed in range(100):
        seen += run_to_the_end(speculating(random_workload(seed, tenants=True), seed)).reference.seen
    assert seen["drafts in a guarded step"] >= 100, seen
    assert seen["express"] >= 50, seen


def test_random_workloads_of_several_tenants() -> None:
    """Every rule is applied in them, or the comparison would not be worth much."""
    seen: Counter[str] = Counter()
    for seed in range(160):
        run = run_to_the_end(random_workload(seed, tenants=True))
        seen += run.reference.seen
        run.now += 10**10
        run.scheduler.add(request("last", [1], max_tokens=1, tenant=Tenant("another")))
        run.scheduler.schedule()
        assert len(list(run.scheduler._accounts)) == 1, "tenants are remembered for ever"
    assert (
        min(
            seen[rule]
            for rule in (
                "express",
                "guarded",
                "put forward",
                "held for a claim",
                "left to who starts",
                "a token for the claim",
                "decoding rows take turns",
            )
        )
        >= 100
    ), seen
    assert min(seen[rule] for rule in ("memory of several", "preempted for a light one", "scored slowly")) >= 5, seen


@pytest.mark.parametrize("tenants", [False, True])
def test_random_workloads_that_begin_alike(tenants: bool) -> None:
    """With a prefix cache. Who may share what, and which page makes room, shows in where requests start."""
    seen: Counter[str] = Counter()
    for seed in range(250):
        run = run_to_the_end(random_workload(seed, tenants=tenants, cached=True))
        kv, expected = run.scheduler.kv, run.reference.kv
        assert (kv.num_queries, kv.num_hits) == (expected.n_queries, expected.n_hits)
        assert run.scheduler.pool.num_evicted == expected.n_evicted
        seen += run.reference.seen + expected.seen
        seen["evicted"] += expected.n_evicted
    rules = ["started behind a prefix", "found when queued", "came back to a prefix", "shared with running ones"]
    rules += ["computed twice", "forgotten", "evicted"]
    rules += ["express", "guarded", "put forward"] if tenants else []
    assert min(seen[rule] for rule in rules) >= 20, seen
    assert not tenants or seen["preempted for a light one"] >= 5, seen


@pytest.mark.parametrize("tenants", [False, True])
def test_drafts_beside_a_prefix_cache(tenants: bool) -> None:
    """Accepted drafts are cached, wrong ones never, and no cached page makes room for a guess."""
    seen: Counter[str] = Counter()
    for seed in range(100):
        run = run_to_the_end(speculating(random_workload(seed, tenants=tenants, cached=True), seed))
        assert run.scheduler.pool.num_evicted == run.reference.kv.n_evicted
        seen += run.reference.seen
    assert min(seen["drafts"], seen["started behind a prefix"]) >= 50, seen
    assert seen["fewer drafts for want of pages"] >= 10, seen


def test_the_workloads_hit_every_limit() -> None:
    """The comparison is worth something only if its workloads preempt, evict, wait for slots and chunk prompts."""
    preemptions = evictions = misses = chunks = 0
    for seed in range(100):
        run = Run(random_workload(seed))
        run.to_the_end()
        preemptions += run.scheduler.counts.preemptions
        misses += run.scheduler.counts.slot_misses
        evictions += run.slots.evictions
        chunks += any(len(r.prompt_token_ids) > run.workload.config.max_batch_tokens for r in run.workload.requests)
    assert min(preemptions, evictions, misses, chunks) >= 20
