"""The HTTP server: uvicorn on sockets that were bound before, and an end in good order.

On SIGTERM or SIGINT the engine takes nothing new (503, and ``/ready`` says so) and finishes what runs within the grace;
then the server ends. A second signal aborts what still runs; a third is left to the system. On SIGHUP the key file is
read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Iterator, Sequence

import uvicorn

from manylora.server.api.app import create_app
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig, ConfigError
from manylora.server.http_limits import limited_http

_log = logging.getLogger(__name__)

_FLUSH_S = 5
"""Seconds that responses have to leave after the engine has drained."""

_KEEP_ALIVE_S = 75
"""Longer than the 60 s after which load balancers commonly drop an idle connection: they, not we, close it first."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which stop accepting connections at once: probes would then see a dead
    server while it drains, and clients a refused connection for what should be a 503."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address of ``host``, not listening yet. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError("--host", f"{host} has no address here: {error.strerror}") from error
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    if port == 0:
        addresses = addresses[:1]  # each would get another port
    sockets: list[socket.socket] = []
    try:
        for family, address in addresses:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL and sock is not sockets[0]:
                    sockets.pop().close()  # localhost's IPv6 address on a machine without IPv6
                    continue
                flag = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
                raise ConfigError(flag, f"cannot listen on {host} port {port}: {error.strerror}") from error
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _give_up_on_silent_peers(sock: socket.socket, seconds: float) -> None:
    """Connections of ``sock`` end when nothing that was sent to the peer is acknowledged for so long: it may have gone
    without a word. Where the system can."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * seconds))


def new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed."""
    factory = uvicorn.Config("", log_config=None).get_loop_factory()
    return asyncio.new_event_loop() if factory is None else factory()


async def serve_until_signal(serving: Serving, config: ApiConfig, sockets: Sequence[socket.socket]) -> int:
    """Accept connections on ``sockets`` until a signal, drain, and return the exit code: 1 if it took two."""
    app = create_app(serving, config)
    server = _Server(
        uvicorn.Config(
            app,
            http=limited_http(config.client_timeout),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_FLUSH_S,
        )
    )
    signals: list[signal.Signals] = []
    drains: list[asyncio.Task[None]] = []
    reloads: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()

    reloading = asyncio.Lock()  # two signals: what the second finds must not be overwritten by the first

    async def reload_keys() -> None:
        async with reloading:
            try:
                await app.state.manylora.keys.reload()
            except ConfigError as error:
                _log.error("SIGHUP: the keys stay as they are: %s", error)
            else:
                _log.info("SIGHUP: the tenants of %s are read again", config.keys_file)

    def on_hangup() -> None:
        task = loop.create_task(reload_keys())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    async def drain() -> None:
        await serving.engine.drain(config.shutdown_grace)
        server.should_exit = True

    def on_signal(received: signal.Signals) -> None:
        signals.append(received)
        if len(signals) == 1:
            _log.info("%s: finishing what runs, for at most %g s", received.name, config.shutdown_grace)
            drains.append(loop.create_task(drain()))
            return
        _log.warning("%s again: aborting what runs", received.name)
        server.should_exit = server.force_exit = True
        for one in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(one)

    for one in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(one, on_signal, one)
    if config.keys_file is not None:
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
    for sock in sockets:
        _give_up_on_silent_peers(sock, config.client_timeout)
    host, port = sockets[0].getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    _log.info("serving %s on http://%s:%d", serving.base_name, shown, port)
    try:
        await server.serve(sockets=list(sockets))
    finally:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(one)
        for task in [*drains, *reloads]:
            task.cancel()
    return 1 if len(signals) > 1 else 0
