"""Every route there is, found out from the application itself, without a key, with a wrong one, and with each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.testclient import TestClient

from manylora.server.api.access.auth import OPEN_PATHS, admin_only
from manylora.server.api.app import create_app, routes
from manylora.server.api.openapi.document import operation_of
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from tests.api.fakes import FakeEngine
from tests.api.test_tenants import with_keys

Connect = Callable[..., TestClient]

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")

TRICKS = ("{}%0A", "{}%0D%0A", "{}%00", "{}%09", "{}/", "/{}", "//localhost{}", "{}%2F", "{};x", "{}%20", "/%2e{}")
"""Other ways of writing a path, of which none may be a way around."""


def _is_admin(route: APIRoute) -> bool:
    return any(one.call is admin_only for one in route.dependant.dependencies)


ROUTES = [route for route in routes() if isinstance(route, APIRoute)]
ADMIN = [route for route in ROUTES if _is_admin(route)]
OPEN = [route for route in ROUTES if route.path in OPEN_PATHS]
INFERENCE = [route for route in ROUTES if route not in ADMIN and route not in OPEN]


def _filled(route: APIRoute) -> str:
    return route.path.replace("{name:path}", "alice").replace("{model:path}", "alice")


def cases(chosen: list[APIRoute]) -> list[Any]:
    return [
        pytest.param(method, _filled(route), id=f"{method} {route.path}")
        for route in chosen
        for method in sorted(route.methods or ())
    ]


@pytest.fixture
def keys(config: ApiConfig, tmp_path: Path) -> ApiConfig:
    path = tmp_path / "keys.toml"
    path.write_text(with_keys('[tenants.acme]\nadapters = ["*"]\n'))
    return replace(config, host="0.0.0.0", keys_file=path, api_keys=("mine",), admin_key="root")


def send(client: TestClient, method: str, path: str, key: str | None = None, **fields: Any) -> Any:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return client.request(method, path, headers=headers, **fields)


def test_every_route_is_of_one_kind(serving: Serving, keys: ApiConfig) -> None:
    """A route of another kind, a mounted application or a socket would be one that the tests below do not look at."""
    app = create_app(serving, keys)
    others = [route for route in _flat(app) if not isinstance(route, APIRoute)]
    assert [getattr(route, "path", None) for route in others] == ["/openapi.json"]
    assert {route.path for route in _flat(app) if isinstance(route, APIRoute)} == {route.path for route in ROUTES}
    assert len(ADMIN) >= 10
    assert len(INFERENCE) >= 6
    assert {route.path for route in OPEN} == OPEN_PATHS
    # Whoever adds a route that manages something says so twice: here, and in the document.
    assert {route.path for route in ADMIN} == {
        route.path for route in ROUTES if (operation := operation_of(route)) is not None and operation.access == "admin"
    }


def _flat(app: FastAPI) -> list[BaseRoute]:
    """The routes that requests are matched against."""
    found: list[BaseRoute] = []

    def walk(some: Any) -> None:
        for route in some:
            inner = getattr(route, "original_router", None) or getattr(route, "router", None)
            if isinstance(route, APIRoute) or inner is None:
                found.append(route)
            else:
                walk(inner.routes)

    walk(app.routes)
    return found


@pytest.mark.parametrize(("method", "path"), cases(ADMIN))
def test_managing_takes_the_admin_key(connect: Connect, keys: ApiConfig, method: str, path: str) -> None:
    client = connect(keys)
    for key in (None, "wrong", "", "roo", "root2"):
        assert send(client, method, path, key).status_code == 401, key
    for key in ("acme-key", "mine"):
        assert send(client, method, path, key).status_code == 403
    assert send(client, method, path, "root").status_code not in (401, 403)


@pytest.mark.parametrize(("method", "path"), cases(ADMIN))
def test_tenants_do_not_manage_where_there_is_no_admin(
    connect: Connect, keys: ApiConfig, method: str, path: str
) -> None:
    """Not even on the machine itself, where anybody may if there are no tenants."""
    local = replace(keys, host="127.0.0.1", admin_key=None)
    for config in (local, replace(local, api_keys=())):
        client = connect(config)
        for key in (None, "wrong", "acme-key", "mine", "root"):
            assert send(client, method, path, key).status_code == 403, key


@pytest.mark.parametrize(("method", "path"), cases(INFERENCE))
def test_inference_takes_a_key(connect: Connect, keys: ApiConfig, method: str, path: str) -> None:
    client = connect(keys)
    for key in (None, "wrong", ""):
        assert send(client, method, path, key).status_code == 401
    for key in ("acme-key", "mine", "root"):
        assert send(client, method, path, key).status_code not in (401, 403)
    assert send(connect(replace(keys, api_keys=())), method, path).status_code == 401


def test_probes_are_open_and_metrics_may_be_closed(connect: Connect, keys: ApiConfig) -> None:
    client, closed = connect(keys), connect(replace(keys, protect_metrics=True))
    for path in OPEN_PATHS:
        assert send(client, "GET", path).status_code == 200
        assert send(client, "GET", path, "wrong").status_code == 200
    for path in ("/health", "/ready"):
        assert send(closed, "GET", path).status_code == 200
    for key, status in ((None, 401), ("wrong", 401), ("mine", 403), ("acme-key", 403), ("root", 200)):
        assert send(closed, "GET", "/metrics", key).status_code == status
    for trick in TRICKS:
        assert "up 1.0" not in send(closed, "GET", trick.format("/metrics"), "acme-key").text


@pytest.mark.parametrize("trick", TRICKS)
def test_no_way_of_writing_a_path_leads_around(
    connect: Connect, keys: ApiConfig, serving: Serving, engine: FakeEngine, trick: str, tmp_path: Path
) -> None:
    """Whatever the path looks like, an admin's endpoint is not reached without the admin's key, nor any without a key:
    on a server of tenants, and on one that anybody may use."""
    source = str(tmp_path / "alice")
    before = serving.registry.list()
    servers = (connect(keys), connect(replace(keys, keys_file=None, api_keys=())))
    for server, client in enumerate(servers):
        for route in ADMIN:
            path = _filled(route)
            for method in route.methods or ():
                for key in (None, "acme-key"):
                    body = {"lora_name": "evil", "lora_path": source, "source": source, "pinned": True}
                    answer = send(client, method, trick.format(path), key, json=body)
                    assert answer.status_code in (400, 401, 403, 404, 405), (method, path, key, answer.text)
                    assert "loaded_adapters" not in answer.text
        if server == 0:
            for route in INFERENCE:
                path = _filled(route)
                for method in route.methods or ():
                    body = {"model": "base", "prompt": "x", "tokens": [65]}
                    assert send(client, method, trick.format(path), json=body).status_code == 401, (method, path)
    assert serving.registry.list() == before
    assert engine.requests == []


@pytest.mark.parametrize("method", METHODS)
def test_no_method_leads_around(connect: Connect, keys: ApiConfig, method: str) -> None:
    client = connect(keys)
    for route in (*ADMIN, *INFERENCE):
        path = _filled(route)
        assert send(client, method, path).status_code == 401
        if route in ADMIN:
            assert send(client, method, path, "acme-key").status_code == 403
    assert send(client, method, "/nowhere").status_code == 401


def test_the_endpoints_ask_for_the_admin_themselves(
    connect: Connect, keys: ApiConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the path did not say that it is an admin's."""
    monkeypatch.setattr("manylora.server.api.access.auth._is_admin", lambda _path: False)
    client = connect(keys)
    for param in cases(ADMIN):
        method, path = param.values
        assert send(client, method, path, "acme-key").status_code == 403
        assert send(client, method, path, "root").status_code != 403
