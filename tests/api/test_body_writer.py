"""Tokens that are written as they arrive: the same answers over real sockets as by ASGI alone, for clients that keep up
and for those that do not."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from manylora.server import body_writer
from manylora.server.api.state import Serving
from manylora.server.api.streaming import EventStreamResponse
from manylora.server.body_writer import BodyWriter
from manylora.server.config import ApiConfig
from manylora.server.engine.request import Request
from manylora.server.engine.stream import RequestStream
from tests.api.fakes import FakeEngine, Step, finish, token
from tests.api.live_server import Address, served

COMPLETION = {"model": "alice", "prompt": "Hi", "stream": True}
CHAT = {"model": "alice", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
USAGE = {"include_usage": True, "continuous_usage_stats": True}
TOOLS = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "model": "base"}

WORDS = ("Once", " upon", ' a "time"', "\n\n", "", " é😀", "\u2028", "\\", " data: [DONE]", " end", "x" * 5000)


@pytest.fixture
def n_written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what was written as it arrived."""
    sizes: list[int] = []
    real = BodyWriter.write

    def write(self: BodyWriter, data: bytes) -> None:
        sizes.append(len(data))
        real(self, data)

    monkeypatch.setattr(BodyWriter, "write", write)
    return sizes


def telling(*words: str) -> Callable[[Request], list[Step]]:
    def script(request: Request) -> list[Step]:
        told = [[token(word, logprobs=request.params.logprobs)] for word in words]
        return [*told, [finish(request, "length", n=len(words))]]

    return script


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine goes on when what it told was read: on a busy machine, too, no two tokens come as one."""
    real = FakeEngine._play

    def play(self: FakeEngine, request: Request, stream: RequestStream, steps: list[Step]) -> None:
        if request.request_id in self._live and (stream._waiter is None or stream._waiter.done()):
            asyncio.get_running_loop().call_later(0.001, self._play, request, stream, steps)
        else:
            real(self, request, stream, steps)

    monkeypatch.setattr(FakeEngine, "_play", play)


def same(text: str) -> str:
    """Without what differs from answer to answer."""
    return re.sub(r'"(id|created)": ?("[^"]*"|\d+)', "", text)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("uv", [True, False])
@pytest.mark.parametrize(
    "body",
    [
        COMPLETION,
        {**COMPLETION, "stream_options": {"include_usage": True}},
        {**COMPLETION, "stream_options": USAGE},
        {**COMPLETION, "logprobs": 2},
        {**COMPLETION, "echo": True},
        {**COMPLETION, "return_token_ids": True},
        {**COMPLETION, "n": 3, "stream_options": USAGE},
        CHAT,
        {**CHAT, "stream_options": {"include_usage": True}},
        {**CHAT, "stream_options": USAGE},
        {**CHAT, "logprobs": True, "top_logprobs": 1},
        {**CHAT, "n": 2},
        {**CHAT, **TOOLS},
    ],
    ids=str,
)
def test_the_answer_is_what_asgi_alone_gives(
    serving: Serving,
    engine: FakeEngine,
    connect: Callable[..., TestClient],
    n_written: list[int],
    body: dict[str, Any],
    uv: bool,
) -> None:
    engine.script = telling(*WORDS)
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    expected = connect(ApiConfig()).post(path, json=body)
    assert n_written == []
    assert expected.status_code == 200

    async def act(address: Address) -> httpx.Response:
        async with httpx.AsyncClient(base_url="http://{}:{}".format(*address)) as client:
            first = await client.post(path, json=body)
            again = await client.post(path, json=body)  # on the same connection
            assert same(again.text) == same(first.text)
            return first

    answer = served(serving, act, uv=uv)
    assert answer.status_code == 200
    if body.get("n", 1) == 1:
        assert same(answer.text) == same(expected.text)
        assert len(n_written) >= len(WORDS)  # of the two answers; the first text of each comes with the head
    else:  # those of several choices share the writes of a step, in an order of their own
        assert sorted(same(answer.text).split("\n\n")) == sorted(same(expected.text).split("\n\n"))
        assert n_written == []


@pytest.mark.parametrize("uv", [True, False])
def test_a_client_that_falls_behind_gets_all_of_it_in_fewer_pieces(
    serving: Serving, engine: FakeEngine, n_written: list[int], uv: bool
) -> None:
    """And what waits for it does not grow in the server's buffer with each token."""
    words = [f"{i:06}" + "x" * 8000 for i in range(400)]
    engine.script = telling(*words)

    async def act(address: Address) -> bytes:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(address)
        body = json.dumps(COMPLETION).encode()
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        while not engine.requests or engine.n_live:  # noqa: ASYNC110 - the fake has no event for it
            await asyncio.sleep(0.01)
        assert 0 < sum(n_written) < 1 << 18
        sock.setblocking(False)
        answer = b""
        while part := await asyncio.get_running_loop().sock_recv(sock, 1 << 16):
            answer += part
        sock.close()
        return answer

    head, _, rest = served(serving, act, uv=uv, sndbuf=4096).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    text = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        text, rest = text + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    frames = text.decode().split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    told = [json.loads(frame.removeprefix("data: "))["choices"][0]["text"] for frame in frames[:-2]]
    assert "".join(told) == "".join(words)
    assert len(told) < len(words)


def test_a_bug_in_one_stream_leaves_the_others_alone(
    serving: Serving, engine: FakeEngine, n_written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends its own answer, without the end that says that this is all."""
    engine.script = telling(*"abcd")
    real = EventStreamResponse._write_now

    def failing(self: EventStreamResponse, event: Any) -> bool:
        if event.text == "c" and len(n_written) < 10 and self._context.prompt_tokens == 5:
            raise ZeroDivisionError
        return real(self, event)

    monkeypatch.setattr(EventStreamResponse, "_write_now", failing)

    async def act(address: Address) -> tuple[Any, Any]:
        async with httpx.AsyncClient(base_url="http://{}:{}".format(*address)) as client:
            return tuple(
                await asyncio.gather(
                    client.post("/v1/completions", json={**COMPLETION, "prompt": "four"}),
                    client.post("/v1/completions", json=COMPLETION),
                    return_exceptions=True,
                )
            )

    broken, whole = served(serving, act)
    assert isinstance(broken, httpx.RemoteProtocolError)
    assert whole.text.endswith("data: [DONE]\n\n")
    assert engine.n_live == 0


def cycle(**other: Any) -> Any:
    flow = SimpleNamespace(write_paused=other.pop("write_paused", False))
    written: list[bytes] = []
    state = {"chunked_encoding": True, "disconnected": False, "response_complete": False, **other}
    transport = SimpleNamespace(write=written.append, written=written)
    return SimpleNamespace(flow=flow, transport=transport, scope={"extensions": {"other": {}}}, **state)


def test_it_writes_chunks() -> None:
    one = cycle()
    writer = BodyWriter(one)
    assert writer.is_free()
    writer.write(b"x" * 26)
    assert one.transport.written == [b"1a\r\n" + b"x" * 26 + b"\r\n"]


@pytest.mark.parametrize(
    "state",
    [
        {"chunked_encoding": None},  # before the head
        {"chunked_encoding": False},
        {"disconnected": True},
        {"response_complete": True},
        {"write_paused": True},
    ],
    ids=str,
)
def test_it_is_not_free(state: dict[str, Any]) -> None:
    assert not BodyWriter(cycle(**state)).is_free()


def test_it_is_found_in_the_scope_where_there_is_one() -> None:
    one = cycle()
    assert body_writer.writer_in(one.scope) is None
    body_writer.provide_writer(one)
    assert isinstance(body_writer.writer_in(one.scope), BodyWriter)
    assert set(one.scope["extensions"]) == {"other", "manylora.body"}
    assert body_writer.writer_in({}) is None
