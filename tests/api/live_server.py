"""The real HTTP server over a fake engine, for tests of what happens on sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.http_server import bind, new_loop, serve_until_signal

Address = tuple[str, int]


def served(
    serving: Serving,
    act: Callable[[Address], Awaitable[Any]],
    config: ApiConfig | None = None,
    *,
    uv: bool = True,
    sndbuf: int = 0,
) -> Any:
    """What ``act`` returns, with a server at its address. ``sndbuf``: bytes that may lie in the system, where neither
    side sees them; 0 for what it has by itself."""

    async def main() -> Any:
        [sock] = bind("127.0.0.1", 0)
        if sndbuf:  # connections inherit it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
        server = asyncio.create_task(serve_until_signal(serving, config or ApiConfig(), [sock]))
        address: Address = sock.getsockname()[:2]
        try:
            async with asyncio.timeout(60):
                while not _answers(address):  # noqa: ASYNC110 - the server has no event for it
                    await asyncio.sleep(0.01)
                return await act(address)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            await server

    with asyncio.Runner(loop_factory=new_loop if uv else asyncio.new_event_loop) as runner:
        return runner.run(main())


def _answers(address: Address) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return False
    return True
