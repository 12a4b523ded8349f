"""Requests that take too long, and a server that is told to read its keys again, over real sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from manylora.server.api.access import deadlines
from manylora.server.api.context import ContextMiddleware
from manylora.server.api.state import Serving
from tests.api.fakes import FakeEngine, endless
from tests.api.test_slow_clients import SOON, Address, body_of, connected, serving_of, status_of, until
from tests.api.test_tenants import with_keys


async def _exchange(address: Address, request: bytes, *, read: Callable[[bytes], bool]) -> bytes:
    """What comes until ``read`` is satisfied, or the server closes."""
    answer = b""
    async with connected(address) as (reader, writer):
        writer.write(request)
        while not read(answer):
            piece = await asyncio.wait_for(reader.read(1 << 16), SOON + 6)
            if not piece:
                break
            answer += piece
    return answer


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}], ids=str)
def test_a_request_is_aborted_when_its_time_is_up(serving: Serving, engine: FakeEngine, fields: dict[str, Any]) -> None:
    engine.script = endless

    def act(address: Address) -> Coroutine[Any, Any, bytes]:
        return _exchange(address, body_of(fields), read=lambda answer: b"504}}" in answer.replace(b" ", b""))

    start = time.monotonic()
    answer = serving_of(serving, act, request_timeout=0.4)
    assert time.monotonic() - start >= 0.4
    # A stream that has begun says so in its last event; another answer by its status.
    assert status_of(answer) == (200 if fields.get("stream") else 504)
    assert b"TimeoutError" in answer
    assert b"[DONE]" not in answer
    assert engine.n_live == 0
    assert len(engine.aborted) == fields.get("n", 1)
    assert serving.registry.info("alice").requests_in_flight == 0


def test_a_stream_that_has_not_begun_is_a_504(serving: Serving, engine: FakeEngine) -> None:
    engine.script = lambda _request: []
    answer = serving_of(
        serving,
        lambda address: _exchange(address, body_of({"stream": True}), read=lambda answer: b"}}" in answer),
        request_timeout=0.3,
    )
    assert status_of(answer) == 504


def test_what_comes_before_the_engine_is_limited_too(
    serving: Serving, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "_SPARE_S", 0.2)

    async def stuck(*_args: Any) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr("manylora.server.api.completions.lease_of", stuck)
    answer = serving_of(
        serving,
        lambda address: _exchange(address, body_of({}), read=lambda answer: b"}}" in answer),
        request_timeout=0.3,
    )
    assert status_of(answer) == 504
    assert engine.requests == []


def test_an_answer_that_has_begun_gets_no_second_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "_SPARE_S", 0.05)
    sent: list[str] = []

    async def send(message: Message) -> None:
        sent.append(message["type"])

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(3600)

    async def never() -> Message:
        raise AssertionError("nobody asks for the body")

    async def main() -> None:
        scope: Scope = {"type": "http", "headers": []}

        async def within(scope: Scope, receive: Receive, send: Send) -> None:
            await deadlines.within_deadline(app, 0.05, scope, receive, send)

        await ContextMiddleware(within, lambda _scope, _context: None)(scope, never, send)

    asyncio.run(main())
    assert sent == ["http.response.start"]


def test_no_limit_on_time(serving: Serving, engine: FakeEngine) -> None:
    answer = serving_of(
        serving,
        lambda address: _exchange(address, body_of({}), read=lambda answer: b"total_tokens" in answer),
        request_timeout=None,
    )
    assert status_of(answer) == 200


def test_sighup_reads_the_keys_again(serving: Serving, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "keys.toml"
    path.write_text(with_keys("[tenants.a]"))

    async def act(address: Address) -> list[int]:
        async def status(key: str) -> int:
            request = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n" % key.encode()
            return status_of(await _exchange(address, request, read=lambda answer: b"\r\n\r\n" in answer))

        async def reload(text: str, says: str) -> None:
            path.write_text(text)
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: says in caplog.text)

        statuses = [await status("a-key"), await status("b-key")]
        await reload(with_keys("[tenants.b]"), "are read again")
        statuses += [await status("a-key"), await status("b-key")]
        await reload("[tenants.a", "the keys stay as they are")
        statuses += [await status("a-key"), await status("b-key")]
        return statuses

    assert serving_of(serving, act, keys_file=path, client_timeout=60.0) == [200, 401, 401, 200, 401, 200]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
