"""Streams: the frames, their order, how many writes they take, and what a client that leaves does to its requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from manylora.server.api.app import create_app
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.engine.request import Request
from tests.api.fakes import FakeEngine, Step, endless, finish, token

PROMPT = {"model": "alice", "prompt": "Hi", "stream": True}
CHAT = {"model": "alice", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


def frames(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_completion_frames(client: TestClient, serving: Serving) -> None:
    got = frames(client, "/v1/completions", PROMPT)
    version = serving.registry.info("alice").version
    assert len({frame.pop("id") for frame in got}) == 1
    assert len({frame.pop("created") for frame in got}) == 1

    def chunk(text: str, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}
        return {
            "object": "text_completion",
            "model": "alice",
            "system_fingerprint": f"fp_ba5eba5e_{version[:12]}",
            "choices": [choice],
        }

    assert got == [chunk(" Hello", None), chunk(" world", None), chunk("", "stop")]


def test_chat_frames(client: TestClient) -> None:
    got = frames(client, "/v1/chat/completions", CHAT)
    assert {frame["object"] for frame in got} == {"chat.completion.chunk"}
    assert [frame["choices"][0].get("delta") for frame in got] == [
        {"role": "assistant", "content": ""},
        {"content": " Hello"},
        {"content": " world"},
        {},
    ]
    assert [frame["choices"][0]["finish_reason"] for frame in got] == [None, None, None, "stop"]
    assert all("usage" not in frame for frame in got)


def test_a_chat_that_says_nothing_still_has_a_role(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [[finish(request, "stop", n=1)]]
    got = frames(client, "/v1/chat/completions", CHAT)
    assert [frame["choices"][0]["delta"] for frame in got] == [{"role": "assistant", "content": ""}, {}]


def test_usage_comes_last_if_asked_for(client: TestClient) -> None:
    got = frames(client, "/v1/completions", {**PROMPT, "n": 2, "stream_options": {"include_usage": True}})
    assert got[-1]["choices"] == []
    assert got[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 24, "total_tokens": 27}
    assert all(frame["usage"] is None for frame in got[:-1])


def test_continuous_usage(client: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    got = frames(client, "/v1/chat/completions", {**CHAT, "stream_options": options})
    assert [frame["usage"]["completion_tokens"] for frame in got] == [6, 6, 12, 12, 12]


def test_continuous_usage_of_completions(client: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    got = frames(client, "/v1/completions", {**PROMPT, "stream_options": options})
    assert [frame["usage"]["completion_tokens"] for frame in got] == [6, 12, 12, 12]


def test_token_ids_come_with_every_chunk(client: TestClient) -> None:
    got = frames(client, "/v1/completions", {**PROMPT, "return_token_ids": True})
    assert [frame["choices"][0]["token_ids"] for frame in got] == [list(b" Hello"), list(b" world"), []]
    assert ["prompt_token_ids" in frame["choices"][0] for frame in got] == [True, False, False]


def test_choices_are_told_apart(client: TestClient, engine: FakeEngine) -> None:
    def script(request: Request) -> list[Step]:
        name = request.request_id.rpartition("-")[2]
        return [[token(name)] for _ in range(3)] + [[finish(request, "length", n=3)]]

    engine.script = script
    got = frames(client, "/v1/completions", {**PROMPT, "prompt": ["a", "b"], "n": 2})
    for index in range(4):
        mine = [frame["choices"][0] for frame in got if frame["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == str(index) * 3
        assert [choice["finish_reason"] for choice in mine].count("length") == 1


def test_echo_comes_with_the_first_text(client: TestClient, engine: FakeEngine) -> None:
    got = frames(client, "/v1/completions", {**PROMPT, "echo": True})
    assert got[0]["choices"][0]["text"] == "Hi Hello"
    engine.script = lambda request: [[finish(request)]]
    got = frames(client, "/v1/completions", {**PROMPT, "echo": True})
    assert [frame["choices"][0]["text"] for frame in got] == ["Hi"]


def test_text_that_is_held_back_makes_no_frame(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [[token("")], [token("ab")], [token("")], [finish(request, n=4)]]
    got = frames(client, "/v1/completions", PROMPT)
    assert [frame["choices"][0]["text"] for frame in got] == ["ab", ""]


def test_completion_logprobs_go_with_their_tokens(client: TestClient) -> None:
    got = frames(client, "/v1/completions", {**PROMPT, "logprobs": 1})
    pieces = [frame["choices"][0]["logprobs"] for frame in got[:-1]]
    assert [len(piece["tokens"]) for piece in pieces] == [6, 6]
    assert pieces[1]["text_offset"] == [6, 7, 8, 9, 10, 11]
    assert got[-1]["choices"][0]["logprobs"] is None


def test_chat_logprobs_go_with_their_tokens(client: TestClient) -> None:
    got = frames(client, "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 1})
    assert [len(frame["choices"][0]["logprobs"]["content"]) for frame in got[1:3]] == [6, 6]
    entry = got[1]["choices"][0]["logprobs"]["content"][1]
    assert entry["token"] == "H"
    assert entry["top_logprobs"] == [{"token": "H", "logprob": -0.5, "bytes": [72]}]


def test_quotes_and_newlines_survive(client: TestClient, engine: FakeEngine) -> None:
    text = 'a "b"\n\ndata: [DONE]\n\n\\ é 😀 \u2028'
    engine.script = lambda request: [[token(text), finish(request)]]
    got = frames(client, "/v1/completions", PROMPT)
    assert got[0]["choices"][0]["text"] == text


# --- below HTTP: writes and disconnects -------------------------------------------------------------------------------


class Connection:
    """One request straight into the application, which sees the client leave when ``leave`` is called."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self.send_fails = False
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self.task = asyncio.ensure_future(app(scope, self._messages.get, self._send))

    async def _send(self, message: Any) -> None:
        if self.send_fails:
            raise OSError("the client is gone")
        self.sent.append(message)

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent if message["type"] == "http.response.body"]


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - a condition on the fake, which has no event for each
            await asyncio.sleep(0.001)


def run(serving: Serving, config: ApiConfig, path: str, body: dict[str, Any], act: Callable[..., Any]) -> Connection:
    async def main() -> Connection:
        connection = Connection(create_app(serving, config), path, body)
        await act(connection)
        async with asyncio.timeout(5):
            await connection.task
        return connection

    return asyncio.run(main())


async def nothing(_connection: Connection) -> None:
    pass


def test_what_comes_together_goes_out_in_one_write(serving: Serving, config: ApiConfig, engine: FakeEngine) -> None:
    def script(request: Request) -> list[Step]:
        return [[token("ab")], [token("c")], [token("d"), finish(request, n=4)]]

    engine.script = script
    body = {**PROMPT, "n": 8, "stream_options": {"include_usage": True}}
    connection = run(serving, config, "/v1/completions", body, nothing)
    # One write for each step of all eight choices, the last with the usage and the end.
    assert len(connection.bodies) <= 4
    assert b"".join(connection.bodies).count(b"data: ") == 8 * 4 + 2
    assert [message.get("more_body") for message in connection.sent[1:]] == [True] * (len(connection.bodies) - 1) + [
        False
    ]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_aborts_its_requests(
    serving: Serving, config: ApiConfig, engine: FakeEngine, path: str, stream: bool, n: int
) -> None:
    engine.script = endless

    async def leave(connection: Connection) -> None:
        await _until(lambda: engine.n_live == n and (not stream or bool(connection.bodies)))
        connection.leave()
        await _until(lambda: engine.n_live == 0)

    run(serving, config, path, {**(PROMPT if "chat" not in path else CHAT), "n": n, "stream": stream}, leave)
    assert len(engine.aborted) == n
    assert serving.registry.info("alice").requests_in_flight == 0


@pytest.mark.parametrize("n", [1, 3])
def test_a_server_that_says_so_by_oserror(serving: Serving, config: ApiConfig, engine: FakeEngine, n: int) -> None:
    engine.script = endless

    async def break_send(connection: Connection) -> None:
        connection.send_fails = True

    run(serving, config, "/v1/completions", {**PROMPT, "n": n}, break_send)
    assert len(engine.aborted) == n


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_response_aborts_its_requests(
    serving: Serving, config: ApiConfig, engine: FakeEngine, stream: bool, n: int
) -> None:
    engine.script = endless

    async def cancel(connection: Connection) -> None:
        await _until(lambda: engine.n_live == n)
        connection.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connection.task
        connection.task = asyncio.ensure_future(asyncio.sleep(0))

    run(serving, config, "/v1/completions", {**PROMPT, "n": n, "stream": stream}, cancel)
    assert len(engine.aborted) == n


def test_leaving_while_the_body_is_sent_is_no_bug(serving: Serving, config: ApiConfig, engine: FakeEngine) -> None:
    async def main() -> None:
        connection = Connection(create_app(serving, config), "/v1/completions", PROMPT)
        connection._messages.get_nowait()
        connection._messages.put_nowait({"type": "http.request", "body": b'{"mod', "more_body": True})
        connection.leave()
        await connection.task

    asyncio.run(main())
    assert engine.requests == []


def test_an_aborted_stream_ends_with_an_error(serving: Serving, config: ApiConfig, engine: FakeEngine) -> None:
    """A drain that takes too long aborts from inside: the client must not take what it has for the whole answer."""
    engine.script = endless

    async def drain(connection: Connection) -> None:
        await _until(lambda: bool(connection.bodies))
        engine.abort_everything()

    connection = run(serving, config, "/v1/completions", PROMPT, drain)
    last = json.loads(connection.bodies[-1].removeprefix(b"data: "))
    assert last["error"]["code"] == 503
    assert connection.sent[-1]["more_body"] is False
