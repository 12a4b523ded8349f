"""Every error has one shape, whoever raises it; and none of them leaks a reference or a stack."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.engine.errors import EngineRefusal, InvalidRequest, PromptTooLong, QueueFull
from manylora.server.engine.request import Request
from tests.api.fakes import FakeEngine, endless, finish, token

BODY = {"model": "alice", "prompt": "Hi"}
JSON = {"content-type": "application/json"}


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["code"] == status
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nowhere", 404, "NotFoundError"),
        ("GET", "/v1/completions/", 404, "NotFoundError"),
        ("GET", "/docs", 404, "NotFoundError"),
        ("GET", "/v1/completions", 405, "MethodNotAllowedError"),
        ("DELETE", "/v1/models", 405, "MethodNotAllowedError"),
    ],
)
def test_unknown_routes(client: TestClient, method: str, path: str, status: int, kind: str) -> None:
    error = error_of(client.request(method, path), status)
    assert error["type"] == kind
    assert path in error["message"]


@pytest.mark.parametrize(
    ("raw", "hint"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "an array"),
        (b"null", "null"),
        (b"7", "a number"),
        (b"true", "a boolean"),
        (b'"x"', "a string"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "-Infinity"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"model": "base", "prompt": "\\ud800"}', "surrogate"),
        (b"[" * 50_000, "nested too deeply"),
        (b'{"prompt":' * 5_000, "nested too deeply"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_malformed_bodies(client: TestClient, raw: bytes, hint: str) -> None:
    error = error_of(client.post("/v1/completions", content=raw, headers=JSON), 400)
    assert hint in error["message"]


def test_escaped_characters_beyond_the_basic_plane_are_text(client: TestClient, engine: FakeEngine) -> None:
    raw = b'{"model": "base", "prompt": "\\ud83d\\ude00"}'
    assert client.post("/v1/completions", content=raw, headers=JSON).status_code == 200
    assert bytes(engine.requests[0].prompt_token_ids[1:]).decode() == "😀"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_other_content_types(client: TestClient, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    error_of(client.post("/v1/completions", content=json.dumps(BODY).encode(), headers=headers), 415)


def test_a_charset_is_fine(client: TestClient) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    assert client.post("/v1/completions", content=json.dumps(BODY), headers=headers).status_code == 200


def test_bodies_over_the_limit(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1024

    assert "65536" in error_of(client.post("/v1/completions", json={"prompt": "x" * 70_000}), 413)["message"]
    error_of(client.post("/v1/completions", content=chunks(), headers=JSON), 413)


def test_a_full_queue_says_when_to_come_back(client: TestClient, engine: FakeEngine) -> None:
    engine.refuse = lambda _request: QueueFull(9, 8, retry_after=7)
    response = client.post("/v1/completions", json=BODY)
    assert error_of(response, 429)["type"] == "RateLimitError"
    assert response.headers["retry-after"] == "7"


def test_a_draining_server(client: TestClient, engine: FakeEngine) -> None:
    engine.is_draining = True
    for stream in (False, True):
        response = client.post("/v1/completions", json={**BODY, "stream": stream})
        assert error_of(response, 503)["type"] == "ServiceUnavailableError"
        assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("refusal", [PromptTooLong(3, 16, 10), InvalidRequest("No.")])
def test_other_refusals_are_the_clients(client: TestClient, engine: FakeEngine, refusal: EngineRefusal) -> None:
    engine.refuse = lambda _request: refusal
    assert error_of(client.post("/v1/completions", json=BODY), 400)["message"] == str(refusal)


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_choice_takes_the_others_with_it(client: TestClient, engine: FakeEngine, stream: bool) -> None:
    engine.refuse = lambda request: QueueFull(9, 8, 1) if request.request_id.endswith("-2") else None
    error_of(client.post("/v1/completions", json={**BODY, "n": 4, "stream": stream}), 429)
    assert [name.rpartition("-")[2] for name in engine.aborted] == ["0", "1"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("abort", 503)])
def test_failing_before_any_output_is_a_status(
    client: TestClient, engine: FakeEngine, reason: str, status: int, stream: bool
) -> None:
    engine.script = lambda request: [[], [finish(request, reason, error="The adapter could not be copied.")]]
    error = error_of(client.post("/v1/completions", json={**BODY, "stream": stream}), status)
    assert (error["message"] == "The adapter could not be copied.") == (reason == "error")


def test_one_failing_choice_fails_the_answer(client: TestClient, engine: FakeEngine) -> None:
    def script(request: Request) -> list[Any]:
        return [[finish(request, "error", error="broken")]] if request.request_id.endswith("-1") else endless(request)

    engine.script = script
    assert error_of(client.post("/v1/completions", json={**BODY, "n": 3}), 500)["message"] == "broken"
    assert len(engine.aborted) == 2


@pytest.mark.parametrize("n", [1, 2])
def test_failing_after_output_is_a_last_frame(client: TestClient, engine: FakeEngine, n: int) -> None:
    def script(request: Request) -> list[Any]:
        if request.request_id.endswith("-0"):
            return [[token("ab")], [token("c")], [finish(request, "error", error="broken")]]
        return endless(request)

    engine.script = script
    response = client.post("/v1/completions", json={**BODY, "n": n, "stream": True})
    assert response.status_code == 200
    frames = [json.loads(frame.removeprefix("data: ")) for frame in response.text.split("\n\n")[:-1]]
    texts = [frame["choices"][0]["text"] for frame in frames[:-1] if frame["choices"][0]["index"] == 0]
    assert "".join(texts) == "abc"
    assert frames[-1] == {"error": {"message": "broken", "type": "InternalServerError", "param": None, "code": 500}}


def test_a_bug_is_answered_and_logged_without_its_stack(
    connect: Callable[..., TestClient],
    config: ApiConfig,
    engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def bug(_request: Request) -> None:
        raise ZeroDivisionError("secret detail")

    engine.refuse = bug
    client = connect(config, raise_bugs=False)
    response = client.post("/v1/completions", json=BODY)
    error_of(response, 500)
    assert "secret" not in response.text
    assert "secret detail" in caplog.text


def test_a_failing_template_gives_the_adapter_back(client: TestClient, serving: Serving) -> None:
    body = {"model": "org/bob", "messages": [{"role": "user", "content": "refuse me"}]}
    error_of(client.post("/v1/chat/completions", json=body), 400)
    assert serving.registry.info("org/bob").requests_in_flight == 0
