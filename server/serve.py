"""``manylora serve``: bind, load, serve.

The port is bound before the base is loaded, so that a taken one is found at once; connections are accepted when
everything is loaded, so ``/ready`` answers when there is something to be ready.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from manylora.server.config import ServeConfig
from manylora.server.http_server import bind, new_loop, serve_until_signal
from manylora.server.serving import Running, build, load_adapters


def serve(config: ServeConfig) -> int:
    """Serve until a signal; the process's exit code. Raises ConfigError, ModelError, AdapterError before that."""
    sockets = bind(config.api.host, config.api.port)
    try:
        running = build(config)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(_serve(running, config, sockets))
    finally:
        for sock in sockets:
            sock.close()


async def _serve(running: Running, config: ServeConfig, sockets: Sequence[socket.socket]) -> int:
    running.engine.start()
    try:
        # Still nobody is connected, so nothing else needs this loop meanwhile.
        load_adapters(running, config)
        return await serve_until_signal(running.serving, config.api, sockets)
    finally:
        await running.close()
