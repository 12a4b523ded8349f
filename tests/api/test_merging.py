"""Merging over HTTP: the two routes and their errors, what the adapters' JSON says, and which requests are bound."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.server.api.app import create_app
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.engine.errors import QueueFull
from manylora.server.engine.merges import Difference, Measured, MergedModel, MergeManager
from tests.api.fakes import BASE_DIGEST, FakeEngine, make_serving

MEASURED = Measured(drift=Difference(0.25, 0.005), effect=Difference(2.0, 0.5))


class Builder:
    def __init__(self) -> None:
        self.free = 1 << 40
        self.before_build: Callable[[], None] = lambda: None

    def size(self, weights: Any, mode: str) -> Any:
        return SimpleNamespace(kept=2_000_000, working=500_000)

    def free_bytes(self) -> int:
        return self.free

    def build(self, weights: Any, mode: str, name: str) -> tuple[Any, int]:
        self.before_build()
        return object(), 1_900_000

    def measure(self, decoder: Any, weights: Any) -> Measured:
        return MEASURED

    def stop(self) -> None: ...

    def warm_up(self, model: MergedModel) -> None: ...


@pytest.fixture
def builder() -> Builder:
    return Builder()


@pytest.fixture
def serving(tmp_path: Path, builder: Builder) -> Serving:
    made = make_serving(tmp_path)
    merges = MergeManager(made.registry, lambda ref: None, builder)
    made.registry.when_freed(merges.version_freed)
    return replace(made, merges=merges)


def version_of(client: TestClient, name: str) -> str:
    version: str = client.get(f"/v1/adapters/{name}").json()["version"]
    return version


def complete(client: TestClient, model: str, **fields: Any) -> Any:
    response = client.post("/v1/completions", json={"model": model, "prompt": "x", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_merge_and_unmerge(client: TestClient) -> None:
    answer = client.post("/v1/adapters/alice/merge", json={"mode": "compact"})
    assert answer.status_code == 200
    body = answer.json()
    assert 0 <= body.pop("seconds") < 60
    expected = {
        "name": "alice",
        "version": version_of(client, "alice"),
        "mode": "compact",
        "bytes": 1_900_000,
        "drift": {"max": 0.25, "mean": 0.005},
        "adapter_effect": {"max": 2.0, "mean": 0.5},
        "warnings": [],
        "automatic": False,
    }
    assert body == {"object": "adapter.merge", **expected}
    shown = {one["name"]: one for one in client.get("/v1/adapters").json()["data"]}
    assert shown["alice"]["merged"] == "compact"
    assert {k: v for k, v in shown["alice"]["merge"].items() if k != "seconds"} == expected
    assert shown["org/bob"]["merged"] is None
    assert shown["org/bob"]["merge"] is None
    ended = client.post("/v1/adapters/unmerge")
    assert ended.status_code == 200
    assert ended.json()["object"] == "adapter.unmerge"
    assert ended.json()["name"] == "alice"
    assert client.get("/v1/adapters/alice").json()["merged"] is None


def test_the_mode_is_exact_unless_said_and_names_may_have_slashes(client: TestClient) -> None:
    assert client.post("/v1/adapters/org/bob/merge", json={}).json()["mode"] == "exact"
    assert client.get("/v1/adapters/org/bob").json()["merged"] == "exact"


def error_of(response: Any, status: int) -> Any:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status
    return error


def test_errors(client: TestClient, builder: Builder) -> None:
    error = error_of(client.post("/v1/adapters/nobody/merge", json={"mode": "exact"}), 404)
    assert error["message"] == "No adapter named `nobody` is loaded."
    assert error_of(client.post("/v1/adapters/unmerge"), 400)["message"] == "No adapter is merged."
    error = error_of(client.post("/v1/adapters/alice/merge", json={"mode": "fast"}), 400)
    assert "mode" in error["message"]
    assert error["param"] == "mode"
    error_of(client.post("/v1/adapters/alice/merge", json={"mode": "exact", "scale": 2}), 400)
    error_of(client.post("/v1/adapters/alice", json={}), 405)
    error_of(client.post("/v1/adapters/merge", json={}), 405)
    builder.free = 2_400_000
    message = error_of(client.post("/v1/adapters/alice/merge", json={"mode": "exact"}), 400)["message"]
    assert "2000000 bytes" in message
    assert "2400000 bytes are free" in message
    assert client.get("/v1/adapters/alice").json()["merged"] is None


def test_draining(client: TestClient, engine: FakeEngine) -> None:
    engine.is_draining = True
    response = client.post("/v1/adapters/alice/merge", json={"mode": "exact"})
    error_of(response, 503)
    assert response.headers["Retry-After"]


def test_one_merge_at_a_time(client: TestClient, builder: Builder) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(30)

    builder.before_build = wait
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(client.post("/v1/adapters/alice/merge", json={})))
    thread.start()
    assert begun.wait(30)
    assert error_of(client.post("/v1/adapters/org/bob/merge", json={}), 409)["type"] == "ConflictError"
    assert complete(client, "alice")["choices"], "requests are answered meanwhile"
    go_on.set()
    thread.join(30)
    assert answers[0].status_code == 200


def test_requests_are_bound_and_the_fingerprint_says_so(client: TestClient, engine: FakeEngine) -> None:
    plain = complete(client, "alice")["system_fingerprint"]
    client.post("/v1/adapters/alice/merge", json={"mode": "compact"})
    merged = complete(client, "alice", n=3)
    assert merged["system_fingerprint"] == f"fp_{BASE_DIGEST[:8]}_{version_of(client, 'alice')[:12]}-compact"
    assert merged["system_fingerprint"] == plain + "-compact"
    bound = engine.requests[-3:]
    assert all(request.merged is bound[0].merged is not None for request in bound)
    assert [use.ref.name for use in bound[0].adapters] == ["alice"]
    for other in ("base", "org/bob"):
        assert not complete(client, other)["system_fingerprint"].endswith("compact")
        assert engine.requests[-1].merged is None
    for adapters in ([{"name": "alice", "scale": 0.5}], [{"name": "alice"}, {"name": "org/bob"}]):
        complete(client, "base", adapters=adapters)
        assert engine.requests[-1].merged is None
    assert complete(client, "base", adapters=[{"name": "alice", "scale": 1}])["system_fingerprint"].endswith("compact")
    chat = {"model": "alice", "messages": [{"role": "user", "content": "hi"}]}
    assert client.post("/v1/chat/completions", json=chat).json()["system_fingerprint"].endswith("-compact")
    client.post("/v1/adapters/unmerge")
    assert complete(client, "alice")["system_fingerprint"] == plain
    assert engine.requests[-1].merged is None


def test_bindings_are_given_back(client: TestClient, engine: FakeEngine, serving: Serving) -> None:
    """By requests that end, and by those that are refused half-way."""
    manager = serving.merges
    assert isinstance(manager, MergeManager)
    client.post("/v1/adapters/alice/merge", json={})
    complete(client, "alice", n=4)
    manager.check_integrity(idle=True)
    engine.refuse = lambda request: QueueFull(1, 1, 1) if request.request_id.endswith("-2") else None
    refused = client.post("/v1/completions", json={"model": "alice", "prompt": "x", "n": 4})
    assert refused.status_code == 429
    engine.abort_everything()
    manager.check_integrity(idle=True)
    response = client.post("/v1/completions", json={"model": "alice", "prompt": "x" * 600})
    assert response.status_code == 400
    manager.check_integrity(idle=True)


def test_unloading_and_replacing_end_it(client: TestClient, tmp_path: Path) -> None:
    client.post("/v1/adapters/alice/merge", json={})
    (tmp_path / "alice" / "adapter_config.json").write_text('{"r": 16}')
    client.put("/v1/adapters/alice", json={"source": str(tmp_path / "alice")})
    assert client.get("/v1/adapters/alice").json()["merged"] is None
    error_of(client.post("/v1/adapters/unmerge"), 400)
    client.post("/v1/adapters/alice/merge", json={})
    client.delete("/v1/adapters/alice")
    error_of(client.post("/v1/adapters/unmerge"), 400)


def test_a_server_that_does_not_merge_says_so(
    serving: Serving, connect: Callable[..., TestClient], config: Any
) -> None:
    with TestClient(create_app(replace(serving, merges=None), config), base_url="http://127.0.0.1:8000") as client:
        error_of(client.post("/v1/adapters/alice/merge", json={}), 400)
        error_of(client.post("/v1/adapters/unmerge"), 400)
        assert client.get("/v1/adapters/alice").json()["merged"] is None
        assert complete(client, "alice")["choices"]


def test_only_admins_merge(connect: Callable[..., TestClient], config: ApiConfig) -> None:
    client = connect(replace(config, api_keys=("user",), admin_key="admin"))
    for path in ("/v1/adapters/alice/merge", "/v1/adapters/unmerge"):
        assert client.post(path, json={}).status_code == 401
        assert client.post(path, json={}, headers={"Authorization": "Bearer user"}).status_code == 403
