"""``manylora serve``: load, then serve on sockets that were bound before anything was loaded.

Connections are accepted when everything is there, so ``/ready`` answers when there is something to be ready.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Sequence

from manylora.server.collector import set_aside
from manylora.server.config import ServeConfig
from manylora.server.http_server import new_loop, serve_until_signal
from manylora.server.serving import Running, build, load_adapters

_log = logging.getLogger(__name__)


def serve(config: ServeConfig, sockets: Sequence[socket.socket]) -> int:
    """Serve on bound ``sockets`` until a signal; the process's exit code: 1 if it took two signals, or if something
    leaked. Raises ModelError, AdapterError before."""
    running = build(config)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(_serve(running, config, sockets))


async def _serve(running: Running, config: ServeConfig, sockets: Sequence[socket.socket]) -> int:
    running.engine.start()
    try:
        # Still nobody is connected, so nothing else needs this loop meanwhile.
        load_adapters(running, config)
        set_aside()
        _say_what_to_try(running, config, sockets[0])
        code = await serve_until_signal(running.serving, config.api, sockets)
    finally:
        await running.close()
    if code:
        return code  # what was cut off by a second signal need not have given back what it held
    try:
        running.check_integrity()
    except RuntimeError as error:
        _log.error("integrity check failed: %s", error)
        return 1
    _log.info("integrity check passed: nothing that requests held is missing")
    return 0


def _say_what_to_try(running: Running, config: ServeConfig, sock: socket.socket) -> None:
    """The first request of somebody who has just started a server, ready to be pasted."""
    names = [running.serving.base_name, *(info.name for info in running.registry.list())]
    host, port = sock.getsockname()[:2]
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    body = json.dumps({"model": names[-1], "prompt": "The capital of Sweden is", "max_tokens": 32})
    key = " -H 'Authorization: Bearer KEY'" if config.api.api_keys or config.api.keys_file else ""
    _log.info("models: %s (a model's name is all that a request needs)", ", ".join(names))
    _log.info(
        "try:  curl -s http://%s:%d/v1/completions -H 'Content-Type: application/json'%s -d '%s'", host, port, key, body
    )
    if config.api.playground:
        _log.info("open: http://%s:%d/ in a browser", host, port)
    _log.info("see:  http://%s:%d/v1/models  /v1/adapters  /metrics  /openapi.json", host, port)
