"""The prefix cache in the engine: what is told of it, what is left by steps that fail and requests that are aborted,
and that no answer changes."""

from __future__ import annotations

import random

import pytest

from manylora.server.engine.request import AdapterUse, FinishEvent, StepPlan
from manylora.server.engine.tenant import Tenant
from tests.engine.harness import Gate, Setup, finish_of, go, output, running
from tests.fakes import FakeMerge, adapter, request

A, B = adapter("a"), adapter("b")


def test_usage_and_metrics_tell_what_was_cached() -> None:
    async def main() -> None:
        async with running(Setup(prefix_cache=True)) as setup:
            for i, cached in enumerate([0, 8, 8]):
                _, finish = await output(setup, request(f"r{i}", range(1, 12)))
                assert (finish.prompt_tokens, finish.cached_tokens) == (11, cached)
            stats = setup.engine.stats()
            assert (stats.prefix_queries, stats.prefix_hits) == (33, 16)
            assert stats.kv_pages_used == 0
            assert stats.prefix_pages == len(setup.scheduler.pool.cache) > 0

    go(main())


def test_a_step_that_failed_leaves_nothing() -> None:
    failing = [True]

    def before(_plan: StepPlan) -> None:
        if failing.pop() if failing else False:
            raise RuntimeError("the device is gone")

    async def main() -> None:
        async with running(Setup(prefix_cache=True, before_step=before)) as setup:
            finish = await finish_of(setup.submit(request("fails", range(1, 12))))
            assert finish.reason == "error"
            assert len(setup.scheduler.pool.cache) == 0
            _, finish = await output(setup, request("again", range(1, 12)))
            assert finish.cached_tokens == 0

    go(main())


def test_an_aborted_request_leaves_what_was_computed() -> None:
    async def main() -> None:
        gate = Gate()
        setup = Setup(prefix_cache=True, before_step=lambda plan: gate(plan) if plan.rows[0].start else None)
        async with running(setup):
            stream = setup.submit(request("aborted", range(1, 12), max_tokens=50))
            await gate.wait()
            stream.abort()
            gate.open()
            assert (await finish_of(stream)).reason == "abort"
            _, finish = await output(setup, request("next", range(1, 12)))
            assert finish.cached_tokens == 8

    go(main())


def test_a_freed_version_is_forgotten_by_the_engine() -> None:
    async def main() -> None:
        async with running(Setup(prefix_cache=True)) as setup:
            await output(setup, request("r", range(1, 12), adapter=A))
            assert setup.engine.stats().prefix_pages > 0
            setup.engine.version_freed(A)
            setup.engine.call(lambda: None).result(30)
            assert setup.engine.stats().prefix_pages == 0

    go(main())


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_has_the_answers_that_it_has_without(seed: int) -> None:
    """Conversations that go on, adapters, merges, failures and aborts. The fake model's next token depends on every
    token in the pages, and it refuses pages of other weights."""
    rng = random.Random(seed)
    merges = [FakeMerge("first"), FakeMerge("second")]
    stems = [[rng.randint(1, 90) for _ in range(40)] for _ in range(3)]
    made = []
    for i in range(80):
        prompt = rng.choice(stems)[: rng.randint(1, 40)] + [rng.randint(1, 90) for _ in range(rng.randint(0, 4))]
        uses = tuple(AdapterUse(ref, rng.choice([1.0, 0.5])) for ref in rng.choice([[], [A], [B], [A, B]]))
        merged = rng.choice(merges) if len(uses) == 1 and uses[0].scale == 1.0 and rng.random() < 0.5 else None
        made.append((f"r{i}", prompt, {"adapters": uses, "merged": merged, "max_tokens": rng.randint(1, 20),
                                       "tenant": Tenant(rng.choice("xy")), "ignore_eos": True}))  # fmt: skip
    failing = {rng.randint(5, 60) for _ in range(3)}
    steps = [0]

    def before(_plan: StepPlan) -> None:
        steps[0] += 1
        if steps[0] in failing:
            raise RuntimeError("a step fails")

    async def answers(cached: bool) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        setup = Setup(
            prefix_cache=cached, before_step=before, num_pages=40, max_context=80, max_rows=6, max_batch_tokens=24
        )
        async with running(setup):
            requests = [request(name, prompt, **more) for name, prompt, more in made]
            streams = [setup.submit(one) for one in requests]
            for i in range(0, 80, 9):
                streams[i].abort()
            finishes = [await finish_of(stream) for stream in streams]
            for one, finish in zip(requests, finishes, strict=True):
                if finish.reason == "length":
                    found[one.request_id] = one.output_token_ids
            # Each conversation goes on.
            turns = []
            for (name, prompt, more), one in zip(made, requests, strict=True):
                text = [*prompt, *one.output_token_ids, 91][:60]
                turns.append(request(f"{name} goes on", text, **{**more, "max_tokens": 3}))
            ends: list[FinishEvent] = [await finish_of(stream) for stream in [setup.submit(turn) for turn in turns]]
            found |= {t.request_id: [*t.prompt_token_ids, *t.output_token_ids] for t in turns}
            assert any(end.cached_tokens for end in ends) == cached
        return found

    runs: list[dict[str, list[int]]] = []

    async def both() -> None:
        for cached in (True, False):
            runs.append(await answers(cached))
            steps[0] = 0

    go(both())
    same = runs[0].keys() & runs[1].keys()
    assert len(same) > 80
    for name in same:
        if " goes on" not in name or runs[0][name][:-3] == runs[1][name][:-3]:
            assert runs[0][name] == runs[1][name]
