"""What a client may send without it coming to anything, over real sockets; the server's memory is not looked at."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from itertools import repeat

import pytest

from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.http_limits import MAX_HEAD
from manylora.server.http_server import bind, serve_until_signal

MIB = b"a" * (1 << 20)
START = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n"


def answers(serving: Serving, pieces: Iterator[bytes] | list[bytes]) -> bytes:
    """Send the pieces on one connection until the server closes it; all that it answered."""

    async def main() -> bytes:
        [sock] = bind("127.0.0.1", 0)
        server = asyncio.create_task(serve_until_signal(serving, ApiConfig(), [sock]))
        try:
            async with asyncio.timeout(20):
                reader, writer = await _connected(*sock.getsockname()[:2])
                reading = asyncio.create_task(reader.read())
                try:
                    for piece in pieces:
                        writer.write(piece)
                        await writer.drain()
                        if reading.done():
                            break
                except ConnectionError:
                    pass  # closed by the server; its answer is there all the same, or was lost with the connection
                try:
                    return await reading
                except ConnectionError:
                    return b""
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            await server

    return asyncio.run(main())


async def _connected(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    while True:
        try:
            return await asyncio.open_connection(host, port)
        except ConnectionRefusedError:  # it does not listen yet
            await asyncio.sleep(0.01)


ENDLESS = {
    "one header": (START + b"X-Long: ", MIB),
    "many headers": (START, b"X-Many: y\r\n" * 1000),
    "a path": (b"GET /", MIB),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"X-Many: y\r\n" * 1000),
    "one trailer": (CHUNKED + b"2\r\n{}\r\n0\r\nX-Long: ", MIB),
    "a chunk's extension": (CHUNKED + b"2;x=", MIB),
}


@pytest.mark.parametrize(("beginning", "more"), ENDLESS.values(), ids=list(ENDLESS))
def test_what_never_ends_is_cut_off(serving: Serving, beginning: bytes, more: bytes) -> None:
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        yield beginning
        for piece in repeat(more, (64 << 20) // len(more)):
            sent += len(piece)
            yield piece

    answer = answers(serving, pieces())
    assert sent < 32 << 20  # what the sockets between hold, not all 64 MiB
    if answer:  # a reset may have overtaken it
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 ") or b" 400 " in head.split(b"\r\n")[0]
        assert b"connection: close" in head.lower()
        if b" 431 " in head:
            error = json.loads(body)["error"]
            assert error["code"] == 431
            assert str(MAX_HEAD) in error["message"]


def test_bodies_and_several_requests_are_not_counted(serving: Serving) -> None:
    body = json.dumps({"model": "nobody", "prompt": "a" * (3 * MAX_HEAD)}).encode()
    request = START + b"Content-Length: %d\r\n\r\n" % len(body)
    chunks = [
        CHUNKED,
        *(b"%x\r\n%s\r\n" % (len(body[i : i + 999]), body[i : i + 999]) for i in range(0, len(body), 999)),
    ]
    small = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Pad: " + b"a" * 30_000 + b"\r\n\r\n"
    last = small.replace(b"\r\nX-Pad", b"\r\nConnection: close\r\nX-Pad")
    answer = answers(serving, [request, body, *chunks, b"0\r\n\r\n", *[small] * 20, last])
    assert answer.count(b"HTTP/1.1 404 ") == 2  # no adapter of that name: the bodies were read to their ends
    assert answer.count(b"HTTP/1.1 200 ") == 21
    assert b" 431 " not in answer
