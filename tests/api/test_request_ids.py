"""Every response says by which id the server's log knows its request."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.engine.errors import QueueFull
from tests.api.fakes import FakeEngine

ID = "x-request-id"
BODY = {"model": "alice", "prompt": "Hi"}
OWN = re.compile(r"[0-9a-f]{32}")


@pytest.mark.parametrize(
    ("method", "path", "fields", "status"),
    [
        ("GET", "/health", {}, 200),
        ("GET", "/metrics", {}, 200),
        ("POST", "/v1/completions", {"json": BODY}, 200),
        ("POST", "/v1/completions", {"json": BODY | {"stream": True}}, 200),
        ("POST", "/v1/completions", {"json": BODY | {"model": "nobody"}}, 404),
        ("POST", "/v1/completions", {"json": {}}, 400),
        ("POST", "/v1/completions", {"content": b"x" * 70_000}, 415),
        ("POST", "/v1/completions", {"json": BODY | {"prompt": "x" * 70_000}}, 413),
        ("GET", "/v1/completions", {}, 405),
        ("GET", "/nothing/here", {}, 404),
        ("DELETE", "/v1/adapters/nobody", {}, 404),
    ],
)
def test_the_id_that_was_sent_comes_back(
    client: TestClient, method: str, path: str, fields: dict[str, object], status: int
) -> None:
    headers = {ID: "trace/42:a~!"}
    if "content" in fields or not fields:
        headers["content-type"] = "text/plain"
    response = client.request(method, path, headers=headers, **fields)  # type: ignore[arg-type]
    assert (response.status_code, response.headers.get_list(ID)) == (status, ["trace/42:a~!"])


def test_without_one_each_request_gets_its_own(client: TestClient) -> None:
    ids = [client.get("/health").headers[ID] for _ in range(3)]
    assert len(set(ids)) == 3
    assert all(OWN.fullmatch(one) for one in ids)


@pytest.mark.parametrize(
    "given", [b"", b"two words", b"tab\there", b"caf\xe9", b"x" * 129, b"\x7f", b"newline\\\n"], ids=repr
)
def test_one_that_could_forge_a_log_line_is_replaced(client: TestClient, given: bytes) -> None:
    response = client.get("/health", headers=[(ID.encode(), given)])
    assert OWN.fullmatch(response.headers[ID])


def test_the_longest_that_is_taken_and_two_that_contradict_each_other(client: TestClient) -> None:
    assert client.get("/health", headers={ID: "x" * 128}).headers[ID] == "x" * 128
    response = client.get("/health", headers=[(ID.encode(), b"one"), (ID.encode(), b"two")])
    assert OWN.fullmatch(response.headers[ID])


def test_refusals_before_the_handler(connect: Callable[..., TestClient]) -> None:
    client = connect(ApiConfig(api_keys=("key",), admin_key="admin"))
    assert (response := client.post("/v1/completions", json=BODY, headers={ID: "a"})).status_code == 401
    assert response.headers.get_list(ID) == ["a"]
    headers = {ID: "b", "authorization": "Bearer key"}
    assert (response := client.get("/v1/adapters", headers=headers)).status_code == 403
    assert response.headers.get_list(ID) == ["b"]


def test_a_bug(connect: Callable[..., TestClient], config: ApiConfig, engine: FakeEngine) -> None:
    def bug(_request: object) -> None:
        raise ZeroDivisionError

    engine.refuse = bug  # type: ignore[assignment]
    client = connect(config, raise_bugs=False)
    response = client.post("/v1/completions", json=BODY, headers={ID: "c"})
    assert (response.status_code, response.headers.get_list(ID)) == (500, ["c"])


def test_the_engine_knows_a_request_by_it(client: TestClient, engine: FakeEngine) -> None:
    sent = [client.post("/v1/completions", json=BODY | {"n": 2}, headers={ID: "same"}).json()["id"] for _ in range(2)]
    ids = [request.request_id for request in engine.requests]
    # Clients may send one id twice at a time; the engine's are unique all the same.
    assert ids == [f"same/{one}-{choice}" for one in sent for choice in (0, 1)]
    assert all(re.fullmatch(r"cmpl-[0-9a-f]{32}", one) for one in sent)


def test_refused_by_the_engine(client: TestClient, engine: FakeEngine, serving: Serving) -> None:
    engine.refuse = lambda _request: QueueFull(9, 8, 1)
    response = client.post("/v1/completions", json=BODY, headers={ID: "d"})
    assert (response.status_code, response.headers[ID]) == (429, "d")
    engine.is_draining = True
    engine.refuse = lambda _request: None
    response = client.post("/v1/completions", json=BODY, headers={ID: "e"})
    assert (response.status_code, response.headers[ID]) == (503, "e")
