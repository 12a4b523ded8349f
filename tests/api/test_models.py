"""Names: which weights a request gets, what the response says about them, and /v1/models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.versions import AdapterRef
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from tests.api.fakes import FakeEngine, make_serving, write_adapter


def post(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"model": "base", "prompt": "Hi", **fields})


@pytest.mark.parametrize(
    ("fields", "adapter", "scale"),
    [
        ({"model": "base"}, None, 1.0),
        ({"model": "alice"}, "alice", 1.0),
        ({"model": "base:alice"}, "alice", 1.0),
        ({"model": "org/bob"}, "org/bob", 1.0),
        ({"model": "base:org/bob"}, "org/bob", 1.0),
        ({"lora_path": "alice"}, "alice", 1.0),
        ({"adapters": [{"name": "alice"}]}, "alice", 1.0),
        ({"adapters": [{"name": "alice", "scale": 0.5}]}, "alice", 0.5),
        ({"adapters": [{"name": "alice", "scale": -1}]}, "alice", -1.0),
        ({"model": "alice", "adapters": [{"name": "alice", "scale": 2}]}, "alice", 2.0),
        ({"model": "base:alice", "lora_path": "alice"}, "alice", 1.0),
    ],
)
def test_which_weights_answer(
    client: TestClient,
    serving: Serving,
    engine: FakeEngine,
    fields: dict[str, Any],
    adapter: str | None,
    scale: float,
) -> None:
    answer = post(client, **fields).json()
    [request] = engine.requests
    assert [(use.ref.name, use.scale) for use in request.adapters] == ([] if adapter is None else [(adapter, scale)])
    assert answer["model"] == fields.get("model", "base")  # as asked
    version = "base" if adapter is None else serving.registry.info(adapter).version[:12]
    assert (answer["system_fingerprint"] == f"fp_ba5eba5e_{version}") == (scale == 1)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": "nobody"}, "model", "The model `nobody` does not exist."),
        ({"model": "base:nobody"}, "model", "The model `base:nobody` does not exist."),
        ({"model": "other:alice"}, "model", "The model `other:alice` does not exist."),
        ({"model": "base:"}, "model", "The model `base:` does not exist."),
        ({"model": ""}, "model", "The model `` does not exist."),
        ({"lora_path": "nobody"}, "lora_path", "The adapter `nobody` does not exist."),
        ({"adapters": [{"name": "nobody"}]}, "adapters", "The adapter `nobody` does not exist."),
    ],
)
def test_unknown_names_are_404_and_never_the_base(
    client: TestClient, engine: FakeEngine, fields: dict[str, Any], param: str, message: str
) -> None:
    response = post(client, **fields)
    assert response.status_code == 404
    assert response.json()["error"] == {"message": message, "type": "NotFoundError", "param": param, "code": 404}
    assert engine.requests == []


def test_contradicting_names_are_refused(client: TestClient) -> None:
    response = post(client, model="alice", lora_path="org/bob")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "lora_path"
    response = post(client, lora_path="alice", adapters=[{"name": "alice"}])
    assert response.json()["error"]["param"] == "adapters"


def test_the_whole_name_comes_before_its_colon(client: TestClient, serving: Serving, tmp_path: Path) -> None:
    serving.registry.load("base:alice", str(write_adapter(tmp_path / "other", "other")))
    serving.registry.load("a:b:c", str(write_adapter(tmp_path / "abc", "abc")))
    for model, name in (("base:alice", "base:alice"), ("a:b:c", "a:b:c"), ("base:a:b:c", "a:b:c")):
        version = serving.registry.info(name).version[:12]
        assert post(client, model=model).json()["system_fingerprint"].endswith(version)


def test_a_base_whose_name_has_a_colon(
    connect: Callable[..., TestClient], config: ApiConfig, serving: Serving, tmp_path: Path
) -> None:
    other = make_serving(tmp_path / "other", base_name="smol:135m")
    object.__setattr__(serving, "base_name", other.base_name)
    client = connect(config)
    assert post(client, model="smol:135m").status_code == 200
    assert post(client, model="smol:135m:alice").status_code == 200
    assert post(client, model="smol:alice").status_code == 404
    assert post(client, model="smol").status_code == 404


def test_all_choices_run_on_one_version(
    client: TestClient, serving: Serving, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is replaced by another thread just between two choices' references."""
    registry = serving.registry
    assert isinstance(registry, AdapterRegistry)
    acquire, calls = registry.acquire, 0

    def acquire_with_a_race(name: str) -> AdapterRef:
        nonlocal calls
        calls += 1
        if calls == 2:
            registry.load("alice", str(write_adapter(tmp_path / "v2", "v2")), replace=True)
        return acquire(name)

    monkeypatch.setattr(registry, "acquire", acquire_with_a_race)
    assert post(client, model="alice", n=3).status_code == 200
    versions = [use.ref.version for request in engine.requests for use in request.adapters]
    assert versions == [registry.info("alice").version] * 3
    registry.check_integrity()


def test_models_are_listed(client: TestClient, serving: Serving, tmp_path: Path) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["base", "alice", "org/bob"]
    base, alice, _ = listed["data"]
    assert base == {
        "id": "base",
        "object": "model",
        "created": serving.created,
        "owned_by": "manylora",
        "root": "/models/base",
        "parent": None,
        "max_model_len": 512,
    }
    assert alice["parent"] == "base"
    assert alice["root"] == str(tmp_path / "alice")


@pytest.mark.parametrize("model", ["base", "alice", "org/bob", "base:alice"])
def test_one_model(client: TestClient, model: str) -> None:
    response = client.get(f"/v1/models/{model}")
    assert response.status_code == 200
    assert response.json()["id"] == model


def test_no_such_model(client: TestClient) -> None:
    response = client.get("/v1/models/nobody")
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"
