"""One line of log for each request: what it says, and what it never does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.server.api.app import create_app
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.engine.errors import QueueFull
from manylora.server.engine.request import Event, FinishEvent, Request, RequestTimes
from manylora.server.logs import FIELDS
from tests.api.fakes import FakeEngine, endless, token

BODY = {"model": "alice", "prompt": "the secret prompt", "max_tokens": 5}


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    caplog.set_level(logging.DEBUG)

    def fields() -> list[dict[str, Any]]:
        return [
            getattr(record, FIELDS) | {"level": record.levelname}
            for record in caplog.records
            if record.name == "manylora.access"
        ]

    return fields


Logged = Callable[[], list[dict[str, Any]]]


def timed(request: Request) -> list[list[Event]]:
    """Two tokens; 0.5 s in the queue, the first token after 2 s."""
    at = request.arrival_time
    times = RequestTimes(at, at + 0.5, at + 2.0, at + 3.0)
    return [[token("ab")], [FinishEvent("stop", None, len(request.prompt_token_ids), 2, times=times)]]


def test_a_completion(client: TestClient, engine: FakeEngine, logged: Logged) -> None:
    engine.script = timed
    client.post("/v1/completions", json=BODY | {"n": 2}, headers={"x-request-id": "it"})
    [line] = logged()
    seconds, queued, first = line.pop("seconds"), line.pop("queue_seconds"), line.pop("ttft_seconds")
    assert line == {
        "level": "INFO",
        "request_id": "it",
        "tenant": None,
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "model": "alice",
        "prompt_tokens": 18,
        "completion_tokens": 4,
        "finish_reasons": ["stop", "stop"],
        "error_type": None,
    }
    assert 0 < seconds < 10
    assert queued == pytest.approx(0.5)
    assert 2.0 <= first < 2.0 + seconds  # from the request's arrival here, which was before the engine's


@pytest.mark.parametrize("stream", [False, True])
def test_a_stream_says_the_same(client: TestClient, engine: FakeEngine, logged: Logged, stream: bool) -> None:
    engine.script = timed
    path, fields = "/v1/chat/completions", {"model": "alice", "messages": [{"role": "user", "content": "Hi"}]}
    client.post(path, json=fields | {"stream": stream})
    [line] = logged()
    assert (line["route"], line["completion_tokens"], line["finish_reasons"]) == (path, 2, ["stop"])
    assert line["queue_seconds"] == pytest.approx(0.5)
    assert line["prompt_tokens"] > 0


def test_tokens_are_for_a_model_too(client: TestClient, logged: Logged) -> None:
    client.post("/tokenize", json={"model": "alice", "prompt": "the secret prompt"})
    client.post("/detokenize", json={"tokens": [65]})
    assert [(line["route"], line["model"]) for line in logged()] == [("/tokenize", "alice"), ("/detokenize", "base")]


def test_what_was_refused(client: TestClient, engine: FakeEngine, logged: Logged) -> None:
    client.post("/v1/completions", json=BODY | {"model": "nobody"})
    client.post("/v1/completions", json=BODY | {"top_p": 7})
    client.get("/v1/models/some/name")
    client.put("/not/a/route")
    client.patch("/v1/models")
    engine.refuse = lambda _request: QueueFull(9, 8, 1)
    client.post("/v1/completions", json=BODY)
    assert [(line["route"], line["status"], line["error_type"], line["model"]) for line in logged()] == [
        ("/v1/completions", 404, "NotFoundError", "nobody"),
        ("/v1/completions", 400, "BadRequestError", None),
        ("/v1/models/{model:path}", 404, "NotFoundError", None),
        ("_other", 404, "NotFoundError", None),
        ("/v1/models", 405, "MethodNotAllowedError", None),
        ("/v1/completions", 429, "RateLimitError", "alice"),
    ]
    assert {line["level"] for line in logged()} == {"INFO"}
    assert logged()[0]["finish_reasons"] is None


def test_a_key_that_is_wrong_is_told_by_its_route(connect: Callable[..., TestClient], logged: Logged) -> None:
    client = connect(ApiConfig(api_keys=("key",)))
    client.get("/v1/adapters/alice")
    client.post("/v1/completions", json=BODY)
    client.get("/openapi.json")
    client.post("/made/up/path", json=BODY)
    assert [(line["route"], line["status"], line["error_type"]) for line in logged()] == [
        ("/v1/adapters/{name:path}", 401, "AuthenticationError"),
        ("/v1/completions", 401, "AuthenticationError"),
        ("/openapi.json", 401, "AuthenticationError"),
        ("_other", 401, "AuthenticationError"),
    ]


def test_an_error_inside_of_a_stream(client: TestClient, engine: FakeEngine, logged: Logged) -> None:
    engine.script = lambda request: [
        [token("a")],
        [FinishEvent("error", None, len(request.prompt_token_ids), 1, "broken")],
    ]
    client.post("/v1/completions", json=BODY | {"stream": True})
    [line] = logged()
    assert (line["status"], line["finish_reasons"], line["error_type"]) == (200, ["error"], "InternalServerError")


def test_a_bug_is_an_error(
    connect: Callable[..., TestClient], config: ApiConfig, engine: FakeEngine, logged: Logged
) -> None:
    def bug(_request: object) -> None:
        raise ZeroDivisionError

    engine.refuse = bug  # type: ignore[assignment]
    connect(config, raise_bugs=False).post("/v1/completions", json=BODY)
    [line] = logged()
    assert (line["level"], line["status"], line["error_type"]) == ("ERROR", 500, "InternalServerError")


def test_what_cannot_be_served_now_is_a_warning(client: TestClient, engine: FakeEngine, logged: Logged) -> None:
    engine.is_draining = True
    client.post("/v1/completions", json=BODY)
    client.get("/ready")
    assert [(line["level"], line["status"]) for line in logged()] == [("WARNING", 503), ("DEBUG", 503)]


def test_probes_are_for_those_who_debug(client: TestClient, logged: Logged) -> None:
    for path in ("/health", "/ready", "/metrics"):
        client.get(path)
    assert [line["level"] for line in logged()] == ["DEBUG"] * 3


def test_neither_keys_nor_prompts_nor_paths(
    connect: Callable[..., TestClient], engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    client = connect(ApiConfig(api_keys=("key-a1b2c3",), admin_key="admin-d4e5f6"))
    for key in ("key-a1b2c3", "admin-d4e5f6", "wrong-778899"):
        headers = {"authorization": f"Bearer {key}"}
        client.post("/v1/completions", json=BODY, headers=headers)
        client.post("/v1/completions", json=BODY | {"stream": True, "echo": True}, headers=headers)
        client.post("/v1/completions", json=BODY | {"bad": "the secret prompt"}, headers=headers)
        client.get(f"/v1/models/{key}?key={key}", headers=headers)
        client.get(f"/{key}", headers=headers)
        client.put(f"/v1/adapters/{key}", json={"source": "/no/where"}, headers=headers)
    ours = [record for record in caplog.records if record.name.startswith("manylora")]
    assert len(ours) >= 18
    for record in ours:
        text = record.getMessage() + repr(getattr(record, FIELDS, {}))
        for secret in ("a1b2c3", "d4e5f6", "778899", "secret prompt", "Hello"):
            assert secret not in text, text


def test_a_models_name_that_goes_on_for_ever(client: TestClient, logged: Logged) -> None:
    client.post("/v1/completions", json=BODY | {"model": "m" * 5000})
    [line] = logged()
    assert len(line["model"] or "") < 200


Act = Callable[[], Awaitable[dict[str, Any]]]


async def visit(app: Any, after_body: Act, *, stream: bool) -> None:
    """One completion, as an ASGI server asks for it; ``after_body`` is what comes after the body."""
    body = b'{"model": "alice", "prompt": "Hi", "stream": %s}' % (b"true" if stream else b"false")
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "http_version": "1.1",
    }  # fmt: skip
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return requests.pop() if requests else await after_body()

    async def send(_message: Any) -> None:
        return

    await app(scope, receive, send)


async def until_live(engine: FakeEngine) -> None:
    while not engine.n_live:  # noqa: ASYNC110 - the fake has no event for it
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)


@pytest.mark.parametrize(("stream", "status"), [(False, 499), (True, 200)])
def test_a_client_that_leaves(
    serving: Serving, config: ApiConfig, engine: FakeEngine, logged: Logged, stream: bool, status: int
) -> None:
    """Before it has any of its answer, and in the middle of it."""
    engine.script = endless

    async def leave() -> dict[str, Any]:
        await until_live(engine)
        return {"type": "http.disconnect"}

    asyncio.run(visit(create_app(serving, config), leave, stream=stream))
    [line] = logged()
    assert (line["status"], line["error_type"], line["finish_reasons"]) == (status, "ClientDisconnected", ["abort"])


def test_a_request_that_the_ending_server_waits_for_no_longer(
    serving: Serving, config: ApiConfig, engine: FakeEngine, logged: Logged
) -> None:
    engine.script = endless

    async def wait() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError

    async def main() -> None:
        task = asyncio.create_task(visit(create_app(serving, config), wait, stream=False))
        await until_live(engine)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    [line] = logged()
    assert (line["level"], line["status"], line["error_type"]) == ("WARNING", 503, "ServiceUnavailableError")
