"""Requests that name adapters which are not loaded: loaded once, for all who ask, beside everything else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.source import resolve_source
from manylora.server.api import on_demand
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from tests.api.fakes import FakeEngine, load_fake, write_adapter

Connect = Callable[..., TestClient]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, content in (("dora", '{"r": 5}'), ("org/eve", '{"template": 2}'), ("broken", "bad")):
        write_adapter(tmp_path / "roots" / name, content)
    return tmp_path / "roots"


@pytest.fixture
def client(connect: Connect, config: ApiConfig, root: Path) -> TestClient:
    return connect(replace(config, adapter_roots=(root,), adapters_on_demand=10))


def ask(client: TestClient, model: str, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"model": model, "prompt": "x", **fields})


def test_off_by_default(connect: Connect, config: ApiConfig, root: Path) -> None:
    assert ask(connect(replace(config, adapter_roots=(root,))), "dora").status_code == 404


def test_loaded_when_named(client: TestClient, serving: Serving) -> None:
    assert ask(client, "dora").status_code == 200
    assert serving.registry.info("dora").source.endswith("roots/dora")
    assert ask(client, "base:org/eve").json()["model"] == "base:org/eve"
    two = [{"name": "alice"}, {"name": "org/eve", "scale": 0.5}]
    assert ask(client, "base", adapters=two).status_code == 200
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    serving.registry.unload("org/eve")
    assert client.post("/v1/chat/completions", json={"model": "org/eve", **chat}).status_code == 200
    serving.registry.unload("org/eve")
    tokens = client.post("/tokenize", json={"model": "org/eve", **chat}).json()["tokens"]
    assert bytes(tokens[1:]).startswith(b"[own template]")


def test_unknown_and_unservable_names(client: TestClient, serving: Serving, root: Path) -> None:
    for name in ("nobody", "../outside", "/etc", "dora/..", "base"):
        assert ask(client, name).status_code == (200 if name == "base" else 404)
    refused = ask(client, "broken")
    assert refused.status_code == 400
    assert "it is bad" in refused.json()["error"]["message"]
    assert [info.name for info in serving.registry.list()] == ["alice", "org/bob"]


def test_a_flood_of_one_unknown_name_reads_the_disk_once(
    client: TestClient, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def resolve(source: str, **options: Any) -> Path:
        looked.append(source)
        return resolve_source(source, **options)

    monkeypatch.setattr("manylora.adapters.on_demand.resolve_source", resolve)
    for _ in range(20):
        assert ask(client, "late").status_code == 404
        assert ask(client, "broken").status_code == 400
    assert len(looked) == 2
    write_adapter(root / "late", '{"r": 6}')
    monkeypatch.setattr(on_demand, "REMEMBERED_FOR_S", 0.0)
    loads = client.app.state.manylora.on_demand  # type: ignore[attr-defined]
    monkeypatch.setattr(loads, "_clock", lambda: float("inf"))
    assert ask(client, "late").status_code == 200


def test_requests_share_a_load_and_others_are_served_meanwhile(
    client: TestClient, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = serving.registry
    assert isinstance(registry, AdapterRegistry)
    loading, go_on = threading.Event(), threading.Event()
    loads: list[str] = []

    def slow(source: str) -> Any:
        loads.append(source)
        loading.set()
        assert go_on.wait(10)
        return load_fake(source)

    monkeypatch.setattr(registry, "_load", slow)
    with ThreadPoolExecutor(4) as clients:
        waiting = [clients.submit(ask, client, "dora") for _ in range(4)]
        assert loading.wait(10)
        assert ask(client, "alice").status_code == 200
        assert not any(one.done() for one in waiting)
        go_on.set()
        assert [one.result(10).status_code for one in waiting] == [200] * 4
    assert len(loads) == 1


def test_too_many_at_once_are_told_to_come_again(
    client: TestClient, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_demand, "MAX_LOADING", 0)
    response = ask(client, "dora")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert ask(client, "alice").status_code == 200


def test_more_than_the_limit_come_and_go(connect: Connect, config: ApiConfig, root: Path, serving: Serving) -> None:
    client = connect(replace(config, adapter_roots=(root,), adapters_on_demand=1))
    for _ in range(3):
        for name in ("dora", "org/eve"):
            assert ask(client, name).status_code == 200
            assert [info.name for info in serving.registry.list() if info.name not in ("alice", "org/bob")] == [name]


def test_nothing_is_loaded_while_draining(client: TestClient, engine: FakeEngine) -> None:
    engine.is_draining = True
    assert ask(client, "dora").status_code == 404
