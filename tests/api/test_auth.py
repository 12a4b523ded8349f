"""The matrix of api/auth.py: every kind of route, every configuration, every key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.server.config import ApiConfig

BODY = {"model": "base", "prompt": "Hi"}

Request = Callable[[TestClient, dict[str, str]], Any]

INFERENCE: dict[str, Request] = {
    "completions": lambda client, headers: client.post("/v1/completions", json=BODY, headers=headers),
    "models": lambda client, headers: client.get("/v1/models", headers=headers),
    "tokenize": lambda client, headers: client.post("/tokenize", json={"prompt": "x"}, headers=headers),
    "openapi": lambda client, headers: client.get("/openapi.json", headers=headers),
}
ADMIN: dict[str, Request] = {
    "list": lambda client, headers: client.get("/v1/adapters", headers=headers),
    "get": lambda client, headers: client.get("/v1/adapters/alice", headers=headers),
    "patch": lambda client, headers: client.patch("/v1/adapters/alice", json={"pinned": False}, headers=headers),
}
OPEN = ("/health", "/ready", "/metrics")

API = {"api_keys": ("key-1", "key-2")}
ADM = {"admin_key": "root"}

NO_KEY: dict[str, str] = {}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("request_", INFERENCE.values(), ids=INFERENCE)
@pytest.mark.parametrize(
    ("configured", "sent", "status"),
    [
        ({}, NO_KEY, 200),
        ({}, bearer("whatever"), 200),
        (ADM, NO_KEY, 200),
        (API, NO_KEY, 401),
        (API, bearer("key-1"), 200),
        (API, bearer("key-2"), 200),
        (API, bearer("key-3"), 401),
        (API, bearer("key-1 "), 200),
        (API, bearer("key-"), 401),
        (API, bearer("kéy-1"), 401),
        (API, {"Authorization": "key-1"}, 401),
        (API, {"Authorization": "Basic key-1"}, 401),
        (API, {"Authorization": "bearer key-1"}, 200),
        (API | ADM, bearer("root"), 200),
        (API | ADM, bearer("key-1"), 200),
        (API | ADM, NO_KEY, 401),
    ],
)
def test_inference(
    connect: Callable[..., TestClient], request_: Request, configured: dict[str, Any], sent: dict[str, str], status: int
) -> None:
    encoded: Any = {name: value.encode("latin-1") for name, value in sent.items()}
    response = request_(connect(ApiConfig(host="0.0.0.0", **configured)), encoded)
    assert response.status_code == status, response.text
    if status == 401:
        assert response.json()["error"]["type"] == "AuthenticationError"
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("request_", ADMIN.values(), ids=ADMIN)
@pytest.mark.parametrize(
    ("host", "configured", "sent", "status"),
    [
        ("127.0.0.1", {}, NO_KEY, 200),
        ("localhost", {}, NO_KEY, 200),
        ("::1", {}, NO_KEY, 200),
        ("0.0.0.0", {}, NO_KEY, 403),
        ("::", {}, NO_KEY, 403),
        ("10.0.0.7", {}, bearer("root"), 403),
        ("0.0.0.0", API, bearer("key-1"), 403),
        ("127.0.0.1", API, NO_KEY, 401),
        ("127.0.0.1", API, bearer("key-1"), 200),
        ("0.0.0.0", ADM, NO_KEY, 401),
        ("0.0.0.0", ADM, bearer("wrong"), 401),
        ("0.0.0.0", ADM, bearer("root"), 200),
        ("127.0.0.1", ADM, NO_KEY, 401),
        ("0.0.0.0", API | ADM, bearer("key-1"), 403),
        ("0.0.0.0", API | ADM, bearer("root"), 200),
    ],
)
def test_managing_adapters(
    connect: Callable[..., TestClient],
    request_: Request,
    host: str,
    configured: dict[str, Any],
    sent: dict[str, str],
    status: int,
) -> None:
    response = request_(connect(ApiConfig(host=host, **configured)), sent)
    assert response.status_code == status, response.text
    if status == 403:
        assert response.json()["error"]["type"] == "PermissionDeniedError"


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter"])
def test_the_other_dialects_are_guarded_too(connect: Callable[..., TestClient], path: str) -> None:
    client = connect(ApiConfig(**ADM))  # type: ignore[arg-type]
    assert client.post(path, json={}).status_code == 401
    assert client.post(path, json={}, headers=bearer("root")).status_code == 400
    assert connect(ApiConfig(host="0.0.0.0")).post(path, json={}).status_code == 403


@pytest.mark.parametrize("name", ["evil.example", "10.0.0.7:8000", "127.0.0.1.evil.example", ""])
def test_a_name_that_was_made_to_point_here_cannot_manage(connect: Callable[..., TestClient], name: str) -> None:
    """DNS rebinding: a web page's own name resolves to 127.0.0.1, so the browser lets it read the answers."""
    client = connect(ApiConfig())
    assert client.get("/v1/adapters", headers={"Host": name}).status_code == 403
    assert client.get("/v1/models", headers={"Host": name}).status_code == 200
    for good in ("localhost:8000", "[::1]:8000", "127.0.0.1"):
        assert client.get("/v1/adapters", headers={"Host": good}).status_code == 200
    with_key = connect(ApiConfig(**ADM))  # type: ignore[arg-type]
    assert with_key.get("/v1/adapters", headers={"Host": name} | bearer("root")).status_code == 200


@pytest.mark.parametrize("path", OPEN)
def test_probes_are_open(connect: Callable[..., TestClient], path: str) -> None:
    assert connect(ApiConfig(host="0.0.0.0", **API, **ADM)).get(path).status_code == 200  # type: ignore[arg-type]


def test_unknown_routes_tell_nothing_without_a_key(connect: Callable[..., TestClient]) -> None:
    client = connect(ApiConfig(**API))  # type: ignore[arg-type]
    assert client.get("/nowhere").status_code == 401
    assert client.get("/nowhere", headers=bearer("key-1")).status_code == 404


def test_no_body_is_read_without_a_key(connect: Callable[..., TestClient]) -> None:
    client = connect(ApiConfig(**API))  # type: ignore[arg-type]
    assert client.post("/v1/completions", content=b"{").status_code == 401
