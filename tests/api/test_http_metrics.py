"""What came in and what was turned away, in /metrics; with the real engine metrics beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from manylora.server.api.access.callers import Caller
from manylora.server.api.app import create_app
from manylora.server.api.context import RequestContext
from manylora.server.api.observing.http_metrics import HttpMetrics
from manylora.server.api.observing.observation import Observed
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.engine.errors import QueueFull
from manylora.server.engine.metrics import Metrics
from manylora.server.engine.tenant import Tenant
from manylora.server.logs import FIELDS
from manylora.server.tenants_file import hashed
from tests.api.fakes import FakeEngine

BODY = {"model": "alice", "prompt": "Hi"}
Samples = dict[tuple[str, ...], float]


def samples(text: str, name: str, *labels: str) -> Samples:
    """By the values of ``labels``, which are all that the samples have."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                assert set(sample.labels) == set(labels)
                found[tuple(sample.labels[label] for label in labels)] = sample.value
    return found


def requests(client: TestClient) -> Samples:
    return samples(client.get("/metrics").text, "manylora_http_requests_total", "route", "method", "status")


def rejected(client: TestClient) -> Samples:
    return samples(client.get("/metrics").text, "manylora_rejected_total", "tenant", "reason")


def test_requests_by_route_method_and_status(client: TestClient) -> None:
    for _ in range(2):
        client.post("/v1/completions", json=BODY)
    client.post("/v1/completions", json={})
    client.get("/v1/models/alice")
    client.get("/v1/models/org/bob")
    assert requests(client) == {
        ("/v1/completions", "POST", "200"): 2,
        ("/v1/completions", "POST", "400"): 1,
        ("/v1/models/{model:path}", "GET", "200"): 2,
    }
    assert requests(client)["/metrics", "GET", "200"] == 1
    text = client.get("/metrics").text
    assert samples(text, "manylora_http_request_seconds_count", "route")[("/v1/completions",)] == 3
    assert text.startswith("# TYPE up gauge")  # the engine's come first


def test_what_clients_make_up_makes_no_series(client: TestClient) -> None:
    for i in range(5):
        client.get(f"/made/up/{i}")
        client.request(f"BREW{i}", "/v1/models")
        client.request("BREW", f"/made/up/{i}")
    assert requests(client) == {
        ("_other", "GET", "404"): 5,
        ("/v1/models", "_other", "405"): 5,
        ("_other", "_other", "404"): 5,
    }


def test_who_was_turned_away_and_why(connect: Callable[..., TestClient], config: ApiConfig, engine: FakeEngine) -> None:
    client = connect(replace(config, api_keys=("key",), admin_key="admin"))
    headers = {"authorization": "Bearer key"}
    client.post("/v1/completions", json=BODY)
    client.post("/v1/completions", json=BODY, headers={"authorization": "Bearer wrong"})
    client.get("/v1/adapters", headers=headers)
    engine.refuse = lambda _request: QueueFull(9, 8, 1)
    client.post("/v1/completions", json=BODY, headers=headers)
    client.post("/v1/completions", json=BODY | {"stream": True}, headers=headers)
    engine.is_draining = True
    client.post("/v1/completions", json=BODY, headers=headers)
    client.get("/ready")  # says so, and turns nobody away
    client.post("/v1/completions", json={}, headers=headers)  # is wrong, and was looked into
    by_reason: dict[str, float] = {}
    for (_tenant, reason), count in rejected(client).items():
        by_reason[reason] = by_reason.get(reason, 0) + count
    assert by_reason == {"auth": 2, "permission": 1, "queue": 2, "draining": 1}
    assert rejected(client)["_anybody", "auth"] == 2


def test_a_tenants_series_go_with_it() -> None:
    engine_metrics = Metrics("base", max_tenant_series=2)
    engine_metrics.retain_tenants(["a", "b"])
    metrics = HttpMetrics(engine_metrics.tenant_label)

    def turn_away(name: str) -> None:
        context = RequestContext("id", Caller(Tenant(name)))
        context.failed("RateLimitError", "rate")
        metrics.record(Observed({}, context, "POST", "/v1/completions", 429, context.arrived + 1))

    def shown() -> Samples:
        return samples(metrics.render().decode(), "manylora_rejected_total", "tenant", "reason")

    for name in ("a", "b", "stranger", "", "a"):
        turn_away(name)
    rate = {(name, "rate"): 1.0 for name in ("b", "_other", "_anybody")}
    assert shown() == rate | {("a", "rate"): 2}
    engine_metrics.retain_tenants(["b"])
    assert shown() == rate
    turn_away("a")  # its last request, which was under way
    assert shown() == rate | {("_other", "rate"): 2}


def test_beside_the_engines(serving: Serving, config: ApiConfig) -> None:
    """No name is in both, which Prometheus would refuse."""
    client = TestClient(create_app(replace(serving, metrics=Metrics("base")), config), base_url="http://127.0.0.1")
    client.post("/v1/completions", json=BODY)
    families = [family.name for family in text_string_to_metric_families(client.get("/metrics").text)]
    assert len(families) == len(set(families))
    assert {"vllm:prompt_tokens", "manylora_http_requests", "manylora_rejected"} <= set(families)


@pytest.mark.parametrize("stream", [False, True])
def test_counted_once(client: TestClient, stream: bool) -> None:
    client.post("/v1/completions", json=BODY | {"stream": stream, "n": 3})
    assert requests(client) == {("/v1/completions", "POST", "200"): 1}


def test_a_tenant_of_the_key_file_is_known_by_name_until_it_is_gone(
    serving: Serving, config: ApiConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "keys.toml"

    def write(*names: str) -> None:
        path.write_text(
            "".join(
                f"[tenants.{name}]\nrequests_per_second = 0.001\nburst = 1\n"
                f'[[tenants.{name}.keys]]\nsha256 = "{hashed(name + "-key").hex()}"\n'
                for name in names
            )
        )

    def ask(client: TestClient, name: str) -> int:
        headers = {"authorization": f"Bearer {name}-key"}
        return client.post("/v1/completions", json=BODY | {"model": "base"}, headers=headers).status_code

    write("acme", "zeta")
    app = create_app(replace(serving, metrics=Metrics("base")), replace(config, keys_file=path, admin_key="root"))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert [ask(client, name) for name in ("acme", "acme", "zeta", "zeta", "nobody")] == [200, 429, 200, 429, 401]
        rest = {("zeta", "rate"): 1.0, ("_anybody", "auth"): 1.0}
        assert rejected(client) == {("acme", "rate"): 1.0} | rest
        write("zeta")
        asyncio.run(app.state.manylora.keys.reload())
        assert rejected(client) == rest
    lines = [getattr(record, FIELDS) for record in caplog.records if record.name == "manylora.access"]
    assert [line["tenant"] for line in lines] == ["acme", "acme", "zeta", "zeta", None]
