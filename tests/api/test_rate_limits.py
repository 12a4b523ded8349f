"""Token buckets against a clock that is moved by hand, and a budget of tokens over HTTP."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.server.api.access.auth import _tokens
from manylora.server.api.access.rate_limits import Bucket, RateLimited, RateLimits
from manylora.server.api.context import RequestContext
from manylora.server.config import ApiConfig
from manylora.server.engine.errors import QueueFull
from manylora.server.engine.request import FinishEvent, Request
from manylora.server.engine.tenant import Tenant
from manylora.server.tenants_file import TenantRules
from tests.api.fakes import FakeEngine, Step, finish, token
from tests.api.test_tenants import ask, of, with_keys


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def rules(rate: float | None, burst: int = 0, tokens: int | None = None) -> TenantRules:
    return TenantRules(Tenant("t"), requests_per_second=rate, burst=burst, tokens_per_minute=tokens)


def takes(limits: RateLimits, n: int = 1) -> int:
    """0, or the seconds to wait."""
    try:
        limits.take_requests(n)
    except RateLimited as error:
        return error.retry_after
    return 0


def test_a_burst_then_the_rate(clock: Clock) -> None:
    limits = RateLimits(rules(2.0, 3), clock)
    assert [takes(limits) for _ in range(4)] == [0, 0, 0, 1]
    clock.now += 0.5
    assert [takes(limits) for _ in range(2)] == [0, 1]
    clock.now += 3600  # no more than a burst is saved up
    assert [takes(limits) for _ in range(4)] == [0, 0, 0, 1]


def test_all_or_nothing_and_when_to_come_again(clock: Clock) -> None:
    limits = RateLimits(rules(0.1, 4), clock)
    assert takes(limits, 3) == 0
    assert takes(limits, 4) == 30  # three are missing, at one in ten seconds
    assert takes(limits, 1) == 0  # the refusal has cost nothing
    assert limits.max_choices == 4
    clock.now += 30
    assert takes(limits, 4) == 10
    clock.now += 10
    assert takes(limits, 4) == 0


def test_retry_after_is_when_it_works(clock: Clock) -> None:
    draw = random.Random(7)
    for _ in range(300):
        limits = RateLimits(rules(draw.uniform(0.001, 50), draw.randint(1, 20)), clock)
        assert limits.max_choices is not None
        for _ in range(10):
            n = draw.randint(1, limits.max_choices)
            wait = takes(limits, n)
            if wait:
                clock.now += wait + 1e-6
                assert takes(limits, n) == 0
            clock.now += draw.uniform(0, 2)


def test_never_more_than_the_rate_allows(clock: Clock) -> None:
    draw = random.Random(11)
    limits = RateLimits(rules(3.0, 5), clock)
    start, taken = clock.now, 0
    for _ in range(5000):
        taken += takes(limits) == 0
        clock.now += draw.expovariate(20)
        assert taken <= 5 + 3.0 * (clock.now - start) + 1
    assert taken >= 3.0 * (clock.now - start) - 1


def test_tokens_are_a_debt(clock: Clock) -> None:
    limits = RateLimits(rules(None, tokens=60), clock)
    assert takes(limits) == 0
    limits.spend_tokens(59)
    assert takes(limits) == 0
    limits.spend_tokens(31)  # 30 more than there were, at one a second
    assert takes(limits) == 30
    clock.now += 29
    assert takes(limits) == 1
    clock.now += 1
    assert takes(limits) == 0
    assert limits.max_choices is None


def test_no_limits(clock: Clock) -> None:
    limits = RateLimits(rules(None), clock)
    limits.spend_tokens(10**9)
    assert [takes(limits, 1000) for _ in range(100)] == [0] * 100


def test_changed_limits_forgive_nothing_and_make_no_debts(clock: Clock) -> None:
    limits = RateLimits(rules(1.0, 10, tokens=60), clock)
    takes(limits, 10)
    limits.change(rules(1.0, 12, tokens=60))
    assert [takes(limits) for _ in range(3)] == [0, 0, 1]
    limits.change(rules(1.0, 2, tokens=60))  # twelve of two are used, which was allowed when they were
    assert takes(limits) == 1
    limits.spend_tokens(100)  # forty more than there are
    limits.change(rules(None, tokens=30))
    assert takes(limits) == 80
    limits.change(rules(None, tokens=120))
    assert takes(limits) == 0
    limits.spend_tokens(120)
    assert takes(limits) > 0
    limits.change(rules(None))
    assert takes(limits) == 0


def test_a_clock_that_stands_still(clock: Clock) -> None:
    bucket = Bucket(5.0, 2.0, clock)
    assert bucket.level() == bucket.level() == 2.0
    bucket.take(1)
    assert bucket.seconds_until(2) == pytest.approx(0.2)


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(connect: Callable[..., TestClient], config: ApiConfig, tmp_path: Path) -> TestClient:
    path = tmp_path / "keys.toml"
    path.write_text(with_keys("[tenants.small]\ntokens_per_minute = 10\n[tenants.large]\ntokens_per_minute = 1000"))
    return connect(replace(config, keys_file=path))


def pays(client: TestClient) -> float:
    """What the tenant "large" has left."""
    ring: Any = client.app.state.manylora.keys  # type: ignore[attr-defined]
    return float(ring.find("large-key").limits._tokens.level())


def test_a_budget_of_tokens(client: TestClient) -> None:
    assert ask(client, "small").status_code == 200  # 2 of the prompt and 12 are more than there are
    refused = ask(client, "small")
    assert refused.status_code == 429
    assert "10 tokens a minute" in refused.json()["error"]["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 24
    assert ask(client, "large").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_and_outputs_of_every_choice(client: TestClient, stream: bool) -> None:
    before = pays(client)
    assert ask(client, "large", prompt=["abc", "d"], n=2, stream=stream).status_code == 200
    # With a first token each, prompts have 4 and 2; four outputs of 12.
    assert before - pays(client) == pytest.approx(2 * (4 + 2) + 4 * 12, abs=3)


def test_what_was_refused_costs_no_tokens(client: TestClient) -> None:
    before = pays(client)
    assert ask(client, "large", model="nobody").status_code == 403
    assert ask(client, "large", temperature=-1).status_code == 400
    assert client.post("/tokenize", json={"prompt": "x" * 100}, headers=of("large")).status_code == 200
    assert pays(client) == before


@pytest.mark.parametrize("stream", [False, True])
def test_what_failed_half_way_costs_what_it_computed(client: TestClient, engine: FakeEngine, stream: bool) -> None:
    def script(request: Request) -> list[Step]:
        n = len(engine.requests)
        if n == 1:
            return [[token("a")], [finish(request, "error", n=5, error="no")]]
        return [[token("b")], [token("c")], [token("d")], [token("e")]]

    engine.script = script
    before = pays(client)
    answer = ask(client, "large", n=3, stream=stream)
    assert answer.status_code == (200 if stream else 500)
    # What went wrong, and not what happened to the others because of it.
    assert answer.text.replace(" ", "").count('"code":500') == 1
    assert '"code": 503' not in answer.text
    # 2 of the prompt for each of the three; the fake's aborted requests have computed nothing.
    assert before - pays(client) == pytest.approx(3 * 2 + 5, abs=1)


def test_to_be_cut_off_is_no_way_not_to_pay() -> None:
    """What ended is paid for as it ended; as long as one end is not known, it is all that was asked for."""
    context = RequestContext("id", submitted=[30, 40])
    assert _tokens(context) == 70
    context.finished.append(FinishEvent("stop", None, 10, 5))
    assert _tokens(context) == 70
    context.finished.append(FinishEvent("abort", None, 10, 1))
    assert _tokens(context) == 26
    assert _tokens(RequestContext("id")) == 0


def test_what_the_engine_does_not_take_costs_no_tokens(client: TestClient, engine: FakeEngine) -> None:
    engine.refuse = lambda _request: QueueFull(1, 1, 3) if len(engine.requests) == 2 else None
    before = pays(client)
    assert ask(client, "large", n=3).status_code == 429
    assert pays(client) == before
