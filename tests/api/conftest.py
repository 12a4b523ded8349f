from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from manylora.server.api.app import create_app
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from tests.api.fakes import FakeEngine, make_serving

LOCAL = "http://127.0.0.1:8000"


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
