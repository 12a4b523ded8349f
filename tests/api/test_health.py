"""/health, /ready and /metrics."""

from __future__ import annotations

from starlette.testclient import TestClient

from tests.api.fakes import FakeEngine


def statuses(client: TestClient) -> tuple[int, int]:
    return client.get("/health").status_code, client.get("/ready").status_code


def test_alive_and_ready(client: TestClient, engine: FakeEngine) -> None:
    assert statuses(client) == (200, 200)
    engine.is_draining = True
    assert statuses(client) == (200, 503)
    assert client.get("/ready").headers["retry-after"]
    engine.is_healthy = False
    assert statuses(client) == (200, 503)  # drained, as it was told to
    engine.is_draining = False
    assert statuses(client) == (503, 503)


def test_metrics(client: TestClient) -> None:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert "up 1.0" in response.text
