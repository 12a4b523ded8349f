from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from manylora.server.api.app import create_app
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from tests.api.conformance import Checked
from tests.api.fakes import FakeEngine, make_serving

LOCAL = "http://127.0.0.1:8000"


@pytest.fixture(autouse=True)
def as_documented(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every application that a test asks, by whatever client, must do as its document says."""
    problems: list[str] = []
    call = FastAPI.__call__

    async def checked(self: FastAPI, scope: Scope, receive: Receive, send: Send) -> None:
        await Checked(partial(call, self), problems)(scope, receive, send)

    monkeypatch.setattr(FastAPI, "__call__", checked)
    yield problems
    assert problems == []


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    return make_serving(tmp_path)


@pytest.fixture
def engine(serving: Serving) -> FakeEngine:
    assert isinstance(serving.engine, FakeEngine)
    return serving.engine


@pytest.fixture
def config(tmp_path: Path) -> ApiConfig:
    return ApiConfig(
        adapter_roots=(tmp_path,), upload_dir=tmp_path / "uploads", max_body_bytes=64 * 1024, max_upload_bytes=32 * 1024
    )


@pytest.fixture
def connect(serving: Serving) -> Iterator[Callable[..., TestClient]]:
    """Makes clients of servers with a given configuration; at the end, no request and no reference may be left."""
    with ExitStack() as stack:

        def make(config: ApiConfig, base_url: str = LOCAL, *, raise_bugs: bool = True) -> TestClient:
            app = create_app(serving, config)
            return stack.enter_context(TestClient(app, base_url=base_url, raise_server_exceptions=raise_bugs))

        yield make
    assert isinstance(serving.engine, FakeEngine)
    assert serving.engine.n_live == 0
    assert serving.registry.counts().requests_in_flight == 0  # type: ignore[attr-defined]


@pytest.fixture
def client(connect: Callable[..., TestClient], config: ApiConfig) -> TestClient:
    return connect(config)
