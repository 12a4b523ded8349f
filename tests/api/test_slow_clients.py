"""Clients that hold a connection without it coming to anything, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from manylora.server import http_server
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.engine.request import Request
from manylora.server.http_limits import LimitedHttp
from tests.api.fakes import FakeEngine, Step, endless, finish, token
from tests.api.live_server import Address, served

SLOW = 0.2
"""The client's time-out in these tests; what is cut off is so after once to twice that."""
SOON = 4 * SLOW + 2.0
"""With time to spare on a busy machine."""

POST = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.fixture
def without_the_systems_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP_USER_TIMEOUT would end some connections as well."""
    monkeypatch.setattr(http_server, "_give_up_on_silent_peers", lambda _sock, _seconds: None)


def serving_of(
    serving: Serving, act: Callable[[Address], Coroutine[Any, Any, Any]], *, uv: bool = True, **options: Any
) -> Any:
    """What ``act`` returns, with an impatient server at its address."""
    return served(serving, act, ApiConfig(**{"client_timeout": SLOW, **options}), uv=uv, sndbuf=4096)


@asynccontextmanager
async def connected(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*address, limit=1 << 24)
    try:
        yield reader, writer
    finally:
        writer.close()


async def to_its_end(reader: asyncio.StreamReader) -> tuple[bytes, float]:
    """All that comes until the server closes, and the seconds that took."""
    start = time.monotonic()
    try:
        return await asyncio.wait_for(reader.read(), SOON), time.monotonic() - start
    except ConnectionError:
        return b"", time.monotonic() - start


async def until(condition: Callable[[], bool], seconds: float = SOON) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        await asyncio.sleep(0.01)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def body_of(fields: dict[str, Any]) -> bytes:
    body = json.dumps({"model": "alice", "prompt": "Hi", **fields}).encode()
    return POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


LONG = POST + b"Content-Length: 100000\r\n\r\n"

STUCK: dict[str, tuple[bytes, bytes]] = {
    "half a head": (b"GET /health HTTP/1.1\r\nHost: x\r\n", b""),
    "a head that drips": (b"GET /health HTTP/1.1\r\nX: ", b"x"),
    "headers that drip": (b"GET /health HTTP/1.1\r\n", b"X: y\r\n"),
    "half a method": (b"GE", b""),
    "a path that drips": (b"GET /", b"x"),
    "half a body": (LONG + b'{"model":', b""),
    "no body": (LONG, b""),
    "a body that drips": (LONG, b" "),
    "chunks that drip": (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "a chunk's size that drips": (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "trailers that drip": (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n", b"X: y\r\n"),
}


@pytest.mark.parametrize(
    ("what", "uv"), [*((what, True) for what in STUCK), ("half a head", False), ("a body that drips", False)]
)
def test_a_request_that_never_ends_is_answered_408(serving: Serving, what: str, uv: bool) -> None:
    beginning, drip = STUCK[what]

    async def act(address: Address) -> tuple[bytes, float]:
        async with connected(address) as (reader, writer):

            async def dripping() -> None:
                while True:
                    writer.write(drip)
                    await asyncio.sleep(SLOW / 5)

            writer.write(beginning)
            task = asyncio.create_task(dripping())
            try:
                return await to_its_end(reader)
            finally:
                task.cancel()

    answer, seconds = serving_of(serving, act, uv=uv)
    assert seconds >= SLOW * 0.9
    if answer or not drip:  # what still dripped in may have reset the connection before the answer was read
        head, _, body = answer.partition(b"\r\n\r\n")
        assert status_of(head) == 408
        assert b"connection: close" in head
        assert b"x-request-id: " in head
        error = json.loads(body)["error"]
        assert (error["code"], error["type"]) == (408, "RequestTimeoutError")
        assert "too slowly" in error["message"]


def test_a_connection_that_is_never_used_is_closed_without_a_word(serving: Serving) -> None:
    async def act(address: Address) -> tuple[bytes, float]:
        async with connected(address) as (reader, _):
            return await to_its_end(reader)

    assert serving_of(serving, act)[0] == b""


def test_empty_lines_do_not_keep_a_connection(serving: Serving) -> None:
    async def act(address: Address) -> bytes:
        async with connected(address) as (reader, writer):
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = await reader.readuntil(b'{"status":"ok"}')
            for _ in range(100):
                writer.write(b"\r\n")
                await asyncio.sleep(SLOW / 5)
                if reader.at_eof() or writer.transport.is_closing():
                    return answer
            raise AssertionError("it is still there")

    assert status_of(serving_of(serving, act)) == 200


@pytest.mark.parametrize("piece", [b"{", b" " * 10_000], ids=["slow", "fast"])
def test_a_body_after_its_answer_is_not_waited_for(serving: Serving, piece: bytes) -> None:
    """A refused request is answered before its body has come; the body must not come for ever."""

    async def act(address: Address) -> tuple[bytes, bytes]:
        async with connected(address) as (reader, writer):
            writer.write(LONG.replace(b"100000", b"100000000"))
            answer = await asyncio.wait_for(reader.readuntil(b"}}"), SOON)

            async def sending() -> None:
                while not writer.is_closing():
                    writer.write(piece)
                    await asyncio.sleep(SLOW / 5)

            task = asyncio.create_task(sending())
            rest, _ = await to_its_end(reader)
            task.cancel()
            return answer, rest

    answer, rest = serving_of(serving, act, api_keys=("k",))
    assert status_of(answer) == 401
    assert rest == b""  # a second answer would be one to the next request


@pytest.mark.usefixtures("without_the_systems_help")
def test_slow_but_steady_is_served(serving: Serving) -> None:
    """Bodies of more than 500 bytes a second, and several requests with pauses between them, and a long answer."""

    def script(request: Request) -> list[Step]:
        return [[token(f"{i} ")] for i in range(300)] + [[finish(request, n=300)]]

    engine = serving.engine
    assert isinstance(engine, FakeEngine)
    engine.script = script

    async def act(address: Address) -> list[int]:
        statuses = []
        async with connected(address) as (reader, writer):
            for stream in (False, True):
                request = body_of({"stream": stream, "user": "x" * 3000})
                for i in range(0, len(request), 200):
                    writer.write(request[i : i + 200])
                    await asyncio.sleep(SLOW / 4)
                end = b"data: [DONE]" if stream else b'"total_tokens"'
                statuses.append(status_of(await asyncio.wait_for(reader.readuntil(end), 20)))
                await reader.readuntil(b"\r\n0\r\n\r\n" if stream else b"}}")
                await asyncio.sleep(3 * SLOW)  # idle between two requests is not slow
        return statuses

    assert serving_of(serving, act) == [200, 200]


def flood(request: Request) -> list[Step]:
    """More than the sockets between hold."""
    return [[token("x" * 20_000)]] * 2000


@pytest.mark.usefixtures("without_the_systems_help")
@pytest.mark.parametrize(("uv", "pipelined"), [(True, False), (True, True), (False, False)])
def test_a_stream_that_nobody_reads_is_aborted(serving: Serving, engine: FakeEngine, uv: bool, pipelined: bool) -> None:
    _ignored(serving, engine, uv=uv, pipelined=pipelined)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="a system without TCP_USER_TIMEOUT")
def test_the_system_notices_a_peer_that_is_gone(
    serving: Serving, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LimitedHttp, "_look_around", lambda _self: None)
    _ignored(serving, engine, uv=True, pipelined=False)


def _ignored(serving: Serving, engine: FakeEngine, *, uv: bool, pipelined: bool) -> None:
    engine.script = flood

    async def act(address: Address) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(address)
        sock.sendall(body_of({"stream": True}))
        await until(lambda: engine.n_live == 1)
        if pipelined:  # uvicorn then forgets the one that it answers
            sock.sendall(body_of({"stream": True}))
        start = time.monotonic()
        await until(lambda: bool(engine.aborted), 20)
        assert time.monotonic() - start >= SLOW * 0.5
        await until(lambda: engine.n_live == 0)
        sock.close()

    serving_of(serving, act, uv=uv)
    assert len(engine.aborted) == 1
    assert serving.registry.info("alice").requests_in_flight == 0


def test_a_client_that_hangs_up_with_another_request_behind(serving: Serving, engine: FakeEngine) -> None:
    engine.script = endless

    async def act(address: Address) -> None:
        async with connected(address) as (_, writer):
            writer.write(body_of({"stream": True}) + body_of({"stream": True}))
            await until(lambda: engine.n_live == 1)
            await asyncio.sleep(0.05)
        await until(lambda: engine.n_live == 0)

    serving_of(serving, act, client_timeout=60.0)
    assert len(engine.requests) == len(engine.aborted) == 1


def _received(sock: socket.socket) -> int:
    """Bytes until the other side ends the connection."""
    n = 0
    with contextlib.suppress(ConnectionError):
        while chunk := sock.recv(1 << 16):
            n += len(chunk)
    return n


@pytest.mark.usefixtures("without_the_systems_help")  # whose timers are too coarse for this
def test_a_stream_that_is_read_slowly_is_not_aborted(serving: Serving, engine: FakeEngine) -> None:
    """There is always more to write than the client takes, and it takes some all the time."""
    engine.script = flood

    async def act(address: Address) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(address)
        sock.sendall(body_of({"stream": True}))
        sock.setblocking(False)
        n, start = 0, time.monotonic()
        while time.monotonic() - start < 8 * SLOW or n < 1_000_000:  # more than all that may lie in between
            taken = await asyncio.get_running_loop().sock_recv(sock, 16_000)
            assert taken
            n += len(taken)
            await asyncio.sleep(0.002)
        assert engine.n_live == 1
        sock.close()
        await until(lambda: engine.n_live == 0)

    serving_of(serving, act)


@pytest.mark.usefixtures("without_the_systems_help")
@pytest.mark.parametrize("size", [60_000, 1_000_000])
def test_an_answer_that_nobody_reads_does_not_keep_its_connection(
    serving: Serving, engine: FakeEngine, size: int
) -> None:
    """Complete, and closing, yet never read: the connection ends nevertheless. The small one is not even too much for
    the server's own buffer."""
    engine.script = lambda request: [[token("x" * size), finish(request, n=1)]]

    async def act(address: Address) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(address)
        sock.sendall(body_of({}).replace(b"Host: 127.0.0.1", b"Host: 127.0.0.1\r\nConnection: close"))
        await until(lambda: len(engine.requests) == 1)
        await asyncio.sleep(4 * SLOW)
        sock.settimeout(10)
        n = await asyncio.to_thread(_received, sock)
        sock.close()
        assert n < size

    serving_of(serving, act)


@pytest.mark.parametrize("sent", [b"\x16\x03\x01 what", b"GET /\xff HTTP/1.1", b"CONNECT x:1 HTTP/1.1\r\nHost: x"])
def test_what_is_not_http_is_an_error_in_the_one_shape(serving: Serving, sent: bytes) -> None:
    async def act(address: Address) -> bytes:
        async with connected(address) as (reader, writer):
            writer.write(sent + b"\r\n\r\n")
            return (await to_its_end(reader))[0]

    head, _, body = serving_of(serving, act).partition(b"\r\n\r\n")
    assert status_of(head) == 400
    assert json.loads(body)["error"]["type"] == "BadRequestError"


def test_half_a_request_behind_another_does_not_end_it(serving: Serving, engine: FakeEngine) -> None:
    """Whoever sends two at a time has all the time that the first takes, and the whole time-out after it."""
    engine.script = endless
    timeout = 1.0

    async def act(address: Address) -> bytes:
        async with connected(address) as (reader, writer):
            start = time.monotonic()  # the server looks at the connection once a time-out from here on
            writer.write(body_of({"stream": True}))
            await reader.readuntil(b"\n\n")
            writer.write(b"GET /health HTTP/1.1\r\nHost: ")
            await asyncio.sleep(start + 1.95 * timeout - time.monotonic())
            assert engine.n_live == 1
            engine.abort_everything()
            first = await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), SOON)
            await asyncio.sleep(start + 2.2 * timeout - time.monotonic())  # it has looked just after the first's end
            writer.write(b"x\r\n\r\n")
            return first + await asyncio.wait_for(reader.readuntil(b'"ok"}'), SOON)

    assert b" 408 " not in serving_of(serving, act, client_timeout=timeout)


def test_nonsense_behind_a_request_is_no_part_of_its_answer(serving: Serving, engine: FakeEngine) -> None:
    engine.script = endless

    async def act(address: Address) -> bytes:
        async with connected(address) as (reader, writer):
            writer.write(body_of({"stream": True}))
            begun = await reader.readuntil(b"\n\n")
            writer.write(b"nonsense\r\n\r\n")
            answer = begun + (await to_its_end(reader))[0]
            await until(lambda: engine.n_live == 0)
            return answer

    assert serving_of(serving, act, client_timeout=60.0).count(b"HTTP/1.1 ") == 1
