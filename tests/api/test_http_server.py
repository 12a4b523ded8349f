"""Real sockets and real signals: a drained end, an impatient one, and ports that are taken."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig, ConfigError
from manylora.server.http_server import bind, serve_until_signal
from tests.api.fakes import FakeEngine, endless

BODY = {"model": "alice", "prompt": "Hi"}


def serve(serving: Serving, act: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> tuple[int, Any]:
    """Serve, ``act`` as a client, and return the exit code and what ``act`` returned."""

    async def main() -> tuple[int, Any]:
        sockets = bind("127.0.0.1", 0)
        url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        server = asyncio.create_task(serve_until_signal(serving, ApiConfig(), sockets))
        async with asyncio.timeout(20), httpx.AsyncClient(base_url=url) as client:
            while (await _status(client)) != 200:  # noqa: ASYNC110 - the server is another task, without an event
                await asyncio.sleep(0.01)
            acted = await act(client)
            return await server, acted

    return asyncio.run(main())


async def _status(client: httpx.AsyncClient, path: str = "/ready") -> int:
    try:
        return (await client.get(path)).status_code
    except httpx.ConnectError:
        return 0


class DrainingEngine(FakeEngine):
    """Drains when its requests have ended, as the real engine does, without a time limit."""

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109
        self.is_draining = True
        while self.n_live:  # noqa: ASYNC110 - the fake has no event for it
            await asyncio.sleep(0.01)


@pytest.fixture
def draining(serving: Serving) -> DrainingEngine:
    engine = DrainingEngine(serving.registry)  # type: ignore[arg-type]
    object.__setattr__(serving, "engine", engine)
    return engine


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish(
    serving: Serving, draining: DrainingEngine, which: signal.Signals
) -> None:
    async def act(client: httpx.AsyncClient) -> Any:
        draining.script = endless
        running = asyncio.create_task(client.post("/v1/completions", json={**BODY, "stream": True}))
        while not draining.n_live:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), which)
        while not draining.is_draining:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        refused = await client.post("/v1/completions", json=BODY)
        statuses = [await _status(client, path) for path in ("/health", "/ready")]
        from tests.api.fakes import finish, token

        for request, stream in list(draining._live.values()):
            draining._deliver(request, stream, [token("bc"), finish(request, n=3)])
        return refused.status_code, refused.headers["retry-after"], statuses, (await running).text

    code, (refused, retry_after, statuses, text) = serve(serving, act)
    assert (code, refused, statuses) == (0, 503, [200, 503])
    assert int(retry_after) > 0
    assert text.endswith("data: [DONE]\n\n")


def test_a_second_signal_does_not_wait(serving: Serving, draining: DrainingEngine) -> None:
    async def act(client: httpx.AsyncClient) -> None:
        draining.script = endless
        running = asyncio.create_task(client.post("/v1/completions", json={**BODY, "stream": True}))
        while not draining.n_live:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
        running.cancel()

    code, _ = serve(serving, act)
    assert code == 1


def test_a_client_that_hangs_up_aborts_its_request(serving: Serving, engine: FakeEngine) -> None:
    async def act(client: httpx.AsyncClient) -> None:
        engine.script = endless
        for stream in (True, False):
            request = asyncio.create_task(client.post("/v1/completions", json={**BODY, "stream": stream}))
            while not engine.n_live:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            request.cancel()
            while engine.n_live:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    code, _ = serve(serving, act)
    assert code == 0
    assert len(engine.aborted) == 2
    assert serving.registry.info("alice").requests_in_flight == 0


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: cannot listen on 127.0.0.1 port {port}"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_ours(host: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        bind(host, 0)


def test_localhost() -> None:
    sockets = bind("localhost", 0)
    assert sockets[0].getsockname()[0] in ("127.0.0.1", "::1")
    for sock in sockets:
        sock.close()
