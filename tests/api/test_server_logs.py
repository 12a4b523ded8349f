"""Real sockets: what uvicorn has to say goes the way of everything else, with the request's id."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import signal
from collections.abc import Iterator

import httpx
import pytest

from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.http_server import bind, serve_until_signal
from manylora.server.logs import set_up_logging
from tests.api.fakes import FakeEngine

BODY = {"model": "alice", "prompt": "Hi"}


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    level, handlers, uvicorn_level = root.level, root.handlers[:], logging.getLogger("uvicorn").level
    root.handlers = []
    stream = io.StringIO()
    set_up_logging("info", "json", stream)
    yield stream
    root.handlers = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    logging.getLogger("uvicorn").setLevel(uvicorn_level)


def test_every_line_is_json_and_a_bugs_traceback_has_its_requests_id(
    serving: Serving, engine: FakeEngine, stream: io.StringIO
) -> None:
    def bug(_request: object) -> None:
        raise ZeroDivisionError("a bug")

    async def main() -> None:
        sockets = bind("127.0.0.1", 0)
        port = sockets[0].getsockname()[1]
        server = asyncio.create_task(serve_until_signal(serving, ApiConfig(), sockets))
        async with asyncio.timeout(20), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            while "serving base" not in stream.getvalue():  # noqa: ASYNC110 - the server is another task
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            ok = await client.post("/v1/completions", json=BODY, headers={"x-request-id": "good"})
            engine.refuse = bug  # type: ignore[assignment]
            bad = await client.post("/v1/completions", json=BODY, headers={"x-request-id": "bad"})
            assert (ok.headers["x-request-id"], bad.headers["x-request-id"]) == ("good", "bad")
            assert (ok.status_code, bad.status_code) == (200, 500)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"\x00garbage\r\n\r\n")
            assert b"400" in await reader.read()
            writer.close()
            os.kill(os.getpid(), signal.SIGTERM)
            await server

    asyncio.run(main())
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    access = {line["request_id"]: line["status"] for line in lines if line["logger"] == "manylora.access"}
    assert access == {"good": 200, "bad": 500}
    [traceback] = [line for line in lines if "exception" in line]
    assert (traceback["logger"], traceback["request_id"]) == ("uvicorn.error", "bad")
    assert "ZeroDivisionError: a bug" in traceback["exception"]
    assert any(line["message"] == "Invalid HTTP request received." for line in lines)
