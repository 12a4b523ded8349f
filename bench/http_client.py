"""A client that costs next to nothing: raw sockets, no parsing but for counting. On a machine whose cores the server
needs itself, a comfortable client would be what is measured."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until_ready(port: int, server: subprocess.Popen[Any], timeout: float) -> None:
    """Until /ready answers 200; RuntimeError if the server ends or takes more than ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {timeout:.0f} s")


async def _stream(port: int, body: dict[str, Any]) -> int:
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    await writer.drain()
    answer = await reader.read()
    writer.close()
    status = answer.split(b"\r\n", 1)[0]
    if b" 200 " not in status or b"data: [DONE]" not in answer:
        raise RuntimeError(f"{status!r}: {answer[-400:]!r}")
    usage = answer[answer.rindex(b'"completion_tokens"') :]
    return int(usage.split(b":", 1)[1].split(b",")[0].split(b"}")[0])


async def stream_all(port: int, bodies: Sequence[dict[str, Any]]) -> list[int]:
    """Send all completions at once, read each stream to its end; completion tokens of each, as its usage says."""
    return await asyncio.gather(*(_stream(port, body) for body in bodies))
